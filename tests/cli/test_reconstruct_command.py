"""reconstruct: what it draws, and how it fails."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import SAMPLES, run
from PIL import Image

import beitzoo
from beitzoo.files import write_text
from beitzoo.images.masks import Masking
from beitzoo.inference.reconstruct import default_masking, picture, reconstruct
from beitzoo.training.recipe import Recipe, dump_recipe

PHOTO = str(SAMPLES / "chelsea.jpg")
NANO = "beit_nano_patch4_32"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that names its tokenizer, one that does not, and a tokenizer in a folder."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("saved")
    model = beitzoo.create_model(NANO, head="mim", vocab_size=512)
    beitzoo.save_pretrained(model, root / "nameless")
    known = model.backbone.pretrained
    model.backbone.pretrained = replace(known, head=replace(known.head, tokenizer="random_patch4_32"))
    beitzoo.save_pretrained(model, root / "run" / "best")
    beitzoo.save_tokenizer(beitzoo.create_tokenizer("random_patch4_32", vocab_size=512, seed=7), root / "seventh")
    return root


def test_the_picture_is_that_of_the_networks_by_name(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "cat.png"
    digit = str(SAMPLES / "digit_3.png")
    result = run("reconstruct", PHOTO, digit, "-m", str(saved / "run"), "--out", str(out), "--seed", "4")
    assert (result.exit_code, result.stderr) == (0, "")
    model = beitzoo.create_model(str(saved / "run"), pretrained=True)
    records = reconstruct(model, beitzoo.create_tokenizer("random_patch4_32"), [PHOTO, digit], seed=4)
    assert result.stdout.splitlines() == [record.describe() for record in records]
    caption = f"model {saved / 'run'}, tokenizer random_patch4_32, seed 4"
    with Image.open(out) as drawn:
        assert (np.asarray(drawn) == np.asarray(picture(records, caption))).all()


def test_masks_of_a_run_are_drawn_as_in_the_run(saved: Path, tmp_path: Path) -> None:
    model = {"name": NANO}
    train = {"epochs": 1, "batch_size": 1, "lr": 1.0}
    mask = {"kind": "random", "count": 11}
    task = {"kind": "pretrain", "tokenizer": "random_patch4_32", "mask": mask}
    recipe = Recipe.model_validate({"model": model, "data": {"source": "digits"}, "train": train, "task": task})
    write_text(saved / "run" / "recipe.toml", dump_recipe(recipe))
    arguments = ["-m", str(saved / "run"), "--out", str(tmp_path / "a.png")]
    for options, count in ((), 11), (("--masked", "3"), 3):
        drawn = run("reconstruct", PHOTO, *arguments, *options)
        assert f"{count} of 64 patches masked" in drawn.stdout
    (saved / "run" / "recipe.toml").unlink()
    network = beitzoo.create_model(str(saved / "run"), pretrained=True)
    masking = Masking(grid=(8, 8), kind="random", count=3)
    (record,) = reconstruct(network, beitzoo.create_tokenizer("random_patch4_32"), [PHOTO], masking)
    assert drawn.stdout == f"{record.describe()}\n"


@pytest.mark.parametrize(("options", "count"), [((), 24), (("--masked", "7"), 7)])
def test_masks_and_tokenizers_can_be_chosen(options: tuple[str, ...], count: int, saved: Path, tmp_path: Path) -> None:
    tokenizer = str(saved / "seventh")
    arguments = ["-m", str(saved / "nameless"), "--tokenizer", tokenizer, "--out", str(tmp_path / "a.png"), *options]
    result = run("reconstruct", PHOTO, *arguments)
    model = beitzoo.create_model(str(saved / "nameless"), pretrained=True)
    codes = beitzoo.create_tokenizer(tokenizer, pretrained=True)
    (record,) = reconstruct(model, codes, [PHOTO], replace(default_masking((8, 8)), count=count))
    assert record.mask.sum() == count
    assert result.stdout == f"{record.describe()}\n"


def test_what_cannot_be_read_is_listed_and_the_rest_is_drawn(saved: Path, tmp_path: Path) -> None:
    broken, out = tmp_path / "broken.png", tmp_path / "out.png"
    broken.write_bytes(b"broken")
    arguments = ["-m", str(saved / "run"), "--out", str(out)]
    result = run("reconstruct", str(broken), PHOTO, "/absent.png", *arguments)
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 1)
    errors = result.stderr.splitlines()
    assert errors[0].startswith(f"{broken}: not an image that can be read")
    assert errors[1:] == ["/absent.png: there is no such file", "The picture is without 2 of 3 images."]
    before = out.read_bytes()
    nothing = run("reconstruct", str(broken), *arguments)
    assert (nothing.exit_code, nothing.stdout) == (1, "")
    assert "The picture is without 1 of 1 images." in nothing.stderr
    assert out.read_bytes() == before


def test_what_cannot_be_drawn_is_said(saved: Path, tmp_path: Path) -> None:
    def error(*arguments: str, images: tuple[str, ...] = (PHOTO,)) -> str:
        result = run("reconstruct", *images, *arguments, *([] if "--out" in arguments else ["--out", "a.png"]))
        assert result.exit_code == 2
        return result.stderr

    run_folder, nameless = str(saved / "run"), str(saved / "nameless")
    assert "no head that predicts visual tokens. These have one: beit_" in error("-m", f"{NANO}.digits")
    assert "does not say which tokenizer's codes it predicts. Name it with --tokenizer" in error("-m", nameless)
    assert "the tokenizer makes 4 x 4 tokens" in error("-m", nameless, "--tokenizer", _coarse(saved))
    assert "is not called like a PNG file" in error("-m", run_folder, "--out", "a.jpg")
    assert "of 8 x 8 patches, 1 to 64 can be masked" in error("-m", run_folder, "--masked", "65")
    assert "shows 64 images at most" in error("-m", run_folder, images=(PHOTO,) * 65)
    assert not Path("a.png").exists()


def _coarse(saved: Path) -> str:
    beitzoo.save_tokenizer(beitzoo.create_tokenizer("random_patch4_32", img_size=16), saved / "coarse")
    return str(saved / "coarse")
