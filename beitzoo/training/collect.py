"""Finished runs as rows of a table: what was trained, from what, at what cost, and how well it does."""

import csv
import hashlib
import io
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beitzoo.errors import MissingFileError, UserError
from beitzoo.evaluation.subjects import Origin
from beitzoo.files import full_path, read_text
from beitzoo.results import ENVIRONMENT, Row, Value
from beitzoo.training.folder import LOG, METRICS, RECIPE
from beitzoo.training.pretrain_sections import Pretrain, TrainTokenizer
from beitzoo.training.recipe import Recipe, read_resolved
from beitzoo.training.sections import Finetune
from beitzoo.weights.names import find_weights

# What makes two runs draws of the same experiment: all that was asked for but the seeds.
_WHAT = ("task", "model", "overrides", "start", "tokenizer", "teacher", "data", "train_per_class", "train_images")
_HOW = ("trained", "mixup", "cutmix", "ema_decay", "epochs", "updates", "batch_size", "precision", "settings")
_SAME = (*_WHAT, *_HOW)
_SEEDS = ("seed", "split_seed", "label_seed", "start_seed", "tokenizer_seed")
_COST = ("train_seconds", "earlier_seconds", "images_per_sec", "wait_share", "processes")
_RIGHT = ("top1", "top5", "map", "count", "failures", "val_top1", "val_map")
_OF_PIXELS = ("miou", "macc", "aacc", "val_miou")
_OF_TOKENS = ("loss", "val_loss", "token_accuracy", "codes_used", "perplexity", "explained")
COLUMNS = ("run", *_SAME, *_SEEDS, *_RIGHT, *_OF_PIXELS, *_OF_TOKENS, "probe_linear", "probe_knn", *_COST, *ENVIRONMENT)
# A run that is collected again replaces its row.
KEY = ("run",)

# What `start` says of random weights.
SCRATCH = "random"

# What `trained` says of a network no part of which is frozen.
_WHOLE = "all"

# What `settings` does not count: seeds, where things are, and how the work is done.
_NOT_SETTINGS: dict[str, set[str] | bool] = {
    "model": {"name", "checkpoint"},
    "data": {"path", "test_path", "split_seed", "label_seed"},
    "train": {"seed"},
    "run": True,
    "task": {"tokenizer", "tokens", "teacher"},
}


class UnfinishedError(MissingFileError):
    """A folder that holds no finished run."""


@dataclass(frozen=True)
class FinishedRun:
    """What a run left.

    Attributes:
        folder: Where.
        recipe: By which it was trained.
        metrics: The content of `metrics.json`.
        log: The lines of `log.csv`.
    """

    folder: Path
    recipe: Recipe
    metrics: dict[str, Any]
    log: list[dict[str, str]]

    @property
    def seconds(self) -> float:
        """Time spent on its updates."""
        return float(self.metrics["train_seconds"])

    def last(self, name: str) -> Value:
        """Return a value as the log has it last at the end of an epoch; None if it never does."""
        values = [line[name] for line in self.log if line["line"] == "epoch" and line.get(name)]
        return float(values[-1]) if values else None

    def median(self, name: str) -> Value:
        """Return the median of a value over the lines of updates; None if there is none."""
        values = [float(line[name]) for line in self.log if line["line"] == "updates" and line.get(name)]
        return round(statistics.median(values), 4) if values else None


def read_run(folder: Path) -> FinishedRun:
    """Read the folder of a run.

    Raises:
        UnfinishedError: There is no finished run in it.
        RecipeError: Its recipe is damaged, or of another version.
    """
    folder = full_path(folder)
    for name, what in ((RECIPE, "no run"), (METRICS, "not finished")):
        if not (folder / name).is_file():
            raise UnfinishedError(f"{folder} is {what}: it has no {name}. Give the folder of a finished run.")
    log = list(csv.DictReader(io.StringIO(read_text(folder / LOG))))
    return FinishedRun(folder, read_resolved(folder / RECIPE), json.loads(read_text(folder / METRICS)), log)


def row_of(run: FinishedRun, name: str) -> Row:
    """Return the row of a run; `name` is what the row calls it."""
    recipe, metrics = run.recipe, run.metrics
    start, tokenizer = _start_of(run), _tokenizer_of(run)
    earlier = [one.seconds for one in _earlier(run)]
    row: Row = {
        "run": name,
        "task": recipe.task.kind,
        "model": metrics.get("model") or _network(recipe),  # a baseline says what it trained in its place
        "overrides": " ".join(f"{name}={value}" for name, value in sorted(_overrides(recipe).items())) or None,
        "start": _start_name(recipe, start),
        "tokenizer": _tokenizer_name(run, tokenizer),
        "teacher": _teacher(run, tokenizer),
        "data": recipe.data.source if recipe.data.path is None else recipe.data.path.name,
        "train_per_class": recipe.data.train_per_class,
        "label_seed": recipe.data.label_seed,
        "start_seed": None if start is None else start.recipe.train.seed,
        "tokenizer_seed": None if tokenizer is None else tokenizer.recipe.train.seed,
        "earlier_seconds": round(sum(earlier), 3),
        **_how(recipe),
        **{name: getattr(recipe.train, name) for name in ("epochs", "batch_size", "precision", "seed")},
        **{name: run.median(name) for name in ("images_per_sec", "wait_share")},
        **{name: run.last(name) for name in ("loss", "codes_used", "probe_linear", "probe_knn")},
        # Of codes that a tokenizer gives, or that a network in pretraining is asked for.
        "perplexity": run.last("perplexity") or run.last("code_perplexity"),
    }
    measured = (
        "train_images",
        "updates",
        "split_seed",
        "train_seconds",
        "processes",
        "val_top1",
        "val_map",
        "val_miou",
        "val_loss",
    )
    row |= {name: metrics.get(name) for name in (*measured, *ENVIRONMENT)}
    for name in ("top1", "top5", "map", "count", "failures", "miou", "macc", "aacc", "token_accuracy", "explained"):
        row[name] = metrics.get(f"test_{name}", metrics.get(f"val_{name}", run.last(name)))
    return {name: _rounded(row.get(name)) for name in COLUMNS}


def summarise(rows: Sequence[Row]) -> list[str]:
    """Say mean and sample standard deviation of top-1, mAP or mIoU over runs that differ in their seeds only."""
    groups: dict[tuple[str, Experiment], list[float]] = {}
    for row, measure in itertools.product(rows, ("top1", "map", "miou")):
        if row[measure] not in (None, ""):
            groups.setdefault((measure, Experiment.of(row)), []).append(float(row[measure] or 0))
    lines = []
    for (measure, experiment), values in groups.items():
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        lines.append(f"{experiment}: {measure} {statistics.fmean(values):.2f}{spread} (n={len(values)})")
    return lines


def summarise_models(rows: Sequence[Row], column: str, called: str | None = None) -> list[str]:
    """Say mean and sample standard deviation of a measure over models that differ in the seeds of their runs only.

    Other models are nobody's draws, so nothing is said of them: those of no finished run, or of another experiment.

    Args:
        rows: Of models that were measured on the same images, with their `model`; those without a value do not count.
        column: The measure.
        called: What it is called; as the column if None.
    """
    groups: dict[tuple[Value | Path | Experiment, ...], dict[Path, float]] = {}
    for row in rows:
        if row.get(column) in (None, "") or (drawn := _drawn(str(row["model"]))) is None:
            continue
        weights, run = drawn
        same = (Experiment.of(row_of(run, str(run.folder))), weights.relative_to(run.folder.resolve()))
        computed = (row.get("dtype"), row.get("computed_by"))
        groups.setdefault((*same, *computed), {})[weights] = float(row[column] or 0)
    return [
        f"{called or column} {statistics.fmean(found.values()):.2f} ± {statistics.stdev(found.values()):.2f} "
        f"(mean ± sd of {len(found)} runs that differ in seeds only: {experiment})"
        for (experiment, *_), found in groups.items()
        if len(found) > 1
    ]


def _drawn(model: str) -> tuple[Path, FinishedRun] | None:
    """Return the file of a model's weights and the run that trained them; None if they are of no finished run."""
    try:
        weights = next((find_weights(file).resolve() for file in Origin(model).files()), None)
        run = None if weights is None else run_at(weights)
    except UserError:  # a run whose recipe is damaged or of another version is no draw of anything
        return None
    return None if weights is None or run is None else (weights, run)


@dataclass(frozen=True)
class Experiment:
    """All that was asked of a run but its seeds: runs of one experiment are draws of it, whose mean says something.

    Attributes:
        asked: The columns that say it, in order.
    """

    asked: tuple[Value, ...]

    @classmethod
    def of(cls, row: Row) -> "Experiment":
        """Return the experiment of the row of a run."""
        return cls(tuple(row[name] for name in _SAME))

    def __str__(self) -> str:
        facts = dict(zip(_SAME, self.asked, strict=True))
        labels = f"{facts['train_per_class']} labels per class" if facts["train_per_class"] else "all labels"
        origin = f"{facts['start']}" + f" ({facts['tokenizer']})" * bool(facts["tokenizer"])
        return f"{facts['data']}, {labels}, {facts['updates']} updates from {origin}{_methods(facts)}"


def _methods(facts: Row) -> str:
    """Say what a run did beyond training the whole network on single images."""
    parts = [f"{name} {facts[name]}" for name in ("mixup", "cutmix", "ema_decay") if facts[name]]
    if facts["trained"] not in (None, "", _WHOLE):
        parts.insert(0, f"{facts['trained']} trained")
    return "".join(f", {part}" for part in parts)


def run_at(name: str | Path) -> FinishedRun | None:
    """Return the run that a model's or a tokenizer's name points into, if it is finished and there."""
    path = full_path(str(name).removeprefix("local-dir:"))
    if str(name) == path.name and not path.exists():
        return None  # the name of a checkpoint, which is no place in the folder where the command was called
    for folder in (path, *path.parents[:2]):
        if (folder / RECIPE).is_file() and (folder / METRICS).is_file():
            return read_run(folder)
    return None


def _network(recipe: Recipe) -> str:
    """Name the network of a recipe; of one that names a run, with or without its weights, that of the run."""
    named = run_at(recipe.model.name)
    return recipe.model.name if named is None else _network(named.recipe)


def _overrides(recipe: Recipe) -> dict[str, Any]:
    """Return the fields in which a network differs from its architecture, those of the run that it is of among them."""
    named = run_at(recipe.model.name)
    return {**({} if named is None else _overrides(named.recipe)), **recipe.model.overrides}


def _how(recipe: Recipe) -> Row:
    """Say how a network was trained: by the settings that are methods of their own, and a checksum of all."""
    asked = recipe.model_dump(mode="json", exclude=_NOT_SETTINGS, exclude_defaults=True)
    row: Row = {"ema_decay": recipe.train.ema_decay or None}
    row["settings"] = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:7]
    if isinstance(recipe.task, Finetune):
        row["trained"] = _trained(recipe.task)
        row |= {name: getattr(recipe.task, name) or None for name in ("mixup", "cutmix")}
    return row


def _trained(task: Finetune) -> str:
    """Say which part of a network was trained."""
    if task.freeze_blocks == "all":
        return "head"
    parts = [] if task.freeze_blocks is None else [f"from block {task.freeze_blocks}"]
    if task.lora is not None:
        parts.append(f"LoRA of rank {task.lora.rank}")
    return ", ".join(parts) or _WHOLE


def _start_of(run: FinishedRun) -> FinishedRun | None:
    """Return the run that gave a run the weights it started from."""
    model = run.recipe.model
    if model.checkpoint is not None:
        return run_at(model.checkpoint)
    return run_at(model.name) if model.pretrained else None


def _tokenizer_of(run: FinishedRun) -> FinishedRun | None:
    """Return the run that trained the tokenizer by which a run, or the one it started from, was pretrained."""
    if isinstance(run.recipe.task, Pretrain):
        return run_at(run.recipe.task.tokenizer)
    start = _start_of(run)
    return None if start is None else _tokenizer_of(start)


def _earlier(run: FinishedRun) -> Iterator[FinishedRun]:
    """Yield the runs without which this one could not have been: its start's, and that of its tokenizer."""
    start = _start_of(run)
    if start is not None:
        yield start
        yield from _earlier(start)
    elif isinstance(run.recipe.task, Pretrain):
        tokenizer = _tokenizer_of(run)
        if tokenizer is not None:
            yield tokenizer


def _start_name(recipe: Recipe, start: FinishedRun | None) -> str:
    """Say what kind of weights a run started from: the task of the run that they are of, their name, or random."""
    if start is not None:
        return start.recipe.task.kind
    if recipe.model.checkpoint is not None:
        return recipe.model.checkpoint.name
    return recipe.model.name if recipe.model.pretrained else SCRATCH


def _tokenizer_name(run: FinishedRun, tokenizer: FinishedRun | None) -> str | None:
    if tokenizer is not None:
        return tokenizer.recipe.model.name
    if isinstance(run.recipe.task, Pretrain):
        return run.recipe.task.tokenizer
    start = _start_of(run)
    return None if start is None else _tokenizer_name(start, None)


def _teacher(run: FinishedRun, tokenizer: FinishedRun | None) -> str | None:
    for one in (run, tokenizer):
        if one is not None and isinstance(one.recipe.task, TrainTokenizer):
            return one.recipe.task.teacher
    return None


def _rounded(value: Value) -> Value:
    return round(value, 5) if isinstance(value, float) else value
