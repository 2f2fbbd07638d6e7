"""Errors a user can correct: what came, what is possible, what to do. Commands catch `UserError` and nothing else."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """Something that the user can correct; the message says how. All other exceptions are faults of beitzoo."""


class InvalidValueError(UserError, ValueError):
    """A value that is out of range, or input that is not what it should be."""


class InvalidOptionError(UserError, TypeError):
    """An option that does not exist, or a value of the wrong type."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that is not there."""


class FileAccessError(UserError, OSError):
    """A file that cannot be read or written: permissions, a full disk, a folder in its place."""


class OutOfMemoryError(UserError, MemoryError):
    """Not even the smallest piece of work fits into memory."""


class UnsupportedError(UserError, NotImplementedError):
    """Something that is understood, but that no released model needs and beitzoo does not do."""


def check(condition: bool, message: str) -> None:
    """Raise `InvalidValueError` with this message unless the condition holds."""
    if not condition:
        raise InvalidValueError(message)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell errors of a full memory, Python's and PyTorch's of any device, from all others."""
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    )


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Return the first few of several names, for a message."""
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def closest(name: str, known: Iterable[str]) -> str:
    """Say which known names look most like the given one, as the tail of an error message."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, matches))}?" if matches else f"there are {', '.join(sorted(known))}."


def describe_invalid(error: "ValidationError", document: Any = None) -> str:
    """Say in one sentence what the first thing is that a pydantic model found wrong, and where.

    Args:
        error: What the model raised.
        document: What it was given, if it is one with unions told apart by `kind`: pydantic names the kind in the
            place too, as if it were a key.
    """
    errors = error.errors(include_input=False, include_url=False)
    places = [".".join(_place(each["loc"], document)) or "the document" for each in errors]
    # Of a value that may be one of several kinds, pydantic says of each why it is not.
    reasons = [each["msg"] for each, place in zip(errors, places, strict=True) if place == places[0]]
    return f"{places[0]}: {' or '.join(reason.removeprefix('Value error, ') for reason in reasons)}"


def _place(parts: Iterable[int | str], document: Any) -> Iterator[str]:
    for part in parts:
        if isinstance(document, dict) and part not in document and document.get("kind") == part:
            continue
        if isinstance(document, bool | int | float | str):
            return  # what follows is a kind that the value might have been
        yield str(part)
        try:
            document = document[part]
        except (LookupError, TypeError):
            document = None
