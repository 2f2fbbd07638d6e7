"""Both views show the same part of the image, as torchvision's transforms cut and resize it."""

import random

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from beitzoo.images.augment import TwoViews


def photograph() -> Image.Image:
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return coarse.resize((120, 90), Image.Resampling.BICUBIC)


def seed() -> None:
    torch.manual_seed(3)
    random.seed(3)


def test_views_are_torchvisions_of_one_box() -> None:
    image = photograph()
    views = TwoViews(patch_size=(64, 48), token_size=(32, 24), jitter=0.0, hflip=0.0, mean=(0.1, 0.2, 0.3))
    seed()
    patch_view, token_view = views(image)
    seed()
    torch.rand(())  # the flip
    box = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
    expected = F.to_tensor(F.resized_crop(image, *box, [64, 48], InterpolationMode.BICUBIC))
    assert torch.equal(patch_view, F.normalize(expected, [0.1, 0.2, 0.3], [0.5, 0.5, 0.5]))
    assert torch.equal(token_view, F.to_tensor(F.resized_crop(image, *box, [32, 24], InterpolationMode.LANCZOS)))
    assert box != (0, 0, 90, 120)


def test_flip_and_jitter_reach_both_views() -> None:
    image = photograph()
    whole = TwoViews(
        patch_size=(90, 120), token_size=(90, 120), jitter=0.0, hflip=1.0, scale=(1, 1), ratio=(4 / 3, 4 / 3)
    )
    patch_view, token_view = whole(image)
    assert torch.equal(token_view, F.to_tensor(F.hflip(image)))
    assert torch.allclose(patch_view * 0.5 + 0.5, token_view, atol=1e-6)
    jittered = TwoViews(patch_size=(90, 120), token_size=(90, 120), hflip=0.0, scale=(1, 1), ratio=(4 / 3, 4 / 3))
    patch_view, token_view = jittered(image)
    assert torch.allclose(patch_view * 0.5 + 0.5, token_view, atol=1e-6)
    assert (token_view - F.to_tensor(image)).abs().max() > 0.05


def test_views_are_a_function_of_the_seed() -> None:
    views = TwoViews()
    seed()
    first = views(photograph())
    seed()
    second = views(photograph())
    assert first[0].shape == (3, 224, 224) and first[1].shape == (3, 112, 112)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], views(photograph())[0])
