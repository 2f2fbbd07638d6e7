"""Every layout comes in exactly and goes out again."""

import argparse
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from oracles import randomise, relative_error
from torch import Tensor, nn
from transformers import (
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitModel,
)

import beitzoo
from beitzoo import Beit, CheckpointError
from beitzoo.factory import look_up
from beitzoo.weights import checkpoint, layouts
from beitzoo.zoo.architectures import ARCHITECTURES

SMALL = replace(ARCHITECTURES["test_beit"], depth=3)
# By default the smallest, an odd and an even side, and that of 224 pixels.
FEW_SIDES = [pytest.param(side, marks=() if side in (1, 2, 5, 14) else pytest.mark.slow) for side in range(1, 25)]
HUGGING: list[dict[str, Any]] = [
    {"use_relative_position_bias": True},
    {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True},
    {"use_relative_position_bias": True, "use_mean_pooling": False, "layer_scale_init_value": 0.0},
    {"use_relative_position_bias": True, "layer_norm_eps": 1e-3, "intermediate_size": 100},
]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def build(**fields: object) -> Beit:
    model = Beit(replace(SMALL, **fields)).eval()
    randomise(model)
    return model


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *(size or (64, 64)))


def hugging(kind: type, folder: Path, **fields: Any) -> nn.Module:
    """Let transformers write a small random model."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 64}
    config = transformers.BeitConfig(**{"intermediate_size": 192, **sizes, **fields})
    model = randomise(kind(config)).eval()
    for name, parameter in model.named_parameters():
        if "lambda" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def exact(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("fields", HUGGING, ids=str)
def test_transformers_classifiers_come_in_and_go_out(fields: dict[str, Any], tmp_path: Path) -> None:
    labels = {0: "a", 1: "b", 2: "c"}
    theirs = hugging(BeitForImageClassification, tmp_path / "in", id2label=labels, label2id={}, **fields)
    ours = beitzoo.create_model(f"local-dir:{tmp_path / 'in'}", pretrained=True).eval()
    x = images()
    assert relative_error(ours(x), theirs(x).logits) < 1e-5
    assert ours.pretrained.head.labels == ("a", "b", "c")
    assert ours.config.norm_eps == theirs.config.layer_norm_eps

    beitzoo.save_transformers(ours, tmp_path / "out")
    again, report = BeitForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert exact(again.state_dict(), theirs.state_dict())
    assert relative_error(again.eval()(x).logits, theirs(x).logits) < 1e-6
    assert again.config.id2label == labels

    ours.reset_classifier(0)
    beitzoo.save_transformers(ours, tmp_path / "bare")
    bare, report = BeitModel.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert not any(report.values()), report
    assert relative_error(bare.eval()(x).pooler_output, ours(x)) < 1e-5


@pytest.mark.parametrize("names", ["memory", "file", "module.", "_orig_mod."])
def test_both_spellings_of_transformers_and_training_prefixes_are_recognised(names: str, tmp_path: Path) -> None:
    theirs = hugging(BeitForImageClassification, tmp_path, num_labels=4, use_relative_position_bias=True)
    ours = beitzoo.create_model(f"local-dir:{tmp_path}", pretrained=True)
    if names.endswith("."):
        state = {f"{names}{name}": tensor for name, tensor in ours.state_dict().items()}
    else:
        state = theirs.state_dict() if names == "memory" else checkpoint.load_file(tmp_path / "model.safetensors")
    expected = "unilm" if names.endswith(".") else "transformers5" if names == "memory" else "transformers"
    assert layouts.recognise(state) == expected
    torch.save({"model": state}, tmp_path / "weights.pth")
    again = beitzoo.create_model(f"local-dir:{tmp_path}", checkpoint_path=tmp_path / "weights.pth")
    assert exact(again.state_dict(), ours.state_dict())


def test_masked_image_models_of_transformers(tmp_path: Path) -> None:
    fields = {"use_shared_relative_position_bias": True, "use_mask_token": True, "vocab_size": 50}
    theirs = hugging(BeitForMaskedImageModeling, tmp_path, **fields)
    name, x, masked = f"local-dir:{tmp_path}", images(), torch.rand(2, 16) < 0.4
    ours = beitzoo.create_model(name, pretrained=True).eval()
    expected = theirs(x, bool_masked_pos=masked).logits
    assert relative_error(ours(x, masked, all_patches=True), expected) < 1e-5
    backbone = beitzoo.create_model(name, pretrained=True, num_classes=0).eval()
    logits = theirs.lm_head(backbone.forward_features(x, bool_masked_pos=masked)[:, 1:])
    assert relative_error(logits, expected) < 1e-5

    classifier = beitzoo.create_model(name, pretrained=True, num_classes=5)
    table = theirs.state_dict()["beit.shared_position_bias.relative_position_bias_table"]
    assert all(torch.equal(block.attn.relative_position_bias_table, table) for block in classifier.blocks)
    assert classifier.rel_pos_bias is None
    assert (classifier.fc_norm.weight == 1).all()
    assert classifier.head.weight.abs().max() < 1e-4
    features = beitzoo.create_model(name, pretrained=True, features_only=True, out_indices=[2]).eval()
    hidden = theirs(x, output_hidden_states=True).hidden_states[3]
    assert relative_error(features(x)[0].flatten(2).transpose(1, 2), hidden[:, 1:]) < 1e-5


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        (BeitForImageClassification, {"image_size": (32, 64), "use_relative_position_bias": True}, "not square"),
        (BeitForMaskedImageModeling, {"use_mean_pooling": False, "use_mask_token": True}, "normed twice"),
    ],
)
def test_what_transformers_computes_otherwise_is_refused(
    kind: type, fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    hugging(kind, tmp_path, **fields)
    with pytest.raises(CheckpointError, match=reason):
        beitzoo.create_model(f"local-dir:{tmp_path}", num_classes=0)


@pytest.mark.parametrize("pooled", [True, False])
def test_segmentation_models_and_backbones_of_transformers(pooled: bool, tmp_path: Path) -> None:
    fields = {"use_relative_position_bias": True, "use_mean_pooling": pooled, "out_indices": [0, 1, 2, 3]}
    theirs = hugging(BeitForSemanticSegmentation, tmp_path, num_labels=4, **fields)
    features = beitzoo.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=1).eval()
    x = images()
    hidden = theirs.beit(x, output_hidden_states=True).hidden_states[3]
    assert relative_error(features(x)[0].flatten(2).transpose(1, 2), hidden[:, 1:]) < 1e-5


def test_labels_go_by_their_number(tmp_path: Path) -> None:
    model = beitzoo.create_model("test_beit", num_classes=11)
    beitzoo.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["label_names"] = {str(i): f"class {i}" for i in sorted(range(11), key=str)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    labels = look_up(f"local-dir:{tmp_path}").pretrained.head.labels
    assert labels == tuple(f"class {i}" for i in range(11))
    config["label_names"] = ["a", "b"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="2 label_names for 11 classes"):
        beitzoo.create_model(f"local-dir:{tmp_path}")


def test_a_gap_in_the_labels_is_refused(tmp_path: Path) -> None:
    hugging(BeitForImageClassification, tmp_path, id2label={0: "a", 2: "c"}, label2id={})
    with pytest.raises(CheckpointError, match="none for output 1"):
        beitzoo.create_model(f"local-dir:{tmp_path}")


def originals(model: Beit, **extra: object) -> dict[str, object]:
    """Give a state dict the form of the authors' checkpoints: with index buffers, and the arguments of the run."""
    state = dict(model.state_dict())
    for name in list(state):
        if name.endswith("relative_position_bias_table"):
            state[name.replace("bias_table", "index")] = torch.zeros(17, 17, dtype=torch.int64)
    return {"model": {**state, **extra}, "args": argparse.Namespace(lr=1e-3), "epoch": 3}


@pytest.mark.parametrize("container", ["model", "module", "state_dict", ""])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_the_originals_files_come_in(container: str, prefix: str, tmp_path: Path) -> None:
    model = build()
    document = originals(model)
    state = {prefix + name: tensor for name, tensor in document.pop("model").items()}  # type: ignore[attr-defined]
    torch.save({container: state, **document} if container else state, tmp_path / "a.pth")
    assert exact(checkpoint.read(tmp_path / "a.pth"), model.state_dict())


def test_pretraining_files_of_the_originals_become_backbones_and_classifiers(tmp_path: Path) -> None:
    """Base size, from a file with visual-token head and v2's extra blocks, as released."""
    name = "beitv2_base_patch16_224.mim_in1k"
    small = {"embed_dim": 48, "num_heads": 3, "depth": 2}
    model = beitzoo.create_model(name, num_classes=0, **small)
    randomise(model)
    extra = {"lm_head.weight": torch.randn(8192, 48), "lm_head.bias": torch.randn(8192)}
    extra |= {
        name.replace("blocks.0", "cls_pt_layers.0"): t for name, t in model.state_dict().items() if "blocks.0" in name
    }
    torch.save(originals(model, **extra), tmp_path / "a.pth")
    again = beitzoo.create_model(name, checkpoint_path=tmp_path / "a.pth", num_classes=0, **small)
    assert exact(again.state_dict(), model.state_dict())
    classifier = beitzoo.create_model(name, checkpoint_path=tmp_path / "a.pth", num_classes=7, img_size=96, **small)
    assert classifier(torch.randn(1, 3, 96, 96)).shape == (1, 7)
    assert torch.equal(classifier.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)


def test_segmentation_files_of_the_originals_give_their_backbone(tmp_path: Path) -> None:
    name, small = "beit_base_patch16_640.in22k_ft_in22k_ade20k", {"embed_dim": 48, "num_heads": 3, "depth": 2}
    model = beitzoo.create_model(name, num_classes=0, **small)
    randomise(model)
    state = {f"backbone.{k}": t for k, t in model.state_dict().items() if not k.startswith("fc_norm")}
    state |= {
        "backbone.fpn1.0.weight": torch.randn(48, 48, 2, 2),
        "decode_head.conv_seg.weight": torch.randn(150, 48, 1, 1),
    }
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "a.pth")
    again = beitzoo.create_model(name, checkpoint_path=tmp_path / "a.pth", num_classes=0, img_size=64, **small)
    assert torch.equal(again.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert (again.fc_norm.weight == 1).all()


def test_saved_unilm_files_have_what_its_strict_loader_wants(tmp_path: Path) -> None:
    model = build(use_shared_rel_pos_bias=True)
    beitzoo.save_unilm(model, tmp_path / "a.pth")
    state = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    index = timm.models.beit.gen_relative_position_index((4, 4))
    assert torch.equal(state["blocks.2.attn.relative_position_index"], index)
    assert torch.equal(state["rel_pos_bias.relative_position_index"], index)
    assert exact(checkpoint.read(tmp_path / "a.pth"), model.state_dict())


@pytest.mark.parametrize("height", FEW_SIDES)
def test_every_grid_comes_back_bit_equal(height: int, tmp_path: Path) -> None:
    """Bias tables of oblong grids can be as long as those of square ones; none may be taken for another's."""
    for width in range(1, 25):
        tiny = {"embed_dim": 4, "num_heads": 1, "depth": 1, "in_chans": 1, "mlp_ratio": 1, "num_classes": 2}
        config = replace(SMALL, img_size=(2 * height, 2 * width), patch_size=(2, 2), **tiny)
        model = randomise(Beit(config))
        beitzoo.save_pretrained(model, tmp_path)
        again = beitzoo.create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert exact(again.state_dict(), model.state_dict()), (height, width)
        assert again.config.img_size == config.img_size


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (5, 5), (14, 14), (2, 5), (1, 5), (3, 8), (4, 6)])
def test_timm_reads_a_grid_exactly_or_refuses_it(grid: tuple[int, int], tmp_path: Path) -> None:
    model = build(img_size=(16 * grid[0], 16 * grid[1]))
    beitzoo.save_pretrained(model, tmp_path)
    lengths = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    if grid[0] != grid[1] and int(lengths**0.5) ** 2 == lengths:
        with pytest.raises(RuntimeError, match="beit_with_what_timm_lacks"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        return
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert exact(theirs.state_dict(), model.state_dict())


@pytest.mark.parametrize("side", FEW_SIDES)
def test_timm_and_transformers_read_every_square(side: int, tmp_path: Path) -> None:
    """Bit-equal: ours, written for the other library, read and written by it, read by us."""
    model = build(img_size=(2 * side, 2 * side), patch_size=(2, 2), embed_dim=8, num_heads=2, depth=1)
    beitzoo.save_pretrained(model, tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert exact(theirs.state_dict(), model.state_dict())
    timm.models.save_for_hf(theirs, tmp_path / "timm again", safe_serialization=True)
    again = beitzoo.create_model(f"local-dir:{tmp_path / 'timm again'}", pretrained=True)
    assert exact(again.state_dict(), model.state_dict())

    beitzoo.save_transformers(model, tmp_path / "transformers")
    theirs, report = BeitForImageClassification.from_pretrained(tmp_path / "transformers", output_loading_info=True)
    assert not any(report.values())
    theirs.save_pretrained(tmp_path / "transformers again")
    again = beitzoo.create_model(f"local-dir:{tmp_path / 'transformers again'}", pretrained=True).eval()
    assert exact(again.state_dict(), model.state_dict())
    x = images(2 * side, 2 * side)
    assert relative_error(theirs.eval()(x).logits, again(x)) < 1e-5


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"img_size": (32, 64)}, "its input is not square"),
        ({"patch_size": (8, 16)}, "its input is not square"),
        ({"qkv_bias": False}, "queries and values have no bias"),
        ({"global_pool": ""}, "it pools by ''"),
        ({"global_pool": "token", "use_fc_norm": True}, "it pools by 'token'"),
        ({"drop_rate": 0.1}, "dropout before the head"),
        ({"pos_drop_rate": 0.1}, "dropout after the embeddings"),
    ],
)
def test_what_transformers_cannot_build_is_refused_before_anything_is_written(
    fields: dict[str, object], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        beitzoo.save_transformers(build(**fields), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", [beitzoo.save_pretrained, beitzoo.save_transformers])
def test_fields_of_our_own_survive(save: Callable[[Beit, Path], None], tmp_path: Path) -> None:
    model = build(norm_eps=1e-12, dynamic_img_size=True, use_mask_token=True)
    save(model, tmp_path)
    again = beitzoo.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.config.norm_eps == 1e-12
    assert again.config.use_mask_token
    assert again.config.dynamic_img_size == (save is beitzoo.save_pretrained)


def test_timm_refuses_what_it_lacks_and_the_log_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for fields, reason in (
        ({"use_mask_token": True}, "no mask token"),
        ({"norm_eps": 1e-5}, "epsilon is 1e-6, not 1e-05"),
    ):
        beitzoo.save_pretrained(build(**fields), tmp_path)
        assert reason in caplog.text
        with pytest.raises(RuntimeError, match="beit_with_what_timm_lacks"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_backbone_that_lost_its_norm_is_not_saved(tmp_path: Path) -> None:
    features = beitzoo.create_model("test_beit", features_only=True, out_indices=1)
    for save in (beitzoo.save_pretrained, beitzoo.save_transformers, beitzoo.save_unilm):
        with pytest.raises(ValueError, match="lost its norm"):
            save(features.backbone, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_threads_read_the_originals_files(tmp_path: Path) -> None:
    model = build()
    torch.save(originals(model), tmp_path / "a.pth")
    found: list[bool] = []

    def work() -> None:
        for _ in range(10):
            found.append(exact(checkpoint.read(tmp_path / "a.pth"), model.state_dict()))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 60


def test_what_the_user_allowed_stays_allowed(tmp_path: Path) -> None:
    torch.save(originals(build()), tmp_path / "a.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint.read(tmp_path / "a.pth")
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_loaded_tensors_are_their_own_and_of_one_precision(tmp_path: Path) -> None:
    state = dict(build(depth=2).state_dict())
    shared = "attn.relative_position_bias_table"
    state[f"blocks.1.{shared}"] = state[f"blocks.0.{shared}"]
    state["cls_token"] = state["cls_token"][..., :1].expand(1, 1, 64)
    state["head.bias"] = state["head.bias"].half()
    torch.save(state, tmp_path / "a.pth")
    model = beitzoo.create_model("test_beit", checkpoint_path=tmp_path / "a.pth")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        model.blocks[0].attn.relative_position_bias_table.zero_()
        model.cls_token.add_(1)
    assert model.blocks[1].attn.relative_position_bias_table.any()


def test_unknown_names_are_said(tmp_path: Path) -> None:
    checkpoint.save({"layer1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"names are no BEiT's \(fc.bias, layer1.weight\)"):
        checkpoint.read(tmp_path / "a.safetensors")
