"""As many answers as images, in order, and never a neighbour's."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import beitzoo
import beitzoo.predict
from beitzoo.images.datasets import ImageError, open_image
from beitzoo.predict import predict

SAMPLES = Path("beitzoo/assets/samples")
DIGITS = sorted(SAMPLES.glob("*.png"))


def test_the_shipped_model_reads_the_shipped_digits() -> None:
    model = beitzoo.create_model(pretrained=True)
    labels = [p.answers[0].label for p in predict(model, DIGITS)]
    assert labels == [path.stem[-1] for path in DIGITS]
    assert len(labels) == 10


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_broken_images_shift_nothing(batch_size: int, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    paths = [broken, *DIGITS[:4], tmp_path / "absent.png", broken, *DIGITS[4:], broken]
    model = beitzoo.create_model(pretrained=True)
    predictions = list(predict(model, paths, batch_size=batch_size))
    assert [p.path for p in predictions] == paths
    for prediction in predictions:
        if prediction.path in DIGITS:
            assert prediction.error is None
            assert prediction.answers[0].label == prediction.path.stem[-1]
        else:
            assert prediction.error is not None
            assert prediction.answers == ()


def test_a_file_that_fails_once_does_not_shift_its_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def open_once(path: Path, in_chans: int) -> Image.Image:
        calls.append(path)
        if len(calls) == 1:
            raise ImageError("gone for a moment")
        return open_image(path, in_chans)

    monkeypatch.setattr(beitzoo.predict, "open_image", open_once)
    first, *others = predict(beitzoo.create_model(pretrained=True), [DIGITS[1], DIGITS[1], DIGITS[7]])
    assert first.error == "gone for a moment"
    assert [p.answers[0].label for p in others] == ["1", "7"]


def test_answers_are_the_softmax_of_the_logits() -> None:
    model = beitzoo.create_model(pretrained=True).eval()
    (prediction,) = predict(model, DIGITS[:1], topk=99)
    transform = beitzoo.create_transform(**beitzoo.resolve_data_config(model))
    logits = model(transform(Image.open(DIGITS[0]))[None])[0]
    expected = logits.softmax(-1).sort(descending=True)
    assert [a.index for a in prediction.answers] == expected.indices.tolist()
    assert [a.probability for a in prediction.answers] == pytest.approx(expected.values.tolist(), rel=1e-5)
    assert len(prediction.answers) == 10


def test_a_fresh_head_has_numbers_for_names() -> None:
    torch.manual_seed(1)
    model = beitzoo.create_model(pretrained=True, num_classes=3)
    (prediction,) = predict(model, DIGITS[:1])
    assert {a.label for a in prediction.answers} == {"0", "1", "2"}


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="takes 4 channels"):
        next(predict(beitzoo.create_model("test_beit", in_chans=4), DIGITS))
    with pytest.raises(ValueError, match="no head"):
        next(predict(beitzoo.create_model("test_beit", num_classes=0), DIGITS))
