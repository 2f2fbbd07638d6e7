"""Batch norms over the images of all processes, as the original's segmentation has them."""

from typing import Any

import torch
from torch import Tensor, distributed, nn

from beitzoo.training.processes import Processes

_AXES = (0, 2, 3)  # batch, height, width


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes that train together, for CPUs; `nn.SyncBatchNorm` has none for these.

    In evaluation mode it is `nn.BatchNorm2d`, and so are its parameters and buffers.
    """

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "SharedBatchNorm":
        """Make one of a batch norm, with its very parameters and buffers."""
        shared = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta")
        shared._parameters.update(norm._parameters)
        shared._buffers.update(norm._buffers)
        return shared.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to normalised values; B may differ between processes, and be 0 in some.

        Mean and variance are sums over all processes, through which gradients go. Sums are in float32 at least. If all
        processes together have one value per channel, since other images could not be read, it becomes the bias.
        """
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        here = exact.new_tensor([x.numel() // self.num_features])
        *_, count = sums = _sum(torch.cat([exact.sum(_AXES), here]))
        mean = sums[:-1] / count.clamp(min=1)
        centred = exact - _per_channel(mean)
        variance = _sum(centred.square().sum(_AXES)) / count.clamp(min=1)
        self._remember(mean, variance, count)
        normalised = centred * _per_channel(torch.rsqrt(variance + self.eps))
        if self.affine:
            normalised = normalised * _per_channel(self.weight) + _per_channel(self.bias)
        return normalised.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running mean and variance, the unbiased one; a value that is alone, or none, moves nothing."""
        if self.num_batches_tracked is None or self.running_mean is None or self.running_var is None or count < 2:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), share)


def share_norms(model: nn.Module, processes: Processes) -> None:
    """Make the batch norms of a model, in place, those of the images of all processes; of one process they are.

    Names and what is saved stay the same, and in evaluation mode nothing changes.
    """
    if processes.count == 1:
        return
    if processes.device.type != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, SharedBatchNorm.of(child))


def has_batch_norms(model: nn.Module) -> bool:
    """Tell whether what a model gives for an image depends on the others in the batch."""
    return any(isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) for module in model.modules())


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradients[0])


def _sum(values: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(values)
    return total


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]
