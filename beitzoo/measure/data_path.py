"""`python -m beitzoo.measure.data_path IMAGE...`: from an image file to a tensor, exactly as timm and the fast way."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from beitzoo.images.fast import FastTransform, open_tensor
from beitzoo.images.files import open_image
from beitzoo.images.transforms import create_transform
from beitzoo.measure.timing import median_interval, median_ratio, time_rounds
from beitzoo.results import ENVIRONMENT, Table, environment
from beitzoo.zoo.pretrained import PRETRAINED

COLUMNS = (
    "route",
    "ratio",
    "ratio_low",
    "ratio_high",
    "images_per_sec",
    "max_difference",
    "mean_difference",
    "images",
    "mean_pixels",
    "rounds",
)
_MODEL = "beit_base_patch16_224.in22k_ft_in22k_in1k"


def run(
    images: Annotated[list[Path], typer.Argument(help="Photographs.")],
    rounds: Annotated[int, typer.Option(min=6, help="Turns of each route over all images.")] = 15,
    results_file: Annotated[Path | None, typer.Option(help="Append a row per route to this CSV.")] = None,
) -> None:
    """Time each route with one thread, and compare its pixels with timm's, in levels of 255."""
    table = Table(results_file, (*COLUMNS, *ENVIRONMENT))
    table.check()
    torch.set_num_threads(1)
    routes = _routes()
    expected = [routes["timm"](path) for path in images]
    seconds = time_rounds({name: _all(route, images) for name, route in routes.items()}, rounds, torch.device("cpu"))
    for name, route in routes.items():
        differences = [(route(path) - one).abs() * 127.5 for path, one in zip(images, expected, strict=True)]
        ratio, ratios = median_ratio(seconds["timm"], seconds[name])
        low, high = median_interval(ratios) or (None, None)
        row = {
            "route": name,
            "ratio": round(ratio, 3),
            "ratio_low": low and round(low, 3),
            "ratio_high": high and round(high, 3),
            "images_per_sec": round(len(images) / statistics.median(seconds[name]), 1),
            "max_difference": round(max(float(one.max()) for one in differences), 3),
            "mean_difference": round(statistics.mean(float(one.mean()) for one in differences), 4),
            "images": " ".join(path.name for path in images),
            "mean_pixels": round(statistics.mean(_pixels(path) for path in images)),
            "rounds": rounds,
            **environment(torch.device("cpu")),
        }
        print(", ".join(f"{column} {row[column]}" for column in COLUMNS))
        table.append(row)


def _routes() -> dict[str, Callable[[Path], Tensor]]:
    from timm.data import create_transform as create_timm_transform

    data = PRETRAINED[_MODEL].data
    options = {
        name: getattr(data, name) for name in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    }
    theirs = create_timm_transform(**options)
    exact = create_transform(**options)
    fast = FastTransform(exact, options)
    return {
        "timm": lambda path: theirs(open_image(path)),
        "exact": lambda path: exact(open_image(path)),
        "fast": lambda path: fast(open_image(path)),
        "fast from open_tensor": lambda path: fast(open_tensor(path)),
    }


def _all(route: Callable[[Path], Tensor], images: list[Path]) -> Callable[[], list[Tensor]]:
    return lambda: [route(path) for path in images]


def _pixels(path: Path) -> int:
    image = open_image(path)
    return image.width * image.height


if __name__ == "__main__":
    typer.run(run)
