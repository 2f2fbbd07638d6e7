"""CSV files that list images: their rows, with the line that each is in, and the files and parts that rows name."""

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from beitzoo.errors import InvalidValueError, check
from beitzoo.files import full_path, read_text
from beitzoo.images.shards import PART_OF, PARTS

NOT_THERE = "named in the CSV, but not there"


def read_rows(path: Path, columns: Sequence[Sequence[str]]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV, with the number of the line where each ends.

    Args:
        path: The file; a first line names the columns.
        columns: Those that must be there, each by the names it may have; one of them. In a row it has the first name.

    Raises:
        InvalidValueError: It is no such file; says in which line.
    """
    text = read_text(path).removeprefix("\ufeff")
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        header = reader.fieldnames or ()
        found = [[name for name in names if name in header] for names in columns]
        if any(len(names) != 1 for names in found) or len(set(header)) < len(header):
            expected = ", ".join(" (or ".join(names[:2]) + ")" * (len(names) > 1) for names in columns)
            raise InvalidValueError(
                f"{path}, line 1: the columns are {', '.join(header) or 'none'}. Expected {expected} and perhaps "
                "part, separated by commas; write them as the first line."
            )
        first_names = {name: names[0] for (name,), names in zip(found, columns, strict=True)}
        for row in reader:
            check(
                None not in row and None not in row.values(),
                f"{path}, line {reader.line_num}: there are not {len(header)} fields, as many as columns. Put names "
                "with a comma in quotation marks.",
            )
            yield reader.line_num, {first_names.get(name, name): value for name, value in row.items()}
    except csv.Error as error:
        raise InvalidValueError(f"{path}, line {reader.reader.line_num}: {error}. Save it as CSV again.") from error


def header_of(path: Path) -> tuple[str, ...]:
    """Return the names of the columns of a CSV; what is wrong with it is said when its rows are read."""
    lines = io.StringIO(read_text(path).removeprefix("\ufeff"), newline="")
    return tuple(next(csv.reader(lines, skipinitialspace=True), ()))


def text_in(row: Mapping[str, str], column: str, place: str) -> str:
    """Return what a row has in a column.

    Raises:
        InvalidValueError: Nothing; `place` says where.
    """
    check(bool(row[column].strip()), f"{place}: there is no {column}. Write it, or remove the line.")
    return row[column]


def file_in(row: Mapping[str, str], column: str, place: str, folder: Path) -> Path:
    """Return the full path of the file that a row names, which is relative to a folder.

    Raises:
        InvalidValueError: It names none; `place` says where.
    """
    return Path(os.path.normpath(folder.absolute() / full_path(text_in(row, column, place))))


def part_in(row: Mapping[str, str], place: str) -> str:
    """Return the part of the data set that a row names; empty for none.

    Raises:
        InvalidValueError: There is no such part; `place` says where.
    """
    word = row.get("part", "").strip().lower()
    check(
        not word or word in PART_OF,
        f"{place}: there is no part {word!r}. Parts are {', '.join(PARTS)}; write one of them, or nothing.",
    )
    return PART_OF.get(word, "")
