"""Many rows of models that are measured one after the other, each in its table before the next."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch

from beitzoo.errors import UserError
from beitzoo.evaluation.evaluate import ClassifierEvaluation, Dtype, Judging, asked, evaluate
from beitzoo.evaluation.subjects import Evaluation, Origin, Subject, images_for
from beitzoo.evaluation.truth import real_labels_of
from beitzoo.images.image_set import ImageSet
from beitzoo.inference.fastest import COPY, OPTIMIZED, PLAIN, batch_like, for_many_images, pays
from beitzoo.inference.pipeline import Loading
from beitzoo.models.beit import Beit
from beitzoo.models.optimize import InferenceBeit, optimize
from beitzoo.results import Row, Table, environment

Found = TypeVar("Found", bound=Evaluation, covariant=True)


class Planned(Protocol[Found]):
    """A row that may have to be measured."""

    @property
    def known(self) -> Row:
        """Columns that are known even where it cannot be measured."""

    def asked(self) -> Row:
        """Return the columns of its key.

        Raises:
            UserError: It cannot be measured.
        """

    def measure(self) -> Found:
        """Measure it.

        Raises:
            UserError: It cannot be measured.
        """

    def recall(self, row: Row) -> Found:
        """Return what a row says that is there already, or that failed."""


def run_sweep(
    rows: Sequence[Planned[Found]], table: Table, *, retry_failed: bool = False, again: bool = False
) -> Iterator[tuple[Found, bool]]:
    """Measure what is not in the table yet; give each row as soon as it is there, and whether it was before.

    Where several rows are asked for, one that cannot be measured is a row as well, and its `error` says why.

    Args:
        rows: What is asked for.
        table: Where rows are looked for and go; checked already.
        retry_failed: Measure again what failed before.
        again: Measure again whatever is there.

    Raises:
        UserError: The only row cannot be measured.
    """
    for planned in rows:
        known = planned.known
        try:
            known = planned.asked()
            found = None if again else table.find(known)
            if found and not (found["error"] and retry_failed):
                yield planned.recall(found), True
                continue
            evaluation = planned.measure()
        except UserError as error:
            if len(rows) == 1:
                raise
            evaluation = planned.recall({**known, "error": str(error)})
        evaluation.row = table.replace(evaluation.row)
        yield evaluation, False


@dataclass(frozen=True)
class Sweep:
    """Classifiers that are measured: every model in every precision, on the same images in the same way.

    Attributes:
        models: Names, as in `create_model`.
        dtypes: What they compute in; the weights are those of float32.
        images: The images.
        data: What rows call them.
        judging: What models see, and what counts as right.
        load: Makes the model of a name; called once for each row, as an inference copy takes the model's place.
        checkpoint: The file of the weights of the only model, where they are not those of its name.
        device: Where models run.
        loading: Batch size and threads.
        optimized: Let the inference copy compute where that is faster; int8 is always its own.
    """

    models: Sequence[str]
    dtypes: Sequence[Dtype]
    images: ImageSet
    data: str
    judging: Judging
    load: Callable[[str], Beit]
    checkpoint: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    loading: Loading = field(default_factory=Loading)
    optimized: bool = True

    @property
    def rows(self) -> "list[PlannedClassifier]":
        """The rows of every model in every precision, in order."""
        return [PlannedClassifier(self, name, dtype) for name in self.models for dtype in self.dtypes]


@dataclass(frozen=True)
class PlannedClassifier:
    """The row of one model in one precision.

    Attributes:
        sweep: What it is of.
        name: Of the model.
        dtype: What it computes in.
    """

    sweep: Sweep
    name: str
    dtype: Dtype

    @property
    def origin(self) -> Origin:
        """Where its weights are from."""
        return Origin(self.name, self.sweep.checkpoint)

    @property
    def known(self) -> Row:
        """Columns that are known even where it cannot be measured."""
        own = {"model": self.origin.shown, "data": self.sweep.data, "dtype": self.dtype}
        return {**environment(self.sweep.device), **own}

    def asked(self) -> Row:
        """Return the columns of its key; see `evaluate.asked`."""
        sweep = self.sweep
        computing = (self.dtype, COPY if self._by_copy() else PLAIN)
        return {**self.known, **asked(self.origin, computing, sweep.data, sweep.images, sweep.judging)}

    def recall(self, row: Row) -> ClassifierEvaluation:
        """Return what a row says that is there already, or that failed."""
        return ClassifierEvaluation(row)

    def measure(self) -> ClassifierEvaluation:
        """Load and measure the model."""
        sweep = self.sweep
        model = self._computing(sweep.load(self.name))
        subject = Subject(model, self.name, sweep.checkpoint, self.dtype)
        evaluation = evaluate(subject, sweep.images, sweep.data, sweep.judging, sweep.loading)
        if isinstance(model, InferenceBeit):
            evaluation.notes.append(OPTIMIZED)
        return evaluation

    def _by_copy(self) -> bool:
        """Tell whether the inference copy computes: in int8 always, in float32 for many images, unless it may not."""
        if self.dtype == "float32":
            return self.sweep.optimized and pays(self._count(), self.sweep.device)
        return self.sweep.optimized or self.dtype == "int8"

    def _computing(self, model: Beit) -> Beit:
        """Return what computes in the precision in the place of the model, which is not to be used again."""
        sweep, count = self.sweep, self._count()
        if not self._by_copy():
            return model.to(getattr(torch, self.dtype))
        if self.dtype == "float32":
            return for_many_images(model, count, sweep.loading.batch_size, inplace=True)
        stored: torch.dtype | Literal["int8"] = "int8" if self.dtype == "int8" else getattr(torch, self.dtype)
        return optimize(model, stored, inplace=True, images_like=batch_like(model, count, sweep.loading.batch_size))

    def _count(self) -> int:
        """Return how many images the model is measured on."""
        images, judging = self.sweep.images, self.sweep.judging
        indices, _ = images_for(self.origin, images, judging.split_seed)
        is_real = judging.labelling.real_labels is not None
        return len(real_labels_of(images, indices, judging.labelling) if is_real else indices)
