"""A look at the masks of a data set before a network is trained on them: do they fit, and what do they hold."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from beitzoo.errors import InvalidValueError, some_of
from beitzoo.images.files import ImageError, upright_size
from beitzoo.images.label_maps import IGNORE, MaskError, UnlabelledError, unknown_colours
from beitzoo.images.masked_sets import MaskedSet


@dataclass(frozen=True)
class MaskCheck:
    """What a sample of masks holds.

    Attributes:
        names: Of the classes.
        pixels: How many pixels each class has.
        ignored: How many pixels have no class.
        count: How many masks were read.
        empty: Masks in which no pixel has a class. Their images are left out, in training and in measuring.
        unknown: Pixels of each colour that is not in the colour table, where there is one.
        unreadable: Images and masks that cannot be read, and why.
    """

    names: tuple[str, ...]
    pixels: tuple[int, ...]
    ignored: int
    count: int
    empty: tuple[str, ...] = ()
    unknown: Mapping[tuple[int, int, int], int] = field(default_factory=dict)
    unreadable: tuple[tuple[str, str], ...] = ()

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each class in all pixels, also those of no class; all are 0 where there are no pixels."""
        total = sum(self.pixels) + self.ignored
        return tuple(pixels / max(total, 1) for pixels in self.pixels)

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes that no pixel has."""
        return tuple(name for name, pixels in zip(self.names, self.pixels, strict=True) if not pixels)

    def describe(self) -> list[str]:
        """Say how large each class is and what to look at, in a few lines."""
        total = max(sum(self.pixels) + self.ignored, 1)
        by_size = sorted(zip(self.shares, self.names, strict=True), key=lambda pair: (-pair[0], pair[1]))
        shares = ", ".join(f"{name} {share:.1%}" for share, name in by_size if share)
        lines = [f"In {self.count:,} masks: {shares or 'no class at all'}; no class {self.ignored / total:.1%}."]
        if self.absent and self.count:
            lines.append(f"Classes that never appear, {len(self.absent):,}: {some_of(self.absent)}")
        if self.empty:
            lines.append(f"Left out as no pixel of the mask has a class, {len(self.empty):,}: {some_of(self.empty)}")
        if self.unknown:
            colours = [f"{colour} ({count:,} pixels)" for colour, count in Counter(self.unknown).most_common(4)]
            share = sum(self.unknown.values()) / total
            lines.append(f"{share:.1%} of the pixels have colours that are not in the colour table: {some_of(colours)}")
        if self.unreadable:
            failures = [f"{name}: {reason}" for name, reason in self.unreadable]
            lines.append(f"Cannot be read, {len(self.unreadable):,}: {some_of(failures)}")
        return lines


def check_masks(masked: MaskedSet, indices: Sequence[int] | None = None, limit: int = 200) -> MaskCheck:
    """Read a sample of masks, before hours are spent on training with wrong ones, and say what they hold.

    Args:
        masked: The set.
        indices: Of the images that are meant; None means all.
        limit: Masks that are read at most, evenly from all of these.

    Raises:
        InvalidValueError: As `sample_masks`; or all pixels with a class have the same one.
    """
    result = sample_masks(masked, indices, limit)
    if sum(map(bool, result.pixels)) == 1 and result.ignored:
        (name,) = set(result.names) - set(result.absent)
        raise InvalidValueError(
            f"All pixels of {result.count:,} masks are {name} or of no class, so there is nothing to tell apart. 255 "
            "stands for no class, also where masks are black (0) and white (255): number the classes from 0, or give "
            "a table of their colours with masks in RGB."
        )
    return result


def sample_masks(masked: MaskedSet, indices: Sequence[int] | None = None, limit: int = 200) -> MaskCheck:
    """Read a sample of masks, evenly from those of some images or all, and say what they hold.

    Raises:
        InvalidValueError: A mask does not fit its image or the classes, or nothing can be read.
    """
    chosen = range(len(masked)) if indices is None else indices
    count = min(limit, len(chosen))
    tally = _Tally(masked)
    for index in (chosen[place * len(chosen) // count] for place in range(count)):
        tally.add(index)
    result = tally.result()
    if result.unreadable and not result.count:
        name, reason = result.unreadable[0]
        raise InvalidValueError(f"None of {count:,} masks can be read, with its image. The first: {name}: {reason}.")
    return result


class _Tally:
    """Counts the pixels of masks, one mask after the other."""

    def __init__(self, masked: MaskedSet) -> None:
        self.masked = masked
        self.counts = np.zeros(IGNORE + 1, dtype=np.int64)
        self.empty: list[str] = []
        self.unknown: Counter[tuple[int, int, int]] = Counter()
        self.unreadable: list[tuple[str, str]] = []
        self.count = 0

    def add(self, index: int) -> None:
        """Count those of one mask; its image's header is read for the size alone."""
        masked = self.masked
        name = masked.images.identity(index)[0]
        source: Any = masked.images.images[index]
        try:
            size = upright_size(source)
            classes = masked.load_mask(index, size)
        except UnlabelledError:
            classes = np.full(size[::-1], IGNORE, dtype=np.uint8)
            self.empty.append(masked.mask_name(index))
        except MaskError as error:
            raise InvalidValueError(f"{name}: {error}.") from error
        except ImageError as error:
            self.unreadable.append((name, str(error)))
            return
        counts = np.bincount(classes.ravel(), minlength=IGNORE + 1)
        self.counts += counts
        self.count += 1
        if masked.labels.colours is not None and counts[IGNORE]:
            self.unknown += unknown_colours(masked.masks[index], masked.labels)

    def result(self) -> MaskCheck:
        """Return what was counted."""
        names = self.masked.labels.names
        return MaskCheck(
            names,
            tuple(self.counts[: len(names)].tolist()),
            int(self.counts[IGNORE]),
            self.count,
            tuple(self.empty),
            dict(self.unknown),
            tuple(self.unreadable),
        )
