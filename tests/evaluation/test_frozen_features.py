"""Features of blocks: the values that the network gives, in the order of the images, and nothing moved by it."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import beitzoo
from beitzoo.errors import InvalidValueError
from beitzoo.evaluation.features import extract_features
from beitzoo.images.datasets import ImageSet
from beitzoo.images.transforms import create_transform, resolve_data_config
from beitzoo.inference.pipeline import Loading
from beitzoo.models.mim import MaskedImageModel
from beitzoo.zoo.networks import MimConfig


def pictures(root: Path, count: int = 5) -> ImageSet:
    """Noise in files, the third of which is damaged."""
    for index in range(count):
        Image.effect_noise((40, 32), 20 + 20 * index).convert("RGB").save(root / f"{index}.png")
    (root / "2.png").write_bytes(b"no image")
    return ImageSet([root / f"{i}.png" for i in range(count)], [i % 2 for i in range(count)], ("a", "b"), root)


def test_features_are_the_pooled_tokens_of_each_block(tmp_path: Path) -> None:
    """Against the blocks run one after the other by hand, one image at a time."""
    images = pictures(tmp_path)
    model = beitzoo.create_model("test_beit", drop_path_rate=0.5)
    features = extract_features(model, images, [4, 2, 0, 1], blocks=[-1, 0], loading=Loading(2))
    assert model.training
    assert (features.indices, features.blocks) == ([4, 0, 1], [0, len(model.blocks) - 1])
    assert [(name, reason.split(" (")[0]) for name, reason in features.failures] == [
        ("2.png", "not an image that can be read")
    ]
    transform = create_transform(**resolve_data_config(model))
    model.eval()
    for place, index in enumerate(features.indices):
        with torch.no_grad(), Image.open(tmp_path / f"{index}.png") as image:
            x, bias = model.embed(transform(image)[None])
            for number, block in enumerate(model.blocks):
                x = block(x, bias)
                if number in features.blocks:
                    expected = {"mean": x[0, 1:].mean(0), "class": x[0, 0]}
                    for pooling in ("mean", "class"):
                        got = features.of(number, pooling)  # type: ignore[arg-type]
                        assert got.dtype == np.float32
                        np.testing.assert_allclose(got[place], expected[pooling].numpy(), rtol=1e-4, atol=1e-5)


def test_a_masked_image_models_backbone_has_features_too(tmp_path: Path) -> None:
    network = beitzoo.create_model(
        "test_beit", num_classes=0, use_mask_token=True, use_fc_norm=False, use_rel_pos_bias=False
    )
    model = MaskedImageModel(network, MimConfig(vocab_size=40))
    features = extract_features(model.backbone, pictures(tmp_path), [0, 1])
    assert features.values["mean"].shape == (len(model.backbone.blocks), 2, model.backbone.num_features)
    with pytest.raises(InvalidValueError, match=r"indices=\[9\]; there are"):
        extract_features(model.backbone, pictures(tmp_path), [0], blocks=[9])


def test_what_is_not_finite_is_a_failure(tmp_path: Path) -> None:
    model = beitzoo.create_model("test_beit")
    model.cls_token.data[0, 0, 0] = float("nan")
    features = extract_features(model, pictures(tmp_path), [0])
    assert (features.indices, features.failures) == ([], [("0.png", "the model's output for it is not finite")])
    assert features.values["mean"].shape[1] == 0


def test_no_random_number_is_drawn(tmp_path: Path) -> None:
    images, model = pictures(tmp_path), beitzoo.create_model("test_beit", drop_path_rate=0.5)
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index,union-attr,unused-ignore]
    extract_features(model, images, [0, 1])
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index,union-attr,unused-ignore]
