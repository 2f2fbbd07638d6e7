"""What the loop asks of a task: fine-tuning now; whatever else is trained answers the same questions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import Split

Metrics = dict[str, float]
_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Task(Protocol):
    """A model, its data and its loss.

    All that changes from update to update belongs to the model (buffers too) or is counted, see `CountsItems`, since
    only that is saved for resuming.
    On several processes each has a task of its own.

    Attributes:
        images: All images.
        split: Which are for what.
        updates_per_epoch: Updates in one pass over the training data; the last epoch of a run may have fewer.
        log_names: What `loss` returns besides the loss.
        metric_names: What `validate` returns. Without any, the best model is the last one.
    """

    images: ImageSet
    split: Split
    updates_per_epoch: int
    log_names: tuple[str, ...]
    metric_names: tuple[str, ...]

    def describe(self) -> list[str]:
        """Say in lines what the task found and will do."""

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the groups of the optimizer; `lr_scale` of a group is a factor on the learning rate."""

    def batches(self, update: int) -> Iterator[Any]:
        """Yield this process's batches from an update on (the first is 0), `accumulation` for each, to the run's end.

        What is in them is a pure function of the recipe and the update: it depends on nothing drawn before.
        """

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]:
        """Return the mean loss of a batch, over how many items it is the mean, and other means over the same items.

        Items weigh the same wherever they are: the loss of an update is the mean over those of all its batches. An item
        is an image for classification, a masked patch for masked image modelling.

        A batch without items has a loss of 0 that depends on all parameters: other processes wait for its gradients.
        """

    def count_images(self, batch: Any) -> int:
        """Tell how many images a batch has, which the log gives the speed in; items may be something else."""

    def validate(self, model: nn.Module) -> Metrics:
        """Measure the model. All processes call this and get the same values; none is counted twice.

        Epochs between two validations (`val_epochs` of the recipe) go without this.
        """

    def better(self, metrics: Metrics, best: Metrics) -> bool:
        """Tell whether a model of these metrics is better than the best so far."""

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write the model as people use it; what is in the folder already is replaced file by file."""

    def measure_best(self, directory: Path) -> Metrics:
        """Measure the best model, read back from its folder, once at the end; all processes call this."""


def compute_loss(
    task: Task, model: nn.Module, batch: Any, precision: str, device: torch.device
) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]:
    """Ask a task for its loss in a precision of the recipe; see `Task.loss`."""
    with torch.autocast(device.type, _AUTOCAST[precision], enabled=precision != "fp32"):
        return task.loss(model, batch)


@runtime_checkable
class CountsItems(Protocol):
    """A task that counts while it trains: which codes were targets, how many images could not be read.

    Attributes:
        counts: Whole numbers, which `loss` adds to in place. Each process has its own, and their sum is what counts:
            a run that goes on has all of them in its first process.
    """

    counts: dict[str, Tensor]

    def take_counts(self) -> None:
        """Add up what all processes counted in the epoch, and begin anew; all of them call this once it has ended."""


@runtime_checkable
class EndsEpochs(Protocol):
    """A task that looks at its model after each epoch: pictures, probes, how many codes are in use.

    Attributes:
        epoch_names: What `end_epoch` returns, and the log has columns for.
    """

    epoch_names: tuple[str, ...]

    def end_epoch(self, model: nn.Module, epoch: int, directory: Path) -> Metrics:
        """Look at the model that is saved, in evaluation mode, after each epoch; only the main process calls this.

        What is drawn from global generators here changes nothing in the run.

        Args:
            model: Not wrapped, nor compiled.
            epoch: Counted from 1.
            directory: The folder of the run, for files.

        Returns:
            What goes into the epoch's line of the log. A name that is not due in this epoch is left out.
        """


@runtime_checkable
class Answering(Protocol):
    """A task whose model gives each held-out image an answer that is right or wrong."""

    def write_answers(self, directory: Path) -> None:
        """Write what `measure_best` was answered into the folder of the run; only the main process calls this."""
