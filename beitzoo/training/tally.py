"""What the updates of a line or an epoch gave, added up, and where their time went."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Means:
    """Running means over some updates.

    Attributes:
        items: How many the losses were means over.
        totals: Sums over these items: of the loss first, then of what the task logs.
        norms: Sum of the norms of the gradients.
        steps: Updates with such a norm; where fp16 overflows there is none.
    """

    items: float = 0.0
    totals: list[float] = field(default_factory=list)
    norms: float = 0.0
    steps: int = 0

    def add(self, items: float, totals: list[float], norm: float) -> None:
        """Take in one update: how many items it had, the sums over them, and the norm of its gradient."""
        self.items += items
        self.totals = [a + b for a, b in zip(self.totals or [0.0] * len(totals), totals, strict=True)]
        if math.isfinite(norm):
            self.norms += norm
            self.steps += 1

    def values(self, names: tuple[str, ...]) -> dict[str, float]:
        """Return the means under the names of the totals, and `grad_norm` if there is one; of no items they are 0."""
        values = {name: total / max(self.items, 1.0) for name, total in zip(names, self.totals, strict=True)}
        return {**values, "grad_norm": self.norms / self.steps} if self.steps else values


@dataclass
class Watch:
    """Where the time of the main process goes, seconds.

    Attributes:
        counted: Until when the time of the run was counted.
        line: When the line began; pauses are as if they had not been.
        waited: Spent on waiting for batches since then.
    """

    counted: float = field(default_factory=time.perf_counter)
    line: float = field(default_factory=time.perf_counter)
    waited: float = 0.0

    def count(self) -> float:
        """Return the time since it was last counted."""
        since, self.counted = self.counted, time.perf_counter()
        return self.counted - since

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for a batch."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do something else than updates: a validation, saving."""
        began = time.perf_counter()
        yield
        self.line += time.perf_counter() - began

    def end_line(self, images: float) -> dict[str, float]:
        """Return how fast the images of a line went and what share of the time waited for them; begin another."""
        now = time.perf_counter()
        seconds = max(now - self.line, 1e-9)
        values = {"images_per_sec": round(images / seconds, 2), "wait_share": round(self.waited / seconds, 4)}
        self.line, self.waited = now, 0.0
        return values
