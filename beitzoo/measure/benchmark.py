"""How fast a model is: one row a run, in timm's columns and with its environment."""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from beitzoo.factory import create_model
from beitzoo.measure.results import Row, append_row, check_columns, environment
from beitzoo.measure.table import count_parameters
from beitzoo.models.beit import Beit
from beitzoo.zoo import costs

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def benchmark_inference(model: Beit, batch_size: int, warm_iterations: int, iterations: int) -> list[float]:
    """Time forward passes of one fixed random batch; return the milliseconds of each."""
    model.eval()
    like = model.cls_token
    images = torch.randn(batch_size, model.config.in_chans, *model.config.img_size).to(like.device, like.dtype)
    times = []
    with torch.inference_mode():
        for iteration in tqdm(range(warm_iterations + iterations), unit="step", leave=False, disable=None):
            started = time.perf_counter()
            model(images)
            if like.device.type != "cpu":
                torch.accelerator.synchronize(like.device)
            if iteration >= warm_iterations:
                times.append(1e3 * (time.perf_counter() - started))
    return times


def inference_row(model: Beit, name: str, batch_size: int, times: list[float]) -> Row:
    """Make the row of a run. Throughput and step time are means, as in timm; the median is beside them."""
    config = model.config
    mean = statistics.fmean(times)
    return {
        "model": name,
        "infer_img_size": config.img_size[1],
        "infer_samples_per_sec": round(1e3 * batch_size / mean, 2),
        "infer_step_time": round(mean, 3),
        "infer_step_time_median": round(statistics.median(times), 3),
        "infer_batch_size": batch_size,
        "param_count": round(count_parameters(model) / 1e6, 2),
        "infer_gmacs": round(costs.macs(config) / 1e9, 2),
        "infer_macts": round(costs.activations(config) / 1e6, 2),
        "precision": str(model.cls_token.dtype).removeprefix("torch."),
        **environment(model.cls_token.device),
    }


def run(
    model: Annotated[str, typer.Option("--model", "-m", help="Model name; weights are random.")],
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 1,
    img_size: Annotated[int | None, typer.Option(min=1, help="Height and width; the model's own by default.")] = None,
    precision: Annotated[str, typer.Option(help=", ".join(PRECISIONS))] = "float32",
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    num_warm_iter: Annotated[int, typer.Option(min=0)] = 10,
    num_bench_iter: Annotated[int, typer.Option(min=1)] = 40,
    results_file: Annotated[Path | None, typer.Option(help="Append the row to this CSV.")] = None,
) -> None:
    """Time the forward pass of a model and print its row as JSON after `--result`."""
    if precision not in PRECISIONS:
        raise typer.BadParameter(f"{precision!r}; there are {', '.join(PRECISIONS)}.", param_hint="--precision")
    torch.manual_seed(0)
    network = create_model(model, img_size=img_size, device=device, dtype=PRECISIONS[precision])
    if results_file is not None:
        check_columns(results_file, list(inference_row(network, model, batch_size, [1.0])))
    row = inference_row(
        network, model, batch_size, benchmark_inference(network, batch_size, num_warm_iter, num_bench_iter)
    )
    if results_file is not None:
        append_row(results_file, row)
    print(f"--result\n{json.dumps(row, indent=2)}")


def main() -> None:
    """Run the command of `benchmark.py`; what the user got wrong is one message and exit code 2."""
    try:
        typer.run(run)
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
