"""Segmentation models are timed as what they are: same blocks, weights, outputs and loss on both sides."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from beitzoo.errors import UnsupportedError
from beitzoo.measure import comparison, steps
from beitzoo.measure.benchmark import read_flags
from beitzoo.measure.comparison import compare
from beitzoo.measure.options import BenchmarkOptions
from beitzoo.measure.sweep import COMPARISON_COLUMNS
from beitzoo.models.segmentation import Segmenter

pytestmark = pytest.mark.usefixtures("no_inference_tensors")

NAME = "beit_base_patch16_640.in22k_ft_in22k_ade20k"
SMALL = {"embed_dim": 24, "num_heads": 3, "depth": 6, "auxiliary_channels": 10, "decoder_drop_rate": 0.0}
OPTIONS = BenchmarkOptions(
    model=NAME,
    num_classes=7,
    img_size=64,
    batch_size=2,
    num_warm_iter=0,
    num_bench_iter=1,
    peer="transformers",
    model_kwargs=(*SMALL.items(), ("out_indices", (0, 1, 2, 3))),
)
TRAINED = replace(OPTIONS, bench="train", opt="adamw", smoothing=0.0)


@pytest.mark.parametrize("subject", ["beitzoo", "beitzoo+optimize"])
def test_transformers_gives_the_same_pixels(subject: str) -> None:
    row = compare(replace(OPTIONS, subject=subject))
    assert set(row) <= set(COMPARISON_COLUMNS)
    assert 0 < float(row["output_difference"] or 0) < 1e-5
    assert float(row["ratio"] or 0) > 0
    assert "gflops" not in row


def test_transformers_has_the_same_loss_of_pixels(tmp_path: Path) -> None:
    sides = [
        comparison._training(comparison._side(replace(TRAINED, peer=name), tmp_path / name))
        for name in ("beitzoo", "transformers")
    ]
    ours, theirs = sides
    assert ours.outputs().shape == theirs.outputs().shape == (2, 7, 16, 16)
    for _ in range(2):  # before the first step, and behind it
        assert theirs.loss().item() == pytest.approx(ours.loss().item(), abs=1e-4)
        ours(), theirs()


def test_the_loss_is_that_of_all_labelled_pixels(tmp_path: Path) -> None:
    training = comparison._training(comparison._side(replace(TRAINED, peer="beitzoo"), tmp_path / "ours"))
    network = training.network
    assert isinstance(network, steps.PixelLoss) and isinstance(network.model, Segmenter)
    images, labels = training._inputs[0], training._labels
    assert labels is not None and labels.shape == (2, 64, 64)
    assert (labels == 255).sum() == 2 * 4 * 64
    torch.manual_seed(1)
    found = training.loss()
    torch.manual_seed(1)
    pixels = [
        F.interpolate(one, (64, 64), mode="bilinear").movedim(1, 3)[labels != 255] for one in network.model(images)
    ]
    main, auxiliary = (F.cross_entropy(one, labels[labels != 255]).item() for one in pixels)
    assert found.item() == pytest.approx(main + 0.4 * auxiliary, abs=1e-5)


def test_steps_are_compared_and_memory_is_measured() -> None:
    row = compare(replace(TRAINED, precision="amp_bfloat16"))
    assert 0 < float(row["output_difference"] or 0) < 3e-2
    assert float(comparison.measure_memory(replace(OPTIONS, peer="beitzoo"))["peak_memory"] or 0) > 100


def test_a_model_is_timed_alone() -> None:
    alone = replace(OPTIONS, peer=None)
    assert steps.measure_steps(alone)["infer_img_size"] == 64
    assert steps.measure_steps(replace(TRAINED, peer=None, grad_checkpointing=True))["train_batch_size"] == 2


def jobs(flags: str) -> BenchmarkOptions:
    options = read_flags(["--model", NAME, *flags.split()])
    return options.jobs([NAME], [options.compare])[0]


def test_both_sides_read_the_blocks_that_transformers_can() -> None:
    job = jobs("--compare transformers")
    assert job.segmenter is not None
    assert (job.segmenter.out_indices, job.opt) == ((1, 3, 5, 9), "sgd")
    assert job.others() == "--model-kwargs 'out_indices=(1, 3, 5, 9)'"
    trained = jobs("--compare transformers --bench train --model-kwargs out_indices=11,1,3,5")
    assert trained.segmenter is not None
    assert (trained.segmenter.out_indices, trained.opt, trained.smoothing) == ((11, 1, 3, 5), "adamw", 0)
    assert jobs("").segmenter == jobs("--bench train").segmenter
    assert jobs("").model_kwargs == ()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peer": "timm"}, "timm has no segmentation models"),
        ({"peer": "transformers", "model_kwargs": (*SMALL.items(),)}, "there blocks must rise"),
    ],
)
def test_what_cannot_be_compared_says_why(changed: dict[str, Any], message: str) -> None:
    with pytest.raises((UnsupportedError, ValueError), match=message):
        compare(replace(OPTIONS, **changed))


def test_what_only_classifiers_have_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"--gp without a head for classes of images: .* the classes of pixels\. Leave"
    ):
        replace(OPTIONS, gp="token")
