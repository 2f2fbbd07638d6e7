"""Tokenizers by name: created, saved and read again; codes are the same from run to run."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from beitzoo import create_model, create_tokenizer, save_tokenizer
from beitzoo.factory import check_tokenizer
from beitzoo.models.mim import MaskedImageModel
from beitzoo.models.random_tokenizer import RandomTokenizer
from beitzoo.models.tokenizers import Dvae, Vqkd
from beitzoo.zoo.checkpoints import Mim
from beitzoo.zoo.networks import RandomConfig
from beitzoo.zoo.tokenizers import TOKENIZERS, find_tokenizer, override_tokenizer

SMALL = {
    "test_dvae": (Dvae, (32, 32), (4, 4), 64, "lanczos", "pixels"),
    "test_vqkd": (Vqkd, (64, 64), (4, 4), 64, "bicubic", "features"),
    "vqkd_nano_patch4_32": (Vqkd, (32, 32), (8, 8), 512, "bicubic", "features"),
    "random_patch4_32": (RandomTokenizer, (32, 32), (8, 8), 512, "bicubic", "features"),
}


@pytest.mark.parametrize("name", SMALL)
def test_created_by_name_saved_and_read_again(name: str, tmp_path: Path) -> None:
    kind, img_size, grid_size, vocab_size, interpolation, decodes_to = SMALL[name]
    tokenizer = create_tokenizer(name)
    assert type(tokenizer) is kind
    assert not tokenizer.training
    assert (tokenizer.img_size, tokenizer.grid_size, tokenizer.in_chans) == (img_size, grid_size, 3)
    assert (tokenizer.vocab_size, tokenizer.interpolation, tokenizer.decodes_to) == (
        vocab_size,
        interpolation,
        decodes_to,
    )
    images = torch.rand(3, 3, *img_size)
    codes = tokenizer.encode(images)
    assert codes.shape == (3, *grid_size)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, tokenizer.encode(images))  # the same bits in every run
    save_tokenizer(tokenizer, tmp_path / "run" / "best")
    for folder in (tmp_path / "run", tmp_path / "run" / "best"):
        again = create_tokenizer(folder, pretrained=True)
        assert again.config == tokenizer.config
        assert torch.equal(again.encode(images), codes)
        assert torch.equal(again.decode(codes), tokenizer.decode(codes))
    tensors = create_tokenizer(name, checkpoint_path=tmp_path / "run" / "best").state_dict()
    assert all(torch.equal(tensors[key], value) for key, value in tokenizer.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_overrides_keep_both_halves_consistent(name: str) -> None:
    size = tuple(2 * side for side in SMALL[name][1])
    grid = tuple(2 * side for side in SMALL[name][2])
    tokenizer = create_tokenizer(name, img_size=size[0], in_chans=1, vocab_size=20)
    codes = tokenizer.encode(torch.rand(2, 1, *size))
    assert codes.shape == (2, *grid)
    assert tokenizer.vocab_size == 20
    decoded = tokenizer.decode(codes)
    assert len(decoded) == 2
    assert tokenizer.decodes_to == "features" or decoded.shape == (2, 1, *size)


def test_an_autoencoder_decodes_to_pixels() -> None:
    tokenizer = create_tokenizer("vqkd_nano_patch4_32", target="pixels", in_chans=1)
    assert tokenizer.decodes_to == "pixels"
    assert tokenizer.decode(tokenizer.encode(torch.rand(2, 1, 32, 32))).shape == (2, 1, 32, 32)


RUN = """
import sys, torch
from beitzoo import create_tokenizer
torch.set_num_threads(1)
images = torch.load("images.pt")
codes = {name: create_tokenizer(name, pretrained=True).encode(images[name]) for name in images}
torch.save(codes, "codes.pt")
"""


def test_codes_are_the_same_in_another_run(tmp_path: Path) -> None:
    codes, images = {}, {}
    for name in ("test_dvae", "test_vqkd", "random_patch4_32"):
        tokenizer = create_tokenizer(name)
        folder = str(tmp_path / name)
        save_tokenizer(tokenizer, folder)
        images[folder] = torch.rand(8, 3, *tokenizer.img_size)
        codes[folder] = tokenizer.encode(images[folder])
        assert len(codes[folder].unique()) > 1
    torch.save(images, tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, check=True)
    again = torch.load(tmp_path / "codes.pt")
    assert all(torch.equal(again[name], codes[name]) for name in codes)


def test_loaded_weights_are_fitted_to_another_size(tmp_path: Path) -> None:
    tokenizer = create_tokenizer("test_vqkd")
    save_tokenizer(tokenizer, tmp_path)
    larger = create_tokenizer(tmp_path, pretrained=True, img_size=128)
    codes = larger.encode(torch.rand(1, 3, 128, 128))
    assert codes.shape == (1, 8, 8)
    assert larger.decode(codes).shape == (1, 64, 16)
    save_tokenizer(larger, tmp_path / "larger")
    assert create_tokenizer(tmp_path / "larger", pretrained=True).grid_size == (8, 8)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="no tokenizer 'vqkd_nano_patch4_23'; did you mean 'vqkd_nano_patch4_32'"):
        create_tokenizer("vqkd_nano_patch4_23")
    with pytest.raises(TypeError, match="'vocabsize' is not an option of this tokenizer; did you mean 'vocab_size'"):
        create_tokenizer("test_vqkd", vocabsize=3)
    with pytest.raises(ValueError, match="use 32 or 40"):
        create_tokenizer("test_dvae", img_size=36)
    with pytest.raises(ValueError, match="train it with `beitzoo train-tokenizer`"):
        create_tokenizer("vqkd_nano_patch4_32", pretrained=True)


def test_a_file_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    save_tokenizer(create_tokenizer("test_vqkd"), tmp_path)
    with pytest.raises(ValueError, match=r"(?s)not a checkpoint.*~ quantize.embedding.weight: \(64, 8\), expected \(9"):
        create_tokenizer(tmp_path, pretrained=True, vocab_size=9)
    (tmp_path / "config.json").write_text('{"tokenizer_kind": "vqkd", "config": {"vocab_size": 1}}')
    with pytest.raises(ValueError, match="not the config of a tokenizer: encoder: Field required"):
        create_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"tokenizer_kind": "random", "config": {"vocab_size": 99999999}}')
    with pytest.raises(ValueError, match="not built from a file's word"):
        create_tokenizer(tmp_path)


def test_random_codes_are_the_nearest_and_the_same_on_every_machine() -> None:
    config = RandomConfig(img_size=(8, 12), patch_size=(4, 4), vocab_size=30, seed=3)
    tokenizer = RandomTokenizer(config)
    images = torch.rand(2, 3, 8, 12)
    codes = tokenizer.encode(images)
    projection, book = tokenizer.projection.double(), tokenizer.codes.double()
    for row in range(2):
        for column in range(3):
            patch = images[1, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].double().flatten()
            vector = torch.cat([patch - patch.mean(), patch.mean()[None] - 0.5]) @ projection
            cosines = F.cosine_similarity(vector[None], book)
            assert codes[1, row, column] == cosines.argmax()
    assert tokenizer.decode(codes).shape == (2, 6, 16)
    # Written down from one machine: random bits are the generator's, and sums of them are exact.
    assert tokenizer.projection[0, :3].tolist() == [-0.10399645566940308, -1.2802802324295044, 0.23211121559143066]
    assert not torch.equal(tokenizer.codes, RandomTokenizer(replace(config, seed=4)).codes)
    assert 0.97 < tokenizer.projection.std() < 1.03


def test_a_tokenizer_that_is_not_the_models_is_refused() -> None:
    model = create_model("test_beit", head="mim", vocab_size=64)
    assert isinstance(model, MaskedImageModel)
    check_tokenizer(model, create_tokenizer("test_dvae"))
    with pytest.raises(ValueError, match="has 4 x 4 patches, and the tokenizer makes 8 x 8 tokens"):
        check_tokenizer(model, create_tokenizer("test_dvae", img_size=64))
    with pytest.raises(
        ValueError, match=r"64 visual tokens, and the tokenizer has 65; .* make the model with vocab_size=65"
    ):
        check_tokenizer(model, create_tokenizer("test_vqkd", vocab_size=65))
    model.backbone.pretrained = replace(model.pretrained, head=Mim(tokenizer="test_vqkd"))
    with pytest.raises(ValueError, match="Choose the tokenizer of its pretraining 'test_vqkd', or"):
        check_tokenizer(model, create_tokenizer("test_vqkd", vocab_size=65))


def test_the_table_is_complete() -> None:
    assert find_tokenizer("vqkd_encoder_base_decoder_1x768x12").name == "vqkd_encoder_base_decoder_1x768x12.clip"
    for name, entry in TOKENIZERS.items():
        assert entry.name is None
        assert override_tokenizer(entry.config, {}) == entry.config
        assert name.startswith("test_") or (entry.paper or "").startswith("https://arxiv.org/abs/")
