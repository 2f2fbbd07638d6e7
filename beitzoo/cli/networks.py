"""From the options --model, --checkpoint and --device to networks with weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from beitzoo.errors import InvalidValueError, UnsupportedError

if TYPE_CHECKING:
    import torch

    from beitzoo.models.beit import Beit


def load_networks(names: Sequence[str], checkpoint: Path | None, device: "torch.device") -> dict[str, "Beit"]:
    """Create each named model, or the one whose weights are in a file; by name, in order, each once.

    Raises:
        InvalidValueError: There are several models for one file.
    """
    from beitzoo.factory import create_model

    if checkpoint is None:
        return _for_images({name: create_model(name, pretrained=True, device=device) for name in dict.fromkeys(names)})
    if len(names) > 1:
        raise InvalidValueError(
            f"--checkpoint is one file, and {len(names)} models are named ({', '.join(names)}); name the one that the "
            "file is of."
        )
    if not names:  # a file that says itself what network it is of, by what is beside it
        return _for_images({str(checkpoint): create_model(str(checkpoint), pretrained=True, device=device)})
    return _for_images({names[0]: create_model(names[0], checkpoint_path=checkpoint, device=device)})


def _for_images(networks: dict[str, "Beit"]) -> dict[str, "Beit"]:
    """Refuse segmentation models: what is asked here is said of whole images."""
    from beitzoo.models.segmentation import Segmenter

    found: dict[str, object] = {**networks}
    for name, network in found.items():
        if isinstance(network, Segmenter):
            raise UnsupportedError(
                f"{name} is a segmentation model, and this command is for whole images. Name a classifier (`beitzoo "
                "list --pretrained`), or use its backbone in Python: create_model(..., num_classes=0)."
            )
    return networks
