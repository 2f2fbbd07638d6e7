"""Which network computes many images: the inference copy, where one can be made, with the same outputs."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import beitzoo
from beitzoo.inference import fastest
from beitzoo.inference.fastest import count_ahead, for_many_images
from beitzoo.models.optimize import InferenceBeit

DIGITS = sorted(Path("beitzoo/assets/samples").glob("digit_*.png"))
HANDFUL = len(DIGITS) - 1


@pytest.fixture(autouse=True)
def small_handful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "HANDFUL", HANDFUL)


def test_many_images_are_computed_by_a_copy() -> None:
    model = beitzoo.create_model("test_beit")
    assert for_many_images(model, HANDFUL, 4) is model
    copy = for_many_images(model, HANDFUL + 1, 4)
    assert isinstance(copy, InferenceBeit)
    assert copy.choices.images_like == (4, 3, *model.config.img_size)
    assert for_many_images(copy, HANDFUL + 1, 4) is copy
    assert (type(model), model.training) == (beitzoo.Beit, True)
    assert for_many_images(model, HANDFUL + 1, 4, inplace=True) is model
    assert isinstance(model, InferenceBeit)


def hooked(model: beitzoo.Beit) -> None:
    model.register_forward_hook(lambda *_: None)


def replaced(model: beitzoo.Beit) -> None:
    model.blocks[0].mlp.fc1 = torch.nn.Sequential(model.blocks[0].mlp.fc1)


def elsewhere(model: beitzoo.Beit) -> None:
    model.to("meta")


@pytest.mark.parametrize("change", [hooked, replaced, elsewhere])
def test_what_cannot_be_copied_computes_itself(change: Callable[[beitzoo.Beit], None]) -> None:
    model = beitzoo.create_model("test_beit")
    change(model)
    assert for_many_images(model, HANDFUL + 1, 4) is model
    assert type(model) is beitzoo.Beit


def test_no_more_images_are_read_than_needed_to_count_a_handful() -> None:
    numbers = itertools.count()
    count, images = count_ahead(numbers)
    assert (count, next(numbers)) == (HANDFUL + 1, HANDFUL + 1)
    assert list(itertools.islice(images, 3)) == [0, 1, 2]
    assert [list(part) if isinstance(part, itertools.chain) else part for part in count_ahead("ab")] == [2, ["a", "b"]]


@pytest.mark.parametrize("is_generator", [False, True])
def test_predict_and_embed_give_the_same_by_the_copy(is_generator: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        made.append(beitzoo.optimize(*arguments, **options))
        return made[-1]

    def images() -> Any:
        return (path for path in DIGITS) if is_generator else DIGITS

    monkeypatch.setattr(fastest, "optimize", noted)
    model = beitzoo.create_model(pretrained=True)
    plain = beitzoo.embed(model, images(), optimize=False)
    answers = beitzoo.predict({"a": model}, images(), topk=10, optimize=False)
    assert not made
    np.testing.assert_allclose(beitzoo.embed(model, images()), plain, atol=1e-5 * np.abs(plain).max())
    by_copy = beitzoo.predict({"a": model}, images(), topk=10)
    assert len(made) == 2
    assert [one.path for one in by_copy] == DIGITS
    assert {one.model for one in by_copy} == {"a"}
    for one, other in zip(answers, by_copy, strict=True):
        first, second = ({answer.index: answer.probability for answer in each.answers} for each in (one, other))
        assert first == pytest.approx(second, abs=1e-5)
    assert len(beitzoo.predict(model, DIGITS)) == len(DIGITS)
    beitzoo.predict(model, DIGITS[:1])
    assert len(made) == 3
    assert model.training
