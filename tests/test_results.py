"""A table of rows is whole at every moment, and takes no rows of another kind."""

import csv
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from beitzoo.results import ENVIRONMENT, append_row, check_columns, drop_rows, environment, read_rows

STAMP = dict.fromkeys(ENVIRONMENT, "x")


def test_a_row_is_on_disk_with_the_header_of_the_first(tmp_path: Path) -> None:
    table = tmp_path / "new" / "rows.csv"
    append_row(table, {"a": 1, "b": None})
    append_row(table, {"a": 2, "b": "x,y"})
    assert table.read_text() == 'a,b\n1,\n2,"x,y"\n'
    with pytest.raises(ValueError, match=r"lacks the columns \['model'.* has \['b'\] of its own"):
        append_row(table, {"a": 3})
    assert [path.name for path in table.parent.iterdir()] == ["rows.csv"]


def test_rows_as_json_leave_out_what_is_empty(tmp_path: Path) -> None:
    table = tmp_path / "rows.json"
    append_row(table, {**STAMP, "model": "a", "rate": 1.5, "error": None}, "json")
    append_row(table, {**STAMP, "model": "b", "rate": None, "error": "no"}, "json")
    rows = json.loads(table.read_text())
    assert rows == read_rows(table, "json")
    assert [(row["model"], row.get("rate"), row.get("error")) for row in rows] == [("a", 1.5, None), ("b", None, "no")]


@pytest.mark.parametrize("text", ["a,b\n1,2", "a,b\n1\n", "a,b\n1,2\n", "a,b\n1,2,3\n", "not a table\n"])
def test_a_foreign_or_cut_table_is_refused_and_left_alone(text: str, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=r"does not end with a line|longer or shorter|no table of such rows"):
        check_columns(table, ["model", *ENVIRONMENT])
    assert table.read_text() == text


@pytest.mark.parametrize("text", ["model,a\n", "{}", '[{"model": "a", "other": 1}]'])
def test_a_foreign_json_is_refused(text: str, tmp_path: Path) -> None:
    table = tmp_path / "rows.json"
    table.write_text(text)
    with pytest.raises(ValueError, match=r"is not JSON|is not a JSON list|no table of such rows"):
        check_columns(table, ["model", *ENVIRONMENT], "json")
    assert table.read_text() == text


def test_a_table_of_an_earlier_version_is_given_the_new_columns(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    append_row(table, {"model": "old", **STAMP})
    check_columns(table, ["model", "rate", *ENVIRONMENT, "error"])
    append_row(table, {"model": "new", "rate": 2, **STAMP, "error": None})
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["model"], row["rate"], row["date"]) for row in rows] == [("old", "", "x"), ("new", "2", "x")]
    with pytest.raises(ValueError, match="no table of such rows"):
        check_columns(table, ["model", *ENVIRONMENT])


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=re.escape(f"Cannot write {tmp_path} (Is a directory); give another file")):
        check_columns(tmp_path, ["a"])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=re.escape(f"Cannot write {tmp_path / 'file' / 'rows.csv'} (")):
        check_columns(tmp_path / "file" / "rows.csv", ["a"])


def test_runs_that_append_at_once_lose_no_row(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    append_row(table, {"a": -1})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: append_row(table, {"a": number}), range(40)))
    assert sorted(int(str(row["a"])) for row in read_rows(table)) == list(range(-1, 40))


@pytest.mark.parametrize("form", ["csv", "json"])
def test_rows_can_be_taken_out(form: str, tmp_path: Path) -> None:
    table = tmp_path / "rows"
    for number in range(3):
        append_row(table, {**STAMP, "model": f"m{number}"}, form)  # type: ignore[arg-type]
    assert drop_rows(table, lambda row: row["model"] == "m1", form) == 1  # type: ignore[arg-type]
    assert [row["model"] for row in read_rows(table, form)] == ["m0", "m2"]  # type: ignore[arg-type]
    check_columns(table, [*STAMP, "model"], form)  # type: ignore[arg-type]


def test_environment_says_what_a_reader_needs() -> None:
    stamp = environment(torch.device("cpu"))
    assert tuple(stamp) == ENVIRONMENT
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(stamp["date"]))
    assert re.fullmatch(r"([0-9a-f]{7,}(\+[0-9a-f]{7})?)?", str(stamp["commit"]))
    assert all(isinstance(value, str | int) for value in stamp.values())


def test_rows_without_a_commit_stay_of_one_table(tmp_path: Path) -> None:
    columns = ("model", *ENVIRONMENT)
    row = dict.fromkeys(columns, "x") | {"commit": ""}
    for form in ("csv", "json"):
        path = tmp_path / f"rows.{form}"
        append_row(path, row, form)
        append_row(path, row, form)
        assert len(read_rows(path, form)) == 2
