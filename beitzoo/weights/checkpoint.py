"""Tensors in and out of files: read safely, load strictly, save atomically. No sockets, no model names."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or one of another network."""


def read(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. The tensors are views of the mapped file until something writes to them.

    Raises:
        CheckpointError: The file is missing, damaged or of another kind.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint {path}.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}.") from error


def load(model: nn.Module, state_dict: Mapping[str, Tensor], origin: str) -> None:
    """Give every parameter of the model the tensor of its name; all or nothing.

    Tensors are taken over, not copied, so a model on the meta device becomes real without ever being filled
    with anything else.

    Args:
        model: Left unchanged if anything does not fit.
        state_dict: Tensors by parameter name.
        origin: What to call the tensors in an error.

    Raises:
        CheckpointError: Lists missing names with a minus, unexpected ones with a plus, and other shapes.
    """
    own = model.state_dict()
    lines = [f"  - {name} {tuple(own[name].shape)}" for name in own if name not in state_dict]
    lines += [f"  + {name} {tuple(state_dict[name].shape)}" for name in state_dict if name not in own]
    lines += [
        f"  ~ {name}: {tuple(state_dict[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state_dict and state_dict[name].shape != own[name].shape
    ]
    lines += [
        f"  ~ {name}: {tensor.dtype}, expected floating point"
        for name, tensor in state_dict.items()
        if name in own and not tensor.is_floating_point()
    ]
    if lines:
        shown = [*lines[:20], f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else lines
        raise CheckpointError(
            f"{origin} is not a checkpoint of this network (- missing, + unexpected, ~ different):\n"
            + "\n".join(shown)
            + "\nCreate the architecture that the checkpoint was saved from."
        )
    model.load_state_dict(state_dict, strict=True, assign=True)


def save(state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file in one step: readers see the old file or the new one, never a part."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in state_dict.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
