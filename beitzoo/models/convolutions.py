"""Convolutions of a pyramid's maps, with less arithmetic and memory than the steps they stand for.

Shapes: B batch, I input channels, O output channels, h w a small map, H W the large one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.models import kernels
from beitzoo.zoo.networks import Pair


def resize(x: Tensor, size: Pair) -> Tensor:
    """Resize maps bilinearly to (height, width); the centres of their corner pixels are not aligned."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def convolve_joined(conv: nn.Module, maps: Sequence[Tensor]) -> Tensor:
    """Resize maps (B, I, h, w) to the size of the first, concatenate and convolve them: (B, O, H, W).

    By `convolve_resized`, so that neither the resized maps nor their concatenation is ever made, if nobody would miss
    the call of the convolution (see `kernels.is_hooked`).
    """
    first, *others = maps
    if not others:
        return conv(first)
    if type(conv) is not nn.Conv2d or kernels.is_hooked(conv):
        size = first.shape[2], first.shape[3]
        return conv(torch.cat([first, *(resize(one, size) for one in others)], dim=1))
    weight, *weights = conv.weight.split([one.shape[1] for one in maps], dim=1)
    y = F.conv2d(first, weight, conv.bias, padding=conv.padding)
    for one, part in zip(others, weights, strict=True):
        y = convolve_resized(y, one, part)
    return y


def convolve_resized(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return y + conv2d(resize(x), weight), (B, O, H, W), for a kernel that keeps the size.

    A convolution is a sum over the places of its kernel: mix the channels as the weight of one place says, and shift
    the map by one place, with zeros beyond its border. Mixing channels is the same before and after resizing, and
    before it there are fewer pixels: for a map half as high and wide, a quarter of the products. Resizing and shifting
    are linear in each direction, so that rows and columns are each one small matrix. This is exact, at borders too.

    Where no gradient is wanted, the sum is made in y.
    """
    (height, width), (kernel_height, kernel_width), maps = x.shape[2:], weight.shape[2:], len(x) * len(weight)
    down = _shifted_resize(height, y.shape[2], kernel_height, y).flatten(0, 1).t()  # (H, kernel h)
    across = _shifted_resize(width, y.shape[3], kernel_width, y)  # (kernel, w, W)
    add = torch.addmm if torch.is_grad_enabled() else Tensor.addmm_
    sums = y.reshape(-1, y.shape[3])  # (B O H, W)
    for column, to_width in zip(weight.unbind(3), across, strict=True):
        mixed = F.conv2d(x, column.transpose(1, 2).flatten(0, 1)[..., None, None])  # (B, O kernel, h, w)
        rows = down.expand(maps, -1, -1) @ mixed.reshape(maps, kernel_height * height, width)  # (B O, H, w)
        sums = add(sums, rows.flatten(0, 1), to_width)
    return sums.view(y.shape)


def _shifted_resize(source: int, target: int, kernel: int, like: Tensor) -> Tensor:
    """Return what resizes a line of pixels and shifts it to the places of a kernel: matrices (kernel, source, target).

    Column t of matrix k says what pixel t + k - kernel // 2 of the resized line is made of; of nothing beyond its ends.
    """
    eye = torch.eye(source, device=like.device)[None]
    line = F.interpolate(eye, size=target, mode="linear", align_corners=False)[0]
    padded = F.pad(line, (kernel // 2, kernel // 2))
    return torch.stack([padded[:, place : place + target] for place in range(kernel)]).to(like.dtype)
