"""Pictures of the tables in a folder of results, and the tables of published accuracies."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from beitzoo.errors import InvalidValueError, MissingFileError
from beitzoo.files import write_atomically, write_text
from beitzoo.results import Row, Value, csv_text, read_rows
from beitzoo.zoo import costs
from beitzoo.zoo.accuracy import DATA_SETS, Accuracy, headline, published
from beitzoo.zoo.pretrained import PRETRAINED
from beitzoo.zoo.registry import find, is_model, split_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart; shapes say the same once more.
_LOOKS = {
    "timm": ("#0072B2", "o"),
    "timm+compile": ("#56B4E9", "s"),
    "transformers": ("#D55E00", "^"),
    "onnxruntime": ("#009E73", "D"),
    "openvino": ("#CC79A7", "v"),
    "beitzoo": ("#000000", "P"),
    "beitzoo+compile": ("#8C8C8C", "X"),
    "beitzoo+optimize": ("#E69F00", "*"),
}
# By the first part of a name.
_FAMILIES = {"beit": ("BEiT", "#0072B2", "o"), "beitv2": ("BEiT v2", "#D55E00", "s")}
_INK, _FAINT = "#222222", "#D9D9D9"
# Places around a point where its label may stand, nearest first: points right and up, and which end it hangs by.
_PLACES = [(7, 0, "left"), (-7, 0, "right")]
_PLACES += [(x, y, end) for y in (9, -9, 17, -17, 25, -25) for x, end in ((7, "left"), (-7, "right"))]

_TIMM_COLUMNS = ["model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count"]
_TIMM_COLUMNS += ["crop_pct", "interpolation"]
_SEGMENT_COLUMNS = ["model", "img_size", "miou", "macc", "aacc", "protocol", "param_count"]
# What a row must have to be drawn as a speed, or as a ratio.
_OF_BOTH = {"model", "precision", "options", "input_size", "device", "threads", "torch", "date"}
_OF_SPEEDS = _OF_BOTH | {"infer_step_time_median", "infer_batch_size", "error"}
_OF_RATIOS = _OF_BOTH | {
    "ratio",
    "ratio_low",
    "ratio_high",
    "peer",
    "subject",
    "subject_precision",
    "bench",
    "batch_size",
    "subject_error",
    "peer_error",
}
# Outputs that are this far off at the most, as a share of the largest, are those of float32 but for rounding.
_ROUNDING = 1e-4
# What rows of one picture have in common.
_MACHINE = ("device", "threads", "torch")
_IN_FILE_NAMES = str.maketrans("+ ", "--")


def write_report(results: Path, out: Path) -> list[Path]:
    """Draw what the tables of a folder allow, and write the published accuracies; return the paths of the new files.

    Every CSV of the folder is read, and a row is what its columns say: the ratio to a peer, a speed, or something that
    is not drawn.

    Args:
        results: The folder with CSV files.
        out: Receives `plots/` and `accuracy/`.

    Raises:
        MissingFileError: The folder does not exist.
        InvalidValueError: A file of it is no table, or there is nothing to draw.
    """
    if not results.is_dir():
        raise MissingFileError(f"There is no folder {results}; give the one with the CSV files of `beitzoo benchmark`.")
    rows = [row for path in sorted(results.glob("*.csv")) for row in read_rows(path)]
    figures = _figures(rows)
    if not figures:
        raise InvalidValueError(
            f"No CSV in {results} has rows to draw; measure some with beitzoo benchmark --results-file FILE."
        )
    paths = [path for name, figure in figures.items() for path in _save(figure, out / "plots" / name)]
    for data in DATA_SETS:
        if data != "digits":  # the small model's, which `evaluate` measures
            paths.append(out / "accuracy" / f"{data}.csv")
            write_text(paths[-1], accuracy_table(data))
    return paths


def accuracy_table(data: str) -> str:
    """Return the CSV of a set of images, best first."""
    rows = sorted(published(data=data), key=lambda row: (-(row.top1 or row.miou or 0), -(row.top5 or 0), row.model))
    columns = _SEGMENT_COLUMNS if data == "ade20k" else _TIMM_COLUMNS
    if DATA_SETS[data] is not None:
        columns = [*columns, "top1_diff", "top5_diff", "rank_diff"]
    return csv_text([*columns, "source"], [_accuracy_row(row) for row in rows])


def _accuracy_row(row: Accuracy) -> Row:
    fields: Row = {name: value for name, value in vars(row).items() if name != "rank_diff"}
    fields["param_count"] = f"{costs.columns(find(row.model).config)['param_count']:.2f}"
    for name in ("top1", "top5"):
        value = getattr(row, name)
        if value is not None:
            fields |= {name: f"{value:.3f}", f"{name}_err": f"{100 - value:.3f}"}
    if row.rank_diff is not None:
        fields |= _differences(row)
    return fields


def _differences(row: Accuracy) -> Row:
    """Compare with the set that timm compares with, by the same source, in timm's spelling."""
    base = next(one for one in published(row.model, DATA_SETS[row.data] or "") if one.source.startswith("timm"))
    assert row.top1 is not None and row.top5 is not None and base.top1 is not None and base.top5 is not None
    return {
        "top1_diff": f"{row.top1 - base.top1:+.3f}",
        "top5_diff": f"{row.top5 - base.top5:+.3f}",
        "rank_diff": f"{row.rank_diff:+d}",
    }


def _figures(rows: Sequence[Row]) -> "dict[str, Figure]":
    figures = {}
    speeds = measured_speeds(rows)
    classifiers = [best for name in PRETRAINED if (best := headline(name)) is not None and best.data == "imagenet"]
    timed = [(row, speed) for row in classifiers if (speed := _speed_of(row.model, speeds)) is not None]
    if timed:
        figures["accuracy-speed"] = _draw_accuracy(timed)
    for group, members in _groups(rows).items():
        figures["-".join(("ratio", *group)).translate(_IN_FILE_NAMES)] = _draw_ratios(members, *group)
    return figures


def measured_speeds(rows: Iterable[Row]) -> dict[str, Row]:
    """Return the newest row of each model: one image at a time in float32, no further options, without an error."""
    plain = sorted(_of_one_machine(filter(_is_plain, rows)), key=lambda row: str(row["date"]))
    return {str(row["model"]): row for row in plain}


def _of_one_machine(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of one machine and version of torch: those of several cannot be compared.

    It is the one of the newest row, and of several that were used on that day the one with the most rows.
    """
    groups: dict[tuple[Value, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _MACHINE), []).append(row)
    return max(groups.values(), key=lambda group: (max(str(row["date"]) for row in group), len(group)), default=[])


def images_per_second(row: Row) -> float:
    """Return the throughput of a row by its median step, which a busy neighbour moves less than timm's mean."""
    return 1e3 * _number(row, "infer_batch_size") / _number(row, "infer_step_time_median")


def _is_plain(row: Row) -> bool:
    if not row.keys() >= _OF_SPEEDS:
        return False
    asked = [row[name] for name in ("precision", "infer_batch_size", "options", "error")]
    return asked == ["float32", "1", "", ""] and bool(row["infer_step_time_median"]) and not _other_size(row)


def _speed_of(name: str, speeds: dict[str, Row]) -> Row | None:
    """Return the row of a checkpoint, or else that of its architecture, which is the same network but for the head."""
    return speeds.get(name) or speeds.get(split_name(name)[0])


def _other_size(row: Row) -> str:
    """Return the input size of a row if it is not the model's own."""
    name, size = str(row["model"]), str(row["input_size"])
    return "" if is_model(name) and size == costs.input_size(find(name).config) else size


def _save(figure: "Figure", stem: Path) -> list[Path]:
    """Write a picture as PNG and SVG."""
    from matplotlib import rc_context

    paths = []
    for suffix, options in ((".png", {"dpi": 160}), (".svg", {"metadata": {"Date": None}})):
        paths.append(stem.with_name(stem.name + suffix))
        # Letters stay letters, and drawn again from the same rows, a file does not change.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "beitzoo"}):
            save = functools.partial(
                figure.savefig, format=suffix[1:], bbox_inches="tight", facecolor="white", **options
            )
            write_atomically(paths[-1], save)
    return paths


def _draw_accuracy(speeds: Sequence[tuple[Accuracy, Row]]) -> "Figure":
    figure, axes = _canvas(8.6, 5.4)
    labels = []
    for row, speed in speeds:
        _, colour, marker = _FAMILIES[row.model.partition("_")[0]]
        x, y = images_per_second(speed), row.top1 or 0.0
        axes.plot(x, y, marker, color=colour, markersize=7, markeredgecolor="white", zorder=3)
        labels.append((x, y, _short(row.model), colour))
    for title, colour, marker in _FAMILIES.values():
        axes.plot([], [], marker, color=colour, markersize=7, label=title)
    axes.set_xscale("log")
    rates = [images_per_second(speed) for _, speed in speeds]
    axes.set_xlim(min(rates) / 2.5, max(rates) * 5)  # room for the labels of the outermost points
    axes.margins(y=0.12)
    _plain_ticks(axes, rates)
    axes.set_xlabel("images per second by the median step, one at a time, float32 (logarithmic)")
    axes.set_ylabel("ImageNet top-1, % (published)")
    axes.set_title("Accuracy against speed", loc="left", color=_INK, fontweight="bold")
    axes.legend(frameon=False, loc="upper right")
    _place_labels(figure, axes, labels)
    _caption(axes, [speed for _, speed in speeds])
    return figure


def _draw_ratios(rows: Sequence[Row], bench: str, precision: str, subject: str) -> "Figure":
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    peers = [peer for peer in _LOOKS if any(row["peer"] == peer for row in rows)]
    figure, axes = _canvas(8.6, 1.6 + len(models) * (0.22 + 0.14 * len(peers)))
    step = 0.8 / max(len(peers), 1)
    for row in rows:
        peer = str(row["peer"])
        colour, marker = _LOOKS[peer]
        y = models.index(str(row["model"])) + step * (peers.index(peer) - (len(peers) - 1) / 2)
        if row["ratio_low"]:
            axes.plot([_number(row, "ratio_low"), _number(row, "ratio_high")], [y, y], color=colour, linewidth=1.6)
        axes.plot(_number(row, "ratio"), y, marker, color=colour, markersize=6, markeredgecolor="white")
        _say_errors(axes, row, y)
    for peer in peers:
        axes.plot([], [], _LOOKS[peer][1], color=_LOOKS[peer][0], label=peer)
    axes.axvline(1, color=_INK, linewidth=1, zorder=1)
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    for line in range(1, len(models)):
        axes.axhline(line - 0.5, color=_FAINT, linewidth=0.6, zorder=0)
    ratios = [_number(row, "ratio") for row in rows]
    if max(ratios) > 4 * min(ratios):
        axes.set_xscale("log")
        _plain_ticks(axes, [*ratios, 1.0])
    axes.set_xlabel(f"time of the peer / time of {subject} (right of 1: {subject} is faster)")
    what = "Training step" if bench == "train" else "Inference"
    axes.set_title(f"{what}, {precision}: {subject} against its peers", loc="left", color=_INK, fontweight="bold")
    off = any(map(_is_off, rows))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.22 if off else 1.01, 1))
    errors = " Off by: largest error of an output against float32, as a share of the largest output." if off else ""
    _caption(axes, rows, f"Medians of ratios in interleaved rounds, with their 95 % intervals.{errors}")
    return figure


def _is_off(row: Row) -> bool:
    return max(_number(row, "peer_error"), _number(row, "subject_error")) > _ROUNDING


def _say_errors(axes: "Axes", row: Row, y: float) -> None:
    """Write beside a ratio how far off both outputs are, if they are so by more than rounding."""
    theirs, ours = _number(row, "peer_error"), _number(row, "subject_error")
    if _is_off(row):
        axes.annotate(
            f"off by {100 * theirs:.1f} %, ours {100 * ours:.1f} %",
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color="#555555",
        )


def _groups(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Group ratios by bench, precisions and subject, each group of one machine; a later row replaces an earlier one."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.keys() >= _OF_RATIOS and row["ratio"] and row["peer"] in _LOOKS:
            ours, theirs = str(row["subject_precision"]), str(row["precision"])
            precision = ours if ours == theirs else f"{ours} against {theirs}"
            groups.setdefault((str(row["bench"]), precision, str(row["subject"])), []).append(row)
    return {group: _latest(_of_one_machine(members)) for group, members in groups.items()}


def _latest(rows: Iterable[Row]) -> list[Row]:
    """Return the last row of each scenario and peer, named by its scenario."""
    latest: dict[tuple[str, str], Row] = {}
    for row in rows:
        size = f" {other}" if (other := _other_size(row)) else ""
        name = f"{row['model']}{size}, batch {row['batch_size']} {row['options']}".rstrip()
        latest[name, str(row["peer"])] = {**row, "model": name}
    return list(latest.values())


def _canvas(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _plain_ticks(axes: "Axes", values: Sequence[float]) -> None:
    """Write numbers, not powers, along a logarithmic axis."""
    from matplotlib.ticker import NullFormatter, NullLocator

    low, high = min(values) / 2, max(values) * 2
    ticks = [digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _place_labels(figure: "Figure", axes: "Axes", labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each label at the first place around its point that covers no other label and no point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(figure).get_renderer()
    points = axes.transData.transform([(x, y) for x, y, _, _ in labels])
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in points]
    for x, y, text, colour in labels:
        for dx, dy, end in _PLACES:
            label = axes.annotate(
                text,
                (x, y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=end,
                va="center",
                fontsize=8,
                color=colour,
            )
            box = label.get_window_extent(renderer)
            if not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        taken.append(box)


def _caption(axes: "Axes", rows: Sequence[Row], note: str = "") -> None:
    """Name the machines and versions of the rows below the picture."""
    machines = dict.fromkeys(f"{row['device']}, {row['threads']} threads, torch {row['torch']}" for row in rows)
    days = sorted({str(row["date"]) for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    text = f"{note}\n{'; '.join(machines)}. {when}.".strip()
    axes.annotate(
        text,
        (0, 0),
        xytext=(0, -44),
        xycoords="axes fraction",
        textcoords="offset points",
        va="top",
        fontsize=8,
        color="#555555",
    )


def _short(model: str) -> str:
    """Say what tells a checkpoint from others of its family: size, pixels, and how it was trained."""
    architecture, tag = split_name(model)
    _, size, _, pixels = architecture.split("_")
    return f"{size} {pixels} {tag}"


def _number(row: Row, name: str) -> float:
    return float(row[name] or 0)
