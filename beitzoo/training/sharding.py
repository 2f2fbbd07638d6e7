"""Networks in shards, a part of every weight for each process (FSDP2), and how they become whole again."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from beitzoo.models.beit import Block
from beitzoo.training.processes import Processes


def shard(model: nn.Module, processes: Processes) -> None:
    """Leave to each process its part of what a network learns, in place; an optimizer is to be made of these parts.

    A forward pass, which all processes must do, fetches one block after the other, and a backward pass leaves the
    gradients of the own parts, averaged over all processes. What is frozen stays whole: it needs neither gradients nor
    moments, and a network may write to it as it goes, as codebooks do.
    """
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for module in [*(module for module in model.modules() if isinstance(module, Block)), model]:
        fully_shard(module, mesh=mesh, ignored_params=frozen)


def outline(model: nn.Module) -> nn.Module:
    """Copy a network without its weights, for `filled`."""
    without = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, without).eval()


@contextmanager
def filled(empty: nn.Module, model: nn.Module) -> Iterator[nn.Module]:
    """While it is entered, give an outline of a network in shards all of its weights; all processes call this."""
    empty.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()}, assign=True)
    try:
        yield empty
    finally:
        nothing = {name: tensor.to("meta") for name, tensor in empty.state_dict().items()}
        empty.load_state_dict(nothing, assign=True)


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor; of one that is whole all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all processes; all of them call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(document: Any, keep: bool) -> Any:
    """Return nested values with whole tensors in the place of those in shards; all processes call this.

    Args:
        document: Of dicts, lists and tuples.
        keep: Whether this process wants them. They are fetched one at a time, and are in main memory then.
    """
    if isinstance(document, DTensor):
        tensor = document.full_tensor()
        return tensor.cpu() if keep else None
    if isinstance(document, dict):
        return {key: gathered(value, keep) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return type(document)(gathered(value, keep) for value in document)
    return document


def parted(tensor: Tensor, like: Tensor | None) -> Tensor:
    """Return this process's part of a tensor that all have whole, if another of its shape is in shards."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
