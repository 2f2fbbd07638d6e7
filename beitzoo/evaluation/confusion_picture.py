"""A picture of a confusion matrix: of classes of pixels or of images, from counts and names alone.

Rows are the truth, each as shares of what has that class. Few classes have numbers in the cells, more have names along
both axes, and a great many have the most confused pairs in words beside the matrix.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from beitzoo.errors import check
from beitzoo.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]

_SUFFIXES = (".png", ".svg", ".pdf")
_MOST_WITH_NUMBERS = 15
_MOST_WITH_NAMES = 40
_PAIRS = 25
_LONGEST_NAME = 26
_INK, _FAINT, _NOWHERE = "#222222", "#8C8C8C", "#E3E3E3"
# Perceptually uniform and light at 0, so that the picture is ink on paper.
_COLOURS = "magma_r"
# Shades rise with the square root, or confusions of a few per cent would look like none.
_GAMMA = 0.5
_TICKS = (0, 1, 5, 10, 25, 50, 100)


def check_picture(path: Path) -> None:
    """Refuse a file of a form that is not drawn, before anything is measured.

    Raises:
        InvalidValueError: Its suffix is another.
    """
    check(path.suffix.lower() in _SUFFIXES, f"{path} is no picture's name; end it with {', '.join(_SUFFIXES)}.")


def write_confusion(path: Path, counts: Array, names: Sequence[str], title: str = "") -> None:
    """Draw a confusion matrix into a file: PNG, SVG or PDF by its suffix.

    Args:
        path: The file; it is replaced.
        counts: (K, K), rows are the truth, columns what was predicted.
        names: Of the K classes.
        title: Above the picture.
    """
    from matplotlib import rc_context

    check_picture(path)
    figure = draw_confusion(counts, names, title)
    form = path.suffix.lower()[1:]
    metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form, {})
    # Drawn again from the same counts, a file does not change.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "beitzoo"}):
        options: dict[str, Any] = {"dpi": 150, "bbox_inches": "tight", "facecolor": "white", "metadata": metadata}
        write_atomically(path, functools.partial(figure.savefig, format=form, **options))


def draw_confusion(counts: Array, names: Sequence[str], title: str = "") -> "Figure":
    """Draw a confusion matrix; see `write_confusion`."""
    from matplotlib.figure import Figure

    classes = len(names)
    assert counts.shape == (classes, classes), (counts.shape, classes)
    shares = row_shares(counts)
    side = _side(classes)
    figure = Figure(figsize=(side, side))
    axes = figure.add_subplot()
    _draw_cells(figure, axes, shares)
    if classes <= _MOST_WITH_NAMES:
        _name_classes(axes, [_shortened(name) for name in names])
    else:
        _number_classes(axes, classes)
        _list_pairs(axes, most_confused(counts, _PAIRS), names)
    if classes <= _MOST_WITH_NUMBERS:
        _write_shares(axes, shares)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    if title:
        axes.set_title(title, loc="left", color=_INK, fontweight="bold", fontsize=10)
    return figure


def row_shares(counts: Array) -> Array:
    """Return counts (K, K) as per cent of their row; NaN in rows that have none."""
    totals = counts.sum(axis=1, keepdims=True, dtype=float)
    return np.divide(100.0 * counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)


def most_confused(counts: Array, most: int) -> list[tuple[int, int, float]]:
    """Return pairs of classes, truth and what it was taken for, with the per cent of the truth that was; highest first.

    Of equal shares, those of more items come first.
    """
    shares = np.nan_to_num(row_shares(counts))
    truth, predicted = np.nonzero((counts > 0) & ~np.eye(len(counts), dtype=bool))
    order = np.lexsort((-counts[truth, predicted], -shares[truth, predicted]))[:most]
    return [(int(t), int(p), float(shares[t, p])) for t, p in zip(truth[order], predicted[order], strict=True)]


def _side(classes: int) -> float:
    """Return inches that the matrix is wide and high, so that what is written in it can be read."""
    if classes <= _MOST_WITH_NUMBERS:
        return max(2.4, 0.5 * classes)
    return max(7.0, 0.2 * classes) if classes <= _MOST_WITH_NAMES else 8.0


def _draw_cells(figure: "Figure", axes: "Axes", shares: Array) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    colours = colormaps[_COLOURS].with_extremes(bad=_NOWHERE)
    image = axes.imshow(
        np.ma.masked_invalid(shares), cmap=colours, norm=PowerNorm(_GAMMA, 0, 100), interpolation="nearest"
    )
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, ticks=_TICKS)
    bar.set_label("% of the truth's class" + "; grey: not in the truth" * bool(np.isnan(shares).any()), fontsize=8)
    bar.ax.tick_params(labelsize=7)
    for spine in axes.spines.values():
        spine.set_color(_FAINT)


def _name_classes(axes: "Axes", names: Sequence[str]) -> None:
    places, size = range(len(names)), 8 if len(names) <= 25 else 7
    axes.set_yticks(places, names, fontsize=size)
    if sum(map(len, names)) <= 3 * len(names):
        axes.set_xticks(places, names, fontsize=size)
    else:
        axes.set_xticks(places, names, fontsize=size, rotation=90)
    axes.tick_params(length=0)


def _number_classes(axes: "Axes", classes: int) -> None:
    step = next(step for step in (5, 10, 20, 25, 50, 100, 10**9) if classes / step <= 20)
    places = range(0, classes, step)
    axes.set_xticks(places, [str(place) for place in places], fontsize=7)
    axes.set_yticks(places, [str(place) for place in places], fontsize=7)


def _list_pairs(axes: "Axes", pairs: Sequence[tuple[int, int, float]], names: Sequence[str]) -> None:
    """Write the most confused pairs to the right of the matrix."""
    lines = [
        f"{share:5.1f} %  {truth} {_shortened(names[truth])} \N{RIGHTWARDS ARROW} {given} {_shortened(names[given])}"
        for truth, given, share in pairs
    ]
    text = "\n".join(["Most confused, truth \N{RIGHTWARDS ARROW} predicted:", "", *lines])
    axes.text(1.2, 1.0, text, transform=axes.transAxes, va="top", fontsize=8, color=_INK, linespacing=1.5)


def _write_shares(axes: "Axes", shares: Array) -> None:
    """Write the per cent into the cells; less than half a per cent is left out."""
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.5:
            colour = "white" if share > 25 else _INK
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)


def _shortened(name: str) -> str:
    """Return a name that matplotlib writes as it is, and cut if it is long."""
    name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1].rstrip(' ,')}\N{HORIZONTAL ELLIPSIS}"
    return name.replace("$", r"\$")
