"""The command of `benchmark.py`: timm's flags, read into a record for each row."""

import ast
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import torch
import typer

from beitzoo.measure.options import BenchmarkOptions, usable_device
from beitzoo.measure.peers import check_names
from beitzoo.measure.sweep import BENCHMARK_COLUMNS, COMPARISON_COLUMNS, KEY, sweep
from beitzoo.results import Format, Row, Table, environment
from beitzoo.zoo.registry import UnknownModelError, find, list_models

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command of `benchmark.py`; what the user got wrong is one message and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        app(args=list(_with_values(sys.argv[1:] if arguments is None else arguments)))
    except (ValueError, TypeError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


# The one function with more than seven parameters: they are the flags, and the record is made of them at once.
@app.command()
def run(
    model: Annotated[str, typer.Option("--model", "-m", help="Name, glob, or 'all' architectures.")] = "",
    model_list: Annotated[
        Path | None, typer.Option(help="File with a name or glob per line; # starts a comment.")
    ] = None,
    bench: Annotated[
        str | None, typer.Option(help="inference, train, both or profile; both, or inference with --compare.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="256 as in timm; 1 on a CPU, where 256 take minutes.")
    ] = None,
    img_size: Annotated[int | None, typer.Option(min=1, help="Height and width; the model's own by default.")] = None,
    input_size: Annotated[tuple[int, int, int] | None, typer.Option(help="Channels, height and width.")] = None,
    precision: Annotated[str, typer.Option(help="float32, amp, amp_bfloat16, bfloat16 or float16.")] = "float32",
    amp: Annotated[bool, typer.Option("--amp", help="Autocast, as --precision amp.")] = False,
    amp_dtype: Annotated[str, typer.Option(help="Of the autocast: float16 or bfloat16.")] = "float16",
    num_classes: Annotated[int | None, typer.Option(min=0, help="Width of the head.")] = None,
    gp: Annotated[str | None, typer.Option(help="Pooling: avg or token.")] = None,
    model_kwargs: Annotated[list[str] | None, typer.Option(help="field=value ..., fields of BeitConfig.")] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last")] = False,
    torchcompile: Annotated[str | None, typer.Option(help="Compile; backend, inductor if none is given.")] = None,
    torchcompile_mode: Annotated[str | None, typer.Option(help="Such as max-autotune.")] = None,
    grad_checkpointing: Annotated[bool, typer.Option("--grad-checkpointing")] = False,
    opt: Annotated[str, typer.Option(help="Any optimizer of timm.")] = "sgd",
    opt_eps: float | None = None,
    opt_betas: tuple[float, float] | None = None,
    momentum: float = 0.9,
    weight_decay: float = 0.0001,
    lr: Annotated[float, typer.Option(help="timm fixes it at this.")] = 0.0001,
    clip_grad: float | None = None,
    clip_mode: Annotated[str, typer.Option(help="norm, value or agc.")] = "norm",
    smoothing: Annotated[float, typer.Option(help="Label smoothing.")] = 0.1,
    drop: Annotated[float, typer.Option(help="Dropout before the head.")] = 0.0,
    drop_path: Annotated[float | None, typer.Option(help="Stochastic depth.")] = None,
    detail: Annotated[bool, typer.Option("--detail", help="Time the parts of a training step, too.")] = False,
    device: Annotated[str | None, typer.Option(help="cuda where there is one, else cpu.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, images and the order of turns.")] = 0,
    num_warm_iter: int = 10,
    num_bench_iter: Annotated[int, typer.Option(help="Timed steps; rounds with --compare.")] = 40,
    no_retry: Annotated[
        bool, typer.Option("--no-retry", help="Do not try smaller batches when memory runs out.")
    ] = False,
    compare: Annotated[str | None, typer.Option(help="Peers, such as timm,timm+compile,transformers,openvino.")] = None,
    subject: Annotated[str, typer.Option(help="Our side of the ratio, or beitzoo+optimize.")] = "beitzoo",
    subject_precision: Annotated[str | None, typer.Option(help="Its precision if that differs, such as int8.")] = None,
    results_file: Annotated[
        Path | None, typer.Option(help="Append rows here; those that are there are not repeated.")
    ] = None,
    results_format: Annotated[str, typer.Option(help="csv or json.")] = "csv",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Measure rows with an error again.")] = False,
) -> None:
    """Time models and print their rows as JSON after `--result`; a row each, or with --compare a row per peer."""
    given = locals()  # before anything else is local: the flags, by the names of the record's fields
    if results_format not in get_args(Format):
        raise ValueError(f"--results-format {results_format!r}; there are {', '.join(get_args(Format))}.")
    place = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    peers: list[str | None] = [*compare.split(",")] if compare else [None]
    check_names(name for name in (*peers, subject) if name is not None)
    flags = {name: value for name, value in given.items() if name in BenchmarkOptions.__dataclass_fields__}
    flags |= {
        "bench": bench or ("inference" if compare else "both"),
        "batch_size": (1 if place.type == "cpu" else 256) if batch_size is None else batch_size,
        "precision": _precision(precision, amp, amp_dtype),
        "model_kwargs": tuple(map(_pair, model_kwargs or ())),
        "device": str(place),
        "retry": not no_retry,
    }
    names = _names(model, model_list)
    jobs = [BenchmarkOptions(**{**flags, "model": name, "peer": peer}) for name in names for peer in peers]
    columns = COMPARISON_COLUMNS if compare else BENCHMARK_COLUMNS
    table = Table(results_file, columns, KEY, cast(Format, results_format))
    table.check()
    _print(list(sweep(jobs, environment(place), table, retry_failed)))


def _names(model: str, model_list: Path | None) -> list[str]:
    """Return the names that were asked for, by name, glob or file, each once and in order.

    Raises:
        UnknownModelError: Some are unknown; the closest are named, and nothing is run.
        ValueError: There is none.
    """
    lines = model_list.read_text(encoding="utf-8").splitlines() if model_list else []
    words = [word for word in (model, *(line.partition("#")[0].strip() for line in lines)) if word]
    if not words:
        raise ValueError("There is no model to time; give --model NAME, a glob such as 'beit_*', or --model-list FILE.")
    return list(dict.fromkeys(name for word in words for name in _matching(word)))


def _matching(word: str) -> list[str]:
    """Return the names that a word stands for; a glob with a dot is one of checkpoints."""
    if word == "all":
        return list_models()
    if not set("*?[") & set(word):
        find(word)
        return [word]
    names = list_models(word, pretrained="." in word)
    if not names:
        raise UnknownModelError(f"No model's name is like {word!r}; `beitzoo list` shows all.")
    return names


def _precision(precision: str, amp: bool, amp_dtype: str) -> str:
    """Join timm's three flags."""
    if amp_dtype not in ("float16", "bfloat16"):
        raise ValueError(f"--amp-dtype {amp_dtype!r}; there are float16, bfloat16.")
    if amp and precision not in ("float32", "amp"):
        raise ValueError(f"--amp with --precision {precision}; give one of the two.")
    if amp or precision == "amp":
        return "amp" if amp_dtype == "float16" else "amp_bfloat16"
    return precision


def _pair(word: str) -> tuple[str, Any]:
    """Read `field=value`, the value as Python writes it, or else as text."""
    name, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"--model-kwargs {word!r}; it must be field=value, such as img_size=384.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _with_values(arguments: Sequence[str]) -> Iterator[str]:
    """Give timm's two flags that take no or many values one each, as the command line library wants them."""
    flag = ""
    for argument, following in zip(arguments, [*arguments[1:], "-"], strict=True):
        flag = argument if argument.startswith("-") else flag
        if flag == "--model-kwargs":
            if argument != flag:
                yield from (flag, argument)
            continue
        yield argument
        if argument == "--torchcompile" and following.startswith("-"):
            yield "inductor"


def _print(rows: list[Row]) -> None:
    """Print rows as timm does, fastest first and without what is empty; exit with 1 if some have failed."""
    fastest_first = sorted(rows, key=_rate, reverse=True)
    filled = [{name: value for name, value in row.items() if value not in (None, "")} for row in fastest_first]
    print(f"--result\n{json.dumps(filled[0] if len(filled) == 1 else filled, indent=2)}")
    failed = sum("error" in row for row in filled)
    if failed:
        print(f"{failed} of {len(rows)} rows failed; each says why in its column error.", file=sys.stderr)
        raise typer.Exit(1)


def _rate(row: Row) -> float:
    # Rows of a CSV are text.
    for name in ("train_samples_per_sec", "infer_samples_per_sec", "samples_per_sec", "infer_gmacs"):
        if row.get(name):
            return float(row[name] or 0)
    return 0.0
