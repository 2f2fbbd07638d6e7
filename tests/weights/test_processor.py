"""transformers' image processor, read from its file: the same pixels as its own two back ends."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from transformers import BeitImageProcessor, BeitImageProcessorPil

import beitzoo
from beitzoo.factory import look_up
from beitzoo.weights.checkpoint import CheckpointError
from beitzoo.zoo.checkpoints import Classify
from beitzoo.zoo.labels import label_names

PHOTO = Path("beitzoo/assets/samples/chelsea.jpg")
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
# One of 255 levels, normalised by a deviation of a half.
LEVEL = 2 / 255


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


def write(folder: Path, processor: dict[str, Any] | None = None, **config: Any) -> str:
    config = {"model_type": "beit", "architectures": ["BeitForImageClassification"], **SMALL, **config}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return f"local-dir:{folder}"


def data_of(name: str) -> Any:
    return look_up(name).pretrained.data


PROCESSORS: list[dict[str, Any]] = [
    {},
    {"size": 64, "resample": 2, "crop_size": 224},
    {"size": {"height": 64, "width": 64}, "resample": 1},
    {"size": [64, 64], "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    {"size": 80, "do_center_crop": True, "crop_size": 64},
    {"size": 73, "do_center_crop": True, "crop_size": 64},
    {"size": {"shortest_edge": 72}, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}},
    {"size": 64, "do_rescale": False, "image_mean": 127.5, "image_std": 127.5},
    {"size": 64, "do_normalize": False},
    {"size": 64, "rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
]


@pytest.mark.parametrize("settings", PROCESSORS, ids=str)
def test_pixels_are_those_of_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    """Its PIL back end to rounding; its torchvision back end, the default, to one level."""
    side = 64 if settings else 224
    model = beitzoo.create_model(write(tmp_path, settings, image_size=side))
    image = Image.open(PHOTO)
    ours = beitzoo.create_transform(**beitzoo.resolve_data_config(model))(image)
    pil = BeitImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    tensor = BeitImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    assert ours.shape == (3, side, side)
    torch.testing.assert_close(ours, pil, atol=1e-5, rtol=0)
    # In units of a level, whatever the deviation and the scale.
    level = LEVEL if "image_std" not in settings else (ours.max() - ours.min()).item() / 200
    assert (ours - tensor).abs().max() < 1.01 * level
    assert (ours - tensor).abs().mean() < 0.01 * level
    image.close()


def test_random_processors_crop_the_same_pixels(tmp_path: Path) -> None:
    """Of the whole photo, whose long side leaves an odd number of pixels to cut as often as an even one."""
    draw = random.Random(5)
    image = Image.open(PHOTO)
    odd = 0
    for number in range(24):
        crop = draw.randrange(32, 97, 16)
        edge = crop + draw.randrange(40)
        odd += (edge * image.width // image.height - crop) % 2
        settings = {
            "size": {"shortest_edge": edge},
            "do_center_crop": True,
            "crop_size": {"height": crop, "width": crop},
            "resample": draw.choice([1, 2, 3]),
        }
        model = beitzoo.create_model(write(tmp_path / str(number), settings, image_size=crop), device="meta")
        config = beitzoo.resolve_data_config(model)
        ours = beitzoo.create_transform(**config)(image)
        pil = BeitImageProcessorPil.from_pretrained(tmp_path / str(number))(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(ours, pil[0], atol=1e-5, rtol=0)
        if config["interpolation"] != "lanczos":  # which torchvision has not for tensors
            fast = beitzoo.create_transform(**config, fast=True)(image)
            assert (fast - ours).abs().max() < 2.01 * LEVEL
    assert odd > 6
    image.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resize": False}, "does not resize"),
        ({"size": {"shortest_edge": 72}}, "crops nothing"),
        ({"size": {"max_height": 72, "max_width": 72}}, "resizes by max_height, max_width"),
        ({"size": {"shortest_edge": 72, "longest_edge": 90}}, "resizes by shortest_edge, longest_edge"),
        ({"size": 64, "do_center_crop": True, "crop_size": 80}, "pads 64 pixels to crop_size 80"),
        ({"size": 67, "do_center_crop": True, "crop_size": 64}, "half a pixel"),
        ({"size": [80, 70], "do_center_crop": True, "crop_size": [64, 64]}, "the same share of both sides"),
        ({"resample": 9}, "resample=9"),
        ({"size": 0}, "size"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"image_std": [0.0, 1.0, 1.0]}, "positive"),
        ({"image_mean": [0.5]}, "3 channels with 1 means"),
    ],
    ids=str,
)
def test_what_cannot_be_expressed_is_refused_by_name(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        beitzoo.create_model(write(tmp_path, settings, image_size=64))


def test_the_transform_is_chosen_by_the_folder_and_follows_the_size(tmp_path: Path) -> None:
    squashed = beitzoo.create_model(write(tmp_path, {"size": 64, "resample": 2}, image_size=64))
    assert beitzoo.resolve_data_config(squashed) == {
        "input_size": (3, 64, 64),
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    squashed.set_input_size((48, 96))
    image = Image.open(PHOTO).convert("RGB")
    ours = beitzoo.create_transform(**beitzoo.resolve_data_config(squashed))(image)
    expected = np.asarray(image.resize((96, 48), Image.Resampling.BILINEAR)) / 127.5 - 1
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert beitzoo.create_model("test_beit").pretrained.data.crop_mode == "center"


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"do_reduce_labels": True}, True),
        ({"reduce_labels": True}, True),
        ({"do_reduce_labels": False}, False),
        ({}, False),
    ],
)
def test_label_reduction_is_read_in_both_spellings_and_kept(
    settings: dict[str, Any], kept: bool, tmp_path: Path
) -> None:
    model = beitzoo.create_model(write(tmp_path, settings, num_labels=3))
    assert model.pretrained.data.reduce_zero_label is kept
    beitzoo.save_transformers(model, tmp_path / "out")
    assert BeitImageProcessorPil.from_pretrained(tmp_path / "out").do_reduce_labels is kept
    beitzoo.save_pretrained(model, tmp_path / "timm")
    assert data_of(f"local-dir:{tmp_path / 'timm'}").reduce_zero_label is kept


@pytest.mark.parametrize(
    "data",
    [{}, {"crop_pct": 1.0}, {"crop_mode": "squash"}, {"crop_mode": "squash", "interpolation": "bilinear"}],
    ids=str,
)
def test_a_saved_processor_gives_our_pixels(data: dict[str, Any], tmp_path: Path) -> None:
    model = beitzoo.create_model("beit_tiny_patch16_224", num_classes=3)
    model.pretrained = beitzoo.PretrainedConfig(head=Classify(num_classes=3), data=beitzoo.DataConfig(**data))
    beitzoo.save_transformers(model, tmp_path)
    image = Image.open(PHOTO).crop((0, 0, 300, 300 if "crop_mode" not in data else 222))
    ours = beitzoo.create_transform(**beitzoo.resolve_data_config(model))(image)
    theirs = BeitImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    again = beitzoo.create_model(f"local-dir:{tmp_path}")
    was, now = beitzoo.resolve_data_config(model), beitzoo.resolve_data_config(again)
    assert now.pop("crop_pct") == pytest.approx(was.pop("crop_pct"), abs=0.01)  # 224 of 248 pixels, 0.9032
    assert now.pop("crop_mode") == was.pop("crop_mode").replace("center", "center_floor")
    assert now == was


def test_a_border_cannot_be_saved_for_transformers(tmp_path: Path) -> None:
    model = beitzoo.create_model("test_beit", num_classes=3)
    model.pretrained = beitzoo.PretrainedConfig(
        head=Classify(num_classes=3), data=beitzoo.DataConfig(crop_mode="border")
    )
    with pytest.raises(ValueError, match="does not pad to a border"):
        beitzoo.save_transformers(model, tmp_path)


def google_names() -> dict[int, str]:
    """Number names as Google's list of 21,843 does, underscores and all."""
    info = Path(timm.__file__).parent / "data" / "_info"
    rows = (info / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
    names = {synset: name.strip('"').replace(" ", "_") for synset, name in (row.split("\t", 1) for row in rows)}
    return {i: names[s] for i, s in enumerate((info / "imagenet21k_goog_synsets.txt").read_text().split())}


@pytest.mark.parametrize("fault", ["gaps", "cut"])
def test_misnumbered_names_of_22k_are_put_right(fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = google_names()
    assert len(names) == 21_843
    if fault == "gaps":
        del names[9205], names[15027]
    else:
        del names[21_841], names[21_842]
    name = write(tmp_path, {}, id2label={str(i): label for i, label in names.items()})
    with caplog.at_level(logging.WARNING):
        row = look_up(name).pretrained
    labels = label_names(row.head)
    assert labels is not None
    assert (len(labels), row.head.num_classes) == (21_841, 21_841)
    # Right up to 9204, then one too low, then two: as transformers shows them and as they are.
    assert [labels[i] for i in (9204, 9205, 9206, 15026, 21_840)] == [
        "pickup, pickup truck",
        "picture frame",
        "picture hat",
        "blind date",
        names[max(names)].replace("_", " ") if fault == "gaps" else labels[-1],
    ]
    assert names[9206] == "picture_frame"
    assert "wrongly from output 9205 on" in caplog.text


def test_right_names_of_22k_are_kept_and_other_gaps_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    right = label_names(beitzoo.get_pretrained_cfg("beit_base_patch16_224.in22k_ft_in22k").head)  # type: ignore[union-attr]
    assert right is not None
    row = look_up(write(tmp_path, {}, id2label=dict(enumerate(right)))).pretrained
    assert row.head.labels == right
    assert not caplog.records
    names = google_names()
    del names[5], names[15027]
    with pytest.raises(CheckpointError, match="none for output 5; the gap would shift"):
        beitzoo.create_model(write(tmp_path, {}, id2label={str(i): name for i, name in names.items()}))


def test_labels_that_nobody_gave_are_none(tmp_path: Path) -> None:
    name = write(tmp_path, {}, id2label={str(i): f"LABEL_{i}" for i in range(4)})
    assert look_up(name).pretrained.head.labels is None
    name = write(tmp_path, {}, id2label={"0": "LABEL_0", "1": "cat"})
    assert look_up(name).pretrained.head.labels == ("LABEL_0", "cat")
