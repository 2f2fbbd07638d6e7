"""Run a function in a process of its own, so that its memory can be measured and its death survived."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch

from beitzoo.results import Row

Argument = TypeVar("Argument")

_LONGEST_MESSAGE = 400
# What PyTorch's allocators say; the classes of exceptions differ between versions and devices.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Outcome:
    """What became of a function: its row, or why there is none."""

    row: Row = field(default_factory=dict)
    error: str | None = None
    out_of_memory: bool = False


def run_in_child(function: Callable[[Argument], Row], argument: Argument, limit_memory: bool = False) -> Outcome:
    """Call a function of a module in a fresh process and return what became of it; an exception is an outcome, too.

    Args:
        function: Importable by name.
        argument: Can be pickled.
        limit_memory: Let the process fail when it asks for more memory than is free, rather than let the system
            kill it or another.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, function, argument, limit_memory))
    process.start()
    sender.close()
    try:
        outcome: Outcome = receiver.recv()
    except EOFError:
        process.join()
        return Outcome(error=_cause_of_death(process.exitcode))
    finally:
        if sys.exc_info()[0] is not None:  # such as KeyboardInterrupt
            process.kill()
        process.join(timeout=10)
        process.kill()  # runtimes have been seen to hang while they unload
        process.join()
    return outcome


def _serve(sender: Connection, function: Callable[[Argument], Row], argument: Argument, limit_memory: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.dup2(2, 1)  # standard output is the parent's, for its rows
    try:
        if limit_memory:
            _limit_memory()
        outcome = Outcome(function(argument))
    except Exception as error:
        if not isinstance(error, ValueError):  # those are for users and say what they have to
            traceback.print_exc()
        message = " ".join(f"{type(error).__name__}: {error}".split())
        outcome = Outcome({}, message[:_LONGEST_MESSAGE], _is_out_of_memory(error))
    sender.send(outcome)
    sender.close()


def _die_with_parent() -> None:
    """Do not go on, and take the cores of the next run, when the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _limit_memory() -> None:
    """Bound the data of this process by what it has and what is free; where the system does not say, do not."""
    meminfo, status = Path("/proc/meminfo"), Path("/proc/self/status")
    if not (meminfo.exists() and status.exists()):
        return
    import resource

    limit = _kibibytes(meminfo, "MemAvailable") + _kibibytes(status, "VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * limit, 1024 * limit))


def _kibibytes(path: Path, name: str) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def _cause_of_death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", as by a system whose memory ran out; try a smaller --batch-size" if name == "SIGKILL" else ""
        return f"the process was killed by {name}{hint}"
    return f"the process ended with code {code} and no result"
