"""The folder of a run: whether a recipe may be run in it, and the lock that keeps a second run out."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from beitzoo.errors import FileAccessError, UserError
from beitzoo.files import remove_partial
from beitzoo.training.recipe import Recipe, read_resolved

if TYPE_CHECKING:  # it needs accelerate, and who only reads folders does not
    from beitzoo.training.processes import Processes

RECIPE, LOG, METRICS = "recipe.toml", "log.csv", "metrics.json"
BEST, LAST = "best", "last"
_LOCK = ".lock"


class RunError(UserError, FileExistsError):
    """A folder that another run is in."""


def saved_states(directory: Path) -> list[Path]:
    """Return the complete states in the folder of a run, oldest first."""
    found = [(int(match[1]), path) for path in directory.glob("state-*") if (match := re.search(r"-(\d+)$", path.name))]
    return [path for _, path in sorted(found)]


def check_folder(directory: Path, recipe: Recipe) -> None:
    """Refuse a folder with a finished run, or with one of another recipe; one that did nothing yet blocks nobody.

    Raises:
        RunError: Says what is in the folder, and the first difference.
    """
    if (directory / METRICS).exists():
        raise RunError(f"{directory} holds a finished run; choose another folder with --out, or remove it.")
    if not saved_states(directory) and not any((directory / name).exists() for name in (BEST, LAST)):
        return
    if not (directory / RECIPE).exists():
        raise RunError(f"{directory} holds models, but no {RECIPE}; choose another folder with --out.")
    difference = recipe.first_difference(read_resolved(directory / RECIPE))
    if difference:
        raise RunError(
            f"{directory} holds a run of another recipe: {difference}. Give the same recipe to go on with that run, or "
            "choose another folder with --out."
        )


@contextlib.contextmanager
def claimed(directory: Path, recipe: Recipe, processes: "Processes") -> Iterator[None]:
    """Keep the folder of a run to this run while it is entered; a run that is killed lets go of it.

    Raises:
        RunError: The folder holds another run, or one that is still going on.
        FileAccessError: Nothing can be written there.
    """
    check_folder(directory, recipe)
    if not processes.is_main:
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / _LOCK).open("w")
    except OSError as error:
        raise FileAccessError(
            f"Cannot write to {directory}: {error.strerror or error}. Choose another folder with --out."
        ) from error
    with lock:
        _take(lock, directory)
        check_folder(directory, recipe)  # the run that just let go may have finished
        remove_partial(directory)
        try:
            yield
        finally:
            (directory / _LOCK).unlink(missing_ok=True)


def _take(lock: IO[str], directory: Path) -> None:
    try:
        import fcntl  # where there is none, as on Windows, people must see to it themselves
    except ModuleNotFoundError:
        return
    try:
        # Not flock, which the processes that load images would inherit, and hold after a kill.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"A run is going on in {directory}; wait for it, or choose another folder.") from error
    except OSError:
        return  # a file system without locks
