"""The images that a command is given: files, folders, globs and lists on stdin."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from beitzoo.images.folders import LeftOut


def find_listed(arguments: Iterable[str], left_out: "LeftOut") -> Iterator[tuple[str, Path]]:
    """Find the images of all arguments, each with what named it: an argument or, where that is '-', a line of stdin.

    Stdin is read line by line as needed.
    """
    from beitzoo.images.folders import find_images, images_at

    for argument in arguments:
        if argument == "-":
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
            for line in filter(None, lines):
                yield from ((line, path) for path in images_at(line, left_out))
        else:
            yield from ((argument, path) for path in find_images([argument], left_out))


def count_listed(arguments: Sequence[str], rows: int = 1) -> int | None:
    """Return how many rows there will be, where that is known without walking through folders beforehand."""
    return len(arguments) * rows if all(map(os.path.isfile, arguments)) else None
