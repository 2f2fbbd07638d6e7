"""Where images come from. An image that cannot be read is an error with its name on it, never its neighbour."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from beitzoo.images.files import ImageError, images_below, open_image
from beitzoo.images.transforms import Transform

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """All images of a data set with their classes, before they are split and transformed.

    Attributes:
        images: The images themselves, or the files they are in.
        labels: Class of each.
        names: Names of the classes.
        root: The folder that all files are in; None where the images are not files.
    """

    images: Sequence[Image.Image | Path]
    labels: Sequence[int]
    names: tuple[str, ...]
    root: Path | None = None

    def identity(self, index: int) -> tuple[str, str]:
        """Say which image it is wherever the data set lies: path below the root, or `digits:INDEX`, and bytes."""
        image = self.images[index]
        if not isinstance(image, Path):
            return f"digits:{index}", ""
        try:
            size = str(image.stat().st_size)
        except OSError:  # it is found to be unreadable when it is opened
            size = ""
        return (image if self.root is None else image.relative_to(self.root)).as_posix(), size


def digits() -> ImageSet:
    """Return UCI's handwritten digits as scikit-learn carries them: 1797 grey images of 8 x 8 pixels.

    Ink is bright. A pixel counts the ink in a 4 x 4 block, 0 to 16; here scaled to 0 to 255.
    """
    from sklearn.datasets import load_digits  # the extra `train`

    data = load_digits()
    pixels = (data.images * (255 / 16)).round().astype("uint8")
    return ImageSet([Image.fromarray(p) for p in pixels], data.target.tolist(), tuple("0123456789"))


def labelled_folder(root: Path) -> ImageSet:
    """Return the images of a folder that has one subfolder per class; classes are in order of their names.

    Raises:
        FileNotFoundError: No such folder, or no images in subfolders of it.
    """
    names = tuple(sorted(p.name for p in root.iterdir() if p.is_dir())) if root.is_dir() else ()
    files = [(path, label) for label, name in enumerate(names) for path in images_below(root / name)]
    if not files:
        raise FileNotFoundError(f"No images in class folders below {root}; expected {root}/CLASS/IMAGE.")
    return ImageSet([path for path, _ in files], [label for _, label in files], names, root)


class LabelledImages(Dataset[tuple[Tensor, int] | None]):
    """Some images of a set, transformed when asked for; one that cannot be read is None and a warning."""

    def __init__(self, images: ImageSet, indices: Sequence[int], transform: Transform, in_chans: int) -> None:
        self.images = images
        self.indices = indices
        self.transform = transform
        self.in_chans = in_chans

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int] | None:
        index = self.indices[position]
        image = self.images.images[index]
        if isinstance(image, Path):
            try:
                image = open_image(image, self.in_chans)
            except ImageError as error:
                _logger.warning("Left out %s: %s.", image, error)
                return None
        return self.transform(image), self.images.labels[index]


def collate(samples: Sequence[tuple[Tensor, int] | None], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Stack the readable samples of one shape (C, H, W) to images (B, C, H, W) and labels (B,); B may be 0."""
    readable = [sample for sample in samples if sample is not None]
    images = torch.stack([image for image, _ in readable]) if readable else torch.empty(0, *shape)
    return images, torch.tensor([label for _, label in readable], dtype=torch.int64)
