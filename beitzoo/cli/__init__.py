"""The commands. Heavy rooms are imported by the command that needs them."""

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from beitzoo.factory import create_model, look_up
from beitzoo.images.files import find_images, images_at
from beitzoo.inference.classify import Tally, predict
from beitzoo.inference.rows import Form, open_output, write_rows
from beitzoo.measure.options import usable_device as _device
from beitzoo.measure.table import images_per_second, measured_speed, model_table
from beitzoo.progress import watch
from beitzoo.weights import sources
from beitzoo.zoo import accuracy, costs
from beitzoo.zoo.checkpoints import DataConfig, HubFile, LocalFile, PackageFile, ReleaseFile, Source
from beitzoo.zoo.registry import DEFAULT_MODEL, list_models

app = typer.Typer(
    help="BEiT: every checkpoint by name.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
CacheDir = Annotated[Path | None, typer.Option(help="Where downloads are kept; the hub's own cache by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Run a command; what the user got wrong is one message and exit code 2, not a traceback."""
    try:
        app()
    except (ValueError, NotImplementedError, OSError, MemoryError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Glob, such as 'beitv2*'.")] = "",
    pretrained: Annotated[bool, typer.Option(help="List checkpoints rather than architectures.")] = False,
    markdown: Annotated[bool, typer.Option(help="Print the table of all checkpoints in Markdown.")] = False,
) -> None:
    """List the models of the zoo."""
    if markdown:
        print(model_table())
        return
    for name in list_models(pattern, pretrained=pretrained):
        print(name)


@app.command()
def info(name: str, as_json: AsJson = False) -> None:
    """Say what a model is: size, cost, where its weights are, how images are prepared, licence."""
    facts = _facts(name)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), Text(_plain(value), overflow="fold"))
    Console().print(table)


@app.command("predict")
def predict_(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders or globs; '-' reads files and folders from stdin, a line each. While the list goes "
            "on, rows come three batches behind it; -b 1 keeps that short."
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help=f"Model name, or local-dir:FOLDER; repeatable. If none: {DEFAULT_MODEL}"),
    ] = None,
    topk: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 3,
    form: Annotated[Form, typer.Option("--format", help="Of the rows, which are written as they come.")] = Form.TABLE,
    output: Annotated[Path | None, typer.Option(help="Write to this file; until the end, to FILE.partial.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 16,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode images.")] = 2,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
) -> None:
    """Classify images. An unreadable one is a row with the reason, and exit code 1 at the end."""
    where = _device(device)
    networks = {
        name: create_model(name, pretrained=True, device=where) for name in dict.fromkeys(models or [DEFAULT_MODEL])
    }
    total = None if "-" in images else len(networks) * sum(1 for _ in find_images(images))
    tally = Tally(predict(networks, _paths(images), topk=topk, batch_size=batch_size, workers=workers))
    unit = "image" if len(networks) == 1 else "row"
    rows_on_terminal = output is None and sys.stdout.isatty()
    with warnings.catch_warnings(), open_output(output) as file:
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is in its row
        write_rows(watch(tally, unit, total, bar=not rows_on_terminal), form, file, topk)
    _exit_with_one_if_failed(tally, unit)


def _exit_with_one_if_failed(tally: Tally, unit: str) -> None:
    if not tally.rows:
        print("There were no images: nothing was listed on stdin.", file=sys.stderr)
    elif tally.failed:
        print(f"{tally.failed:,} of {tally.rows:,} {unit}s have no answer; each says why.", file=sys.stderr)
    if tally.failed or not tally.rows:
        raise typer.Exit(1)


@app.command()
def finetune(
    recipe: Annotated[Path, typer.Argument(help="A TOML file, such as configs/finetune/digits.toml.")],
    out: Annotated[Path, typer.Option(help="Receives checkpoints, log and metrics.json.")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable.")] = None,
) -> None:
    """Train a classifier by a recipe and measure it once on held-out images."""
    _need("train", "accelerate", "sklearn")
    from beitzoo.training.recipe import load_recipe
    from beitzoo.training.tasks import finetune as task

    metrics = task.finetune(load_recipe(recipe, settings or ()), out)
    print(json.dumps(metrics, indent=2))


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model names, or local-dir:FOLDER.")],
    data: Annotated[str, typer.Option(help="'digits' (its held-out third), or a folder of class folders (all).")],
    split_seed: Annotated[
        int | None, typer.Option(help="Which held-out third of the digits; by default the one the run held out.")
    ] = None,
    results_file: Annotated[Path | None, typer.Option(help="Append a row per model to this CSV.")] = None,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure top-1 and top-5 accuracy; of several models also mean and standard deviation."""
    _need("train", "accelerate", "sklearn")
    from beitzoo.evaluation.evaluate import COLUMNS, accuracy_row, summarise
    from beitzoo.results import append_row, check_columns

    if results_file is not None:
        check_columns(results_file, COLUMNS)

    rows = []
    for name in tqdm(models, unit="model", disable=None):
        row = accuracy_row(name, data, split_seed, _device(device))
        if results_file is not None:
            append_row(results_file, row)
        rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("model", "top1", "top5", "images")
    for row in rows:
        table.add_row(str(row["model"]), f"{row['top1']:.2f}", f"{row['top5']:.2f}", str(row["count"]))
    Console().print(table)
    if len(rows) > 1:
        Console().print(summarise(rows))


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder with benchmark.csv and comparison.csv.")] = Path("results"),
    out: Annotated[Path | None, typer.Option(help="Receives the pictures; by default plots/ in that folder.")] = None,
) -> None:
    """Draw accuracy against speed and the ratio to each peer, and write the tables of published accuracy."""
    _need("plots", "matplotlib")
    from beitzoo.measure.report import draw_all, write_accuracies

    for path in [*write_accuracies(results / "accuracy"), *draw_all(results, out or results / "plots")]:
        print(path)


@app.command()
def download(
    models: Annotated[list[str], typer.Argument(help="Model names, globs of them, or hf-hub:OWNER/NAME@REVISION.")],
    cache_dir: CacheDir = None,
) -> None:
    """Fetch weights into the cache and prove them, for use without network later."""
    cache_dir = cache_dir and cache_dir.expanduser()
    failed = False
    for name in _expand(models):
        try:
            pretrained = look_up(name, cache_dir).pretrained
            path = sources.fetch(pretrained.sources if pretrained else (), cache_dir)
            print(f"{name}  {path}")
        except (ValueError, OSError) as error:
            failed = True
            print(f"Error: {name}: {error}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@app.command()
def verify(
    models: Annotated[list[str] | None, typer.Argument(help="Model names or globs; without any, all of them.")] = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Hash downloaded weights again; exit code 1 if a file is damaged or a named model absent."""
    cache_dir = cache_dir and cache_dir.expanduser()
    rows: list[dict[str, str]] = []
    for name in _expand(models or ["*"]):
        try:
            rows += _verdicts(name, cache_dir, named=bool(models))
        except (ValueError, OSError) as error:
            rows.append({"model": name, "state": "not found", "file": "", "detail": str(error)})
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{row['state']:<14}  {row['model']}  {row['file']}".rstrip())
            if row["state"] != "verified" and row["detail"]:
                print(f"    {row['detail']}")
    if any(row["state"] not in ("verified", "unverified") for row in rows):
        raise typer.Exit(1)


def _verdicts(name: str, cache_dir: Path | None, named: bool) -> list[dict[str, str]]:
    """Return a row for each local copy of a checkpoint; if there is none, one that says so, if it was named."""
    pretrained = look_up(name, cache_dir).pretrained
    verdicts = [sources.verify(source, cache_dir) for source in (pretrained.sources if pretrained else ())]
    rows = [
        {"model": name, "state": verdict.state, "file": str(verdict.path), "detail": verdict.detail}
        for verdict in verdicts
        if verdict.path is not None
    ]
    absent = {"model": name, "state": "not downloaded" if verdicts else "no weights", "file": "", "detail": ""}
    return rows or [absent] * named


def _expand(patterns: list[str]) -> list[str]:
    """Replace globs by the checkpoints they match; anything else is a name, right or wrong."""
    names = []
    for pattern in patterns:
        matches = (
            list_models(pattern, pretrained=True) if set("*?[") & set(pattern) and ":" not in pattern else [pattern]
        )
        if not matches:
            raise ValueError(f"No checkpoint matches {pattern!r}; 'beitzoo list --pretrained' shows all.")
        names += matches
    return names


def _paths(arguments: Iterable[str]) -> Iterator[Path]:
    """Find the images of all arguments; where one is '-', those named on stdin, read line by line as needed."""
    for argument in arguments:
        if argument == "-":
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
            for line in filter(None, lines):
                yield from images_at(line)
        else:
            yield from find_images([argument])


def _need(extra: str, *modules: str) -> None:
    """Say which extra to install before a command fails half-way for want of it."""
    from importlib.util import find_spec

    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ValueError(f"This command needs {', '.join(missing)}; install it with: pip install 'beitzoo[{extra}]'")


def _facts(name: str) -> dict[str, Any]:
    entry = look_up(name)
    config, row = entry.config, entry.pretrained
    data = (row.data if row else DataConfig()).fitted_to(config)
    return {
        "model": entry.name,
        "parameters": costs.parameters(config),
        "gmacs": round(costs.macs(config) / 1e9, 2),
        "activations_millions": round(costs.activations(config) / 1e6, 1),
        "classes": config.num_classes,
        "input_size": list(data.input_size),
        "mean": list(data.mean),
        "std": list(data.std),
        "interpolation": data.interpolation,
        "crop_pct": data.crop_pct,
        "crop_mode": data.crop_mode,
        "weights": [] if row is None else [_where(source) for source in row.sources],
        "accuracy": [_published(one) for one in accuracy.published(entry.name)],
        **_speed(entry.name),
        "license": row and row.license,
        "paper": row and row.paper,
    }


def _published(one: accuracy.Accuracy) -> dict[str, Any]:
    """Return what is known of one accuracy; the model is known already."""
    return {name: value for name, value in asdict(one).items() if name != "model" and value is not None}


def _speed(name: str) -> dict[str, Any]:
    row = measured_speed(name)
    if row is None:
        return {"images_per_second": None, "measured_on": None}
    where = f"{row['device']}, {row['threads']} threads, one image at a time in float32, {row['date']}"
    return {"images_per_second": round(images_per_second(row), 2), "measured_on": where}


def _plain(value: object) -> str:
    """Write a fact as a person would; places and accuracies one below the other."""
    if isinstance(value, dict):
        scores = [f"{key} {value[key]}" for key in ("top1", "top5", "miou", "macc", "aacc") if key in value]
        return f"{value['data']}: {', '.join(scores)} ({value['source']})"
    if isinstance(value, list):
        separator = ", " if value and isinstance(value[0], int | float) else "\n"
        return separator.join(map(_plain, value)) or "none"
    if isinstance(value, float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else "none" if value is None else str(value)


def _where(source: Source) -> str:
    match source:
        case HubFile(repo_id, filename, revision):
            return f"hub {repo_id}/{filename} at {revision or 'main'}"
        case ReleaseFile():
            return source.url
        case PackageFile(path):
            return f"package {path}"
        case LocalFile(path):
            return str(path)
