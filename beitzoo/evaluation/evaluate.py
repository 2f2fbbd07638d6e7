"""How right a classifier is: its accuracy on labelled images that it was not trained on, as a row."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from beitzoo.errors import check
from beitzoo.evaluation.metrics import Accuracy, AccuracySum
from beitzoo.factory import look_up
from beitzoo.files import full_path
from beitzoo.images.datasets import find_images, guess_source
from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import SPLIT_FILE, Split, draw_split, read_split
from beitzoo.images.transforms import resolve_data_config
from beitzoo.inference.classify import check_classifier, classification, eval_mode
from beitzoo.inference.pipeline import Failure, Loading, run_jobs
from beitzoo.models.beit import Beit
from beitzoo.results import ENVIRONMENT, Row, environment
from beitzoo.zoo import costs
from beitzoo.zoo.checkpoints import LocalFile
from beitzoo.zoo.labels import outputs_of
from beitzoo.zoo.registry import DEFAULT_MODEL

_OWN_COLUMNS = (
    "model",
    "img_size",
    "top1",
    "top1_err",
    "top5",
    "top5_err",
    "param_count",
    "crop_pct",
    "interpolation",
    "data",
    "split_seed",
    "count",
    "failures",
)
COLUMNS = [*_OWN_COLUMNS, *ENVIRONMENT]

# Images whose logits are added up at a time.
_ADD_EVERY = 64


@dataclass(frozen=True)
class Subject:
    """A model that is measured, and where its weights are from.

    Attributes:
        model: The classifier.
        name: As in `create_model`; the row has it.
        checkpoint: The file of its weights, where they are not those of the name.
    """

    model: Beit
    name: str
    checkpoint: Path | None = None


@dataclass
class Evaluation:
    """One measurement.

    Attributes:
        row: In timm's columns and with its environment.
        failures: Images that were not counted, with the reason.
        notes: What a reader of the row must know.
    """

    row: Row
    failures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_data(data: str) -> ImageSet:
    """Find the images that are measured on: `digits`, a folder of class folders, or Parquet files.

    Raises:
        InvalidValueError: The images have no classes.
    """
    path = None if data == "digits" else full_path(data)
    images = find_images("digits" if path is None else guess_source(path), path)
    check(images.labels is not None, f"The images of {data} have no classes, so no answer is right; give others.")
    return images


def evaluate(
    subject: Subject, images: ImageSet, data: str, split_seed: int | None = None, loading: Loading | None = None
) -> Evaluation:
    """Measure the accuracy of a classifier on all images that it was not trained on.

    Args:
        subject: The classifier.
        images: Of some or all of its classes. As in timm, all its outputs compete, also those of other classes.
        data: What the row calls the images.
        split_seed: Use the third of the digits that this seed holds out. Without it, images that the model's own run
            trained on are left out; of the digits, where no such run is known, it is seed 0.
        loading: Batch size and threads.

    Raises:
        InvalidValueError: The data has classes that the model has not, or all its images were trained on.
    """
    check_classifier(subject.model, subject.name)
    indices, notes = _unseen_images(subject, images, split_seed)
    outputs = _outputs(subject, images)
    if len(outputs) < subject.model.num_classes:
        notes.append(
            f"{subject.name} tells {subject.model.num_classes:,} classes apart, the data has {len(outputs):,} of them; "
            "all its outputs compete, as in timm."
        )
    assert images.labels is not None
    labels = {index: outputs[images.labels[index]] for index in indices}
    accuracy, failures = measure(subject.model, images, labels, loading or Loading())
    row = {**_facts(subject), **_scores(accuracy), "data": data, "split_seed": split_seed}
    row |= environment(subject.model.cls_token.device)
    return Evaluation({name: row[name] for name in COLUMNS}, failures, notes)


def measure(
    model: Beit, images: ImageSet, labels: dict[int, int], loading: Loading
) -> tuple[Accuracy, list[tuple[str, str]]]:
    """Classify some images of a set, in the model's precision; return its accuracy, and what could not be classified.

    Args:
        model: The classifier; its training mode is kept.
        images: The set.
        labels: For each index of an image that is measured, the right output of the model.
        loading: Batch size and threads.

    Raises:
        InvalidValueError: No image could be classified.
    """
    sums = AccuracySum(model.num_classes)
    failures: list[tuple[str, str]] = []
    pending: list[tuple[torch.Tensor, int]] = []

    def add() -> None:
        if pending:
            sums.add(torch.stack([logits for logits, _ in pending]), torch.tensor([label for _, label in pending]))
            pending.clear()

    job = classification(model, list)
    with eval_mode([model]):
        for index, (outcome,) in run_jobs(labels, [job], loading, lambda index: images.images[index]):
            if isinstance(outcome, Failure):
                failures.append((images.identity(index)[0], outcome.reason))
                continue
            pending.append((outcome, labels[index]))
            if len(pending) == _ADD_EVERY:
                add()
    add()
    sums.add_failures(len(failures))
    return sums.accuracy(), failures


def _facts(subject: Subject) -> Row:
    config = resolve_data_config(subject.model)
    return {
        "model": subject.name if subject.checkpoint is None else str(subject.checkpoint),
        "img_size": config["input_size"][2],
        "param_count": round(costs.parameters(subject.model.config) / 1e6, 2),
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
    }


def _scores(accuracy: Accuracy) -> Row:
    top1, top5 = accuracy.top1, accuracy.top5
    return {
        "top1": round(top1, 3),
        "top1_err": round(100 - top1, 3),
        "top5": None if top5 is None else round(top5, 3),
        "top5_err": None if top5 is None else round(100 - top5, 3),
        "count": accuracy.count,
        "failures": accuracy.failures,
    }


def _unseen_images(subject: Subject, images: ImageSet, split_seed: int | None) -> tuple[list[int], list[str]]:
    """Choose the images that the model was not trained on, nor chosen by; and say what was left out."""
    own = split_of_run(subject, images)
    if split_seed is None and (own is not None or images.root is not None):
        return unseen_images(subject.name, images, own)
    seen = set() if own is None else {*own.train, *own.val}
    held_out = _split_of_digits(images, split_seed or 0).test
    check(
        not seen & set(held_out),
        f"{subject.name} was trained on images that split_seed {split_seed} holds out; leave --split-seed out to "
        "measure it on those that its own run held out.",
    )
    return sorted(held_out), []


def unseen_images(name: str, images: ImageSet, own: Split | None) -> tuple[list[int], list[str]]:
    """Choose the images that are held out and that a model was not trained on; and say what was left out.

    Args:
        name: What notes and errors call the model.
        images: All images.
        own: How the model's own run split them, if that is known.

    Raises:
        InvalidValueError: It was trained on all of them.
    """
    seen = set() if own is None else {*own.train, *own.val}
    shown = images.held_out
    unseen = [index for index in shown if index not in seen]
    check(bool(unseen), f"{name} was trained on all {len(shown):,} images; evaluate it on others.")
    notes = []
    if len(shown) < len(images.images):
        notes.append(f"The data has parts; only the {len(shown):,} images that are held out by their names count.")
    if left_out := len(shown) - len(unseen):
        notes.append(f"Left out {left_out:,} of {len(shown):,} images, which {name} was trained on or chosen by.")
    return unseen, notes


def split_of_run(subject: Subject, images: ImageSet) -> Split | None:
    """Find the split that a model was trained with: in the file that its run wrote; seed 0 for the shipped model."""
    return split_of(subject.name, subject.checkpoint, images)


def split_of(name: str, checkpoint: Path | None, images: ImageSet) -> Split | None:
    """Find the split that the model of a name, or of a file of weights, was trained with; see `split_of_run`."""
    if checkpoint is not None:
        files = [full_path(checkpoint)]
    else:
        entry = look_up(name)
        if entry.name == DEFAULT_MODEL:
            return None if images.root is not None else _split_of_digits(images, 0)
        sources = () if entry.pretrained is None else entry.pretrained.sources
        files = [source.path for source in sources if isinstance(source, LocalFile)]
    splits = [
        folder / SPLIT_FILE
        for file in files
        for place in (file.absolute(), file.resolve())
        for folder in place.parents[:2]
    ]
    return next((read_split(path, images) for path in splits if path.is_file()), None)


def _split_of_digits(images: ImageSet, seed: int) -> Split:
    check(images.root is None, "--split-seed draws a part of the digits, and this is a folder. Leave it out.")
    return draw_split(images, val_fraction=0.1, test_fraction=1 / 3, seed=seed)


def _outputs(subject: Subject, images: ImageSet) -> list[int]:
    """Find the output of the model that stands for each class of the data."""
    model, name = subject.model, subject.name
    own = model.class_names
    if own is None:
        check(
            len(images.names) == model.num_classes,
            f"{name} tells {model.num_classes} classes apart and nobody named them, the data has "
            f"{len(images.names)}; evaluate a model that was trained on these classes.",
        )
    outputs = outputs_of(model.pretrained.head, images.names)
    unknown = [name for name, output in zip(images.names, outputs, strict=True) if output is None]
    check(
        not unknown,
        f"{name} was not trained on {len(unknown)} of the {len(images.names)} classes of the data "
        f"({_some(unknown)}), but on {model.num_classes} ({_some(own or ())}). Name the class folders after the "
        "model's classes, or evaluate a model that was trained on these.",
    )
    return [output for output in outputs if output is not None]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def summarise(rows: Sequence[Row]) -> str:
    """Say mean and sample standard deviation of top-1 over several rows."""
    values = [float(row["top1"]) for row in rows if row["top1"] is not None]
    return f"top1 {statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} (mean ± sd of {len(values)})"
