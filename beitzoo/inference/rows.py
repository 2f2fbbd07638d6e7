"""Predictions as text, row by row while they are computed: a table for people, JSON and CSV for programs."""

import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import typer
from rich.cells import cell_len

from beitzoo.errors import FileAccessError, check
from beitzoo.files import full_path

if TYPE_CHECKING:
    from beitzoo.inference.classify import Prediction

Role = Literal["title", "error"]
Paint = Callable[[str, Role], str]


class Form(StrEnum):
    """What predictions are written as."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


def choose_form(form: Form | None, output: Path | None) -> Form:
    """Return the form that was asked for, or else the one that the name of the output file says.

    Raises:
        InvalidValueError: The name says something that is not written.
    """
    if form is not None or output is None:
        return form or Form.TABLE
    forms = {"": Form.TABLE, ".txt": Form.TABLE, ".json": Form.JSON, ".csv": Form.CSV}
    suffix = output.suffix.lower()
    check(
        suffix in forms or (output.exists() and not output.is_file()),
        f"--output {output}: what a {suffix} file holds is not known here. Name it .json, .csv or .txt, or say "
        f"--format {', '.join(Form)}.",
    )
    return forms.get(suffix, Form.TABLE)


@contextmanager
def open_output(path: Path | None) -> Iterator[TextIO]:
    """Open the place that rows go to: stdout, or a file that is replaced once all rows are written.

    Until then they are in a file beside it, `NAME.partial`, which an interrupted run leaves. A link stays, and the file
    it leads to is the one that is written; into a pipe or a device go the rows themselves.

    Raises:
        FileAccessError: The file cannot be written, or another run's `.partial` is in the way.
    """
    if path is None:
        yield sys.stdout
        return
    path = full_path(path)
    if path.is_dir():
        raise FileAccessError(f"{path} is a folder; give --output the name of a file.")
    if path.exists() and not path.is_file():  # there is nothing to keep in it, and no file may take its place
        with _open_text(path, "w") as file:
            yield file
        return
    path = path.resolve()
    partial = path.with_name(f"{path.name}.partial")
    file = _open_text(partial, "x")
    try:
        with file:
            yield file
    except BaseException:
        if partial.stat().st_size:
            print(f"The rows so far are in {partial}.", file=sys.stderr)
        else:
            partial.unlink()
        raise
    partial.replace(path)


def _open_text(path: Path, mode: Literal["w", "x"]) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names of files need not be text; their bytes come out as they went in.
        return path.open(mode, encoding="utf-8", errors="surrogateescape", newline="")
    except FileExistsError as error:
        raise FileAccessError(
            f"{path} has the rows of a run that was interrupted or is still going on; move it away first."
        ) from error
    except OSError as error:
        raise FileAccessError(f"Cannot write {path} ({error.strerror}); give --output another file.") from error


def write_rows(
    predictions: Iterable["Prediction"], form: Form, file: TextIO, topk: int, rows_for_widths: int = 16
) -> None:
    """Write every prediction as soon as it is there, so that an interrupted run keeps what was done.

    Args:
        predictions: As they come.
        form: What is written.
        file: Receives the rows.
        topk: Classes that a line of a CSV has columns for.
        rows_for_widths: Rows from which a table takes the widths of its columns, which it waits for; what is longer
            later sticks out and is never cut.

    Raises:
        FileAccessError: As `write_lines`.
    """
    if form is Form.TABLE:
        paint = _paint if file.isatty() and not os.environ.get("NO_COLOR") else _plain
        lines = _table(predictions, paint, rows_for_widths)
    else:
        lines = _json(predictions) if form is Form.JSON else _csv(predictions, topk)
    write_lines(lines, file)


def write_lines(lines: Iterable[str], file: TextIO) -> None:
    """Write lines as they come, each through to the file.

    Raises:
        FileAccessError: They cannot be written, such as on a full disk.
    """
    for line in lines:
        try:
            file.write(line)
            file.flush()
        except BrokenPipeError:  # whoever reads them has enough
            raise
        except OSError as error:
            raise FileAccessError(
                f"The rows cannot be written: {error.strerror}. Make room, or write elsewhere."
            ) from error


def _json(predictions: Iterable["Prediction"]) -> Iterator[str]:
    """Write an array with a row on each line; it is closed even where the run is interrupted."""
    separator = "[\n"
    try:
        for prediction in predictions:
            yield separator + json.dumps({**asdict(prediction), "path": _path(prediction)})
            separator = ",\n"
    except (Exception, KeyboardInterrupt):
        if separator == ",\n":
            yield "\n]\n"
        raise
    yield "\n]\n" if separator == ",\n" else "[]\n"


def _csv(predictions: Iterable["Prediction"], topk: int) -> Iterator[str]:
    """Write a line per image and model; the columns of a class that there is not are empty."""
    ranks = range(1, topk + 1)
    titles = [f"{column}_{rank}" for rank in ranks for column in ("label", "index", "probability")]
    header = csv_line(["path", "model", "error", *titles])
    for prediction in predictions:
        classes = [value for answer in prediction.answers for value in (answer.label, answer.index, answer.probability)]
        missing = [""] * (3 * topk - len(classes))
        yield header + csv_line([_path(prediction), prediction.model, prediction.error, *classes, *missing])
        header = ""
    yield header


def csv_line(values: Iterable[object]) -> str:
    """Return values as a line of a CSV."""
    line = io.StringIO()
    # The writer quotes what has a character of its line end in it, so that with this one no \r stays bare in a name.
    csv.writer(line, lineterminator="\r\n").writerow(values)
    return line.getvalue().removesuffix("\r\n") + "\n"


def _table(predictions: Iterable["Prediction"], paint: Paint, rows_for_widths: int) -> Iterator[str]:
    """Write aligned columns: image, model where there are several, label, probability and the classes next to it."""
    rest = iter(predictions)
    first: list[Prediction] = []
    try:
        first.extend(itertools.islice(rest, rows_for_widths))
    except (Exception, KeyboardInterrupt):
        yield from _table_rows(first, first, paint)
        raise
    yield from _table_rows(first, itertools.chain(first, rest), paint)


def _table_rows(first: list["Prediction"], predictions: Iterable["Prediction"], paint: Paint) -> Iterator[str]:
    if not first:
        return
    several = len({prediction.model for prediction in first}) > 1
    titles = ["image", *(["model"] if several else []), "label"]
    cells = [_cells(prediction, several) for prediction in first]
    widths = [max(map(cell_len, column)) for column in itertools.zip_longest(titles, *cells, fillvalue="")]
    has_next = any(len(prediction.answers) > 1 for prediction in first)
    yield paint(_aligned(titles, widths) + "  probability" + ("  next" if has_next else ""), "title") + "\n"
    for prediction in predictions:
        start = _aligned(_cells(prediction, several), widths)
        if prediction.error is not None:
            yield f"{start}  {paint(printable(prediction.error), 'error')}\n"
            continue
        others = ", ".join(f"{printable(answer.label)} {answer.probability:.1%}" for answer in prediction.answers[1:])
        yield f"{start}  {prediction.answers[0].probability:>11.1%}  {others}".rstrip() + "\n"


def _cells(prediction: "Prediction", several: bool) -> list[str]:
    """Return the cells of a row that say which image, which model and which class."""
    label = [printable(prediction.answers[0].label)] if prediction.answers else []
    return [printable(_path(prediction) or ""), *([prediction.model or ""] if several else []), *label]


def _path(prediction: "Prediction") -> str | None:
    return None if prediction.path is None else str(prediction.path)


def _aligned(cells: list[str], widths: list[int]) -> str:
    return "  ".join(
        cell + " " * (width - cell_len(cell)) for cell, width in zip(cells, widths[: len(cells)], strict=True)
    )


def printable(text: str) -> str:
    """Show what is no character, such as a terminal's commands in a file name, by its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _plain(text: str, _: Role) -> str:
    return text


def _paint(text: str, role: Role) -> str:
    return typer.style(text, bold=role == "title" or None, fg="red" if role == "error" else None)
