"""A convolution of resized maps gives what its steps give, without them."""

import pytest
import torch
from oracles import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.models import convolutions
from beitzoo.models.convolutions import convolve_joined


def joined(maps: list[Tensor]) -> Tensor:
    size = maps[0].shape[2:]
    return torch.cat([F.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in maps], dim=1)


SIZES = [
    [(8, 12), (4, 6), (2, 3), (1, 1)],  # of a pyramid, down to a single pixel
    [(7, 5), (3, 2), (2, 1)],  # no whole factors
    [(4, 4), (4, 4), (6, 9)],  # nothing to resize, and larger
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kernel", [1, 3, (3, 5)], ids=str)
@pytest.mark.parametrize("batch", [0, 2])
def test_outputs_and_gradients_are_those_of_the_steps(sizes, kernel, batch: int) -> None:
    maps = [torch.randn(batch, 3 + level, *size, requires_grad=True) for level, size in enumerate(sizes)]
    conv = nn.Conv2d(sum(one.shape[1] for one in maps), 6, kernel, padding="same")
    inputs = [*maps, *conv.parameters()]
    y, expected = convolve_joined(conv, maps), conv(joined(maps))
    assert y.shape == expected.shape
    with torch.no_grad():
        in_place = convolve_joined(conv, maps)
    if not batch:
        return
    assert relative_error(y, expected) < 1e-6
    assert torch.equal(in_place, y)
    weight = torch.randn_like(y)
    found = torch.autograd.grad((y * weight).sum(), inputs)
    for ours, theirs in zip(found, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("trained", [False, True])
def test_precision_and_memory_format_are_those_of_the_steps(trained: bool) -> None:
    maps = [torch.randn(2, 4, *size).contiguous(memory_format=torch.channels_last) for size in SIZES[0]]
    conv = nn.Conv2d(16, 6, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(trained):
        exact = conv(joined(maps))
        assert relative_error(convolve_joined(conv, maps), exact) < 1e-6
        with torch.autocast("cpu", torch.bfloat16):
            cast = convolve_joined(conv, maps)
        conv.bfloat16()
        half = convolve_joined(conv, [one.bfloat16() for one in maps])
    for y in (cast, half):
        assert y.dtype == torch.bfloat16
        assert relative_error(y, exact) < 2e-2


def test_a_convolution_that_somebody_watches_is_called() -> None:
    maps = [torch.randn(1, 2, *size) for size in SIZES[1]]
    conv, seen = nn.Conv2d(6, 3, 3, padding=1), []
    y = convolve_joined(conv, maps)
    conv.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    assert relative_error(convolve_joined(conv, maps), y) < 1e-6
    assert torch.equal(seen[0], joined(maps))


def test_the_large_maps_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = [torch.randn(1, 2, *size) for size in SIZES[0]]
    conv = nn.Conv2d(8, 3, 3, padding=1)
    for name in ("resize", "torch.cat"):
        monkeypatch.setattr(f"{convolutions.__name__}.{name}", None)
    assert convolve_joined(conv, maps).shape == (1, 3, 8, 12)
