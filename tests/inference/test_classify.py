"""As many answers as images, in order, and never a neighbour's."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import beitzoo
from beitzoo import Beit
from beitzoo.errors import InvalidOptionError
from beitzoo.images import files
from beitzoo.images.files import ImageError, open_image
from beitzoo.inference import pipeline
from beitzoo.inference.classify import Tally, predict, predict_each
from beitzoo.inference.pipeline import Loading
from beitzoo.zoo.checkpoints import Classify

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


def test_a_file_that_fails_once_does_not_shift_its_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def open_once(path: Path, in_chans: int) -> Image.Image:
        calls.append(path)
        if len(calls) == 1:
            raise ImageError("gone for a moment")
        return open_image(path, in_chans)

    monkeypatch.setattr(files, "open_image", open_once)
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
        predict(beitzoo.create_model("test_beit", in_chans=4), DIGITS)
    for options in ({"num_classes": 0}, {"global_pool": ""}, {"head": "mim"}):
        with pytest.raises(ValueError, match="no head"):
            predict(beitzoo.create_model("test_beit", **options), DIGITS)
    with pytest.raises(ValueError, match="b has no head"):
        predict({"b": beitzoo.create_model("test_beit", num_classes=0)}, DIGITS)


def test_probabilities_are_those_the_head_was_trained_for() -> None:
    """Sigmoid for several labels at once, or for a single output: transformers' own rule, and its numbers."""
    logits = torch.tensor([[2.0, -1.0, 0.0]])
    for classes in (3, 1):
        model = beitzoo.create_model("test_beit", num_classes=classes)
        head = Classify(num_classes=classes, labels=tuple("abc"[:classes]), activation="sigmoid")
        model.pretrained = replace(model.pretrained, head=head)
        model.register_forward_hook(lambda _, __, out: logits[:, : out.shape[1]])
        (prediction,) = predict(model, Image.new("RGB", (8, 8)))
        expected = logits[0, :classes].sigmoid().sort(descending=True)
        assert [answer.probability for answer in prediction.answers] == pytest.approx(expected.values.tolist())
        assert [answer.index for answer in prediction.answers] == expected.indices.tolist()
        (softmax,) = predict(replace_head(model, "softmax"), Image.new("RGB", (8, 8)))
        assert sum(answer.probability for answer in softmax.answers) == pytest.approx(1)


def replace_head(model: Beit, activation: Any) -> Beit:
    head = replace(model.pretrained.head, activation=activation)  # type: ignore[type-var]
    model.pretrained = replace(model.pretrained, head=head)
    return model


def test_images_come_as_people_have_them() -> None:
    model = beitzoo.create_model(pretrained=True)
    assert model.training
    pixels = np.asarray(Image.open(DIGITS[3]))
    images = [DIGITS[3], str(DIGITS[3]), Image.open(DIGITS[3]), pixels, torch.tensor(pixels)[None]]
    rows = beitzoo.predict(model, images)
    assert [row.answers[0].label for row in rows] == ["3"] * 5
    assert [row.path for row in rows] == [DIGITS[3], DIGITS[3], None, None, None]
    assert len({row.answers[0].probability for row in rows}) == 1
    for image in images:
        assert beitzoo.predict(model, image)[0].answers[0].label == "3"
    assert model.training
    with pytest.raises(InvalidOptionError, match="cannot be made of a int"):
        beitzoo.predict(model, [3])


def test_the_weights_decide_the_precision() -> None:
    model = beitzoo.create_model(pretrained=True, dtype=torch.bfloat16)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    assert [row.answers[0].label for row in predict(model, DIGITS)] == list("0123456789")
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("name", ["topk", "batch_size", "workers"])
def test_numbers_are_checked_at_the_call(name: str, number: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {number}; it can be 1 or more. Leave it out"):
        predict(beitzoo.create_model("test_beit"), DIGITS, **{name: number})


def test_no_models_are_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match=r"There are no models; .* Give a model"):
        predict({}, DIGITS)


def test_several_models_see_each_image_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def count(path: Path, in_chans: int) -> Image.Image:
        opened.append((path.name, in_chans))
        return open_image(path, in_chans)

    monkeypatch.setattr(files, "open_image", count)
    (tmp_path / "broken.png").touch()
    paths = [DIGITS[7], tmp_path / "broken.png", DIGITS[2]]
    models = {
        "grey": beitzoo.create_model(pretrained=True),
        "same": beitzoo.create_model(pretrained=True),
        "colour": beitzoo.create_model("test_beit", num_classes=4),
    }
    rows = list(predict(models, paths, batch_size=2))
    assert [(row.path, row.model) for row in rows] == [(path, name) for path in paths for name in models]
    assert [row.answers[0].label for row in rows if row.model == "grey" and row.answers] == ["7", "2"]
    assert [row.error is None for row in rows] == [True] * 3 + [False] * 3 + [True] * 3
    assert sorted(opened) == [("broken.png", 1), *[(path.name, c) for path in (DIGITS[2], DIGITS[7]) for c in (1, 3)]]
    for name, model in models.items():
        alone = list(predict(model, [DIGITS[7], DIGITS[2]]))
        together = [row for row in rows if row.model == name and row.answers]
        for own, row in zip(alone, together, strict=True):
            assert [answer.index for answer in own.answers] == [answer.index for answer in row.answers]


def test_output_that_is_not_finite_is_a_failure_of_its_own_image() -> None:
    model = beitzoo.create_model(pretrained=True)

    def spoil(_: torch.nn.Module, __: object, logits: torch.Tensor) -> torch.Tensor:
        logits[1, 4], logits[2, 0] = float("nan"), float("inf")
        return logits

    model.register_forward_hook(spoil)
    rows = list(predict(model, DIGITS[:4]))
    assert [row.error for row in rows] == [None, *["the model's output for it is not finite"] * 2, None]
    assert [row.answers[0].label for row in rows if row.answers] == ["0", "3"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_does_not_fit_is_halved_and_stays_so(
    error: RuntimeError, caplog: pytest.LogCaptureFixture
) -> None:
    model = beitzoo.create_model(pretrained=True)
    sizes: list[int] = []

    def refuse(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 2:
            raise error

    model.register_forward_pre_hook(refuse)
    rows = list(predict(model, DIGITS, batch_size=8))
    assert [row.answers[0].label for row in rows] == list("0123456789")
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert "8 images do not fit into memory; going on with 4" in caplog.text


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        ("can't allocate memory", MemoryError, r"Not even one image of \(1, 32, 32\) fits"),
        ("shapes differ", RuntimeError, "shapes differ"),
    ],
)
def test_other_errors_and_a_single_image_that_does_not_fit_end_the_run(
    raised: str, expected: type[Exception], message: str
) -> None:
    model = beitzoo.create_model(pretrained=True)

    def refuse(*_: object) -> None:
        raise RuntimeError(raised)

    model.register_forward_pre_hook(refuse)
    with pytest.raises(expected, match=message):
        list(predict(model, DIGITS, batch_size=4))


def test_paths_are_read_as_needed_and_rows_come_before_the_end() -> None:
    asked = 0

    def endless() -> Iterator[Path]:
        nonlocal asked
        for path in itertools.cycle(DIGITS):
            asked += 1
            yield path

    rows = predict_each(beitzoo.create_model(pretrained=True), endless(), loading=Loading(batch_size=5))
    assert next(rows).answers[0].label == "0"
    assert asked == 5  # the first rows wait for nothing but their own batch
    labels = [row.answers[0].label for row in itertools.islice(rows, 39)]
    assert labels == [str(i % 10) for i in range(1, 40)]
    assert asked == 45  # one batch ahead
    rows.close()  # type: ignore[attr-defined]


def test_what_cannot_be_prepared_is_a_row(tmp_path: Path) -> None:
    """Of 1 x 3000 pixels padded to a border nothing is left of the short side."""
    Image.new("L", (1, 3000)).save(tmp_path / "thin.png")
    model = beitzoo.create_model(pretrained=True)
    model.pretrained = replace(model.pretrained, data=replace(model.pretrained.data, crop_mode="border"))
    thin, digit = predict(model, [tmp_path / "thin.png", DIGITS[5]])
    assert thin.error is not None
    assert thin.error.startswith("cannot be prepared: ")
    assert digit.answers


def test_a_broken_transform_is_no_fault_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("shapes differ"), AttributeError("mode"), TypeError("missing argument")):

        def fail(image: Image.Image, error: Exception = error) -> torch.Tensor:
            raise error

        monkeypatch.setattr(pipeline, "create_transform", lambda fail=fail, **_: fail)
        with pytest.raises(type(error), match=str(error)):
            predict(beitzoo.create_model(pretrained=True), DIGITS)


def test_tally_counts_rows_and_failures() -> None:
    tally = Tally(predict_each(beitzoo.create_model(pretrained=True), [DIGITS[0], Path("absent.png")]))
    assert (tally.rows, tally.failed) == (0, 0)
    assert len(list(tally)) == 2
    assert (tally.rows, tally.failed) == (2, 1)


@pytest.mark.parametrize("save", [beitzoo.save_pretrained, beitzoo.save_transformers])
def test_labels_go_with_a_saved_model(save: Callable[[Beit, Path], None], tmp_path: Path) -> None:
    model = beitzoo.create_model(pretrained=True)
    names = tuple(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    model.pretrained = replace(model.pretrained, head=replace(model.pretrained.head, labels=names))
    save(model, tmp_path)
    rows = predict(beitzoo.create_model(f"local-dir:{tmp_path}", pretrained=True), DIGITS)
    assert tuple(row.answers[0].label for row in rows) == names
    (fresh,) = predict(beitzoo.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=9), DIGITS[:1])
    assert {answer.label for answer in fresh.answers} <= set("012345678")


def test_a_resized_model_sees_resized_images() -> None:
    model = beitzoo.create_model(pretrained=True)
    shapes = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    list(predict(model, DIGITS[:1]))
    model.set_input_size((48, 40))
    list(predict(model, DIGITS[:1]))
    assert shapes == [(1, 1, 32, 32), (1, 1, 48, 40)]
