"""The commands about models and tokenizers: list, info, download, verify, convert-tokenizer."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beitzoo.errors import InvalidValueError, UserError
from beitzoo.files import full_path
from beitzoo.zoo import accuracy, costs
from beitzoo.zoo.checkpoints import (
    Classify,
    DataConfig,
    Head,
    HubFile,
    LocalFile,
    Mim,
    PackageFile,
    ReleaseFile,
    Segment,
    Source,
    WebFile,
)
from beitzoo.zoo.pretrained import PRETRAINED
from beitzoo.zoo.registry import find, list_models
from beitzoo.zoo.tokenizers import find_tokenizer, list_tokenizers

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.

CacheDir = Annotated[Path | None, typer.Option(help="Where downloads are kept; the hub's own cache by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def list_(
    pattern: Annotated[str, typer.Argument(help="Glob, such as 'beitv2*'.")] = "",
    pretrained: Annotated[bool, typer.Option(help="List checkpoints rather than architectures.")] = False,
    tokenizers: Annotated[bool, typer.Option(help="List image tokenizers instead.")] = False,
    markdown: Annotated[bool, typer.Option(help="Print the table of all checkpoints in Markdown.")] = False,
) -> None:
    """List the models of the zoo."""
    if markdown:
        print(model_table())
        return
    for name in list_tokenizers(pattern) if tokenizers else list_models(pattern, pretrained=pretrained):
        print(name)


def model_table() -> str:
    """Return a Markdown table with a row for each checkpoint."""
    lines = ["| model | input | parameters | GMACs | classes | top-1 % |", "| --- | --- | --- | --- | --- | --- |"]
    for name, pretrained in PRETRAINED.items():
        config = find(name).config
        cells = [
            f"`{name}`",
            "x".join(map(str, config.img_size)),
            f"{costs.parameters(config) / 1e6:.1f} M",
            f"{costs.macs(config) / 1e9:.2f}",
            _classes(pretrained.head),
            _headline(name),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _classes(head: Head) -> str:
    match head:
        case Classify():
            return f"{head.num_classes:,}"
        case Segment():
            return f"{head.num_classes} of ADE20K"
    return "visual tokens (backbone)"


def _headline(name: str) -> str:
    best = accuracy.headline(name)
    if best is None:
        return ""
    return f"{best.top1:.1f}" if best.top1 is not None else f"mIoU {best.miou:.1f}"


def info(name: str, as_json: AsJson = False) -> None:
    """Describe a model or an image tokenizer.

    Size, cost, where its weights are, how images are prepared, published accuracy, licence and paper.
    """
    from beitzoo.factory import names_tokenizer

    facts = _tokenizer_facts(name) if names_tokenizer(name) else _facts(name)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), Text(_plain(value), overflow="fold"))
    Console().print(table)


def download(
    models: Annotated[
        list[str],
        typer.Argument(help="Names of models or tokenizers, globs of them, or hf-hub:OWNER/NAME@REVISION."),
    ],
    cache_dir: CacheDir = None,
) -> None:
    """Download weights and verify their checksums."""
    from beitzoo.weights import sources

    cache_dir = cache_dir and full_path(cache_dir)
    failed = False
    for name in _expand(models):
        try:
            for places in _files(name, cache_dir) or [()]:
                print(f"{name}  {sources.fetch(places, cache_dir)}")
        except UserError as error:
            failed = True
            print(f"Error: {name}: {error}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def verify(
    models: Annotated[list[str] | None, typer.Argument(help="Model names or globs; without any, all of them.")] = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Verify the checksums of downloaded weights.

    The exit code is 1 if a file is damaged or a named model is absent.
    """
    cache_dir = cache_dir and full_path(cache_dir)
    rows: list[dict[str, str]] = []
    for name in _expand(models or ["*"]):
        try:
            rows += _verdicts(name, cache_dir, named=bool(models))
        except UserError as error:
            rows.append({"model": name, "state": "not found", "file": "", "detail": str(error)})
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{row['state']:<14}  {row['model']}  {row['file']}".rstrip())
            if row["state"] != "verified" and row["detail"]:
                print(f"    {row['detail']}")
    if any(row["state"] not in ("verified", "prefix matches", "unverified") for row in rows):
        raise typer.Exit(1)


def convert_tokenizer(
    name: Annotated[str, typer.Argument(help="A tokenizer with weights, such as dvae_patch8_112.dalle.")],
    out: Annotated[Path, typer.Option(help="Folder for config.json and model.safetensors.")],
    encoder: Annotated[Path | None, typer.Option(help="OpenAI's encoder.pkl, if you have it already.")] = None,
    decoder: Annotated[Path | None, typer.Option(help="OpenAI's decoder.pkl, if you have it already.")] = None,
    cache_dir: CacheDir = None,
) -> None:
    """Convert a released tokenizer to safetensors, once; the folder is then a name of it.

    Files are downloaded, unless they are given. No code of a pickle is run.
    """
    from beitzoo.factory import create_tokenizer
    from beitzoo.saving import save_tokenizer

    if (encoder is None) != (decoder is None):
        raise InvalidValueError("Give both --encoder and --decoder, or neither to download them.")
    given = None if encoder is None or decoder is None else (encoder, decoder)
    save_tokenizer(create_tokenizer(name, pretrained=True, checkpoint_path=given, cache_dir=cache_dir), out)
    print(out)


def _files(name: str, cache_dir: Path | None) -> list[tuple[Source, ...]]:
    """Return, for each file of a model's or tokenizer's weights, the places that have it."""
    from beitzoo.factory import look_up, look_up_tokenizer, names_tokenizer

    if names_tokenizer(name):
        return [file.sources for file in look_up_tokenizer(name).files]
    pretrained = look_up(name, cache_dir).pretrained
    return [pretrained.sources] if pretrained else []


def _verdicts(name: str, cache_dir: Path | None, named: bool) -> list[dict[str, str]]:
    """Return a row for each local copy of a checkpoint; if there is none, one that says so, if it was named."""
    from beitzoo.weights import sources

    verdicts = [sources.verify(source, cache_dir) for places in _files(name, cache_dir) for source in places]
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
        is_glob = set("*?[") & set(pattern) and ":" not in pattern
        tokenizers = [name for name in list_tokenizers(pattern) if find_tokenizer(name).files] if is_glob else []
        matches = list_models(pattern, pretrained=True) + tokenizers if is_glob else [pattern]
        if not matches:
            raise InvalidValueError(
                f"No checkpoint matches {pattern!r}; 'beitzoo list --pretrained' and 'beitzoo list --tokenizers' show "
                "all."
            )
        names += matches
    return names


def _facts(name: str) -> dict[str, Any]:
    from beitzoo.factory import look_up

    entry = look_up(name)
    config, row = entry.config, entry.pretrained
    data = (row.data if row else DataConfig()).fitted_to(config)
    return {
        "model": entry.name,
        "parameters": costs.parameters(config),
        "gmacs": round(costs.macs(config) / 1e9, 2),
        "activations_millions": round(costs.activations(config) / 1e6, 1),
        "classes": config.num_classes,
        **({"tokenizer": row.head.tokenizer} if row and isinstance(row.head, Mim) else {}),
        "input_size": list(data.input_size),
        "mean": list(data.mean),
        "std": list(data.std),
        "interpolation": data.interpolation,
        "crop_pct": data.crop_pct,
        "crop_mode": data.crop_mode,
        "weights": [] if row is None else [_where(source) for source in row.sources],
        "accuracy": [_published(one) for one in accuracy.published(entry.name)],
        "license": row and row.license,
        "paper": row and row.paper,
    }


def _tokenizer_facts(name: str) -> dict[str, Any]:
    import torch

    from beitzoo.factory import create_tokenizer, look_up_tokenizer

    entry = look_up_tokenizer(name)
    with torch.device("meta"):
        tokenizer = create_tokenizer(name, device="meta")
    return {
        "tokenizer": entry.name,
        "parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
        "input_size": [tokenizer.in_chans, *tokenizer.img_size],
        "interpolation": tokenizer.interpolation,
        "grid_size": list(tokenizer.grid_size),
        "vocab_size": tokenizer.vocab_size,
        "decodes_to": tokenizer.decodes_to,
        "weights": [_where(source) for file in entry.files for source in file.sources],
        "license": entry.license,
        "paper": entry.paper,
    }


def _published(one: accuracy.Accuracy) -> dict[str, Any]:
    """Return what is known of one accuracy; the model is known already."""
    return {name: value for name, value in asdict(one).items() if name != "model" and value is not None}


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
        case ReleaseFile() | WebFile():
            return source.url
        case PackageFile(path):
            return f"package {path}"
        case LocalFile(path):
            return str(path)
