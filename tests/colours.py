"""A data set of three colours, small enough to be trained on in a second."""

from pathlib import Path
from typing import Any

from PIL import Image

from beitzoo.training.recipe import Recipe

COLOURS = ("blue", "green", "red")


def write_colours(root: Path, per_class: int = 12) -> Path:
    """Write images of three colours in several shades, a folder for each; the first red one is broken."""
    for index, colour in enumerate(COLOURS):
        (root / colour).mkdir(parents=True)
        for number in range(per_class):
            shade = [40 + 5 * number] * 3
            shade[2 - index] = 255
            Image.new("RGB", (40, 40), tuple(shade)).save(root / colour / f"{number}.png")
    (root / "red" / "0.png").write_bytes(b"broken")
    return root


def write_mixtures(root: Path, rounds: int = 5) -> Path:
    """Write images of all mixtures of the three colours, and a CSV of which are in each; black has none of them.

    The file of the first is broken.
    """
    root.mkdir(parents=True)
    lines = ["path,labels"]
    for number in range(8 * rounds):
        has = [bool(number >> place & 1) for place in range(3)]
        shade = 5 * (number // 8)
        blue, green, red = (255 - shade if on else shade for on in has)
        Image.new("RGB", (40, 40), (red, green, blue)).save(root / f"{number}.png")
        lines.append(f"{number}.png,{';'.join(name for name, on in zip(COLOURS, has, strict=True) if on)}")
    (root / "0.png").write_bytes(b"broken")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root / "labels.csv"


def mixture_recipe(labels: Path, **train: object) -> Recipe:
    """A run on such a CSV; keywords change its `train` section."""
    document = colour_recipe(labels, **{"batch_size": 8, "lr": 4e-3, **train}).model_dump()
    document["data"]["source"] = "csv"
    document["task"]["labels"] = "many"
    return Recipe.model_validate(document)


def colour_recipe(data: Path, run: dict[str, Any] | None = None, **train: object) -> Recipe:
    """A run on such a folder; keywords change its `train` section."""
    return Recipe.model_validate(
        {
            "model": {"name": "test_beit", "overrides": {"drop_path_rate": 0.2}},
            "data": {"source": "folder", "path": data, "val_fraction": 0.25},
            "train": {"epochs": 5, "batch_size": 6, "lr": 2e-3, "warmup_epochs": 1, "clip_grad": 1.0, **train},
            "run": {"log_updates": 2, "pictures": False, **(run or {})},
            "task": {"kind": "finetune", "augment": {"kind": "crop", "scale": [0.5, 1.0], "color_jitter": 0.2}},
        }
    )


def mim_recipe(
    data: Path,
    tokenizer: Path | str,
    *,
    model: dict[str, Any] | None = None,
    split: dict[str, Any] | None = None,
    task: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    **train: Any,
) -> Recipe:
    """A run on a folder of colours; keywords change its sections, those without a name its `train` section."""
    return Recipe.model_validate(
        {
            "model": {"name": "test_beit", "overrides": {"drop_path_rate": 0.2}, **(model or {})},
            "data": {"source": "folder", "path": data, **(split or {})},
            "train": {"epochs": 2, "batch_size": 6, "lr": 2e-3, "clip_grad": 1.0, **train},
            "run": {"log_updates": 2, "pictures": False, **(run or {})},
            "task": {
                "kind": "pretrain",
                "tokenizer": str(tokenizer),
                "mask": {"count": 6, "min_block": 2},
                "picture_epochs": 0,
                **(task or {}),
            },
        }
    )


def tokenizer_recipe(data: Path, task: dict[str, Any] | None = None, **train: object) -> Recipe:
    """Tokenizer training on such a folder; keywords change its `train` section."""
    return Recipe.model_validate(
        {
            "model": {"name": "test_vqkd", "overrides": {"vocab_size": 16}},
            "data": {"source": "folder", "path": data, "val_fraction": 0.25},
            "train": {"epochs": 2, "batch_size": 6, "lr": 2e-3, "clip_grad": 1.0, **train},
            "run": {"log_updates": 2, "pictures": False},
            "task": {"kind": "tokenizer", "teacher": "pixels", **(task or {})},
        }
    )
