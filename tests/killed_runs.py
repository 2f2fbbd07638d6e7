"""A program that trains by recipes in one go, and then in processes that are killed until one comes to the end.

It imports once and forks each attempt, so that an attempt costs no more than its updates:
`python killed_runs.py SEED PROCESSES KIND LONGEST LEAST RECIPE.toml ...` fills `whole` beside each recipe, and
`killed-1` and so on until there were at least so many kills. An attempt is killed after at most so many events, or, if
KIND is `time`, at most this share of the time that the whole run took. `events,time` takes two, which are in turn.
"""

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import sklearn.model_selection  # noqa: F401  (here and not in each attempt)
import timm.data  # noqa: F401
import torch
import torch.utils.tensorboard
from forks import fork, free_port

from beitzoo.training.folder import METRICS
from beitzoo.training.recipe import read_resolved
from beitzoo.training.tasks.finetune import finetune
from beitzoo.training.tasks.pretrain import pretrain
from beitzoo.training.tasks.segment import train_segmenter
from beitzoo.training.tasks.tokenizer import train_tokenizer

_TRAIN = {"finetune": finetune, "pretrain": pretrain, "segment": train_segmenter, "tokenizer": train_tokenizer}


def main(seed: str, processes: str, kind: str, longest: str, least: str, *recipes: str) -> None:
    kinds, longests = kind.split(","), longest.split(",")
    for recipe in recipes:
        draw = random.Random(int(seed))
        out, started = Path(recipe).parent, time.monotonic()
        assert not _attempt(recipe, str(out / "whole"), int(processes), "", 0)
        took = time.monotonic() - started
        units = {"events": 1.0, "time": took}
        in_turn = itertools.cycle((one, float(most) * units[one]) for one, most in zip(kinds, longests, strict=True))
        kills = runs = 0
        while kills < int(least):
            runs += 1
            while not (out / f"killed-{runs}" / METRICS).exists():  # the last thing that a run writes
                one, most = next(in_turn)
                kills += _attempt(recipe, str(out / f"killed-{runs}"), int(processes), one, draw.uniform(0, most))
        print(f"{recipe}: {kills} kills, {runs} runs")


def _attempt(recipe: str, out: str, processes: int, kind: str, moment: float) -> bool:
    """Train until the end or a moment; tell whether that moment came first."""
    port = free_port()
    at_event = max(round(moment), 1) if kind == "events" else 0
    works = [partial(_train, recipe, out, at_event if rank == 0 else 0) for rank in range(processes)]
    running = {fork(work, rank, processes, port) for rank, work in enumerate(works)}
    deadline = time.monotonic() + moment if kind == "time" else float("inf")
    statuses: list[int] = []
    while running:
        ended = [child for child in running if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)]
        if any(statuses) or time.monotonic() > deadline:
            for child in running:
                os.kill(child, signal.SIGKILL)
            ended = list(running)
        statuses += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ended]
        running -= set(ended)
        time.sleep(0.002)
    if any(statuses) and -signal.SIGKILL not in statuses:
        sys.exit(f"An attempt failed: {statuses}")
    return -signal.SIGKILL in statuses


def _train(recipe: str, out: str, at_event: int) -> None:
    if at_event:
        _die_at(at_event)
    chosen = read_resolved(Path(recipe))
    _TRAIN[chosen.task.kind](chosen, Path(out))


def _die_at(moment: int) -> None:
    """Let this process be killed at one of the moments that matter: before an update, a write to disk, a rename."""
    left = [moment]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return count

    for name in ("fsync", "rename", "replace", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    torch.optim.AdamW.step = counted(torch.optim.AdamW.step)  # type: ignore[method-assign]


if __name__ == "__main__":
    main(*sys.argv[1:])
