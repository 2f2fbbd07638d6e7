"""Many models, each in several precisions: measured one after the other, each row in its table before the next."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from beitzoo.errors import UserError
from beitzoo.evaluation.evaluate import COLUMNS, ClassifierEvaluation, Dtype, Judging, asked, evaluate
from beitzoo.evaluation.subjects import Origin, Subject, images_for
from beitzoo.evaluation.truth import real_labels_of
from beitzoo.images.image_set import ImageSet
from beitzoo.inference.fastest import OPTIMIZED, for_many_images
from beitzoo.inference.pipeline import Loading
from beitzoo.models.beit import Beit
from beitzoo.models.optimize import InferenceBeit, optimize
from beitzoo.results import Row, Table, environment


@dataclass(frozen=True)
class Sweep:
    """What is measured: every model in every precision, on the same images in the same way.

    Attributes:
        models: Names, as in `create_model`.
        dtypes: What they compute in; the weights are those of float32.
        images: The images.
        data: What rows call them.
        judging: What models see, and what counts as right.
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
    checkpoint: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    loading: Loading = field(default_factory=Loading)
    optimized: bool = True

    @property
    def rows(self) -> list[tuple[str, Dtype]]:
        """Model and precision of each row, in order."""
        return [(name, dtype) for name in self.models for dtype in self.dtypes]

    def asked(self, name: str, dtype: Dtype) -> Row:
        """Return what is known of a row before it is measured."""
        row = asked(Origin(name, self.checkpoint), dtype, self.data, self.images, self.judging)
        return {**environment(self.device), **row}

    def count(self, name: str) -> int:
        """Return how many images a model is measured on."""
        indices, _ = images_for(Origin(name, self.checkpoint), self.images, self.judging.split_seed)
        labelling = self.judging.labelling
        return len(real_labels_of(self.images, indices, labelling) if labelling.real_labels else indices)


def run_sweep(
    sweep: Sweep, load: Callable[[str], Beit], table: Table, *, retry_failed: bool = False, again: bool = False
) -> Iterator[tuple[ClassifierEvaluation, bool]]:
    """Measure what is not in the table yet; give each row as soon as it is there, and whether it was before.

    A row is measured anew where there were other images then. Where several rows are asked for, one that cannot be
    measured is a row as well, and its `error` says why.

    Args:
        sweep: What is measured.
        load: Makes the model of a name; called once for each row, as an inference copy takes the model's place.
        table: Where rows are looked for and go; checked already.
        retry_failed: Measure again what failed before.
        again: Measure again whatever is there.

    Raises:
        UserError: The only row cannot be measured.
    """
    for name, dtype in sweep.rows:
        try:
            wanted, count = sweep.asked(name, dtype), sweep.count(name)
            found = None if again else table.find(wanted)
            if found and ((found["error"] and not retry_failed) or _images_in(found) == count):
                yield ClassifierEvaluation(found), True
                continue
            evaluation = _measure(sweep, name, dtype, load(name), count)
        except UserError as error:
            if len(sweep.rows) == 1:
                raise
            row = {**_facts_of_failure(sweep, name, dtype), "error": str(error)}
            evaluation = ClassifierEvaluation({column: row.get(column) for column in COLUMNS})
        table.replace(evaluation.row)
        yield evaluation, False


def _measure(sweep: Sweep, name: str, dtype: Dtype, model: Beit, count: int) -> ClassifierEvaluation:
    if dtype == "float32":
        batch_size = sweep.loading.batch_size
        model = for_many_images(model, count, batch_size, inplace=True) if sweep.optimized else model
    elif dtype == "int8" or sweep.optimized:
        model = optimize(model, "int8" if dtype == "int8" else getattr(torch, dtype), inplace=True)
    else:
        model = model.to(getattr(torch, dtype))
    subject = Subject(model, name, sweep.checkpoint, dtype)
    evaluation = evaluate(subject, sweep.images, sweep.data, sweep.judging, sweep.loading)
    if isinstance(model, InferenceBeit):
        evaluation.notes.append(OPTIMIZED)
    return evaluation


def _facts_of_failure(sweep: Sweep, name: str, dtype: Dtype) -> Row:
    """Return what is known of a row of which even what was asked for may not be."""
    try:
        return sweep.asked(name, dtype)
    except UserError:
        return {**environment(sweep.device), "model": name, "data": sweep.data, "dtype": dtype}


def _images_in(row: Row) -> int:
    return sum(int(row[name] or 0) for name in ("count", "failures"))
