"""Rows as text: a table for people, JSON and CSV for programs, each row written when it is there."""

import csv
import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from beitzoo.errors import FileAccessError, InvalidValueError
from beitzoo.inference.classify import Answer, Prediction
from beitzoo.inference.rows import Form, choose_form, open_output, write_rows

CAT = Prediction(Path("a.png"), (Answer(1, "cat, tabby", 0.875), Answer(0, "dog", 0.125)), None, "m")
BROKEN = Prediction(Path('odd, "name"\n.png'), error="damaged", model="m")
# Looks like markup, moves a terminal's cursor, is twice as wide as long, and is no text at all.
STRANGE = [
    Prediction(Path(name), CAT.answers, None, "m")
    for name in ("[red]x.png", "\x1b[31mx.png", "日本語.png", "lat\udce9.png")
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(predictions: list[Prediction], form: Form, topk: int = 2, file: io.StringIO | None = None) -> str:
    file = file or io.StringIO()
    write_rows(predictions, form, file, topk)
    return file.getvalue()


def test_json_is_an_array_with_a_row_on_each_line() -> None:
    text = written([CAT, BROKEN], Form.JSON)
    assert json.loads(text) == [
        {
            "path": "a.png",
            "answers": [
                {"index": 1, "label": "cat, tabby", "probability": 0.875},
                {"index": 0, "label": "dog", "probability": 0.125},
            ],
            "error": None,
            "model": "m",
        },
        {"path": 'odd, "name"\n.png', "answers": [], "error": "damaged", "model": "m"},
    ]
    assert len(text.splitlines()) == 4
    assert written([], Form.JSON) == "[]\n"


def test_csv_has_a_line_per_row_and_columns_for_each_class() -> None:
    rows = list(csv.reader(io.StringIO(written([CAT, BROKEN], Form.CSV, topk=3), newline="")))
    assert rows[0][:6] == ["path", "model", "error", "label_1", "index_1", "probability_1"]
    assert rows[1] == ["a.png", "m", "", "cat, tabby", "1", "0.875", "dog", "0", "0.125", "", "", ""]
    assert written([], Form.CSV, topk=1) == "path,model,error,label_1,index_1,probability_1\n"
    assert rows[2] == ['odd, "name"\n.png', "m", "damaged", *[""] * 9]


def test_a_carriage_return_in_a_name_ends_no_row() -> None:
    names = ["a\r.png", "\r\n", "b\r\nc.png"]
    text = written([Prediction(Path(name), error="damaged\r") for name in names], Form.CSV, topk=1)
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows[1:] == [[name, "", "damaged\r", "", "", ""] for name in names]
    assert text.splitlines(keepends=True)[0].endswith("probability_1\n")


def test_table_is_aligned_and_shows_names_as_they_are() -> None:
    assert written([CAT, BROKEN, *STRANGE], Form.TABLE).splitlines() == [
        "image              label       probability  next",
        "a.png              cat, tabby        87.5%  dog 12.5%",
        'odd, "name"\\n.png  damaged',
        "[red]x.png         cat, tabby        87.5%  dog 12.5%",
        "\\x1b[31mx.png      cat, tabby        87.5%  dog 12.5%",
        "日本語.png         cat, tabby        87.5%  dog 12.5%",
        "lat\\udce9.png      cat, tabby        87.5%  dog 12.5%",
    ]
    two = [Prediction(CAT.path, CAT.answers[:1], None, model) for model in ("first", "second")]
    assert written(two, Form.TABLE).splitlines() == [
        "image  model   label       probability",
        "a.png  first   cat, tabby        87.5%",
        "a.png  second  cat, tabby        87.5%",
    ]
    assert written([], Form.TABLE) == ""


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[31mdamaged" in written([BROKEN], Form.TABLE, file=Terminal())
    assert "\x1b" not in written([BROKEN], Form.TABLE)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in written([BROKEN], Form.TABLE, file=Terminal())


@pytest.mark.parametrize("form", Form)
def test_rows_are_there_before_the_next_is_asked_for(form: Form, tmp_path: Path) -> None:
    file = (tmp_path / "rows").open("w")

    def predictions() -> Iterator[Prediction]:
        for before in range(30):
            yield CAT
            # A table looks at its first 16 rows before it writes.
            assert (tmp_path / "rows").read_text().count("a.png") == (
                before + 1 if before >= 15 or form != "table" else 0
            )

    write_rows(predictions(), form, file, 2)
    file.close()
    assert (tmp_path / "rows").read_text().count("a.png") == 30


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("form", Form)
def test_an_interrupted_run_keeps_its_rows(
    form: Form, error: type[BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def predictions() -> Iterator[Prediction]:
        yield from [CAT] * 9
        raise error

    with pytest.raises(error), open_output(tmp_path / "sub" / "rows") as file:
        write_rows(predictions(), form, file, 2)
    assert not (tmp_path / "sub" / "rows").exists()
    text = (tmp_path / "sub" / "rows.partial").read_text()
    assert text.count("a.png") == 9
    assert form is not Form.JSON or len(json.loads(text)) == 9
    assert "The rows so far are in " in capsys.readouterr().err
    with (
        pytest.raises(FileAccessError, match="interrupted or is still going on"),
        open_output(tmp_path / "sub" / "rows"),
    ):
        pass


@pytest.mark.parametrize("form", Form)
def test_a_run_that_fails_before_its_first_row_leaves_nothing(
    form: Form, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def predictions() -> Iterator[Prediction]:
        raise ValueError("no head")
        yield

    with pytest.raises(ValueError, match="no head"), open_output(tmp_path / "rows") as file:
        write_rows(predictions(), form, file, 2)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_a_file_is_replaced_once_all_rows_are_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("old")
    with open_output(path) as file:
        write_rows(STRANGE, Form.CSV, file, 2)
        assert path.read_text() == "old"
    assert path.read_bytes().splitlines()[4].startswith(b"lat\xe9.png")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileAccessError, match="is a folder"), open_output(tmp_path):
        pass


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    target, link, dangling = tmp_path / "sub" / "rows", tmp_path / "link", tmp_path / "dangling"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to("sub/rows")
    dangling.symlink_to("new/rows")
    for path in (link, dangling):
        with open_output(path) as file:
            file.write("rows")
        assert path.is_symlink()
        assert path.read_text() == "rows"
    assert target.read_text() == "rows"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["dangling", "link", "new", "rows", "rows", "sub"]


def test_a_pipe_and_a_device_stay_what_they_are(tmp_path: Path) -> None:
    pipe, null = tmp_path / "pipe", tmp_path / "null"
    os.mkfifo(pipe)
    null.symlink_to(os.devnull)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, null):
        with open_output(path) as file:
            write_rows([CAT], Form.CSV, file, 2)
    assert os.read(reader, 4096).endswith(b'a.png,m,,"cat, tabby",1,0.875,dog,0,0.125\n')
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert sorted(tmp_path.iterdir()) == [null, pipe]


def test_the_form_is_what_the_file_is_called_unless_it_is_said(tmp_path: Path) -> None:
    names = {"a.json": Form.JSON, "a.CSV": Form.CSV, "a.txt": Form.TABLE, "a": Form.TABLE, os.devnull: Form.TABLE}
    assert {name: choose_form(None, Path(name)) for name in names} == names
    assert choose_form(Form.CSV, Path("a.json")) == Form.CSV
    assert choose_form(None, None) == Form.TABLE
    with pytest.raises(InvalidValueError, match=r"what a .jsonl file holds is not known here. Name it .json, .csv"):
        choose_form(None, tmp_path / "a.jsonl")


def test_a_full_disk_is_an_error_of_the_user_and_a_closed_pipe_is_not() -> None:
    class Full(io.StringIO):
        error: type[OSError] = OSError

        def write(self, text: str) -> int:
            raise self.error(28, "No space left on device")

    with pytest.raises(FileAccessError, match="cannot be written: No space left on device"):
        write_rows([CAT], Form.CSV, Full(), 2)
    Full.error = BrokenPipeError
    with pytest.raises(BrokenPipeError):
        write_rows([CAT], Form.CSV, Full(), 2)


def test_pixels_without_a_path_have_none_in_any_form() -> None:
    pixels = [Prediction(None, CAT.answers)]
    assert json.loads(written(pixels, Form.JSON))[0]["path"] is None
    assert written(pixels, Form.CSV).splitlines()[1].startswith(",,,")
    assert "cat, tabby" in written(pixels, Form.TABLE)
