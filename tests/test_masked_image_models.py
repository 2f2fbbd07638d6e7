"""Masked image models by name: from every format, back out to it, and on to other uses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from oracles import randomise, relative_error

import beitzoo
from beitzoo import create_model, save_pretrained
from beitzoo.models.mim import MaskedImageModel
from beitzoo.zoo.checkpoints import Classify, Mim
from beitzoo.zoo.pretrained import PRETRAINED

NAMES = [name for name, row in PRETRAINED.items() if isinstance(row.head, Mim)]
SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 12, "img_size": 64, "vocab_size": 40}
V1, V2 = "beit_base_patch16_224.mim_in22k", "beitv2_base_patch16_224.mim_in1k"
# Published, with the norm and the head: v1; counted from the published architecture: v2.
PARAMETERS = {
    "beit_base": 91_965_776,
    "beit_large": 311_534_016,
    "beitv2_base": 106_143_056,
    "beitv2_large": 336_728_512,
}


def build(name: str, **fields: object) -> MaskedImageModel:
    model = beitzoo.create_model(name, **SMALL, **fields).eval()
    assert isinstance(model, MaskedImageModel)
    return randomise(model)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.rand(2, 16) < 0.4
    mask[:, 0] = True
    return torch.randn(2, 3, 64, 64), mask


def logits(model: MaskedImageModel, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(images, mask)
    return output if isinstance(output, torch.Tensor) else torch.stack(output)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_a_masked_image_model(name: str) -> None:
    model = beitzoo.create_model(name, device="meta")
    assert isinstance(model, MaskedImageModel)
    if name != "beit_base_patch16_224.mim_in1k_800e":  # absolute positions, no layer scale
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name.partition("_patch")[0]]
    assert model.pretrained.head == PRETRAINED[name].head
    assert beitzoo.resolve_data_config(model)["mean"] == PRETRAINED[name].data.mean


@pytest.mark.parametrize("name", [V1, V2, "beit_base_patch16_224.mim_in1k_800e"])
@pytest.mark.parametrize("save", ["unilm", "pretrained"])
def test_files_load_strictly_and_save_back(name: str, save: str, tmp_path: Path) -> None:
    model = build(name)
    if save == "unilm":
        beitzoo.save_unilm(model, tmp_path / "file.pth")
        names = torch.load(tmp_path / "file.pth")["model"].keys()
        assert {"lm_head.weight", "cls_token", "norm.weight"} <= names
        again = beitzoo.create_model(name, checkpoint_path=tmp_path / "file.pth", **SMALL)
    else:
        beitzoo.save_pretrained(model, tmp_path / "folder")
        again = beitzoo.create_model(str(tmp_path / "folder"), pretrained=True)
    assert isinstance(again, MaskedImageModel)
    assert again.config == model.config
    images, mask = batch()
    assert torch.equal(logits(again.eval(), images, mask), logits(model, images, mask))


# DiT (https://arxiv.org/abs/2203.02378) has BEiT's layer scale and absolute positions; the 800-epoch BEiT has neither
# layer scale nor tables.
ABSOLUTE = {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": False}
DIT, PT1K = {"head": "mim", **ABSOLUTE, "init_values": 1e-5}, {"head": "mim", **ABSOLUTE, "init_values": 0.0}


@pytest.mark.parametrize("fields", [DIT, PT1K], ids=["DiT", "BEiT for 800 epochs"])
def test_files_with_absolute_positions_load_strictly_and_save_back(fields: dict[str, object], tmp_path: Path) -> None:
    block = ["attn.qkv.weight", "attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2"]
    block += [
        f"{layer}.{kind}"
        for layer in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    names = {"cls_token", "mask_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    names |= {"norm.weight", "norm.bias", "lm_head.weight", "lm_head.bias"}
    names |= {
        f"blocks.{index}.{name}"
        for index in range(12)
        for name in block
        if fields["init_values"] or "gamma" not in name
    }
    source = build("beit_base_patch16_224", **fields)
    state = {name.removeprefix("backbone."): tensor for name, tensor in source.state_dict().items()}
    assert state.keys() == names
    torch.save({"model": state, "optimizer": {}, "epoch": 799}, tmp_path / "original.pth")
    model = beitzoo.create_model(
        "beit_base_patch16_224", checkpoint_path=tmp_path / "original.pth", **SMALL, **fields
    ).eval()
    images, mask = batch()
    expected = logits(source, images, mask)
    assert torch.equal(logits(model, images, mask), expected)
    beitzoo.save_unilm(model, tmp_path / "again.pth")
    assert torch.load(tmp_path / "again.pth")["model"].keys() == names
    beitzoo.save_pretrained(model, tmp_path / "folder")
    assert torch.equal(
        logits(beitzoo.create_model(tmp_path / "folder", pretrained=True).eval(), images, mask), expected
    )
    with pytest.raises(beitzoo.CheckpointError, match=r"- backbone\.rel_pos_bias\.relative_position_bias_table"):
        beitzoo.create_model("beit_base_patch16_224", head="mim", checkpoint_path=tmp_path / "again.pth", **SMALL)


@pytest.mark.parametrize("fields", [{}, DIT, PT1K], ids=["BEiT", "DiT", "BEiT for 800 epochs"])
def test_transformers_loads_what_we_save_and_we_what_it_saves(fields: dict[str, object], tmp_path: Path) -> None:
    model = build("beit_base_patch16_224", **fields) if fields else build(V1)
    beitzoo.save_transformers(model, tmp_path / "ours")
    theirs, report = transformers.BeitForMaskedImageModeling.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images, mask = batch()
    expected = theirs.eval()(images, bool_masked_pos=mask).logits[mask]
    assert relative_error(logits(model, images, mask), expected) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = beitzoo.create_model(str(tmp_path / "theirs"), pretrained=True).eval()
    assert isinstance(again, MaskedImageModel)
    assert relative_error(logits(again, images, mask), expected) < 1e-5


def test_transformers_has_no_patch_aggregation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it has no patch aggregation"):
        beitzoo.save_transformers(build(V2), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [V1, V2])
def test_other_uses_of_the_same_file(name: str, tmp_path: Path) -> None:
    model = build(name)
    beitzoo.save_unilm(model, tmp_path / "file.pth")
    small = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    images, _ = batch()

    def create(**options: object) -> torch.nn.Module:
        return beitzoo.create_model(name, checkpoint_path=tmp_path / "file.pth", **small, **options).eval()

    with torch.no_grad():
        tokens = model.forward_features(images)
        assert torch.equal(create(num_classes=0)(images), tokens[:, 1:].mean(1))
        classifier = create(num_classes=5)
        table = model.backbone.rel_pos_bias.relative_position_bias_table
        assert torch.equal(classifier.blocks[7].attn.relative_position_bias_table, table)
        assert classifier(images).shape == (2, 5)
        maps = create(features_only=True)(images)
        assert maps[-1].shape == (2, 48, 4, 4)


def test_the_backbone_alone_can_be_saved(tmp_path: Path) -> None:
    model = build(V2)
    beitzoo.save_pretrained(model.backbone, tmp_path)
    again = beitzoo.create_model(str(tmp_path), pretrained=True).eval()
    assert again.pretrained.head == Classify(num_classes=0)
    images, _ = batch()
    with torch.no_grad():
        assert torch.equal(again.forward_features(images), model.forward_features(images))


def test_another_size_and_vocabulary() -> None:
    model = beitzoo.create_model(V1, **{**SMALL, "img_size": (48, 80)})
    assert model(torch.randn(1, 3, 48, 80), torch.ones(1, 15, dtype=torch.bool)).shape == (15, 40)
    with pytest.raises(ValueError, match="vocab_size=0"):
        beitzoo.create_model(V1, **{**SMALL, "vocab_size": 0})
    with pytest.raises(TypeError, match="'vocab_sise'"):
        beitzoo.create_model(V1, vocab_sise=40)


def test_decay_is_the_originals() -> None:
    model = build("beit_base_patch16_224.mim_in1k_800e")
    assert model.no_weight_decay() == {"backbone.cls_token", "backbone.pos_embed"}


def test_any_architecture_can_be_made_for_pretraining() -> None:
    model = create_model("beit_nano_patch4_32", head="mim", vocab_size=512, in_chans=3)
    assert isinstance(model, MaskedImageModel)
    config = model.backbone.config
    assert (config.use_shared_rel_pos_bias, config.use_rel_pos_bias, config.use_mask_token) == (True, False, True)
    assert not config.norm_after_pooling
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, 2:5, 2:5] = True
    assert model(torch.rand(2, 3, 32, 32), mask).shape == (18, 512)
    as_released = create_model("beitv2_large_patch16_224", head="mim", device="meta")
    assert as_released.config.early_layers == 21
    # timm's 1e-5 of beitv2_base is that of nobody's pretraining.
    scales = {"beit_base": 0.1, "beit_large": 1e-5, "beitv2_base": 0.1, "beitv2_large": 1e-5}
    for name, scale in scales.items():
        network = create_model(f"{name}_patch16_224", head="mim", device="meta").backbone.config
        assert network.init_values == scale
    absolute = {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": False, "init_values": 0.0}
    names = create_model("test_beit", head="mim", early_layers=1, head_layers=1, **absolute).state_dict()
    assert {"backbone.pos_embed", "cls_pt_layers.0.norm1.weight"} <= names.keys()
    assert not [name for name in names if "table" in name or "gamma" in name]


def test_a_classifier_is_no_start_of_pretraining() -> None:
    with pytest.raises(NotImplementedError, match="was not trained to predict visual tokens"):
        create_model("beit_nano_patch4_32", pretrained=True, head="mim")
    with pytest.raises(NotImplementedError, match="segmentation; there is no way from there to a masked image model"):
        create_model("beit_base_patch16_640.in22k_ft_in22k_ade20k", head="mim")
    with pytest.raises(TypeError, match="exclude each other"):
        create_model("test_beit", head="mim", num_classes=3)
    with pytest.raises(TypeError, match="head='mae'; it must be 'mim'"):
        create_model("test_beit", head="mae")


def test_a_saved_model_knows_its_tokenizer(tmp_path: Path) -> None:
    model = create_model("test_beit", head="mim", vocab_size=64)
    head = replace(model.pretrained.head, tokenizer="test_vqkd")
    model.backbone.pretrained = replace(model.pretrained, head=head)
    save_pretrained(model, tmp_path)
    assert create_model(tmp_path, pretrained=True).pretrained.head == head
    assert create_model("beit_base_patch16_224.mim_in22k", device="meta").pretrained.head.tokenizer == (
        "dvae_patch8_112.dalle"
    )
