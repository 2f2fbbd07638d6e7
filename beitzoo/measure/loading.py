"""`python -m beitzoo.measure.loading`: from a file on disk to the first logits, here and in peers.

Each turn is a fresh process that has imported its library but made nothing yet.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch import nn
from tqdm import tqdm

from beitzoo.factory import create_model
from beitzoo.measure.child import run_in_child
from beitzoo.measure.timing import median_interval, median_ratio, peak_memory
from beitzoo.results import ENVIRONMENT, Row, Table, environment
from beitzoo.saving import save_pretrained, save_transformers

Library = Literal["beitzoo", "beitzoo local-dir", "timm", "transformers"]
LIBRARIES: tuple[Library, ...] = ("beitzoo", "beitzoo local-dir", "timm", "transformers")
COLUMNS = ("model", "library", "ratio", "ratio_low", "ratio_high", "load_time", "logits_time", "added_memory", "rounds")


@dataclass(frozen=True)
class Load:
    """One turn: a library, the name of a model, and the folder with its files in the forms of timm and transformers."""

    library: Library
    model: str
    input_size: tuple[int, int, int]
    folder: Path


def first_logits(load: Load) -> Row:
    """Load a model and classify one image; seconds to either, and the memory this added, in MB."""
    make = _prepare(load)
    before = peak_memory(torch.device("cpu"))
    started = time.perf_counter()
    model = make().eval()
    loaded = time.perf_counter()
    with torch.inference_mode():
        model(torch.zeros(1, *load.input_size))
    seconds = time.perf_counter() - started
    return {
        "load_time": loaded - started,
        "logits_time": seconds,
        "added_memory": peak_memory(torch.device("cpu")) - before,
    }


def _prepare(load: Load) -> Callable[[], nn.Module]:
    """Import a library; return what loads the model with it."""
    timms = load.folder / "timm"
    match load.library:
        case "beitzoo":
            return lambda: create_model(load.model, checkpoint_path=timms / "model.safetensors")
        case "beitzoo local-dir":
            return lambda: create_model(f"local-dir:{timms}", pretrained=True)
        case "timm":
            import timm

            return lambda: timm.create_model(f"local-dir:{timms}", pretrained=True)
        case "transformers":
            from transformers import BeitForImageClassification

            theirs = load.folder / "transformers"
            return lambda: BeitForImageClassification.from_pretrained(theirs)


def run(
    model: Annotated[str, typer.Option("--model", "-m", help="An architecture.")] = "beit_base_patch16_224",
    rounds: Annotated[int, typer.Option(min=6, help="Turns of each library.")] = 9,
    results_file: Annotated[Path | None, typer.Option(help="Append a row per library to this CSV.")] = None,
) -> None:
    """Write a model with random weights, load it by turns in every library, and print a row for each."""
    table = Table(results_file, (*COLUMNS, *ENVIRONMENT))
    table.check()
    order = random.Random(0)
    turns: dict[Library, list[Row]] = {library: [] for library in LIBRARIES}
    with tempfile.TemporaryDirectory() as folder:
        network = create_model(model)
        size = (network.config.in_chans, *network.config.img_size)
        save_pretrained(network, Path(folder) / "timm")
        save_transformers(network, Path(folder) / "transformers")
        for _ in tqdm(range(rounds), unit="round", disable=None):
            for library in order.sample(LIBRARIES, len(LIBRARIES)):
                outcome = run_in_child(first_logits, Load(library, model, size, Path(folder)))
                if outcome.error is not None:
                    raise ValueError(f"{library} did not load {model}: {outcome.error}")
                turns[library].append(outcome.row)
    for library in LIBRARIES:
        row = {"model": model, "library": library, **_summary(turns[library], turns["beitzoo"]), "rounds": rounds}
        row |= environment(torch.device("cpu"))
        print(", ".join(f"{name} {row[name]}" for name in COLUMNS))
        table.append(row)


def _summary(theirs: list[Row], ours: list[Row]) -> Row:
    """Return medians, and how many times our time to first logits theirs is."""
    seconds = [[float(turn["logits_time"] or 0) for turn in turns] for turns in (theirs, ours)]
    ratio, ratios = median_ratio(*seconds)
    low, high = median_interval(ratios) or (None, None)
    medians = {
        name: round(statistics.median(float(turn[name] or 0) for turn in theirs), digits)
        for name, digits in (("load_time", 3), ("logits_time", 3), ("added_memory", 0))
    }
    return {
        "ratio": round(ratio, 3),
        "ratio_low": low and round(low, 3),
        "ratio_high": high and round(high, 3),
        **medians,
    }


if __name__ == "__main__":
    typer.run(run)
