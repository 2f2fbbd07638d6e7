"""Tokens computed once are the tokenizer's of the same views; what is done stays, and what differs is refused."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import run
from PIL import Image

from beitzoo.factory import create_tokenizer
from beitzoo.files import write_text
from beitzoo.images.augment import TwoViews
from beitzoo.images.datasets import folder_of_images
from beitzoo.images.files import ImageError, as_image
from beitzoo.images.image_set import ImageSet
from beitzoo.images.masks import sample_generator
from beitzoo.images.token_views import MANIFEST, TokenViews
from beitzoo.inference import tokenize as room
from beitzoo.inference.tokenize import TokenJob, tokenize, weights_checksum

VIEWS = TwoViews(patch_size=(64, 64), token_size=(32, 32), scale=(0.3, 1.0))


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    """Seven images, of which the third cannot be read."""
    folder = tmp_path / "images"
    folder.mkdir()
    noise = torch.randint(0, 256, (7, 40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels.numpy()).resize((50, 40 + number)).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"no image")
    return folder_of_images(folder)


def job(images: ImageSet, **changes: object) -> TokenJob:
    name = "random_patch4_32"
    tokenizer = create_tokenizer(name)
    known = TokenJob(
        tokenizer=tokenizer, name=name, images=images, samples=range(6), views=VIEWS, seed=3, count=4, chunk=2
    )
    return replace(known, **changes)  # type: ignore[arg-type]


def test_tokens_are_the_tokenizers_of_the_views_that_a_run_draws(images: ImageSet, tmp_path: Path) -> None:
    asked = job(images)
    tokens = pickle.loads(pickle.dumps(tokenize(asked, tmp_path / "tokens", batch_size=5)))
    for sample in (0, 1, 3, 4, 5):
        image = as_image(images.images[sample])
        for epoch, (view, ids) in enumerate(tokens.views(sample)):
            assert view == VIEWS.draw(*image.size, sample_generator(3, epoch, sample))
            expected = asked.tokenizer.encode(VIEWS.apply(image, view)[1][None])[0]
            assert torch.equal(ids, expected) and ids.dtype == torch.int64 and len(ids.unique()) > 10
            again_view, again = tokens.view(sample, epoch + 4)
            assert again_view == view and torch.equal(again, ids)
    assert [(one.sample, one.name) for one in tokens.unreadable] == [(2, "2.png")]
    with pytest.raises(ImageError, match="not an image"):
        tokens.view(2, 0)
    with pytest.raises(ValueError, match="Image 6 has no tokens"):
        tokens.view(6, 0)
    assert sum(path.stat().st_size for path in (tmp_path / "tokens").glob("0*.npy")) > 6 * 4 * (44 + 2 * 64)


def test_what_is_done_stays_and_the_same_job_goes_on(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = tokenize(job(images), tmp_path / "whole"), tmp_path / "tokens"
    encoded: list[int] = []
    encode = room._encoded

    def stopped(tokenizer: object, pixels: list[torch.Tensor], batch_size: int) -> list[torch.Tensor]:
        encoded.append(len(pixels))
        if len(encoded) == 4:
            raise KeyboardInterrupt
        return encode(tokenizer, pixels, batch_size)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "_encoded", stopped)
    with pytest.raises(KeyboardInterrupt):
        tokenize(job(images), folder, batch_size=4)
    with pytest.raises(ValueError, match=r"are not finished, 2 files are missing; the same command goes on"):
        TokenViews.open(folder)
    tokenize(job(images), folder, batch_size=4)
    assert len(encoded) == 4 + 4  # the last four samples
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in whole.folder.iterdir()
    }
    (folder / "00001.npy").write_bytes((folder / "00001.npy").read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"00001.npy is damaged; the command that made it makes it again"):
        TokenViews.open(folder)
    tokenize(job(images), folder, batch_size=4)
    assert len(encoded) == 8 + 2
    with pytest.raises(ValueError, match=r"other tokens: seed is 3 there and 4 here. Choose another folder"):
        tokenize(job(images, seed=4), folder)
    write_text(folder / MANIFEST, "{}")
    with pytest.raises(ValueError, match=r"manifest.json is damaged, or of another version"):
        TokenViews.open(folder)
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json, so it holds no tokens"):
        TokenViews.open(tmp_path)


def test_tokens_of_anything_else_are_refused(images: ImageSet, tmp_path: Path) -> None:
    tokens = tokenize(job(images, count=1, samples=[5, 0, 1]), tmp_path / "tokens")
    tokens.check(images, [0, 5], replace(VIEWS, patch_size=(96, 96), mean=(0.1,)), 512)
    with pytest.raises(ValueError, match=r"are others: jitter is 0.4 there and 0.1 here"):
        tokens.check(images, [0], replace(VIEWS, jitter=0.1), 512)
    with pytest.raises(ValueError, match=r"of random_patch4_32 with 512 codes, and 64 are wanted"):
        tokens.check(images, [0], VIEWS, 64)
    with pytest.raises(ValueError, match=r"2 of these images have no tokens"):
        tokens.check(images, [0, 3, 4], VIEWS, 512)
    assert images.root is not None
    (images.root / "1.png").write_bytes(b"another image")
    with pytest.raises(ValueError, match=r"of other images than these"):
        tokens.check(images, [0], VIEWS, 512)


def test_the_checksum_of_weights_sees_every_tensor() -> None:
    for name in ("test_dvae", "random_patch4_32"):
        first, second = create_tokenizer(name), create_tokenizer(name)
        second.load_state_dict(first.state_dict())
        assert weights_checksum(first) == weights_checksum(second)
        second.load_state_dict({name: tensor + 1e-3 for name, tensor in first.state_dict().items()})
        assert weights_checksum(first) != weights_checksum(second)


def test_the_command_makes_what_a_recipe_pretrains_on(tmp_path: Path) -> None:
    settings = ["task.tokenizer=random_patch4_32", "data.train_per_class=2", "train.seed=5"]
    options = [option for one in settings for option in ("--set", one)]
    command = ("tokenize", "digits", "--views", "3", "--out", str(tmp_path / "tokens"), *options)
    unfit = run(*command)  # before hours are spent on tokens that no network of the recipe could be trained on
    assert unfit.exit_code == 2 and "The network has in_chans=1" in unfit.stderr
    result = run(*command, "--set", "model.overrides.in_chans=3")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert (printed["images"], printed["views"], printed["unreadable"]) == (20, 3, 0)
    tokens = TokenViews.open(tmp_path / "tokens")
    assert tokens.request.tokenizer == "random_patch4_32" and tokens.request.seed == 5
    assert tokens.request.settings.scale == (0.7, 1.0) and tokens.request.grid == (8, 8)
    assert run("tokenize", "digits", "--views", "0", "--out", str(tmp_path)).exit_code == 2
