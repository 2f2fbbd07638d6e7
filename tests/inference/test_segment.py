"""Label maps: sizes, scales and flips by a slow loop, every kind of input, and what cannot be labelled."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from corpus import picture
from oracles import randomise, vary_classes
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import beitzoo
from beitzoo import SegmentOptions, segment
from beitzoo.errors import InvalidOptionError, InvalidValueError, OutOfMemoryError
from beitzoo.inference.segment import ScaledView, label_pixels, post_process, segment_each
from beitzoo.models.segmentation import Segmenter
from beitzoo.models.windows import NotFiniteError, Sliding, slide
from beitzoo.zoo.networks import Pair


def build(**fields: object) -> Segmenter:
    model = beitzoo.create_model("test_beit", head="segment", **{"num_classes": 5, "embed_dim": 32, **fields})
    assert isinstance(model, Segmenter)
    torch.manual_seed(0)
    randomise(model)
    vary_classes(model, model.backbone.config.img_size)
    return model


MODEL = build()
IMAGE = picture(150, 101)


@torch.inference_mode()
def reference(image: Image.Image, sizes: list[Pair], flip: bool, crop: Pair | None = (64, 64)) -> Tensor:
    """Return the mean probabilities of (height, width) sizes, (K, height, width), everything at once and by steps."""
    found = []
    for height, width in sizes:
        resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = torch.from_numpy((resized / 255 - 0.5) / 0.5).permute(2, 0, 1)
        for view in (pixels, pixels.flip(2)) if flip else (pixels,):
            side = crop or (height, width)
            logits = slide(MODEL, view, Sliding(side, (side[0] * 2 // 3, side[1] * 2 // 3)))
            logits = F.interpolate(logits[None], (image.height, image.width), mode="bilinear", align_corners=False)[0]
            found.append(logits.softmax(0).flip(2) if view is not pixels else logits.softmax(0))
    return torch.stack(found).mean(0)


def assert_same(labels: Tensor | np.ndarray, probabilities: Tensor) -> None:
    """Compare with the likeliest classes where rounding cannot have chosen another."""
    best = probabilities.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-5
    assert clear.float().mean() > 0.99
    assert len(probabilities.argmax(0).unique()) > 2
    assert torch.equal(torch.as_tensor(labels)[clear].long(), probabilities.argmax(0)[clear])


@pytest.mark.parametrize(
    ("options", "sizes", "crop"),
    [
        (SegmentOptions(), [(64, 95)], (64, 64)),
        (SegmentOptions(mode="whole"), [(64, 95)], None),
        (SegmentOptions(short_side=0, crop=48), [(101, 150)], (48, 48)),
        (SegmentOptions(scales=(0.5, 1.0, 1.75), flip=True), [(64, 95), (64, 95), (112, 166)], (64, 64)),
        (SegmentOptions(short_side=80, flip=True, budget=1), [(80, 119)], (64, 64)),
    ],
    ids=["slide", "whole", "as it is", "scales and flip", "small budget"],
)
def test_labels_are_those_of_a_slow_loop(options: SegmentOptions, sizes: list[Pair], crop: Pair | None) -> None:
    expected = reference(IMAGE, sizes, options.flip, crop)
    assert_same(label_pixels(MODEL, IMAGE, options), expected)
    other = reference(IMAGE, [(height, width + 9) for height, width in sizes], options.flip, crop)
    assert (other.argmax(0) != expected.argmax(0)).float().mean() > 0.01  # it could fail


def test_images_are_resized_as_in_the_original() -> None:
    view = ScaledView(3, 512, 512, (1.0,), "bilinear")
    assert view.size_at((480, 640), 1.0) == (512, 683)
    assert view.size_at((683, 512), 1.0) == (683, 512)
    assert view.size_at((300, 3000), 1.0) == (205, 2048)  # the longer side is at most four times the network's
    assert view.size_at((1, 9000), 1.0) == (1, 2048)
    scaled = ScaledView(3, 512, 512, (0.5, 1.75), "bilinear")
    assert scaled.size_at((480, 640), 0.5) == (512, 683)  # never smaller than the window
    assert scaled.size_at((480, 640), 1.75) == (896, 1195)
    as_it_is = ScaledView(3, 0, 512, (1.0,), "bilinear")
    assert as_it_is.size_at((48, 9000), 1.0) == (48, 9000)


def test_the_budget_changes_no_label() -> None:
    options = [SegmentOptions(scales=(1.0, 1.5), flip=True, budget=budget) for budget in (1, 20_000, 10**7, 10**9)]
    maps = [segment(MODEL, IMAGE, one)[0].labels for one in options]
    for labels in maps[1:]:
        assert np.mean(labels == maps[0]) > 0.9999  # rounding may choose another class of a pixel between two


def test_every_kind_of_image_in_one_call(tmp_path: Path) -> None:
    """Of different sizes, some broken; a photograph is labelled upright."""
    small, turned = picture(70, 40), Image.Exif()
    turned[0x0112] = 6
    IMAGE.save(tmp_path / "turned.png", exif=turned)
    small.save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "small.png").read_bytes()[:99])
    pixels = np.asarray(small)
    images = [
        str(tmp_path / "small.png"), tmp_path / "broken.png", tmp_path / "turned.png", small, pixels,
        torch.from_numpy(pixels.copy()).permute(2, 0, 1), "absent.png",
    ]  # fmt: skip
    found = segment(MODEL.train(), images)
    assert MODEL.training and not MODEL.eval().training
    assert [one.path for one in found] == [*map(Path, map(str, images[:3])), None, None, None, Path("absent.png")]
    assert [one.error is not None for one in found] == [False, True, False, False, False, False, True]
    assert found[6].error == "there is no such file" and found[6].labels is None
    labels = found[0].labels
    assert labels is not None and (labels.shape, labels.dtype) == ((40, 70), np.uint8)
    for one in found[3:6]:
        np.testing.assert_array_equal(one.labels, labels)
    np.testing.assert_array_equal(found[2].labels, label_pixels(MODEL, IMAGE.transpose(Image.Transpose.ROTATE_270)))
    np.testing.assert_array_equal(segment(MODEL, small)[0].labels, labels)
    assert segment(MODEL, []) == []
    with pytest.raises(InvalidOptionError, match="An image cannot be made of"):
        segment(MODEL, [3.5])


def test_images_are_labelled_as_they_come() -> None:
    asked: list[int] = []

    def slow() -> object:
        for number in range(50):
            asked.append(number)
            yield picture(20, 20)

    found = segment_each(MODEL, slow(), workers=2)  # type: ignore[arg-type]
    assert next(found).labels is not None and len(asked) == 2
    found.close()  # type: ignore[attr-defined]


def test_copies_precisions_grey_and_absolute_positions() -> None:
    labels = segment(MODEL, IMAGE)[0].labels
    optimized = segment(beitzoo.optimize(MODEL), IMAGE)[0].labels
    assert np.mean(optimized == labels) > 0.999
    half = build().to(torch.bfloat16)
    half.load_state_dict(MODEL.state_dict())
    assert np.mean(segment(half, IMAGE)[0].labels == labels) > 0.9
    grey = build(in_chans=1, use_abs_pos_emb=True, decoder="linear")
    found = segment(grey, [IMAGE, IMAGE.convert("L")], SegmentOptions(mode="whole"))
    np.testing.assert_array_equal(found[0].labels, found[1].labels)
    oblong = build(img_size=(48, 80))
    assert segment(oblong, IMAGE)[0].labels.shape == (101, 150)


def test_windows_are_halved_until_they_fit_and_stay_so() -> None:
    model, sizes = build(), []

    def refuse(_: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("out of memory")

    model.decode_head.register_forward_pre_hook(lambda module, inputs: refuse(module, (inputs[0][0],)))
    most = 2
    wide = picture(230, 64)  # five windows
    labels = segment(model, [wide, wide])
    assert sizes == [5, 2, 2, 1, 2, 2, 1]
    np.testing.assert_array_equal(labels[0].labels, labels[1].labels)
    most = 0
    with pytest.raises(OutOfMemoryError, match=r"Not even one window fits .* smaller crop"):
        segment(model, wide)
    with pytest.raises(OutOfMemoryError, match=r'Not even one whole image fits .* mode="slide"'):
        segment(model, wide, SegmentOptions(mode="whole"))


def test_what_is_not_finite_is_a_failure() -> None:
    model = build()
    with torch.no_grad():
        model.decode_head.conv_seg.bias[2] = float("nan")
    (one,) = segment(model, IMAGE)
    assert one.labels is None and one.error == "the model's output for it is not finite"
    with pytest.raises(NotFiniteError, match="not finite"):
        label_pixels(model, IMAGE)


def test_post_processing_is_that_of_transformers() -> None:
    logits = torch.randn(3, 7, 10, 14, generator=torch.Generator().manual_seed(0))
    processor = transformers.BeitImageProcessor()
    sizes = [(37, 50), (10, 14), (5, 9)]
    for targets in (sizes, None):
        theirs = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), targets)
        ours = post_process(logits, targets)
        assert [(one.dtype, one.shape) for one in ours] == [(one.dtype, one.shape) for one in theirs]
        assert all(torch.equal(one, their) for one, their in zip(ours, theirs, strict=True))
    assert all(map(torch.equal, post_process(logits, torch.tensor(sizes)), post_process(logits, sizes)))
    with pytest.raises(InvalidValueError, match="logits of 3 images and 2 target sizes"):
        post_process(logits, sizes[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "all"}, "mode='all'; there are 'slide' and 'whole'"),
        ({"stride": 0}, "stride is 0; it can be 1 or more"),
        ({"crop": 0}, "crop is 0"),
        ({"short_side": -1}, "short_side is -1; it can be 0 or more"),
        ({"budget": 0}, "budget is 0"),
        ({"scales": ()}, r"scales=\(\)"),
        ({"scales": (1.0, 0.0)}, "must be positive numbers"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        SegmentOptions(**options)  # type: ignore[arg-type]


def test_models_are_checked() -> None:
    with pytest.raises(InvalidValueError, match="This model is a Beit, which names no pixels"):
        segment(beitzoo.create_model("test_beit"), IMAGE)  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="has 256 classes"):
        segment(build(num_classes=256), IMAGE)
    with pytest.raises(InvalidValueError, match="takes 4 channels"):
        segment(build(in_chans=4), IMAGE)
    with pytest.raises(InvalidValueError, match=r"The stride is \(65, 65\) with windows"):
        segment(MODEL, IMAGE, SegmentOptions(stride=65))


@pytest.mark.slow
def test_a_large_image_takes_less_than_four_gibibytes() -> None:
    """2048 x 1024 pixels as they are, ten windows of the base network at 640, in a process of its own."""
    code = """
import resource, numpy, beitzoo
model = beitzoo.create_model("beit_base_patch16_640.in22k_ft_in22k_ade20k")
image = numpy.random.default_rng(0).integers(0, 256, (1024, 2048, 3), dtype=numpy.uint8)
(one,) = beitzoo.segment(model, image, beitzoo.SegmentOptions(short_side=0))
assert one.labels.shape == (1024, 2048)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 4 << 30
