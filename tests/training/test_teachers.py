"""Features of a teacher are those computed by hand from timm's and transformers' own outputs."""

import json
from pathlib import Path

import pytest
import timm
import torch
from oracles import randomise, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import beitzoo
from beitzoo.training.teachers import TeacherError, load_teacher

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def timm_folder(directory: Path, network: nn.Module, architecture: str, **args: object) -> Path:
    """Write a folder in timm's form."""
    from safetensors.torch import save_file

    directory.mkdir()
    save_file(network.state_dict(), directory / "model.safetensors")
    cfg = {name: network.pretrained_cfg[name] for name in ("mean", "std", "num_classes")}
    cfg["input_size"] = [3, *args["img_size"]] if "img_size" in args else list(network.pretrained_cfg["input_size"])
    config = {"architecture": architecture, "num_classes": network.num_classes, "model_args": args}
    (directory / "config.json").write_text(json.dumps({**config, "pretrained_cfg": cfg}))
    return directory


def test_timms_clip_is_projected_behind_its_norm(tmp_path: Path) -> None:
    args = {**SMALL, "img_size": [32, 32]}
    network = timm.create_model("vit_base_patch16_clip_224.openai", num_classes=10, **args).eval()
    randomise(network)
    folder = timm_folder(tmp_path / "clip", network, "vit_base_patch16_clip_224", **args)
    teacher = load_teacher(f"local-dir:{folder}", (2, 2), 3, projection=True)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        x = network.norm_pre(network._pos_embed(network.patch_embed(normalised(images, CLIP_MEAN, CLIP_STD))))
        for block in network.blocks:
            x = block(x)
        expected = network.norm(x)[:, 1:] @ network.head.weight.t() + network.head.bias
        plain = load_teacher(f"local-dir:{folder}", (2, 2), 3)(images)
    assert teacher.dim == 10
    assert relative_error(teacher(images), expected) < 1e-5
    assert relative_error(plain, network.norm(x)[:, 1:].detach()) < 1e-5


def test_a_teacher_sees_the_size_that_has_the_tokenizers_grid(tmp_path: Path) -> None:
    """DINO by its name in timm, at 48 pixels for a tokenizer of 3 x 3 patches of 12; positions are timm's fit."""
    args = {**SMALL, "img_size": [32, 32]}
    network = timm.create_model("vit_base_patch16_224.dino", **args).eval()
    randomise(network)
    folder = timm_folder(tmp_path / "dino", network, "vit_base_patch16_224", **args)
    teacher = load_teacher(f"local-dir:{folder}", (3, 3), 3)
    images = torch.rand(2, 3, 36, 36)
    larger = F.interpolate(images, (48, 48), mode="bicubic", antialias=True).clamp(0, 1)
    network.set_input_size((48, 48))
    cfg = network.pretrained_cfg
    with torch.no_grad():
        expected = network.forward_features(normalised(larger, cfg["mean"], cfg["std"]))[:, 1:]
    assert teacher(images).shape == (2, 9, 24)
    assert relative_error(teacher(images), expected) < 1e-5
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_name_of_timm_is_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, global_pool="avg", **SMALL)
    randomise(network.eval())
    asked = []

    def create(name: str, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        return network

    monkeypatch.setattr(timm, "create_model", create)
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (3, 32, 32)}
    teacher = load_teacher("timm:vit_tiny_patch16_224.augreg_in21k", (2, 2), 3)
    assert asked == [("vit_tiny_patch16_224.augreg_in21k", True)]
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():  # pooled as timm does, the features are what its head sees but for the order of norm and mean
        tokens = network.forward_features(normalised(images, (0.5,) * 3, (0.5,) * 3))[:, 1:]
        expected = F.layer_norm(tokens, (24,), network.fc_norm.weight, network.fc_norm.bias, 1e-6)
    assert relative_error(teacher(images), expected) < 1e-5


def write_processor(directory: Path) -> None:
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_mean": CLIP_MEAN, "image_std": CLIP_STD}))


@pytest.mark.parametrize("projection", [True, False])
def test_transformers_clip_is_projected_behind_its_norm(tmp_path: Path, projection: bool) -> None:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 16}
    network = CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 9}, vision_config=vision, projection_dim=10))
    randomise(network.eval())
    network.save_pretrained(tmp_path / "clip")
    write_processor(tmp_path / "clip")
    teacher = load_teacher(f"transformers:{tmp_path / 'clip'}", (2, 2), 3, projection)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        tower = network.vision_model
        tokens = tower(normalised(images, CLIP_MEAN, CLIP_STD)).last_hidden_state[:, 1:]
        expected = F.layer_norm(tokens, (24,), tower.post_layernorm.weight, tower.post_layernorm.bias, 1e-5)
        if projection:
            expected = expected @ network.visual_projection.weight.t()
    assert teacher(images).shape == (2, 4, 10 if projection else 24)
    assert relative_error(teacher(images), expected) < 1e-5


def test_transformers_dino_is_normed_already(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    small = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = ViTModel(ViTConfig(**small, image_size=32, patch_size=16))
    randomise(network.eval())
    network.save_pretrained(tmp_path / "dino")
    write_processor(tmp_path / "dino")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        pixels = normalised(images, CLIP_MEAN, CLIP_STD)
        expected = network(pixels).last_hidden_state[:, 1:]
        larger = F.interpolate(images, (48, 48), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = normalised(larger, CLIP_MEAN, CLIP_STD)
        expected_larger = network(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    for prefix in ("transformers:", "local-dir:"):
        assert relative_error(load_teacher(f"{prefix}{tmp_path / 'dino'}", (2, 2), 3)(images), expected) < 1e-5
    assert relative_error(load_teacher(f"transformers:{tmp_path / 'dino'}", (3, 3), 3)(images), expected_larger) < 1e-5


def test_a_run_of_fine_tuning_is_a_teacher(tmp_path: Path) -> None:
    """A classifier of beitzoo, whose last norm is behind the pooling."""
    network = beitzoo.create_model("test_beit", in_chans=1).eval()
    randomise(network)
    beitzoo.save_pretrained(network, tmp_path / "run" / "best")
    teacher = load_teacher(f"local-dir:{tmp_path / 'run'}", network.config.grid_size, 1)
    images = torch.rand(2, 1, *network.config.img_size)
    cfg = network.pretrained_cfg
    with torch.no_grad():
        tokens = network.forward_features(normalised(images, cfg["mean"], cfg["std"]))[:, 1:]
        expected = network.fc_norm(tokens)
    assert relative_error(teacher(images), expected) < 1e-5


@pytest.mark.parametrize(
    ("architecture", "grid", "message"),
    [
        ("resnet18", (2, 2), "without patches.*VQ-KD needs a feature for each patch.*timm:vit_base_patch16_224.dino"),
        ("swin_tiny_patch4_window7_224", (56, 56), r"output of shape \(1, 7, 7, 96\), and VQ-KD needs a feature"),
    ],
)
def test_a_teacher_without_features_of_patches(
    architecture: str, grid: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)} if "swin" in architecture else {}
    network = timm.create_model(architecture, **small)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: network)
    with pytest.raises(TeacherError, match=message):
        load_teacher(f"timm:{architecture}", grid, 3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {}, "'resnet18' is no teacher; give 'pixels', timm:NAME"),
        ("timm:vit_bass_patch16_224", {}, "timm has no model 'vit_bass_patch16_224'; did you mean 'vit_base_patch16"),
        ("local-dir:/nowhere", {}, "There is no /nowhere/config.json"),
        ("local-dir:{beit}", {"in_chans": 3}, "takes images of 1 channels, and the tokenizer has 3"),
        ("local-dir:{beit}", {"projection": True}, "no projection into a space shared with texts"),
        ("transformers:{beit}", {}, "The teacher transformers:.* cannot be loaded: "),
    ],
)
def test_what_is_no_teacher(name: str, options: dict[str, object], message: str, tmp_path: Path) -> None:
    beitzoo.save_pretrained(beitzoo.create_model("test_beit", in_chans=1), tmp_path)
    with pytest.raises(TeacherError, match=message):
        load_teacher(name.format(beit=tmp_path), (4, 4), **{"in_chans": 1, **options})  # type: ignore[arg-type]


def test_a_network_of_one_size_is_no_teacher_for_another_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    network = timm.create_model("cait_xxs24_224", embed_dim=24, depth=1, num_heads=2)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: network)
    assert load_teacher("timm:cait_xxs24_224", (14, 14), 3).dim == 24
    with pytest.raises(TeacherError, match=r"images of \(224, 224\) only, which are 14 x 14 patches.* has 7 x 7"):
        load_teacher("timm:cait_xxs24_224", (7, 7), 3)
