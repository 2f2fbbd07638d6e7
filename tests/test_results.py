"""A table of rows can be read at every moment, takes no rows of another kind, and says what machine they are of."""

import csv
import errno
import fcntl
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from beitzoo.errors import FileAccessError, InvalidValueError
from beitzoo.results import ENVIRONMENT, Format, Table, _warn_of_no_lock, describe_cpu, environment, read_rows

STAMP = dict.fromkeys(ENVIRONMENT, "x")
COLUMNS = ("model", "rate", *ENVIRONMENT, "error")


def table(path: Path, form: Format = "csv", columns: tuple[str, ...] = COLUMNS) -> Table:
    return Table(path, columns, ("model", "device"), form)


def row(model: str, **values: Any) -> dict[str, Any]:
    return {**STAMP, "model": model, **values}


def test_a_row_is_on_disk_with_the_header_of_the_first(tmp_path: Path) -> None:
    rows = Table(tmp_path / "new" / "rows.csv", ("a", "b"))
    assert rows.append({"a": 1}) == {"a": 1, "b": None}
    rows.append({"b": "x,y", "a": 2})
    assert (tmp_path / "new" / "rows.csv").read_text() == 'a,b\n1,\n2,"x,y"\n'
    with pytest.raises(InvalidValueError, match=r"lacks the columns \['device'.* has \['b'\]\."):
        Table(tmp_path / "new" / "rows.csv", ("a",)).append({"a": 3})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.csv"]


def test_file_names_that_are_not_utf8_come_back(tmp_path: Path) -> None:
    table(tmp_path / "rows.csv").append(row("caf\udce9"))
    assert table(tmp_path / "rows.csv").rows()[0]["model"] == "caf\udce9"


@pytest.mark.parametrize("form", ["csv", "json"])
def test_rows_are_found_by_their_key_and_failures_taken_out(form: Format, tmp_path: Path) -> None:
    rows = table(tmp_path / "rows", form)
    assert (rows.find(row("a")), rows.drop_failed([row("a")])) == (None, None)
    for model, values in (("a", {"rate": 1.5}), ("b", {"error": "no"}), ("c", {"error": "no"})):
        rows.append(row(model, **values))
    found = rows.find(row("a", date="another", rate=7))
    assert found is not None and float(found["rate"] or 0) == 1.5
    assert rows.find(row("a", device="another")) is None
    rows.drop_failed([row("a"), row("b")])
    assert [one["model"] for one in rows.rows()] == ["a", "c"]
    rows.check()
    if form == "json":
        assert [set(one) - set(STAMP) for one in json.loads((tmp_path / "rows").read_text())] == [
            {"model", "rate"},
            {"model", "error"},
        ]


@pytest.mark.parametrize("text", ["a,b\n1,2", "a,b\n1\n", "a,b\n1,2\n", "a,b\n1,2,3\n", "not a table\n", 'a\n"b"c\n'])
def test_a_foreign_or_cut_table_is_refused_and_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(
        InvalidValueError, match=r"does not end with a line|longer or shorter|no table of such rows|not a CSV"
    ):
        table(path).check()
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["model,a\n", "{}", '[{"model": "a", "other": 1}]'])
def test_a_foreign_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(InvalidValueError, match=r"is not JSON|is not a JSON list|no table of such rows"):
        table(path, "json").check()
    assert path.read_text() == text


def test_a_table_of_an_earlier_version_is_given_the_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    table(path, columns=("model", *ENVIRONMENT)).append(row("old"))
    table(path).check()
    table(path).append(row("new", rate=2))
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(one["model"], one["rate"], one["date"]) for one in rows] == [("old", "", "x"), ("new", "2", "x")]
    with pytest.raises(InvalidValueError, match="no table of such rows"):
        table(path, columns=("model", *ENVIRONMENT)).check()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in {
        tmp_path: "Is a directory",
        tmp_path / "file" / "rows.csv": "",
        Path("/proc/rows.csv"): "No such file or directory",
    }.items():
        with pytest.raises(FileAccessError, match=re.escape(f"Cannot write {path} ({reason}")):
            table(path).check()
    with pytest.raises(FileAccessError, match="Cannot read"):
        read_rows(tmp_path)


def test_runs_that_append_at_once_lose_no_row(tmp_path: Path) -> None:
    rows = table(tmp_path / "rows.csv")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: rows.append(row(str(number))), range(40)))
    assert sorted(int(str(one["model"])) for one in rows.rows()) == list(range(40))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_without_locks_ends_no_run(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    _warn_of_no_lock.cache_clear()
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            table(tmp_path / "rows.csv").append(row(str(number)))
    assert len(table(tmp_path / "rows.csv").rows()) == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} cannot be locked (no locks here): let no other run write results there meanwhile."
    ]


def test_environment_says_what_a_reader_needs() -> None:
    stamp = environment(torch.device("cpu"))
    assert tuple(stamp) == ENVIRONMENT
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(stamp["date"]))
    assert re.fullmatch(r"([0-9a-f]{7,}(\+[0-9a-f]{7})?)?", str(stamp["commit"]))
    assert all(isinstance(value, str | int) for value in stamp.values())
    assert re.search(r", \d+ cores?(, |$)", str(stamp["device"]))


def test_processors_of_one_name_are_told_apart() -> None:
    def cpuinfo(flags: str) -> str:
        core = f"model name\t: AMD EPYC\nflags\t\t: fpu sse2 {flags}\n\n"
        return f"processor\t: 0\n{core}processor\t: 1\n{core}"

    assert describe_cpu(cpuinfo("avx avx2 fma"), 2) == "AMD EPYC, 2 cores, AVX2"
    newer = "avx avx2 avx512f avx512_vnni avx512_bf16"
    assert describe_cpu(cpuinfo(newer), 1) == "AMD EPYC, 1 core, AVX-512 VNNI bfloat16"
    assert describe_cpu(cpuinfo(f"{newer} amx_tile avx_vnni"), 8).endswith("8 cores, AVX-512 VNNI AMX bfloat16")
    arm = describe_cpu("processor : 0\nFeatures : fp asimd asimddp sve i8mm bf16\n", 4)
    assert arm.endswith(", 4 cores, SVE dot products I8MM bfloat16")
    assert re.fullmatch(r"[^,]+, 3 cores", describe_cpu("", 3))
