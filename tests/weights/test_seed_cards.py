"""The models people load first, in true form and at true size, with random weights written by their own library.

Large has 4 of its 24 layers here; all of them among the slow tests.
"""

from pathlib import Path

import pytest
import timm
import torch
import transformers
from oracles import randomise, relative_error
from PIL import Image
from transformers import BeitForImageClassification, BeitForMaskedImageModeling, BeitImageProcessorPil

import beitzoo

PHOTO = Path("beitzoo/assets/samples/chelsea.jpg")
# Expected values of the real weights: reference values of transformers' own tests on COCO image 39769.
LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def write_card(folder: Path, size: int, **fields: object) -> BeitForImageClassification:
    """Write what microsoft/beit-* holds: config with labels, weights in the classic names, processor."""
    names = timm.data.ImageNetInfo("imagenet-1k")
    labels = {i: names.index_to_description(i) for i in range(1000)}
    config = transformers.BeitConfig(
        image_size=size, use_relative_position_bias=True, id2label=labels, label2id={}, **fields
    )
    with torch.device("meta"):
        model = BeitForImageClassification(config)
    model.to_empty(device="cpu").eval()
    randomise(model)
    model.save_pretrained(folder)
    BeitImageProcessorPil(size={"height": size, "width": size}, resample=2).save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        pytest.param(224, {"num_hidden_layers": 4}, id="base-patch16-224-shallow"),
        pytest.param(224, {}, id="base-patch16-224", marks=pytest.mark.slow),
        pytest.param(384, {**LARGE, "num_hidden_layers": 4}, id="large-patch16-384-shallow", marks=pytest.mark.slow),
        pytest.param(384, {**LARGE, "num_hidden_layers": 24}, id="large-patch16-384", marks=pytest.mark.slow),
    ],
)
def test_microsofts_classifiers(size: int, fields: dict[str, int], tmp_path: Path) -> None:
    theirs = write_card(tmp_path, size, **fields)
    ours = beitzoo.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = Image.open(PHOTO)
    processor = BeitImageProcessorPil.from_pretrained(tmp_path)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    x = beitzoo.create_transform(**beitzoo.resolve_data_config(ours))(image)[None]
    torch.testing.assert_close(x, pixels, atol=1e-5, rtol=0)
    with torch.inference_mode():
        expected = theirs(pixels, output_hidden_states=True)
        logits = ours(x)
        assert relative_error(logits, expected.logits) < 1e-4
        assert relative_error(ours.forward_features(x), expected.hidden_states[-1]) < 1e-4
    assert ours.pretrained.head.labels is not None
    top = int(logits.argmax())
    assert ours.pretrained.head.labels[top] == theirs.config.id2label[top]
    image.close()


def test_microsofts_masked_image_model(tmp_path: Path) -> None:
    config = transformers.BeitConfig(
        use_mask_token=True, use_shared_relative_position_bias=True, architectures=["BeitForMaskedImageModeling"]
    )
    theirs = randomise(BeitForMaskedImageModeling(config)).eval()
    theirs.save_pretrained(tmp_path)
    model = beitzoo.create_model(str(tmp_path), pretrained=True).eval()
    image = Image.open(PHOTO)
    x = beitzoo.create_transform(**beitzoo.resolve_data_config(model))(image)[None]
    bool_masked_pos = torch.ones(1, 196, dtype=torch.bool)
    bool_masked_pos[:, ::3] = False
    with torch.inference_mode():
        expected = theirs(x, bool_masked_pos=bool_masked_pos, output_hidden_states=True)
        logits = model(x, bool_masked_pos)
        assert relative_error(logits, expected.logits[bool_masked_pos]) < 1e-4
        assert relative_error(model(x, bool_masked_pos, all_patches=True), expected.logits) < 1e-4
        tokens = model.forward_features(x, bool_masked_pos)
        assert relative_error(tokens, theirs.layernorm(expected.hidden_states[-1])) < 1e-4
    image.close()


@pytest.mark.slow
def test_timms_card(tmp_path: Path) -> None:
    theirs = timm.create_model("beit_base_patch16_224.in22k_ft_in22k_in1k").eval()
    randomise(theirs)
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    ours = beitzoo.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = Image.open(PHOTO)
    x = beitzoo.create_transform(**beitzoo.resolve_data_config(ours))(image)[None]
    data = timm.data.resolve_model_data_config(theirs)
    assert torch.equal(x[0], timm.data.create_transform(**data)(image))
    with torch.inference_mode():
        assert relative_error(ours(x), theirs(x)) < 1e-5
        assert relative_error(ours.forward_features(x), theirs.forward_features(x)) < 1e-5
    image.close()


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "expected", "top"),
    [
        ("hf-hub:microsoft/beit-base-patch16-224", [-1.2385, -1.0987, -1.0108], 281),
        ("hf-hub:microsoft/beit-large-patch16-384", [-0.5122, 0.5117, -0.2113], 761),
        ("hf-hub:microsoft/beit-large-patch16-224-pt22k-ft22k", [1.6881, -0.2787, 0.5901], 2396),
    ],
)
def test_real_classifiers_give_their_published_logits(name: str, expected: list[float], top: int) -> None:
    """COCO val2017 000000039769, squashed and bilinear as Microsoft's processor does."""
    from urllib.request import urlopen

    model = beitzoo.create_model(name, pretrained=True).eval()
    with urlopen("http://images.cocodataset.org/val2017/000000039769.jpg") as file, Image.open(file) as image:
        x = beitzoo.create_transform(**beitzoo.resolve_data_config(model))(image.convert("RGB"))[None]
    with torch.inference_mode():
        logits = model(x)[0]
    torch.testing.assert_close(logits[:3], torch.tensor(expected), atol=1e-2, rtol=0)
    assert int(logits.argmax()) == top


@pytest.mark.network
@pytest.mark.parametrize("name", beitzoo.list_pretrained("beit*", exclude_filters=["*digits"]))
def test_real_rows_load(name: str) -> None:
    model = beitzoo.create_model(name, pretrained=True, num_classes=0).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, *model.config.img_size)).isfinite().all()
