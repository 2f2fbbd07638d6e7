"""A picture of probes: accuracy by block, a line for each probe and pooling, a panel for each network."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from beitzoo.errors import UnsupportedError, check
from beitzoo.evaluation.probe_rows import block_name
from beitzoo.files import write_atomically
from beitzoo.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which the colour-blind tell apart; the pooling is the kind of line.
_COLOURS = {"linear": "#0072B2", "ridge": "#56B4E9", "joint": "#D55E00", "knn": "#009E73"}
_LINES = {"mean": "-", "class": "--", "both": "-.", "pooled": ":"}
_FAINT = "#D9D9D9"


def check_picture(path: Path) -> None:
    """Refuse a name that no picture is written as, and a Python that draws none.

    Raises:
        InvalidValueError: Another ending.
        UnsupportedError: matplotlib is not installed.
    """
    check(path.suffix.lower() in SUFFIXES, f"{path} does not end in {', '.join(SUFFIXES)}; name the picture so.")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UnsupportedError("Pictures need matplotlib; install it with: pip install 'beitzoo[plots]'") from error


def draw_probes(rows: Sequence[Row], path: Path) -> None:
    """Draw rows of probes, as `probe_rows` returns them, to a file that is written atomically.

    Args:
        rows: Of one or more networks.
        path: Ends in .png, .svg or .pdf.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    figure = Figure(figsize=(7, 3.4 * len(models)), layout="constrained")
    for place, model in enumerate(models, start=1):
        _draw(figure.add_subplot(len(models), 1, place), [row for row in rows if row["model"] == model])
    write_atomically(
        path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=160, facecolor="white")
    )


def _draw(axes: "Axes", rows: Sequence[Row]) -> None:
    blocks = list(dict.fromkeys(block_name(row) for row in rows))
    for pooling, probe in dict.fromkeys((str(row["pooling"]), str(row["probe"])) for row in rows):
        chosen = [row for row in rows if (row["pooling"], row["probe"]) == (pooling, probe)]
        own = {block_name(row): float(row["top1"] or 0) for row in chosen}
        axes.plot(
            range(len(blocks)),
            [own[block] for block in blocks],
            _LINES[pooling],
            color=_COLOURS[probe],
            marker="o",
            markersize=3,
            label=f"{probe}, {pooling}",
        )
    axes.set_xticks(range(len(blocks)), blocks)
    axes.set_xlabel("block")
    axes.set_ylabel("top-1, %")
    axes.set_title(f"{rows[0]['model']}: {rows[0]['count']} images", fontsize=10, loc="left")
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
