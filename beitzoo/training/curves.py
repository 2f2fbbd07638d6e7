"""The picture of a run's log: loss, validation metrics and learning rate against updates, of any task."""

import csv
import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from beitzoo.errors import InvalidValueError
from beitzoo.files import read_text, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = Mapping[str, str]
Points = tuple[list[int], list[float]]

# Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _FAINT, _GRID = "#222222", "#9C9C9C", "#E3E3E3"
_OF_VALIDATION = "val_"
# A loss that falls by more than this factor is drawn on a logarithmic scale.
_MOST_LINEAR = 30
_MOST_MARKED = 60  # points of a line that are marked; more would be a band


@dataclass(frozen=True)
class _Panel:
    """One of the pictures above each other.

    Attributes:
        title: Beside its vertical axis.
        names: Columns of the log that it shows, where the log has them; with `val_` before them too.
    """

    title: str
    names: tuple[str, ...]


_PANELS = (
    _Panel("loss", ("loss",)),
    _Panel(
        "%",
        (
            "top1",
            "top5",
            "map",
            "miou",
            "macc",
            "aacc",
            "token_accuracy",
            "aggregation_accuracy",
            "probe_linear",
            "probe_knn",
        ),
    ),
    _Panel("share", ("cosine", "explained")),
    _Panel("codes", ("codes_used", "code_perplexity", "perplexity")),
    _Panel("learning rate", ("lr",)),
)


def write_curves(log: Path, path: Path, best: Mapping[str, object], title: str = "") -> None:
    """Draw a log as a PNG.

    Args:
        log: A run's `log.csv`.
        path: The picture; it is replaced.
        best: Metrics of the best model, which is marked where the log has it.
        title: Above the picture.

    Raises:
        InvalidValueError: It is no log, or has no line yet.
    """
    figure = draw_curves(read_lines(log), best, title)
    save = functools.partial(figure.savefig, format="png", dpi=130, bbox_inches="tight", facecolor="white")
    write_atomically(path, save)


def read_lines(log: Path) -> list[Line]:
    """Read the lines of a log; one that is cut short is left out.

    Raises:
        InvalidValueError: It is no log, or has no line yet.
    """
    reader = csv.DictReader(io.StringIO(read_text(log), newline=""))
    lines: list[Line] = [line for line in reader if None not in line.values()]
    if not {"line", "update", "loss", "lr"} <= set(reader.fieldnames or ()) or not lines:
        raise InvalidValueError(f"{log} is no log of a run, or has no line yet; give the folder of a run.")
    return lines


def draw_curves(lines: Sequence[Line], best: Mapping[str, object], title: str = "") -> "Figure":
    """Draw a panel for each kind of values that the log has; see `write_curves`."""
    from matplotlib.figure import Figure

    panels = [panel for panel in _PANELS if _shown(lines, panel)]
    heights = [1.0 if panel.names == ("lr",) else 2.2 for panel in panels]
    figure = Figure(figsize=(8.4, sum(heights) + 0.35 * len(panels) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    chosen = _update_of(lines, best)
    for panel, one in zip(panels, axes, strict=True):
        _draw_panel(one, lines, panel)
        if chosen is not None:
            one.axvline(chosen, color=_INK, linewidth=0.9, linestyle=(0, (2, 3)), zorder=1)
    if chosen is not None:
        label = f"best model, update {chosen:,}"
        axes[0].annotate(
            label, (chosen, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
            ha="center", va="bottom", fontsize=8, color=_INK, annotation_clip=False,
        )  # fmt: skip
    figure.align_ylabels()
    axes[-1].set_xlabel("updates", fontsize=9, color=_INK)
    axes[-1].set_xlim(left=0)
    axes[-1].xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
    if title:
        figure.suptitle(title, x=0.01, ha="left", color=_INK, fontweight="bold", fontsize=11)
    return figure


def _shown(lines: Sequence[Line], panel: _Panel) -> list[str]:
    """Return the columns of a panel that have values in the log, in its order, validated ones after the others."""
    names = [full for name in panel.names for full in (name, _OF_VALIDATION + name)]
    return [name for name in names if any(_points(lines, kind, name)[0] for kind in ("epoch", "updates"))]


def _points(lines: Sequence[Line], kind: str, name: str) -> Points:
    """Return updates and values of a column in the lines of a kind; what is not finite is left out."""
    updates, values = [], []
    for line in lines:
        value = line.get(name)
        if line["line"] == kind and value and math.isfinite(float(value)):
            updates.append(int(line["update"]))
            values.append(float(value))
    return updates, values


def _draw_panel(axes: "Axes", lines: Sequence[Line], panel: _Panel) -> None:
    shown = _shown(lines, panel)
    validated = {name for name in shown if name.startswith(_OF_VALIDATION)}
    stems = list(dict.fromkeys(name.removeprefix(_OF_VALIDATION) for name in shown))
    for name in shown:
        stem = name.removeprefix(_OF_VALIDATION)
        # One quantity in training and validation has two colours; several quantities have one each.
        place = int(name in validated) if len(stems) == 1 else stems.index(stem)
        has_twin = _OF_VALIDATION + name in shown
        label = f"{stem.replace('_', ' ')}{', training' * has_twin}{', validation' * (name in validated)}"
        _draw_column(axes, lines, name, _COLOURS[place % len(_COLOURS)], label)
    values = [value for name in shown for kind in ("epoch", "updates") for value in _points(lines, kind, name)[1]]
    if panel.names == ("loss",) and min(values) > 0 and max(values) > _MOST_LINEAR * min(values):
        _make_logarithmic(axes)
    if panel.names[0] in ("lr", "codes_used"):
        axes.set_ylim(bottom=0)
    axes.set_ylabel(panel.title, fontsize=9, color=_INK)
    axes.tick_params(labelsize=8, color=_FAINT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    if panel.names != ("lr",):
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.6)


def _make_logarithmic(axes: "Axes") -> None:
    """Write numbers, not powers, along a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_column(axes: "Axes", lines: Sequence[Line], name: str, colour: str, label: str) -> None:
    """Draw the means of epochs as a line over the faint means of updates; a learning rate is one line."""
    every, epochs = _points(lines, "updates", name), _points(lines, "epoch", name)
    if name == "lr":
        whole = sorted(zip(every[0] + epochs[0], every[1] + epochs[1], strict=True))
        axes.plot([update for update, _ in whole], [rate for _, rate in whole], color=_INK, linewidth=1.3)
        return
    if every[0]:
        axes.plot(*every, color=colour, linewidth=0.8, alpha=0.35 if epochs[0] else 1, zorder=2)
    marker = ("o" if name.startswith(_OF_VALIDATION) else ".") if len(epochs[0]) <= _MOST_MARKED else ""
    axes.plot(*epochs, color=colour, linewidth=1.5, marker=marker, markersize=4, label=label, zorder=3)


def _update_of(lines: Sequence[Line], best: Mapping[str, object]) -> int | None:
    """Return the update of the epoch that had these metrics; None if the run has no validation."""
    names = [name for name in best if name.startswith(_OF_VALIDATION)]
    for line in lines:
        values = [line.get(name) or "nan" for name in names]
        if line["line"] == "epoch" and names and [float(v) for v in values] == [best[name] for name in names]:
            return int(line["update"])
    return None
