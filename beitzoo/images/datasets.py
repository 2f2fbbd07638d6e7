"""Where images come from. An image that cannot be read is an error with its name on it, never its neighbour."""

import glob
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from beitzoo.images.transforms import Transform

_logger = logging.getLogger(__name__)

# A file is opened as what it contains, whatever it is called; decoders outside this list never run.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class ImageError(ValueError):
    """A file that is not an image, or not one we open."""


def open_image(path: Path, in_chans: int = 3) -> Image.Image:
    """Decode an image upright, as grey for one channel and RGB otherwise.

    Raises:
        ImageError: The file is missing, damaged, too large or of a format outside `FORMATS`.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return _eight_bit(_upright(image, path)).convert("L" if in_chans == 1 else "RGB")
    except FileNotFoundError as error:
        raise ImageError("there is no such file") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"not an image that can be read ({', '.join(FORMATS)})") from error
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise ImageError(f"damaged or unreadable: {error or type(error).__name__}") from error


def _upright(image: Image.Image, path: Path) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # damaged notes about an image do not make its pixels unreadable
        _logger.warning("The EXIF data of %s is damaged, so it is not turned: %s.", path, error)
        return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8; `convert` would clip it."""
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("I", "F"):
        raise ImageError("its pixels are 32-bit numbers of unknown range; convert it to 8 or 16 bits")
    return image


def find_images(places: Iterable[str]) -> list[Path]:
    """Turn files, folders (searched through) and globs into image paths, in order.

    A file is taken at its word; of a folder, the files that look like images. A place where there is
    nothing stays in the list, so that it is reported and not passed over.
    """
    paths: list[Path] = []
    for place in places:
        path = Path(place).expanduser()
        if path.is_dir():
            found = _images_below(path)
        else:
            matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
            found = [file for match in matches for file in (_images_below(match) if match.is_dir() else [match])]
        paths.extend(found or [path])
    return paths


@dataclass(frozen=True)
class ImageSet:
    """All images of a data set with their classes, before they are split and transformed.

    Attributes:
        images: The images themselves, or the files they are in.
        labels: Class of each.
        names: Names of the classes.
    """

    images: Sequence[Image.Image | Path]
    labels: Sequence[int]
    names: tuple[str, ...]


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
    files = [(path, label) for label, name in enumerate(names) for path in _images_below(root / name)]
    if not files:
        raise FileNotFoundError(f"No images in class folders below {root}; expected {root}/CLASS/IMAGE.")
    return ImageSet([path for path, _ in files], [label for _, label in files], names)


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


def _images_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
