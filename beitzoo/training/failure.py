"""An update or a validation that gave no number: what of it is kept, so that it can be done again alone."""

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beitzoo.errors import UserError
from beitzoo.files import write_atomically
from beitzoo.training.generators import generator_states
from beitzoo.training.processes import Processes
from beitzoo.training.state import TrainState, save_state

FAILED = "failed"


class NonFiniteError(UserError, ArithmeticError):
    """A loss, a gradient, a metric or a weight that is no number any more."""


@dataclass(frozen=True)
class Start:
    """What an update started from besides what an optimizer changes, which stays as it was if the update fails.

    Attributes:
        generators: States of the global generators of this process.
        moved: What of the model a forward pass may change: buffers, and parameters that learn without gradients.
        versions: How often these parameters had been written to.
    """

    generators: dict[str, Any]
    moved: dict[str, Tensor]
    versions: dict[str, int]

    @classmethod
    def of(
        cls, model: nn.Module, names: frozenset[str], device: torch.device, before: "Start | None" = None
    ) -> "Start":
        """Copy it; `names` are those of `moved_names`.

        Parameters that nobody wrote to since the start of an update before are not copied again: frozen parts may be
        large. (Buffers are few, and batch norms write to theirs behind the back of PyTorch's count.)
        """
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers() if name in names}
        kept = {name: parameter for name, parameter in model.named_parameters() if name in names}
        versions = {name: parameter._version for name, parameter in kept.items()}
        parameters = {
            name: before.moved[name]
            if before is not None and before.versions.get(name) == versions[name]
            else parameter.detach().clone()
            for name, parameter in kept.items()
        }
        return cls(generator_states(device), {**buffers, **parameters}, versions)

    def restore(self, model: nn.Module) -> None:
        """Give a model back what a forward pass changed."""
        model.load_state_dict(self.moved, strict=False)


def moved_names(model: nn.Module) -> frozenset[str]:
    """Name what of a model's state no gradient changes, so that only a forward pass may."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return frozenset(model.state_dict().keys() - trained)


def keep_failed(
    batches: list[Any] | None, state: TrainState, start: Start, directory: Path, processes: Processes
) -> str:
    """Write `failed/`: the state before the update and the batches of each process; return the command that redoes it.

    The moving average of the weights may be that of a few updates later. All processes call this.

    Args:
        batches: Of this process, in order; None if it was the validation of the state that failed.
        state: Of an update that failed, with parameters and optimizer as they were before it.
        start: What else it started from.
        directory: The folder of the run.
        processes: Those that train together.
    """
    folder = directory / FAILED
    start.restore(state.model)
    if processes.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    save_state(state, folder, processes, start.generators)
    processes.wait()
    write_atomically(folder / f"batches-{processes.rank}.pt", lambda path: torch.save(batches, path))
    processes.wait()
    return f"beitzoo replay {shlex.quote(str(directory))}"
