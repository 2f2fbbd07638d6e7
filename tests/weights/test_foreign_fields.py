"""Every field of a foreign config is honoured, refused by name, or passed over for a stated reason."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models import PretrainedCfg
from transformers.processing_utils import ImagesKwargs

import beitzoo
from beitzoo import CheckpointError
from beitzoo.factory import look_up
from beitzoo.weights import timm_form, transformers_form

HUGGING = {
    "model_type": "beit",
    "architectures": ["BeitForImageClassification"],
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "image_size": 64,
}


def names(reasons: dict[str, tuple[str, ...]]) -> set[str]:
    return {name for group in reasons.values() for name in group}


def fields(form: type) -> set[str]:
    return set(form.model_fields)  # type: ignore[attr-defined]


def test_every_field_of_transformers_config_is_decided() -> None:
    read, ignored = fields(transformers_form._Form), names(transformers_form.IGNORED)
    assert not read & ignored
    theirs = set(transformers.BeitConfig().to_dict())
    assert theirs - read - ignored == set()
    old = {"torch_dtype", "pruned_heads", "quantization_config", "auto_map", "num_labels"}  # of other versions
    assert (read | ignored) - theirs == old


def test_every_setting_of_transformers_processor_is_decided() -> None:
    read, ignored = fields(transformers_form._Preprocessor), names(transformers_form.IGNORED_SETTINGS)
    assert not read & ignored
    theirs = set(transformers.BeitImageProcessor().to_dict()) | set(ImagesKwargs.__annotations__)
    assert theirs - read - ignored == set()
    assert (read | ignored) - theirs == set()


def test_every_field_of_timms_config_is_decided() -> None:
    read, ignored = fields(timm_form._Data), names(timm_form.IGNORED)
    assert not read & ignored
    assert {field.name for field in dataclasses.fields(PretrainedCfg)} == read | ignored
    around = fields(timm_form._Form) | names(timm_form.IGNORED_AROUND)
    theirs = {"architecture", "num_classes", "num_features", "global_pool", "label_names", "label_descriptions"}
    assert around == theirs | {"model_args", "pretrained_cfg", "beitzoo"}


@pytest.mark.parametrize(
    ("change", "activation"),
    [
        ({"num_labels": 3}, "softmax"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, "softmax"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "sigmoid"),
        ({"num_labels": 1}, "sigmoid"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "sigmoid"),
        ({"id2label": {"0": "cat"}}, "sigmoid"),
    ],
    ids=str,
)
def test_the_activation_is_decided_as_by_transformers(change: dict[str, Any], activation: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**HUGGING, **change}))
    assert look_up(str(tmp_path)).pretrained.head.activation == activation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem_type": "regression"}, "regression"),
        ({"problem_type": "detection"}, "problem_type"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"hidden_act": "relu"}, "hidden_act"),
    ],
    ids=str,
)
def test_what_would_change_numbers_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**HUGGING, **change}))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        beitzoo.create_model(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_processor_type": "ConvNextImageProcessor"}, "a ConvNextImageProcessor, and only BeitImageProcessor"),
        ({"feature_extractor_type": "ViTFeatureExtractor"}, "a ViTFeatureExtractor"),
        ({"data_format": "channels_last"}, "data_format"),
    ],
    ids=str,
)
def test_settings_of_another_processor_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUGGING))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        beitzoo.create_model(str(tmp_path))


def test_a_size_of_one_number_may_be_that_of_the_shorter_side(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUGGING))
    settings = {"size": 72, "default_to_square": False, "do_center_crop": True, "crop_size": 64}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert look_up(str(tmp_path)).pretrained.data.crop_mode == "center_floor"


SMALL_TIMM = {"embed_dim": 48, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    "document",
    [
        {"pretrained_cfg": {"input_size": [3, 64, 64], "fixed_input_size": True, "num_classes": 7}},
        {"pretrained_cfg": {"input_size": [1, 224, 224], "mean": [0.5], "std": [0.5]}, "num_classes": 7},
        {"pretrained_cfg": {}, "num_classes": 7},
        {"pretrained_cfg": {"input_size": [3, 96, 96], "fixed_input_size": True}, "model_args": {"img_size": 64}},
    ],
    ids=["input_size", "channels", "nothing stated", "arguments win"],
)
def test_what_timm_builds_from_its_config_is_built(document: dict[str, Any], tmp_path: Path) -> None:
    arguments = {**SMALL_TIMM, **document.get("model_args", {})}
    document = {"architecture": "beit_base_patch16_224", **document, "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(document))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=False)
    ours = beitzoo.create_model(f"local-dir:{tmp_path}")
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    expected, got = timm.data.resolve_model_data_config(theirs), beitzoo.resolve_data_config(ours)
    for name in ("input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode"):
        value = expected[name]
        assert got[name] == (tuple(value) if isinstance(value, list) else value), name


def test_timms_old_flat_config_is_read(tmp_path: Path) -> None:
    flat = {"architecture": "beit_base_patch16_224", "num_classes": 2, "labels": ["a", "b"], "mean": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    entry = look_up(str(tmp_path))
    assert entry.pretrained.head.labels == ("a", "b")
    assert entry.pretrained.data.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"custom_load": True}, "custom_load"),
        ({"label_offset": 1}, "label_offset"),
        ({"classifier": "fc"}, "classifier"),
        ({"first_conv": "stem.conv"}, "first_conv"),
        ({"crop_mode": "random"}, "crop_mode"),
    ],
    ids=str,
)
def test_timms_fields_that_would_change_numbers_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    document = {"architecture": "test_beit", "pretrained_cfg": change}
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        beitzoo.create_model(str(tmp_path))


def test_an_argument_that_no_beit_of_ours_has_is_refused_by_name(tmp_path: Path) -> None:
    document = {"architecture": "test_beit", "pretrained_cfg": {}, "model_args": {"swiglu_mlp": True}}
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="'swiglu_mlp' is not an option"):
        beitzoo.create_model(str(tmp_path))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_backbones_of_transformers_load_for_features(shared: bool, pooled: bool, tmp_path: Path) -> None:
    sizes = {name: HUGGING[name] for name in HUGGING if name not in ("model_type", "architectures")}
    config = transformers.BeitConfig(
        **{**sizes, "num_hidden_layers": 3},
        use_shared_relative_position_bias=shared,
        use_relative_position_bias=not shared,
        use_mean_pooling=pooled,
        out_indices=[1, 3],
    )
    theirs = transformers.BeitBackbone(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = beitzoo.create_model(str(tmp_path), pretrained=True, features_only=True, out_indices=(0, 2)).eval()
    x = torch.randn(2, 3, 64, 64)
    for mine, their in zip(ours(x), theirs(x).feature_maps, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5)


def test_a_feature_extractors_own_weights_load_back_by_the_same_call(tmp_path: Path) -> None:
    options: dict[str, Any] = {"features_only": True, "out_indices": (0,)}
    first = beitzoo.create_model("test_beit", **options)
    torch.save(first.state_dict(), tmp_path / "a.pth")
    again = beitzoo.create_model("test_beit", checkpoint_path=tmp_path / "a.pth", **options)
    assert again.state_dict().keys() == first.state_dict().keys()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.eval()(x)[0], first.eval()(x)[0])
