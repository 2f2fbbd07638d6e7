"""Masks have the statistics of the original's, in every corner, and depend on nothing but seed, epoch and sample."""

import pytest
import torch

from beitzoo.images.masks import Masking, draw_mask, sample_generator


def draw(masking: Masking, count: int) -> torch.Tensor:
    return torch.stack([draw_mask(masking, sample_generator(0, 0, sample)) for sample in range(count)])


def test_block_masks_have_the_originals_statistics() -> None:
    """Figures were measured on the original's generator."""
    masks = draw(Masking(), 50_000)
    counts = masks.flatten(1).sum(1)
    assert counts.double().mean().item() == pytest.approx(74.47, abs=0.05)
    assert counts.min() > 55 and counts.max() == 75
    assert 0.655 < (counts == 75).double().mean() < 0.675
    rates = masks.double().mean(0)
    corners = torch.stack([rates[0, 0], rates[0, -1], rates[-1, 0], rates[-1, -1]])
    assert torch.allclose(corners, torch.full_like(corners, 0.04), atol=0.01)
    edges = torch.stack([rates[0, 6:8].mean(), rates[-1, 6:8].mean(), rates[6:8, 0].mean(), rates[6:8, -1].mean()])
    assert torch.allclose(edges, torch.full_like(edges, 0.19), atol=0.01)
    assert rates[6:8, 6:8].mean().item() == pytest.approx(0.72, abs=0.01)


@pytest.mark.parametrize(
    "masking",
    [
        Masking(exact=True),
        Masking(kind="random", count=80),
        Masking(grid=(5, 9), count=18, min_block=3, exact=True),
        Masking(grid=(8, 8), count=26, min_block=4, max_block=9, exact=True),
    ],
)
def test_exact_masks_have_their_count(masking: Masking) -> None:
    masks = draw(masking, 500)
    assert masks.shape[1:] == masking.grid
    assert (masks.flatten(1).sum(1) == masking.count).all()
    assert masks.double().mean(0).min() > 0  # every patch is masked now and then


def test_all_patches() -> None:
    assert draw_mask(Masking(kind="all"), sample_generator(0, 0, 0)).all()


def test_a_mask_is_that_of_its_seed_epoch_and_sample() -> None:
    masks = {key: draw_mask(Masking(), sample_generator(*key)) for key in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 11)]}
    for key, mask in masks.items():
        assert torch.equal(mask, draw_mask(Masking(), sample_generator(*key)))
        assert not any(torch.equal(mask, other) for name, other in masks.items() if name != key)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, "count=0; of 14 x 14 patches, 1 to 196 can be masked"),
        ({"count": 197}, "count=197"),
        ({"min_block": 0}, "min_block=0"),
        ({"max_block": 0}, "max_block=0"),
        ({"min_aspect": 0}, "min_aspect=0"),
    ],
)
def test_impossible_masks_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Masking(**fields)
