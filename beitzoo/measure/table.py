"""What is known about models, from the zoo's tables and the measurements of this checkout, for people to read."""

from collections import Counter
from pathlib import Path

from beitzoo.results import Row, read_rows
from beitzoo.zoo import costs
from beitzoo.zoo.accuracy import headline
from beitzoo.zoo.checkpoints import Classify, Head, PretrainedConfig, Segment
from beitzoo.zoo.pretrained import PRETRAINED
from beitzoo.zoo.registry import find, split_name

# Measurements are of one machine and no part of the package: they are where the repository is, or nowhere.
RESULTS = Path(__file__).parents[2] / "results"


def model_table() -> str:
    """Return a Markdown table with a row for each checkpoint."""
    lines = [
        "| model | input | parameters | GMACs | classes | top-1 % | images/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(name, row) for name, row in PRETRAINED.items()]
    return "\n".join(lines)


def measured_speed(name: str, results: Path = RESULTS) -> Row | None:
    """Return the newest row about one image at a time in float32 with no further options; None if there is none.

    Only rows of one machine are looked at, that with the most of them, so that models can be compared. A row of the
    checkpoint goes before one of its architecture, which is the same network but for the head.
    """
    rows = [row for row in read_rows(results / "benchmark.csv") if _is_plain(row)]
    machines = Counter((row["device"], row["threads"]) for row in rows)
    if machines:
        (machine, _), *_ = machines.most_common(1)
        rows = [row for row in rows if (row["device"], row["threads"]) == machine]
    for wanted in (name, split_name(name)[0]):
        found = [row for row in rows if row["model"] == wanted]
        if found:
            return max(reversed(found), key=lambda row: str(row["date"]))  # of one day, the last
    return None


def images_per_second(row: Row) -> float:
    """Return the throughput of a row by its median step, which a busy neighbour moves less than timm's mean."""
    return 1e3 * float(row["infer_batch_size"] or 0) / float(row["infer_step_time_median"] or 0)


def _is_plain(row: Row) -> bool:
    config = find(str(row["model"])).config
    size = "x".join(map(str, (config.in_chans, *config.img_size)))
    asked = [row.get(name) for name in ("precision", "infer_batch_size", "options", "input_size", "error")]
    return asked == ["float32", "1", "", size, ""] and bool(row["infer_step_time_median"])  # none in a profile


def _row(name: str, row: PretrainedConfig) -> str:
    config = find(name).config
    cells = [
        f"`{name}`",
        "x".join(map(str, config.img_size)),
        f"{costs.parameters(config) / 1e6:.1f} M",
        f"{costs.macs(config) / 1e9:.2f}",
        _classes(row.head),
        _accuracy(name),
        _speed(name),
    ]
    return f"| {' | '.join(cells)} |"


def _classes(head: Head) -> str:
    match head:
        case Classify():
            return f"{head.num_classes:,}"
        case Segment():
            return f"{head.num_classes} of ADE20K (backbone)"
    return "visual tokens (backbone)"


def _accuracy(name: str) -> str:
    best = headline(name)
    if best is None:
        return ""
    return f"{best.top1:.1f}" if best.top1 is not None else f"mIoU {best.miou:.1f}"


def _speed(name: str) -> str:
    row = measured_speed(name)
    return "" if row is None else f"{images_per_second(row):.3g}"
