"""Reconstructions: panels against what the networks say when they are asked directly."""

import copy
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from commands import SAMPLES
from oracles import randomise
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import beitzoo
from beitzoo.images import pictures
from beitzoo.images.masks import Masking, draw_mask, sample_generator
from beitzoo.inference.pipeline import Failure
from beitzoo.inference.reconstruct import (
    Reconstruction,
    default_masking,
    picture,
    reconstruct,
    write_reconstructions,
)
from beitzoo.models.mim import MaskedImageModel

SMALL = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}
PHOTOS = [SAMPLES / "chelsea.jpg", SAMPLES / "coffee.jpg"]
MASKING = Masking(grid=(4, 4), count=6, min_block=2, exact=True)


class Levels(nn.Module):
    """A tokenizer that anyone can check: the mean of a patch of 8 x 8 pixels, rounded to one of several levels."""

    img_size: Final = (32, 32)
    in_chans: Final = 3
    grid_size: Final = (4, 4)
    vocab_size: Final = 40
    interpolation: Final = "bicubic"
    decodes_to: Final = "pixels"

    def encode(self, images: Tensor) -> Tensor:
        return (F.avg_pool2d(images, 8).mean(1) * 39).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        patches = (codes / 39).repeat_interleave(8, 1).repeat_interleave(8, 2)
        return patches[:, None].expand(-1, 3, -1, -1)


@pytest.fixture(scope="module")
def model() -> MaskedImageModel:
    torch.manual_seed(0)
    model = beitzoo.create_model("beit_base_patch16_224.mim_in22k", **SMALL, vocab_size=40)
    assert isinstance(model, MaskedImageModel)
    randomise(model)
    return model


def records(model: MaskedImageModel, tokenizer: nn.Module, **options: object) -> list[Reconstruction]:
    outcomes = reconstruct(model, tokenizer, PHOTOS, MASKING, **options)
    assert all(isinstance(outcome, Reconstruction) for outcome in outcomes)
    return outcomes


def test_tokens_and_losses_are_those_of_the_networks(model: MaskedImageModel) -> None:
    transform = beitzoo.create_transform(**beitzoo.resolve_data_config(model))
    for place, record in enumerate(records(model, Levels(), seed=5)):
        view = transform(beitzoo.open_image(PHOTOS[place]))[None]
        mask = draw_mask(MASKING, sample_generator(5, 0, place, "mask"))
        assert (record.mask == mask.numpy()).all() and record.mask.sum() == 6
        # The same centre at half the size: a level more or less at most, of those that are not on an edge.
        coarse = F.avg_pool2d(view[0] * 0.5 + 0.5, 16).mean(0) * 39
        assert (torch.from_numpy(record.ids) - coarse).abs().max() < 1
        with torch.no_grad():
            logits = model.eval()(view, mask[None])
        ids = torch.from_numpy(record.ids)
        losses = F.cross_entropy(logits, ids[mask], reduction="none")
        assert record.losses[record.mask] == pytest.approx(losses.numpy(), rel=1e-4)
        assert np.isnan(record.losses[~record.mask]).all()
        assert record.loss == pytest.approx(losses.mean().item(), rel=1e-4)
        assert (record.predicted[record.mask] == logits.argmax(-1).numpy()).all()
        assert (record.predicted[~record.mask] == record.ids[~record.mask]).all()
        for decoded, codes in zip(record.decoded, (record.predicted, record.ids), strict=True):
            expected = Levels().decode(torch.from_numpy(codes)[None])[0].permute(1, 2, 0)
            assert (np.asarray(decoded) == (255 * expected).round().numpy()).all()
        assert (np.asarray(record.image) == ((view[0] * 0.5 + 0.5) * 255).round().permute(1, 2, 0).numpy()).all()


def panels(whole: Image.Image, rows: int, side: int) -> np.ndarray:
    """Cut the panels out of a picture, (rows, columns, side, side, 3): the last rows before the scale."""
    pixels = np.asarray(whole)
    tops = _starts(pixels, side, rows)
    lefts = [16 + (side + 8) * column for column in range(5)]
    return np.stack([[pixels[y : y + side, x : x + side] for x in lefts] for y in tops])


def _starts(pixels: np.ndarray, side: int, rows: int) -> list[int]:
    """Find the rows of panels: where the last column, which has no text on its right end, is not white."""
    inked = (pixels[:, 16 + 5 * side + 4 * 8 - 1] < 250).any(axis=-1)
    starts = [y for y in range(1, len(inked)) if inked[y] and not inked[y - 1] and inked[y : y + side].all()]
    assert len(starts) == rows
    return starts


def test_every_panel_of_the_picture_is_in_its_place(model: MaskedImageModel) -> None:
    found = records(model, Levels())
    drawn = panels(picture(found), rows=2, side=256)
    for record, row in zip(found, drawn, strict=True):
        image = np.asarray(record.image).repeat(4, axis=0).repeat(4, axis=1)
        mask = record.mask.repeat(64, axis=0).repeat(64, axis=1)
        assert (row[0] == image).all()
        assert (row[1][mask] == pictures.MASKED).all() and (row[1][~mask] == image[~mask]).all()
        for panel, decoded in zip(row[2:4], record.decoded, strict=True):
            assert (panel == np.asarray(decoded).repeat(8, axis=0).repeat(8, axis=1)).all()
        inside = record.mask.repeat(64, axis=0).repeat(64, axis=1)
        hottest = np.unravel_index(np.nanargmax(record.losses), (4, 4))
        lightness = (row[4] @ (0.2126, 0.7152, 0.0722))[32::64, 32::64]  # of the middle of each patch
        assert np.unravel_index(np.where(record.mask, lightness, -1).argmax(), (4, 4)) == hottest
        assert (row[4][~inside].max(axis=-1) == row[4][~inside].min(axis=-1)).all()  # grey
    both = np.concatenate([record.losses.ravel() for record in found])
    hottest = np.nanargmax(both)
    middle = drawn[hottest // 16, 4, 64 * (hottest % 16 // 4) + 32, 64 * (hottest % 4) + 32]
    assert tuple(middle) == (253, 231, 37)  # the scale ends at the largest loss of all


@pytest.mark.parametrize("name", ["test_vqkd", "random_patch4_32"])
def test_codes_without_pixels_are_drawn_in_colour(name: str, model: MaskedImageModel) -> None:
    tokenizer = beitzoo.create_tokenizer(name, img_size=64 if name == "test_vqkd" else 16, vocab_size=40)
    randomise(tokenizer)
    tokenizer.codebook.data = F.normalize(tokenizer.codebook.data)
    found = records(model, tokenizer)
    whole = picture(found)
    drawn = panels(whole, rows=2, side=256)
    colours = pictures.code_colours(tokenizer.codebook.double().numpy())
    for record, row in zip(found, drawn, strict=True):
        for panel, codes in zip(row[2:4], (record.predicted, record.ids), strict=True):
            assert (panel == colours[codes].repeat(64, axis=0).repeat(64, axis=1)).all()
    data = beitzoo.resolve_data_config(model) | {"input_size": (3, *tokenizer.img_size)}
    transform = beitzoo.create_transform(**data | {"mean": (0,) * 3, "std": (1,) * 3})
    with torch.no_grad():
        features = F.normalize(tokenizer.features(transform(beitzoo.open_image(PHOTOS[0]))[None])[0], dim=-1)
    angles = (features @ tokenizer.codebook.T).numpy()
    assert found[0].nearness.ravel() == pytest.approx(angles.max(axis=1), abs=1e-5)
    assert (found[0].ids.ravel() == angles.argmax(axis=1)).all()
    commonest = np.bincount(np.concatenate([record.ids.ravel() for record in found])).argmax()
    swatches = np.asarray(whole)[:, 17]
    assert (swatches == colours[commonest]).all(axis=-1).sum() >= 48


def test_neither_modes_nor_generators_are_touched(model: MaskedImageModel, tmp_path: Path) -> None:
    model.train()
    model.backbone.blocks[1].eval()
    before = [module.training for module in model.modules()]
    states = random.getstate(), torch.get_rng_state()
    write_reconstructions(model, Levels(), [Image.open(path) for path in PHOTOS], tmp_path / "new" / "epoch.png", 3)
    assert [module.training for module in model.modules()] == before
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = picture(
        [record for record in reconstruct(model, Levels(), [Image.open(path) for path in PHOTOS], seed=3)]
    )
    with Image.open(tmp_path / "new" / "epoch.png") as written:
        assert (np.asarray(written) == np.asarray(expected)).all()


def test_an_image_that_cannot_be_read_has_its_reason(model: MaskedImageModel, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"broken")
    images = [tmp_path / "broken.png", PHOTOS[0], tmp_path / "absent.png"]
    first, second, third = reconstruct(model, Levels(), images, MASKING)
    assert isinstance(first, Failure) and "not an image" in first.reason
    assert isinstance(third, Failure) and third.reason == "there is no such file"
    assert isinstance(second, Reconstruction) and second.name == "chelsea.jpg"
    write_reconstructions(model, Levels(), images[:1], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(ValueError, match="nothing to draw"):
        picture([])


def test_losses_at_the_ends_of_what_there_is(model: MaskedImageModel) -> None:
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.lm_head.bias, math.nan)
    assert reconstruct(broken, Levels(), PHOTOS) == [Failure("the model's output for it is not finite")] * 2
    (record, _) = records(model, Levels())
    perfect = replace(record, losses=np.where(record.mask, 0.0, math.nan))
    (row,) = panels(picture([perfect]), rows=1, side=256)
    assert (row[4][record.mask.repeat(64, axis=0).repeat(64, axis=1)] == (68, 1, 84)).all()


def test_networks_that_do_not_agree_are_refused(model: MaskedImageModel) -> None:
    class Finer(Levels):
        grid_size: Final = (8, 8)

    class More(Levels):
        vocab_size: Final = 41

    with pytest.raises(ValueError, match="The model has 4 x 4 patches, and the tokenizer makes 8 x 8"):
        reconstruct(model, Finer(), PHOTOS)
    with pytest.raises(ValueError, match="predicts 40 visual tokens, and the tokenizer has 41"):
        reconstruct(model, More(), PHOTOS)
    with pytest.raises(ValueError, match="The mask is one of 14 x 14 patches, and the model has 4 x 4"):
        reconstruct(model, Levels(), PHOTOS, Masking())


def test_default_masks_are_beits_in_proportion() -> None:
    assert default_masking((14, 14)) == Masking(exact=True)
    assert default_masking((8, 8)) == Masking(grid=(8, 8), count=24, min_block=5, exact=True)
    assert default_masking((1, 1)).count == 1
