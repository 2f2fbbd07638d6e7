"""The processes that train together: who this one is, and the few things they tell each other."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """This process among those of its launcher (torchrun, accelerate launch); without one it is alone.

    Accelerate finds the launcher, the device and the backend. Its loaders, optimizers and precision are not used: how
    images are shared out, summed up and rounded is the recipe's business, and must be the same after a restart.

    Attributes:
        rank: Number of this process, from 0.
        count: How many there are.
        device: Where this process computes.
    """

    rank: int
    count: int
    device: torch.device

    @classmethod
    def join(cls) -> "Processes":
        """Join the others. On a machine without a GPU Accelerate must be told that CPUs are meant."""
        state = PartialState(cpu=not torch.accelerator.is_available())
        return cls(state.process_index, state.num_processes, torch.device(state.device))

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a model whose backward pass averages gradients over all processes."""
        if self.count == 1:
            return model
        return DistributedDataParallel(model, device_ids=None if self.device.type == "cpu" else [self.device])

    def without_average(self, model: nn.Module) -> AbstractContextManager[None]:
        """Leave gradients as they are in this process: more are to be added before they are averaged."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """Return the largest of the values that the processes have."""
        return max(self.gather(value))

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        values = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            distributed.barrier()
