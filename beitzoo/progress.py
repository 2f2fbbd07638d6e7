"""How far a long command is: a bar on a terminal, now and then a plain line in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

_Item = TypeVar("_Item")

# Seconds between two lines; a bar in a log would be megabytes.
LINE_EVERY = 30.0


def watch(items: Iterable[_Item], unit: str, total: int | None = None, *, bar: bool = True) -> Iterator[_Item]:
    """Pass items on, and say on stderr how many there were.

    Args:
        items: What is counted, as it comes.
        unit: What one item is called.
        total: How many will come, if known.
        bar: False for no bar on a terminal, such as where the items themselves are printed on it.
    """
    on_terminal = sys.stderr.isatty()
    started = last = time.monotonic()
    for count, item in enumerate(tqdm(items, total=total, unit=unit, disable=not (bar and on_terminal)), start=1):
        yield item
        now = time.monotonic()
        if not on_terminal and now - last >= LINE_EVERY:
            last = now
            of_total = "" if total is None else f" of {total:,}"
            print(f"{count:,}{of_total} {unit}s, {count / (now - started):.1f} per second", file=sys.stderr, flush=True)
