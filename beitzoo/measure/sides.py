"""One side of a comparison, and the ways to run it: what `peers` lists and `comparison` times."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from beitzoo.errors import check
from beitzoo.measure.options import BenchmarkOptions
from beitzoo.models.beit import Beit
from beitzoo.models.mim import MaskedImageModel
from beitzoo.models.segmentation import Segmenter


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: A key of `PEERS`.
        model: Ours, float32, in eval mode.
        images: (B, in_chans, height, width), float32.
        options: What was asked for, with the precision of this side.
        folder: Where it can put files.
        mask: (B, h w), of a masked image model; None for any other.
    """

    name: str
    model: Beit | MaskedImageModel | Segmenter
    images: Tensor
    options: BenchmarkOptions
    folder: Path
    mask: Tensor | None = None


@dataclass(frozen=True)
class Peer:
    """A way to run a Beit: a module, which can also be trained, or a runtime.

    Attributes:
        packages: Distributions it needs; the first is the one whose version counts.
        module: Makes a module that maps images, with the mask if there is one, to our model's output, float32.
        compiled: Run the module through torch.compile.
        runtime: Makes a call that returns the output for the images.
    """

    packages: tuple[str, ...]
    module: Callable[[Side], nn.Module] | None = None
    compiled: bool = False
    runtime: Callable[[Side], Callable[[], Any]] | None = None


def require(name: str, packages: tuple[str, ...]) -> None:
    """Make sure that the distributions that a peer needs are there.

    Raises:
        InvalidValueError: They are not; says how to install them.
    """
    missing = [package for package in packages if version_of(package) is None]
    check(not missing, f"{name} needs {', '.join(missing)}; install it with: pip install 'beitzoo[peers]'")


def version_of(package: str) -> str | None:
    """Return the version of an installed distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
