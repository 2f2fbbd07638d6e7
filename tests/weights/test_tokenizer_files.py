"""Released tokenizers load strictly from files in their authors' form, and become safetensors once."""

import argparse
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import run
from fake_hub import FakeHub
from huggingface_hub import constants
from torch import Tensor

from beitzoo import (
    CheckpointError,
    DownloadError,
    create_model,
    create_tokenizer,
    save_pretrained,
    save_tokenizer,
)
from beitzoo.models.tokenizers import Dvae, Vqkd
from beitzoo.weights import sources
from beitzoo.zoo.checkpoints import ReleaseFile, WebFile
from beitzoo.zoo.tokenizers import TOKENIZERS, TokenizerFile, find_tokenizer

# A package with OpenAI's class names, that exists only where the pickles are written. The module tree and the names of
# the parameters are those of the released files; what is computed does not matter here.
DALL_E = """
import sys, types, torch
from collections import OrderedDict
from torch import nn

class Conv2d(nn.Module):
    def __init__(self, n_in, n_out, kw):
        super().__init__()
        self.n_in, self.kw, self.use_float16, self.device = n_in, kw, True, torch.device("cpu")
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw), requires_grad=False)
        self.b = nn.Parameter(torch.randn(n_out), requires_grad=False)

class Block(nn.Module):
    def __init__(self, n_in, n_out, kernels):
        super().__init__()
        hid = n_out // 4
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        steps = zip([n_in, hid, hid, hid], [hid, hid, hid, n_out], kernels)
        self.res_path = nn.Sequential(OrderedDict(
            item for i, (a, b, k) in enumerate(steps, 1)
            for item in ((f"relu_{i}", nn.ReLU()), (f"conv_{i}", Conv2d(a, b, k)))
        ))

class EncoderBlock(Block): pass
class DecoderBlock(Block): pass

def groups(widths, kernels, block, resize):
    for g, (a, b) in enumerate(zip(widths, widths[1:]), 1):
        layers = [("block_1", block(a, b, kernels))] + ([resize] if g < 4 else [])
        yield f"group_{g}", nn.Sequential(OrderedDict(layers))

class Encoder(nn.Module):
    def __init__(self, n, vocab):
        super().__init__()
        self.blocks = nn.Sequential(OrderedDict([
            ("input", Conv2d(3, n, 7)),
            *groups([n, n, 2 * n, 4 * n, 8 * n], (3, 3, 3, 1), EncoderBlock, ("pool", nn.MaxPool2d(kernel_size=2))),
            ("output", nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(8 * n, vocab, 1)))),
        ]))

class Decoder(nn.Module):
    def __init__(self, first, n, vocab):
        super().__init__()
        self.blocks = nn.Sequential(OrderedDict([
            ("input", Conv2d(vocab, first, 1)),
            *groups([first, 8 * n, 4 * n, 2 * n, n], (1, 3, 3, 3), DecoderBlock, ("upsample", nn.Upsample(None, 2))),
            ("output", nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(n, 6, 1)))),
        ]))

parts = {"utils": (Conv2d,), "encoder": (Encoder, EncoderBlock), "decoder": (Decoder, DecoderBlock)}
for part, classes in parts.items():
    name = f"dall_e.{part}"
    module = sys.modules[name] = types.ModuleType(name)
    for kind in classes:
        kind.__module__ = name
        setattr(module, kind.__name__, kind)
sys.modules["dall_e"] = types.ModuleType("dall_e")
torch.manual_seed(0)
for part, module in (("encoder", Encoder(8, 64)), ("decoder", Decoder(8, 8, 64))):
    torch.save(module, f"{part}.pkl")
    torch.save(module.state_dict(), f"{part}.expected")
"""


@pytest.fixture(scope="module")
def pickles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dall_e")
    subprocess.run([sys.executable, "-c", DALL_E], cwd=folder, check=True)
    return folder


def expected_dvae(pickles: Path) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor
        for part in ("encoder", "decoder")
        for name, tensor in torch.load(pickles / f"{part}.expected").items()
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_openais_pickles_load_strictly_and_are_converted_once(pickles: Path, tmp_path: Path) -> None:
    files = (pickles / "encoder.pkl", pickles / "decoder.pkl")
    released = replace(find_tokenizer("dvae_patch8_112"), config=find_tokenizer("test_dvae").config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TOKENIZERS, "dvae_patch8_112.dalle", released)
        model = create_tokenizer("dvae_patch8_112.dalle", checkpoint_path=files)
        assert isinstance(model, Dvae)
        assert_equal(model.state_dict(), expected_dvae(pickles))
        options = ("--encoder", str(files[0]), "--decoder", str(files[1]))
        result = run("convert-tokenizer", "dvae_patch8_112.dalle", "--out", str(tmp_path / "dvae"), *options)
        assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'dvae'}\n")
        assert "Give both" in run("convert-tokenizer", "dvae_patch8_112", "--out", "x", *options[:2]).stderr
        with pytest.raises(TypeError, match="has 3 files; give one of the whole tokenizer, or its encoder and decoder"):
            create_tokenizer("dvae_patch8_112", checkpoint_path=(*files, "another.pkl"))
    again = create_tokenizer(tmp_path / "dvae", pretrained=True)
    assert_equal(again.state_dict(), expected_dvae(pickles))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.encode(images), model.encode(images))
    assert "dall_e" not in sys.modules


def test_half_a_dvae_is_refused(pickles: Path, tmp_path: Path) -> None:
    torch.save(torch.load(pickles / "encoder.expected"), tmp_path / "dalle_encoder.pth")  # as mmpretrain has it
    with pytest.raises(CheckpointError, match=r"one half of a dVAE only\. Convert OpenAI's two files"):
        create_tokenizer("test_dvae", checkpoint_path=tmp_path / "dalle_encoder.pth")


def unilm_file(model: Vqkd) -> dict[str, object]:
    """Return a checkpoint as unilm's training of a VQ-KD writes it."""
    training = {
        "scaling_layer.shift": torch.zeros(1, 3, 1, 1),
        "teacher_model.visual.proj": torch.randn(8, 4),
        "loss_weight": torch.ones(1),
    }
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {
        "model": {**training, **state},
        "optimizer": {"state": {}},
        "epoch": 99,
        "args": argparse.Namespace(lr=2e-4),
    }


def names_of_unilm(depth: int) -> set[str]:
    """List the tensors of a VQ-KD as `modeling_vqkd.py` and `norm_ema_quantizer.py` name them."""
    block = [f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")]
    block += ["attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"]
    block += [f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")]
    whole = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    whole += ["fc_norm.weight", "fc_norm.bias", *(f"blocks.{index}.{name}" for index in range(depth) for name in block)]
    tasks = [
        f"{half}_task_layer.{i}.{kind}" for half in ("encode", "decode") for i in (0, 2) for kind in ("weight", "bias")
    ]
    codes = [f"embedding.{name}" for name in ("weight", "cluster_size", "embed_avg", "initted")] + ["cluster_size"]
    halves = {f"{half}.{name}" for half in ("encoder", "decoder") for name in whole}
    return halves | set(tasks) | {f"quantize.{name}" for name in codes}


def test_unilms_vqkd_loads_strictly(tmp_path: Path) -> None:
    model = create_tokenizer("test_vqkd")
    assert isinstance(model, Vqkd)
    assert set(model.state_dict()) == names_of_unilm(depth=1)
    document = unilm_file(model)
    torch.save(document, tmp_path / "vqkd.pth")
    again = create_tokenizer("test_vqkd", checkpoint_path=tmp_path / "vqkd.pth")
    assert_equal(again.state_dict(), model.state_dict())
    del document["model"]["quantize.cluster_size"]  # type: ignore[attr-defined]
    torch.save(document, tmp_path / "vqkd.pth")
    with pytest.raises(
        CheckpointError, match=r"(?s)not a checkpoint of this network.*- quantize\.cluster_size \(64,\)"
    ):
        create_tokenizer("test_vqkd", checkpoint_path=tmp_path / "vqkd.pth")


def test_a_release_is_downloaded_and_compared_with_the_hash_in_its_name(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = create_tokenizer("test_vqkd")
    assert isinstance(model, Vqkd)
    torch.save(unilm_file(model), tmp_path / "vqkd.pth")
    content = (tmp_path / "vqkd.pth").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    fake_hub.files[f"vqkd-{sha256[:8]}.pth"] = fake_hub.files["vqkd-00000000.pth"] = content
    monkeypatch.setattr(ReleaseFile, "url", property(lambda self: f"{fake_hub.address}/files/{self.filename}"))
    name, cache = "test_vqkd", ("--cache-dir", str(tmp_path / "cache"))

    def release(prefix: str) -> None:
        source = ReleaseFile("BEiT-v2", f"vqkd-{prefix}.pth", sha256_prefix=prefix)
        row = replace(find_tokenizer(name), files=(TokenizerFile(sources=(source,)),), name=None)
        monkeypatch.setitem(TOKENIZERS, name, row)

    release(sha256[:8])
    assert run("verify", name, *cache).stdout == "not downloaded  test_vqkd\n"
    loaded = create_tokenizer(name, pretrained=True, cache_dir=tmp_path / "cache")
    assert_equal(loaded.state_dict(), model.state_dict())
    assert "unverified" not in caplog.text
    copy = tmp_path / "cache" / "beitzoo" / "BEiT-v2" / f"vqkd-{sha256[:8]}.pth"
    assert run("download", "test_v*", *cache).stdout == f"test_vqkd  {copy}\n"
    result = run("verify", name, *cache)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"prefix matches  test_vqkd  {copy}\n    its sha256 begins with {sha256[:8]}")
    assert f"nobody states the rest of {sha256}" in result.stdout
    copy.write_bytes(content[:-1] + b"?")
    assert run("verify", name, *cache).stdout.startswith("damaged")
    release("00000000")
    with pytest.raises(DownloadError, match=rf"its sha256 is {sha256}, and must begin with 00000000\. Delete it"):
        create_tokenizer(name, pretrained=True, cache_dir=tmp_path / "cache")


def test_the_two_files_of_a_dvae_are_downloaded(
    pickles: Path, fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for part in ("encoder", "decoder"):
        fake_hub.files[f"{part}.pkl"] = (pickles / f"{part}.pkl").read_bytes()
        files.append(TokenizerFile(sources=(WebFile(f"{fake_hub.address}/files/{part}.pkl"),), part=part))
    row = replace(find_tokenizer("test_dvae"), files=tuple(files), name=None)
    monkeypatch.setitem(TOKENIZERS, "test_dvae", row)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=r"files/encoder\.pkl is not in .*offline.*'beitzoo download NAME'"):
        create_tokenizer("test_dvae", pretrained=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert len(run("download", "test_dvae").stdout.splitlines()) == 2
    fake_hub.stop()
    assert_equal(create_tokenizer("test_dvae", pretrained=True).state_dict(), expected_dvae(pickles))
    states = [sources.verify(file.sources[0]).state for file in files]
    assert states == ["unverified", "unverified"]


def test_the_released_files() -> None:
    addresses = [source.url for entry in TOKENIZERS.values() for file in entry.files for source in file.sources]  # type: ignore[union-attr]
    release = "https://github.com/addf400/files/releases/download/BEiT-v2/vqkd_encoder_base_decoder_"
    assert addresses == [
        "https://cdn.openai.com/dall-e/encoder.pkl",
        "https://cdn.openai.com/dall-e/decoder.pkl",
        f"{release}3x768x12_clip-d5036aa7.pth",
        f"{release}1x768x12_clip-d93179da.pth",
        f"{release}1x768x12_dino-663c55d7.pth",
    ]
    for entry in TOKENIZERS.values():
        for file in entry.files:
            for source in file.sources:
                if isinstance(source, ReleaseFile):  # torch.hub's convention: what is behind the last dash
                    assert source.filename.rpartition("-")[2] == f"{source.sha256_prefix}.pth"


def test_models_and_tokenizers_are_not_mixed_up(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'dvae_patch8_112' is an image tokenizer.*create_tokenizer\('dvae_patch8_112'\)"
    ):
        create_model("dvae_patch8_112")
    with pytest.raises(ValueError, match=r"is a model.*create_model\('beit_base_patch16_224'\)"):
        create_tokenizer("beit_base_patch16_224")
    assert run("convert-tokenizer", "random_patch4_32", "--out", str(tmp_path)).exit_code == 0
    with pytest.raises(CheckpointError, match="is an image tokenizer, not a model"):
        create_model(tmp_path)
    facts = json.loads(run("info", str(tmp_path), "--json").stdout)
    assert (facts["tokenizer"], facts["vocab_size"], facts["grid_size"]) == (str(tmp_path), 512, [8, 8])
    assert facts["weights"] == [str(tmp_path / "model.safetensors")]
    save_pretrained(create_model("test_beit"), tmp_path)
    with pytest.raises(CheckpointError, match="is not the config of an image tokenizer"):
        create_tokenizer(tmp_path)
    with pytest.raises(TypeError, match="Got a Linear; an image tokenizer can be saved, alone or inside"):
        save_tokenizer(torch.nn.Linear(2, 2), tmp_path)


def test_list_and_info() -> None:
    assert run("list", "--tokenizers").stdout.split() == list(TOKENIZERS)
    assert run("list", "vqkd*", "--tokenizers").stdout.split() == [name for name in TOKENIZERS if name[:4] == "vqkd"]
    facts = json.loads(run("info", "dvae_patch8_112.dalle", "--json").stdout)
    assert facts == {
        "tokenizer": "dvae_patch8_112.dalle",
        "parameters": 53_786_240 + 43_829_766,
        "input_size": [3, 112, 112],
        "interpolation": "lanczos",
        "grid_size": [14, 14],
        "vocab_size": 8192,
        "decodes_to": "pixels",
        "weights": ["https://cdn.openai.com/dall-e/encoder.pkl", "https://cdn.openai.com/dall-e/decoder.pkl"],
        "license": "Modified MIT",
        "paper": "https://arxiv.org/abs/2102.12092",
    }
    facts = json.loads(run("info", "beit_base_patch16_224.mim_in22k", "--json").stdout)
    assert facts["tokenizer"] == "dvae_patch8_112.dalle"


@pytest.mark.network
@pytest.mark.parametrize("name", [name for name, entry in TOKENIZERS.items() if entry.files])
def test_real_tokenizers_load(name: str) -> None:
    tokenizer = create_tokenizer(name, pretrained=True)
    codes = tokenizer.encode(torch.rand(1, 3, *tokenizer.img_size))
    assert codes.shape == (1, 14, 14)
    assert tokenizer.decode(codes).isfinite().all()
