"""From inputs to outcomes, whatever is done with a batch: in order, as soon as a batch is done, in bounded memory."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from beitzoo.errors import InvalidOptionError, InvalidValueError, OutOfMemoryError
from beitzoo.inference.pipeline import Failure, Job, Loading, View, one_or_many, run_jobs

EVAL: dict[str, Any] = {
    "input_size": (1, 4, 4),
    "interpolation": "nearest",
    "mean": (0.0,),
    "std": (1 / 255,),
    "crop_pct": 1.0,
}
CPU = torch.device("cpu")


def job(sizes: list[int] | None = None, most: int = 99, dtype: torch.dtype = torch.float32) -> Job[int]:
    """Read the grey of an image off its tensor: an outcome that is no class; odd greys have none."""

    def run(images: torch.Tensor) -> list[int | Failure]:
        assert (images.dtype, torch.is_inference_mode_enabled()) == (dtype, True)
        (sizes if sizes is not None else []).append(len(images))
        if len(images) > most:
            raise torch.OutOfMemoryError("out of memory")
        greys = [round(float(grey)) for grey in images[:, 0, 0, 0]]
        return [Failure("odd") if grey % 2 else grey for grey in greys]

    return Job(View(1, tuple(EVAL.items())), CPU, dtype, run)


def grey(value: int) -> Image.Image:
    return Image.new("L", (8, 8), value)


def test_every_input_has_its_outcome_in_order() -> None:
    outcomes = list(run_jobs(range(20), [job(), job(dtype=torch.float64)], Loading(6, 3), grey))
    assert [value for value, _ in outcomes] == list(range(20))
    assert [both for _, both in outcomes] == [[Failure("odd") if v % 2 else v] * 2 for v in range(20)]


def test_outcomes_come_before_more_inputs_are_asked_for() -> None:
    """From a pipe, the next input may come tomorrow."""
    asked: list[int] = []

    def slow() -> Iterator[int]:
        for number in range(100):
            asked.append(number)
            yield number

    outcomes = run_jobs(slow(), [job()], Loading(4, 1), grey)
    assert len(list(islice(outcomes, 4))) == len(asked) == 4
    list(islice(outcomes, 4))
    assert len(asked) == 12  # from now on, a batch ahead
    outcomes.close()  # type: ignore[attr-defined]


def test_a_batch_is_halved_until_it_fits_and_stays_so() -> None:
    sizes: list[int] = []
    values = [value for _, (value,) in run_jobs(range(0, 40, 2), [job(sizes, most=3)], Loading(8), grey)]
    assert values == list(range(0, 40, 2))
    assert sizes == [8, 4, *[2] * 10]
    with pytest.raises(OutOfMemoryError, match=r"Not even one image of \(1, 4, 4\) fits"):
        list(run_jobs(range(3), [job(most=0)], Loading(8), grey))


def test_an_input_that_cannot_be_opened_is_a_failure_for_every_job() -> None:
    outcomes = list(run_jobs(["absent.png", grey(6)], [job(), job()], Loading()))
    assert [both for _, both in outcomes] == [[Failure("there is no such file")] * 2, [6, 6]]


def test_no_inputs_have_no_outcomes() -> None:
    assert list(run_jobs([], [job()], Loading())) == []


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("name", ["batch_size", "workers"])
def test_numbers_are_checked(name: str, number: int) -> None:
    with pytest.raises(InvalidValueError, match=f"{name} is {number}; it can be 1 or more. Leave it out"):
        Loading(**{name: number})


def test_one_image_is_a_list_of_it_and_an_array_of_several_is_each_of_them() -> None:
    pixels = np.zeros((5, 8, 9, 3), np.uint8)
    tensors = torch.zeros(5, 3, 8, 9, dtype=torch.uint8)
    for one in ("a.png", Path("a.png"), grey(1), pixels[0], pixels[0, :, :, 0], tensors[0], b"bytes"):
        assert one_or_many(one) == [one] or one_or_many(one)[0] is one  # type: ignore[index]
    for many in (pixels, tensors, ["a.png"], (grey(1),), {"a.png": 1}, np.array(["a.png", "b.png"])):
        assert one_or_many(many) is many
    assert [tuple(one.shape) for one in one_or_many(tensors)] == [(3, 8, 9)] * 5
    for wrong in (None, 3):
        with pytest.raises(InvalidOptionError, match="images are a list of paths, PIL images, arrays or tensors"):
            one_or_many(wrong)
