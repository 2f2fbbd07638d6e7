"""A plain U-Net on the data, the augmentation, the loss and the measurement of a recipe for segmentation models.

It is what a segmentation model is compared with: `python tests/baselines/unet.py RECIPE OUT --seconds N --set ...`
trains it for about so many seconds of one processor core. (Others may use the machine at the same time, so that seconds
of a clock on the wall would say little.)
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beitzoo.models.segmentation import Segmenter
from beitzoo.training.optim import make_optimizer
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe, load_recipe
from beitzoo.training.run import run
from beitzoo.training.task import compute_loss
from beitzoo.training.tasks.segment import SegmentTask, prepare

LEVELS = 4
_WEIGHTS = "unet.pt"
_TIMED = 6  # updates by which the time of one is measured, after the first two


class Unet(nn.Module):
    """U-Net (https://arxiv.org/abs/1505.04597) with batch norms and padding; width doubles from level to level."""

    def __init__(self, in_chans: int, num_classes: int, width: int = 24) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(LEVELS)]
        self.down = nn.ModuleList(_two_convolutions(a, b) for a, b in zip([in_chans, *widths], widths, strict=False))
        pairs = list(itertools.pairwise(widths))[::-1]
        self.grow = nn.ModuleList(nn.ConvTranspose2d(large, small, kernel_size=2, stride=2) for small, large in pairs)
        self.up = nn.ModuleList(_two_convolutions(2 * small, small) for small, _ in pairs)
        self.classify = nn.Conv2d(width, num_classes, kernel_size=1)
        self.to(memory_format=torch.channels_last)  # faster on processors

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W), sides multiples of 8, to logits (B, K, H, W)."""
        images = images.contiguous(memory_format=torch.channels_last)
        maps: list[Tensor] = []
        for level, convolve in enumerate(self.down):
            maps.append(convolve(nn.functional.max_pool2d(maps[-1], 2) if level else images))
        x = maps.pop()
        for grow, convolve in zip(self.grow, self.up, strict=True):
            x = convolve(torch.cat([maps.pop(), grow(x)], dim=1))
        return self.classify(x)


def _two_convolutions(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (before, after):
        layers += [nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UnetSegmenter(Segmenter):
    """A U-Net in the place of a segmentation model, which goes on saying how large images are; nothing else runs."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__(model.backbone, model.config)
        self.requires_grad_(False)
        self.unet = Unet(model.backbone.in_chans, model.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits of their size."""
        logits: Tensor = self.unet(images)
        return logits


class UnetTask(SegmentTask):
    """The task of a recipe for another network, which has no auxiliary head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.log_names = ()

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write the weights of the U-Net."""
        assert isinstance(model, UnetSegmenter)
        directory.mkdir(exist_ok=True)
        torch.save(model.unet.state_dict(), directory / _WEIGHTS)

    def measure_best(self, directory: Path) -> dict[str, Any]:
        """Measure the best weights on the held-out images, and say what they are of."""
        assert isinstance(self.model, UnetSegmenter)
        self.model.unet.load_state_dict(torch.load(directory / _WEIGHTS, weights_only=True))
        return {**self.measure_test(self.model.eval()), "model": "unet"}


def prepare_unet(recipe: Recipe, processes: Processes) -> tuple[UnetTask, UnetSegmenter]:
    """Make the task of a recipe and a U-Net."""
    task, model = prepare(recipe, processes)
    unet = UnetSegmenter(model)
    return UnetTask(recipe, task.masked, task.split, unet, processes, task.found), unet


def updates_in(recipe: Recipe, seconds: float) -> int:
    """Return how many updates of a U-Net take so many seconds of the processor, measured on the first ones."""
    processes = Processes.join()
    task, model = prepare_unet(recipe, processes)
    optimizer = make_optimizer(task.parameter_groups(model), recipe.train)
    batches = task.batches(0)
    for number in range(2 + _TIMED):
        if number == 2:
            started = time.process_time()
        loss, _, _ = compute_loss(task, model.train(), next(batches), recipe.train.precision, processes.device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return max(round(seconds * _TIMED / (time.process_time() - started)), 1)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train by a recipe; print and return what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, help="of the processor; without it the recipe's number of updates")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="section.key=value")
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe, options.settings, kind="segment")
    if options.seconds is not None:
        length = {"updates": updates_in(recipe, options.seconds), "epochs": None}
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=length)})
    started = time.process_time()
    metrics = run(recipe, options.out, prepare_unet)
    print(json.dumps({**metrics, "processor_seconds": round(time.process_time() - started, 1)}, indent=2))
    return metrics


if __name__ == "__main__":
    main()
