"""The one place where a name, a network, its weights and its head meet."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from beitzoo.models.beit import Beit
from beitzoo.weights import checkpoint, folder, hub
from beitzoo.zoo.config import BeitConfig, LocalFile, override
from beitzoo.zoo.registry import DEFAULT_MODEL, Entry, UnknownModelError, find


def create_model(
    model_name: str = DEFAULT_MODEL,
    pretrained: bool = False,
    *,
    checkpoint_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Beit:
    """Create a model by name, in training mode, as timm does.

    Args:
        model_name: `architecture`, `architecture.tag`, or `local-dir:` and a folder written by
            `save_pretrained` or by timm. Without a name, the small model that comes with the package.
        pretrained: Load the weights of the tag; otherwise they are random.
        checkpoint_path: Load this safetensors file of the same network instead of the tag's weights.
        cache_dir: Where downloads are kept; the hub's own cache if None.
        device: Where the parameters live; PyTorch's default device if None.
        dtype: Of the parameters; that of the weights, or float32, if None.
        **overrides: Fields of `BeitConfig`, in timm's spellings. A loaded model is fitted to another
            `img_size`, `in_chans`, `num_classes` (a fresh head; 0 for none) or `global_pool`.

    Raises:
        UnknownModelError: The name is unknown; the closest are named.
        TypeError: An override is unknown; the closest is named.
        ValueError: An override is out of range, or the weights are of another network.
        DownloadError: The weights cannot be had.
    """
    entry = _look_up(model_name)
    config = override(entry.config, **overrides)
    if pretrained or checkpoint_path is not None:
        path = _weights(entry, checkpoint_path, cache_dir)
        model = _load(path, entry.config, config)
    else:
        model = _initialise(config, torch.get_default_device() if device is None else device)
    if entry.pretrained is not None:
        model.pretrained = entry.pretrained
    return model.to(device=device, dtype=dtype)


def save_pretrained(model: Beit, directory: str | Path) -> None:
    """Save weights and config to a folder that `create_model('local-dir:...')` reads, here and in timm."""
    directory = Path(directory)
    checkpoint.save(model.state_dict(), directory / folder.WEIGHTS_NAME)
    folder.write_config(directory, model.config, model.pretrained)


def _look_up(name: str) -> Entry:
    if name.startswith("local-dir:"):
        return folder.read(Path(name.removeprefix("local-dir:")).expanduser())
    if {"/", "\\", ":"} & set(name):
        raise UnknownModelError(f"{name!r} is no model name; a folder is given as 'local-dir:{name}'.")
    return find(name)


def _weights(entry: Entry, checkpoint_path: str | Path | None, cache_dir: str | Path | None) -> Path:
    if checkpoint_path is not None:
        sources: tuple[Any, ...] = (LocalFile(Path(checkpoint_path)),)
    elif entry.pretrained is not None:
        sources = entry.pretrained.sources
    else:
        raise UnknownModelError(f"{entry.name!r} has no pretrained weights; create it with pretrained=False.")
    return hub.fetch(sources, None if cache_dir is None else Path(cache_dir))


def _initialise(config: BeitConfig, device: torch.device | str) -> Beit:
    with torch.device("meta"):
        model = Beit(config)
    model.to_empty(device=device)
    model.init_weights()
    return model


def _load(path: Path, stored: BeitConfig, wanted: BeitConfig) -> Beit:
    """Build the network of the file, load it strictly, then fit it to what was asked for."""
    with torch.device("meta"):
        model = Beit(
            replace(
                wanted,
                img_size=stored.img_size,
                in_chans=stored.in_chans,
                num_classes=stored.num_classes,
                global_pool=stored.global_pool,
            )
        )
    checkpoint.load(model, checkpoint.read(path), origin=str(path))
    if wanted.img_size != stored.img_size:
        model.set_input_size(wanted.img_size)
    if wanted.in_chans != stored.in_chans:
        model.set_in_chans(wanted.in_chans)
    if wanted.global_pool != stored.global_pool:
        model.set_global_pool(wanted.global_pool)
    if wanted.num_classes != stored.num_classes:
        model.reset_classifier(wanted.num_classes)
    return model
