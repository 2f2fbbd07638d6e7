"""How right a classifier is: its accuracy on labelled images that it was not trained on, as a row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from beitzoo.errors import check
from beitzoo.evaluation.label_answers import LabelAnswers
from beitzoo.evaluation.looks import Looks, answer
from beitzoo.evaluation.metrics import AccuracySum, CalibrationSum
from beitzoo.evaluation.subjects import Evaluation, Origin, Subject, images_for
from beitzoo.evaluation.truth import Labelling, Truth, truth_of
from beitzoo.files import full_path
from beitzoo.images.datasets import find_images, guess_source
from beitzoo.images.image_set import ImageSet
from beitzoo.inference.classify import check_classifier, eval_mode
from beitzoo.inference.fastest import computed_by
from beitzoo.inference.pipeline import Failure, Job, Loading, run_jobs
from beitzoo.models.beit import Beit
from beitzoo.results import ENVIRONMENT, Row, environment
from beitzoo.zoo import costs

Dtype = Literal["float32", "bfloat16", "int8"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

_OWN_COLUMNS = (
    "model",
    "img_size",
    "top1",
    "top1_err",
    "top5",
    "top5_err",
    "map",
    "param_count",
    "crop_pct",
    "interpolation",
    "data",
    "data_version",
    "split_seed",
    "count",
    "failures",
    "ece",
    "dtype",
    "computed_by",
    "crop",
    "sizes",
    "flip",
    "outputs",
    "real_labels",
    "weights",
)
COLUMNS = [*_OWN_COLUMNS, *ENVIRONMENT, "error"]
_LOOKS = ("dtype", "computed_by", "crop", "sizes", "flip", "outputs", "real_labels")
_ASKED = ("model", "weights", "data", "data_version", "split_seed", *_LOOKS)
# What makes two rows the same measurement: what was asked for, and where; not when.
KEY = (*_ASKED, *(name for name in ENVIRONMENT if name != "date"))

# Images whose logits are added up at a time.
_ADD_EVERY = 64


@dataclass(frozen=True)
class Judging:
    """How a classifier is measured; the defaults are as in timm.

    Attributes:
        looks: What it sees of an image.
        labelling: What counts as right.
        split_seed: Use the third of the digits that this seed holds out. Without it, images that the model's own run
            trained on are left out; of the digits, where no such run is known, it is seed 0.
    """

    looks: Looks = Looks()  # noqa: RUF009 - a frozen record
    labelling: Labelling = Labelling()  # noqa: RUF009 - a frozen record
    split_seed: int | None = None


@dataclass
class ClassifierEvaluation(Evaluation):
    """One measurement of a classifier, its row in timm's columns.

    Attributes:
        answers: Of each image that was counted the right output and the one that the model gave; none with ReaL labels
            or several labels.
    """

    answers: list[tuple[int, int]] = field(default_factory=list)


def load_data(data: str, real_labels: str | None = None) -> ImageSet:
    """Find the images that are measured on: `digits`, a folder of class folders, a CSV of labels, or Parquet files.

    Args:
        data: Where they are.
        real_labels: What says which answers are right, as in `Labelling`; then folders need not be of classes.

    Raises:
        InvalidValueError: The images have no classes.
    """
    path = None if data == "digits" else full_path(data)
    source = "digits" if path is None else guess_source(path)
    images = find_images("images" if source == "folder" and real_labels else source, path)
    check(
        images.has_classes or real_labels is not None,
        f"The images of {data} have no classes, so no answer is right; give others.",
    )
    return images


def evaluate(
    subject: Subject[Beit], images: ImageSet, data: str, judging: Judging | None = None, loading: Loading | None = None
) -> ClassifierEvaluation:
    """Measure the accuracy of a classifier on all images that it was not trained on.

    Args:
        subject: The classifier.
        images: Of some or all of its classes.
        data: What the row calls the images.
        judging: What it sees, and what counts as right.
        loading: Batch size and threads.

    Raises:
        InvalidValueError: The data has classes that the model has not, or all its images were trained on.
    """
    model, name = subject.model, subject.name
    judging = judging or Judging()
    check_classifier(model, name)
    indices, notes = images_for(subject.origin, images, judging.split_seed)
    truth = truth_of(model, name, images, indices, judging.labelling)
    measured = _measure(model, images, truth, judging.looks.jobs(model, name), loading or Loading())
    row = {
        **environment(model.cls_token.device),
        **asked(subject.origin, (subject.dtype or _dtype_of(model), computed_by(model)), data, images, judging),
        **_facts(model, judging.looks),
        **measured.scores(),
    }
    answers = [] if judging.labelling.real_labels else measured.answers
    return ClassifierEvaluation(
        {column: row.get(column) for column in COLUMNS},
        measured.failures,
        notes + truth.notes,
        model.class_names or images.names,
        answers,
    )


def asked(origin: Origin, computing: tuple[str, str], data: str, images: ImageSet, judging: Judging) -> Row:
    """Return the columns that say what is measured, which are known before it is.

    `weights` is empty where they are those of a name, which do not change.

    Args:
        origin: Of the model.
        computing: What it computes in, and whether the plain network or its inference copy does.
        data: What the row calls the images.
        images: The images.
        judging: What the model sees, and what counts as right.

    Raises:
        InvalidValueError: The model was trained on all images, or on some that the seed holds out.
    """
    looks, labelling = judging.looks, judging.labelling
    indices, _ = images_for(origin, images, judging.split_seed)
    dtype, computed = computing
    return {
        "model": origin.shown,
        "weights": origin.fingerprint(),
        "data": data,
        "data_version": labelling.version(images, indices),
        "split_seed": judging.split_seed,
        "dtype": dtype,
        "computed_by": computed,
        "crop": looks.crop,
        "sizes": " ".join(map(str, looks.sizes)) or None,
        "flip": looks.flip,
        "outputs": labelling.competing(images),
        "real_labels": labelling.real_labels,
    }


@dataclass
class _Measured:
    """What became of the images.

    Attributes:
        accuracy: How many are right.
        calibration: How far probabilities are to be believed.
        answers: The first right output of each image, and what the model gave.
        failures: Images without an answer.
    """

    accuracy: AccuracySum
    calibration: CalibrationSum = field(default_factory=CalibrationSum)
    answers: list[tuple[int, int]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def add(self, logits: Tensor, probabilities: Tensor, right: Tensor) -> None:
        """Count a batch: logits, probabilities and which outputs are right, all (B, outputs)."""
        given, truth = logits.argmax(1), right.int().argmax(1)
        self.accuracy.add_several(logits, right)
        self.calibration.add(probabilities.max(1).values, right.gather(1, given[:, None])[:, 0])
        self.answers += zip(truth.tolist(), given.tolist(), strict=True)

    def scores(self) -> Row:
        """Return the columns of what was measured."""
        self.accuracy.add_failures(len(self.failures))
        accuracy = self.accuracy.accuracy()
        top1, top5 = accuracy.top1, accuracy.top5
        return {
            "top1": round(top1, 3),
            "top1_err": round(100 - top1, 3),
            "top5": None if top5 is None else round(top5, 3),
            "top5_err": None if top5 is None else round(100 - top5, 3),
            "count": accuracy.count,
            "failures": accuracy.failures,
            "ece": round(self.calibration.error(), 3),
        }


@dataclass
class _MeasuredLabels:
    """What became of images with several labels: as `_Measured`, without answers that are one class."""

    parts: list[LabelAnswers] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def add(self, logits: Tensor, _: Tensor, right: Tensor) -> None:
        """Count a batch: logits and which outputs are right, both (B, outputs)."""
        self.parts.append(LabelAnswers.of(range(len(right)), right, logits))

    def scores(self) -> Row:
        """Return the columns of what was measured."""
        scores = LabelAnswers.joined(self.parts, len(self.failures)).scores()
        return {"map": round(scores.map, 3), "count": scores.count, "failures": scores.failures}


def _measure(
    model: Beit, images: ImageSet, truth: Truth, jobs: Sequence[Job[Tensor]], loading: Loading
) -> _Measured | _MeasuredLabels:
    """Classify the images of a truth; what could not be is among the failures."""
    count = model.num_classes if truth.competing is None else len(truth.competing)
    competing = None if truth.competing is None else torch.tensor(truth.competing)
    numbers = range(count) if truth.competing is None else truth.competing
    place = {output: place for place, output in enumerate(numbers)}
    measured = _MeasuredLabels() if truth.all_labels else _Measured(AccuracySum(count))
    pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def add() -> None:
        if pending:
            measured.add(*(torch.stack(column) for column in zip(*pending, strict=True)))
            pending.clear()

    with eval_mode([model]):
        for index, outcomes in run_jobs(truth.right, jobs, loading, lambda index: images.images[index]):
            looks = [outcome for outcome in outcomes if not isinstance(outcome, Failure)]
            if failure := next((outcome for outcome in outcomes if isinstance(outcome, Failure)), None):
                measured.failures.append((images.identity(index)[0], failure.reason))
                continue
            right = torch.zeros(count, dtype=torch.bool)
            right[[place[output] for output in truth.right[index]]] = True
            pending.append((*answer(model, looks, competing), right))
            if len(pending) == _ADD_EVERY:
                add()
    add()
    measured.answers = [(numbers[truth], numbers[given]) for truth, given in measured.answers]
    return measured


def _facts(model: Beit, looks: Looks) -> Row:
    config = max(looks.data_configs(model), key=lambda one: int(one["input_size"][2]))
    return {
        "img_size": config["input_size"][2],
        "param_count": round(costs.parameters(model.config) / 1e6, 2),
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
    }


def _dtype_of(model: Beit) -> str:
    return str(model.cls_token.dtype).removeprefix("torch.")
