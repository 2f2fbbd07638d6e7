"""Segmentation models by name: what is built, what files come in and go out, and what else a file is good for."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from oracles import randomise, relative_error
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import beitzoo
from beitzoo import create_model
from beitzoo.errors import UnsupportedError
from beitzoo.models.segmentation import LinearHead, Neck, Segmenter
from beitzoo.zoo.checkpoints import Segment
from beitzoo.zoo.labels import label_names
from beitzoo.zoo.networks import pyramid_blocks
from beitzoo.zoo.pretrained import PRETRAINED

NAMES = [name for name, row in PRETRAINED.items() if isinstance(row.head, Segment)]
BASE = "beit_base_patch16_640.in22k_ft_in22k_ade20k"
SMALL = {"embed_dim": 24, "num_heads": 3, "depth": 6, "img_size": 64}
# Published of transformers' models at 640 pixels; at 512 the tables of each block have fewer rows.
PARAMETERS = {
    "beit_base": 163_407_980,
    "beit_large": 441_271_084,
    "beitv2_base": 163_407_980 - 12 * 12 * (6244 - 3972),
    "beitv2_large": 441_271_084 - 24 * 16 * (6244 - 3972),
}


def fill(model: Segmenter) -> Segmenter:
    """Fill parameters and the statistics of batch norms."""
    randomise(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
            module.num_batches_tracked.fill_(5)
    return model.eval()


def build(**fields: object) -> Segmenter:
    model = create_model(BASE, **{**SMALL, "num_classes": 7, "auxiliary_channels": 10, **fields})
    assert isinstance(model, Segmenter)
    return fill(model)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_a_segmenter(name: str) -> None:
    model = create_model(name, device="meta")
    assert isinstance(model, Segmenter)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name.partition("_patch")[0]]
    assert model.config.out_indices == ((7, 11, 15, 23) if "large" in name else (3, 5, 7, 11))
    assert model.num_classes == 150
    assert model.pretrained.data.reduce_zero_label
    assert beitzoo.resolve_data_config(model)["mean"] == PRETRAINED[name].data.mean


def test_the_originals_blocks_of_any_depth() -> None:
    assert [pyramid_blocks(depth) for depth in (24, 12, 6, 4, 2, 1)] == [
        (7, 11, 15, 23),
        (3, 5, 7, 11),
        (1, 2, 3, 5),
        (0, 1, 2, 3),
        (0, 0, 0, 1),
        (0, 0, 0, 0),
    ]


@pytest.mark.parametrize("fields", [{}, {"decoder": "linear"}, {"auxiliary_channels": 0}], ids=str)
def test_the_originals_files_load_strictly_and_save_back(fields: dict[str, object], tmp_path: Path) -> None:
    model = build(**fields)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    beitzoo.save_unilm(synced, tmp_path / "a.pth")
    document = torch.load(tmp_path / "a.pth")
    names = document["state_dict"].keys()
    assert {name.partition(".")[0] for name in names} <= {"backbone", "decode_head", "auxiliary_head"}
    assert {"backbone.blocks.5.attn.relative_position_index", "decode_head.conv_seg.bias"} <= names
    if not fields:
        assert {
            "backbone.fpn1.0.weight",
            "backbone.fpn1.1.running_var",
            "backbone.fpn1.3.bias",
            "backbone.fpn2.0.weight",
            "decode_head.psp_modules.3.1.conv.weight",
            "decode_head.psp_modules.3.1.bn.num_batches_tracked",
            "decode_head.bottleneck.bn.weight",
            "decode_head.lateral_convs.2.conv.weight",
            "decode_head.fpn_convs.2.bn.bias",
            "decode_head.fpn_bottleneck.conv.weight",
            "auxiliary_head.convs.0.conv.weight",
            "auxiliary_head.conv_seg.weight",
        } <= names
    assert not [name for name in names if "norm." in name.replace("norm1.", "").replace("norm2.", "")]
    # The classes are the file's, whatever is trained for; the other fields were said.
    own = {**SMALL, "auxiliary_channels": 10, "num_classes": 7, **fields}
    again = create_model(BASE, checkpoint_path=tmp_path / "a.pth", **own)
    assert torch.equal(logits(again, IMAGES), logits(model, IMAGES))
    told = create_model(tmp_path / "a.pth", pretrained=True)  # by shapes alone
    assert told.config.decoder == model.config.decoder
    assert torch.equal(logits(told, IMAGES), logits(model, IMAGES))
    beitzoo.save_unilm(told, tmp_path / "b.pth")
    other = torch.load(tmp_path / "b.pth")["state_dict"]
    assert other.keys() == names
    assert all(torch.equal(tensor, other[name]) for name, tensor in document["state_dict"].items())
    broken = {name: t for name, t in document["state_dict"].items() if name != "decode_head.conv_seg.bias"}
    torch.save({"state_dict": broken}, tmp_path / "c.pth")
    with pytest.raises(beitzoo.CheckpointError, match=r"- decode_head\.conv_seg\.bias"):
        create_model(BASE, checkpoint_path=tmp_path / "c.pth", **own)


def test_a_saved_folder_is_the_same_model(tmp_path: Path) -> None:
    labels = tuple("abcdefg")
    model = build(out_indices=(0, 2, 2, 4), pool_scales=(1, 3), dynamic_img_size=True)
    model.backbone.pretrained = beitzoo.PretrainedConfig(head=Segment(network=model.config, labels=labels))
    beitzoo.save_pretrained(model, tmp_path)
    again = create_model(tmp_path, pretrained=True)
    assert (again.config, again.class_names) == (model.config, labels)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(again, IMAGES), logits(model, IMAGES))
    assert logits(again, torch.randn(1, 3, 48, 112)).shape == (1, 7, 12, 28)
    assert create_model(tmp_path, pretrained=True, num_classes=5).class_names is None
    backbone = create_model(tmp_path, pretrained=True, num_classes=0)
    assert backbone.eval()(IMAGES).shape == (2, 24)
    maps = create_model(tmp_path, pretrained=True, features_only=True, out_indices=[4]).eval()(IMAGES)
    assert torch.equal(maps[0], backbone.forward_intermediates(IMAGES, [4], intermediates_only=True)[0])


def test_names_of_ade20k_stay_with_the_weights(tmp_path: Path) -> None:
    names = label_names(PRETRAINED[BASE].head)
    assert names is not None and len(names) == 150
    assert build(num_classes=150).class_names is None  # random weights tell nothing apart
    beitzoo.save_unilm(build(num_classes=150), tmp_path / "a.pth")
    small = {**SMALL, "auxiliary_channels": 10, "out_indices": (0, 1, 2, 4)}
    model = create_model(BASE, checkpoint_path=tmp_path / "a.pth", **small)
    assert model.class_names == names
    assert create_model(BASE, checkpoint_path=tmp_path / "a.pth", **small, num_classes=7).class_names is None
    beitzoo.save_unilm(model, tmp_path / "b.pth")
    assert torch.load(tmp_path / "b.pth")["meta"]["CLASSES"] == names
    beitzoo.save_pretrained(model, tmp_path / "folder")
    assert create_model(tmp_path / "folder", pretrained=True).class_names == names
    beitzoo.save_transformers(model, tmp_path / "transformers")
    config = tmp_path / "transformers" / "config.json"
    document = json.loads(config.read_text())
    assert tuple(document["id2label"][str(index)] for index in range(150)) == names
    assert document["label2id"]["flag"] == 149
    document["id2label"]["7"] = "bed "  # as in the released folders
    config.write_text(json.dumps(document))
    released = create_model(tmp_path / "transformers", pretrained=True)
    assert released.class_names == names
    released.reset_classifier(150)
    assert released.class_names is None


def test_transformers_loads_what_we_save_and_we_what_it_saves(tmp_path: Path) -> None:
    model = build(out_indices=(5, 0, 2, 4), norm_eps=1e-12)
    beitzoo.save_transformers(model, tmp_path / "ours")
    theirs, report = transformers.BeitForSemanticSegmentation.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    expected = logits(theirs, IMAGES).logits
    assert relative_error(logits(model, IMAGES), expected) < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    again = create_model(tmp_path / "theirs", pretrained=True)
    assert again.config.out_indices == (5, 0, 2, 4)
    assert relative_error(logits(again, IMAGES), expected) < 1e-4
    torch.save(theirs.state_dict(), tmp_path / "memory.pth")
    state = create_model(tmp_path / "theirs", checkpoint_path=tmp_path / "memory.pth").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"reads the blocks \(1, 2, 3, 5\) of 6, and there blocks must rise"):
        beitzoo.save_transformers(build(), tmp_path / "original")
    with pytest.raises(ValueError, match="no decoder 'linear'"):
        beitzoo.save_transformers(build(decoder="linear"), tmp_path / "original")
    assert not (tmp_path / "original").exists()


def test_other_classes_have_fresh_classifiers_and_the_rest_is_loaded(tmp_path: Path) -> None:
    model = build()
    beitzoo.save_unilm(model, tmp_path / "a.pth")
    path = tmp_path / "a.pth"
    again = create_model(BASE, checkpoint_path=path, **SMALL, auxiliary_channels=10, num_classes=3)
    assert again.decode_head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.4)
    assert again.auxiliary_head.conv_seg.weight.shape == (3, 10, 1, 1)
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert "conv_seg" in name or torch.equal(state[name], tensor), name
    linear = create_model(BASE, checkpoint_path=path, **SMALL, decoder="linear", num_classes=3)
    assert isinstance(linear.decode_head, LinearHead)
    assert linear.neck is None and linear.auxiliary_head is None
    assert torch.equal(linear.backbone.blocks[5].mlp.fc1.weight, model.backbone.blocks[5].mlp.fc1.weight)
    with pytest.raises(TypeError, match=r"was not trained with the decoder 'linear'.* Give num_classes=N"):
        create_model(BASE, decoder="linear")


@pytest.mark.parametrize("kind", ["mim", "classify"])
def test_any_backbone_starts_a_segmenter(kind: str, tmp_path: Path) -> None:
    name = "beit_base_patch16_224" + (".mim_in22k" if kind == "mim" else "")
    source = randomise(create_model(name, **SMALL))
    beitzoo.save_unilm(source, tmp_path / "a.pth")
    options = {**SMALL, "head": "segment", "num_classes": 4}
    model = create_model(name, checkpoint_path=tmp_path / "a.pth", **options)
    blocks, theirs = model.backbone.blocks, source.backbone
    assert torch.equal(blocks[3].attn.qkv.weight, theirs.blocks[3].attn.qkv.weight)
    assert model.backbone.rel_pos_bias is None
    for block, other in zip(blocks, theirs.blocks, strict=True):
        table = theirs.rel_pos_bias if kind == "mim" else other.attn
        assert torch.equal(block.attn.relative_position_bias_table, table.relative_position_bias_table)
    main, auxiliary = model.train()(IMAGES)
    assert (main.shape, auxiliary.shape) == ((2, 4, 16, 16), (2, 4, 4, 4))
    (main.sum() + auxiliary.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not [name for name in model.state_dict() if name.startswith(("backbone.norm", "backbone.head"))]


def test_what_cannot_be_built_is_refused_plainly() -> None:
    with pytest.raises(TypeError, match="how many classes a fresh one shall tell apart was not said"):
        create_model("test_beit", head="segment")
    with pytest.raises(TypeError, match="num_classes=0 and head='segment' exclude each other"):
        create_model("test_beit", head="segment", features_only=True)
    with pytest.raises(ValueError, match="decoder='unet'; there are 'upernet' and 'linear'"):
        create_model("test_beit", head="segment", num_classes=2, decoder="unet")
    with pytest.raises(ValueError, match=r"out_indices=\(0, 1, 2, 3\) of a network of 2 blocks, 0 to 1"):
        create_model("test_beit", head="segment", num_classes=2, out_indices=(0, 1, 2, 3))
    with pytest.raises(ValueError, match="reads 4 of the blocks"):
        create_model("test_beit", head="segment", num_classes=2, out_indices=(0, 1))
    with pytest.raises(ValueError, match="num_classes=-1"):
        create_model(BASE, device="meta", num_classes=-1)
    model = create_model("test_beit", head="segment", num_classes=2, dynamic_img_size=True).eval()
    with pytest.raises(ValueError, match="is not a multiple of patch_size"):
        model(torch.randn(1, 3, 64, 40))
    with pytest.raises(ValueError, match="1 x 4 patches, and the smallest of the pyramid is half as large"):
        model(torch.randn(1, 3, 16, 64))
    with pytest.raises(ValueError, match="Got 3 maps"):
        Neck(4)([torch.zeros(1, 4, 2, 2)] * 3)


@pytest.mark.parametrize("fields", [{}, {"decoder": "linear"}, {"dynamic_img_size": True}], ids=str)
def test_an_inference_copy_gives_the_same_pyramid_and_logits(fields: dict[str, object]) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build(**fields))
    images = torch.randn(2, 3, 48, 80) if "dynamic_img_size" in fields else IMAGES
    with torch.inference_mode():
        expected, pyramid = model(images), model.forward_features(images)
        for copied in (beitzoo.optimize(model), pickle.loads(pickle.dumps(beitzoo.optimize(model)))):
            assert relative_error(copied(images), expected) < 1e-5
            for ours, theirs in zip(copied.forward_features(images), pyramid, strict=True):
                assert relative_error(ours, theirs) < 1e-5
        norms = [isinstance(one, nn.SyncBatchNorm) for one in beitzoo.optimize(model).modules()]
        assert sum(norms) == ("decoder" in fields)  # the linear decoder's is before its classifier
        assert torch.equal(model(images), expected)
        assert beitzoo.optimize(model, inplace=True) is model
        assert relative_error(model(images), expected) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), ("int8", 6e-2)], ids=str)
def test_an_inference_copy_of_another_precision(dtype: torch.dtype | str, tolerance: float) -> None:
    model = build()
    copied = beitzoo.optimize(model, dtype=dtype)
    assert 1e-4 < relative_error(logits(copied, IMAGES), logits(model, IMAGES)) < tolerance
    assert copied.decode_head.conv_seg.weight.dtype == (torch.float32 if dtype == "int8" else dtype)
    for refused in (copied.train, copied.state_dict):
        with pytest.raises(UnsupportedError, match="inference snapshot"):
            refused()


def test_what_is_hooked_to_a_convolution_or_norm_is_kept_in_an_inference_copy() -> None:
    model, seen = build(), []
    model.neck.fpn1[1].register_forward_hook(lambda module, inputs, output: seen.append(module))
    model.decode_head.fpn_convs[0].conv.register_forward_hook(lambda module, inputs, output: output * 2)
    copied = beitzoo.optimize(model)
    assert relative_error(logits(copied, IMAGES), logits(model, IMAGES)) < 1e-5
    assert len(seen) == 2


def test_layers_learn_as_fast_as_in_the_original() -> None:
    """`get_num_layer_for_vit` of the original, written out: depth + 2 levels, neck and heads at full rate."""
    model = build()
    depth, decay = SMALL["depth"], 0.9
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=decay)
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(list(model.parameters()))
    assert len({scale for scale, _ in found.values()}) == depth + 2
    for name, parameter in model.named_parameters():
        layer = depth + 1
        if name == "backbone.cls_token" or name.startswith("backbone.patch_embed"):
            layer = 0
        elif name.startswith("backbone.blocks"):
            layer = int(name.split(".")[2]) + 1
        scale, weight_decay = found[id(parameter)]
        assert scale == pytest.approx(decay ** (depth + 1 - layer)), name
        # The original looks for names without the prefix, so that the class token is decayed.
        assert weight_decay == (0 if parameter.ndim == 1 or name.endswith(".bias") else 0.05), name


def test_synchronised_norms_keep_names_and_numbers() -> None:
    model = build()
    state, expected = model.state_dict(), logits(model, IMAGES)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in synced.modules())
    assert list(synced.state_dict()) == list(state)
    assert torch.equal(logits(synced, IMAGES), expected)
