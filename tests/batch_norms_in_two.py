"""A program that trains a small segmentation model on drawn images, by one process or by several on one machine.

`python batch_norms_in_two.py OUT PROCESSES` fills OUT with what the loop writes and the state after the last update.
The model is in float64, its last block is not read, and of the second update the last process gets no image.
"""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from forks import run_together
from torch import Tensor, nn
from torch.nn import functional as F

import beitzoo
from beitzoo.models.segmentation import Segmenter
from beitzoo.training.loop import Run, fit
from beitzoo.training.optim import groups_without_layers
from beitzoo.training.processes import Processes
from beitzoo.training.sections import RunSection, TrainSection
from beitzoo.training.state import start_state

# Images of an update that each of two processes has.
_SHARES = ((2, 2), (4, 0), (1, 3))
TRAIN = TrainSection(batch_size=4, updates=len(_SHARES), lr=1e-3)


class Pixels:
    """Labels of pixels, drawn once for each update."""

    images: Any = None
    split: Any = None
    updates_per_epoch = len(_SHARES)
    log_names: tuple[str, ...] = ()
    metric_names: tuple[str, ...] = ()

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def describe(self) -> list[str]:
        return []

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return groups_without_layers(model, TRAIN)

    def batches(self, update: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number, shares in enumerate(_SHARES[update:], update):
            draw = torch.Generator().manual_seed(number)
            images = torch.randn(4, 3, 64, 64, generator=draw, dtype=torch.float64)
            labels = torch.randint(3, (4, 64, 64), generator=draw)
            ours = slice(0, 4)
            if self.processes.count == 2:
                ours = slice(0, shares[0]) if self.processes.is_main else slice(shares[0], 4)
            yield images[ours], labels[ours]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int, dict[str, Tensor]]:
        images, labels = batch
        both = model(images)
        if not len(images):
            return both[0].sum() + both[1].sum(), 0, {}
        main, auxiliary = (F.cross_entropy(F.interpolate(one, labels.shape[1:]), labels) for one in both)
        return main + 0.4 * auxiliary, len(images), {}

    def count_images(self, batch: tuple[Tensor, Tensor]) -> int:
        return len(batch[0])

    def validate(self, model: nn.Module) -> dict[str, float]:
        return {}

    def better(self, metrics: dict[str, float], best: dict[str, float]) -> bool:
        raise AssertionError("there is nothing to compare")

    def save(self, model: nn.Module, directory: Path) -> None:
        assert isinstance(model, Segmenter)
        beitzoo.save_pretrained(copy.deepcopy(model).float(), directory)

    def measure_best(self, directory: Path) -> dict[str, float]:
        return {}


def train(out: Path) -> None:
    """Train by the processes of the launcher, or alone."""
    processes = Processes.join()
    torch.manual_seed(0)
    model = beitzoo.create_model(
        "test_beit", head="segment", num_classes=3, out_indices=(-1, 0, 0, 0), decoder_drop_rate=0, auxiliary_channels=8
    )
    state = start_state(Pixels(processes), model.double(), TRAIN, processes)
    fit(Pixels(processes), state, Run(out, TRAIN, RunSection(log_updates=1, tensorboard=False), processes))
    torch.save({"model": state.model.state_dict(), "moments": len(state.optimizer.state)}, out / f"{processes.rank}.pt")


def main(out: str, count: str) -> None:
    if count == "1":
        return train(Path(out))
    sys.exit(run_together(lambda: train(Path(out)), int(count)))


if __name__ == "__main__":
    main(*sys.argv[1:])
