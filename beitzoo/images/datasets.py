"""Data sets of labelled images: the digits, and folders with a subfolder per class."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from beitzoo.errors import FileAccessError, InvalidValueError, MissingFileError, UnsupportedError
from beitzoo.files import full_path
from beitzoo.images.folders import EMPTY_CLASSES, OUTSIDE, LeftOut, images_below, why_not

# Names of folders that are parts of a data set.
_TRAIN, _HELD_OUT = {"train", "training"}, {"val", "valid", "validation", "dev", "test", "testing"}


@dataclass(frozen=True)
class ImageSet:
    """All images of a data set with their classes, before they are split and transformed.

    Attributes:
        images: The images themselves, or the files they are in.
        labels: Class of each.
        names: Names of the classes.
        root: The folder that all files are in; None where the images are not files.
        left_out: What else was found in the folder, and why it was not taken.
    """

    images: Sequence[Image.Image | Path]
    labels: Sequence[int]
    names: tuple[str, ...]
    root: Path | None = None
    left_out: LeftOut = field(default_factory=LeftOut, compare=False)

    def describe(self) -> list[str]:
        """Say what was found and what was left out, in a few lines."""
        sizes = Counter(self.labels)
        fewest, most = (min(sizes, key=lambda c: (sizes[c], c)), max(sizes.values())) if sizes else (0, 0)
        where = "" if self.root is None else f" in {self.root}"
        even = f"{most:,} of each" if sizes[fewest] == most else f"{sizes[fewest]:,} ({self.names[fewest]}) to {most:,}"
        return [f"{len(self.labels):,} images of {len(self.names):,} classes{where}: {even}", *self.left_out.describe()]

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
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "The digits come with scikit-learn, which is not installed; install it with: pip install 'beitzoo[train]'"
        ) from error
    data = load_digits()
    pixels = (data.images * (255 / 16)).round().astype("uint8")
    return ImageSet([Image.fromarray(p) for p in pixels], data.target.tolist(), tuple("0123456789"))


def labelled_folder(root: Path) -> ImageSet:
    """Return the images of a folder that has one subfolder per class; classes are in order of their names.

    A subfolder that is hidden, left by a tool or without an image is no class; `ImageSet.left_out` says which were.

    Raises:
        MissingFileError: No such folder, or no images in subfolders of it.
        FileAccessError: The folder cannot be listed.
        InvalidValueError: Its subfolders are parts of a data set, such as train and val, and not classes.
    """
    root = full_path(root)
    left_out = LeftOut()
    classes = {name: list(images_below(root / name, left_out, base=root)) for name in _class_folders(root, left_out)}
    for name, files in classes.items():
        if not files:
            left_out.add(EMPTY_CLASSES, name)
    names = tuple(name for name, files in classes.items() if files)
    if not names:
        raise MissingFileError(
            ". ".join([f"No images in class folders below {root}; expected {root}/CLASS/IMAGE", *left_out.describe()])
        )
    images = [path for name in names for path in classes[name]]
    labels = [label for label, name in enumerate(names) for _ in classes[name]]
    return ImageSet(images, labels, names, root, left_out)


def _class_folders(root: Path, left_out: LeftOut) -> list[str]:
    try:
        entries = sorted((path.name, path.is_dir()) for path in root.iterdir())
    except FileNotFoundError as error:
        raise MissingFileError(f"There is no folder {root}; expected one with images in {root}/CLASS/IMAGE.") from error
    except OSError as error:
        raise FileAccessError(f"The folder {root} cannot be listed: {error.strerror}. Give another one.") from error
    for name, is_folder in entries:
        if reason := why_not(name, is_folder) or (None if is_folder else OUTSIDE):
            left_out.add(reason, name)
    names = [name for name, is_folder in entries if is_folder and why_not(name, is_folder) is None]
    _refuse_parts(root, names)
    return names


def _refuse_parts(root: Path, names: Sequence[str]) -> None:
    """Refuse a root whose subfolders are train and val: a classifier of the two is not what anyone wants.

    "train" is also something to ride on, so the name alone says nothing where it is one class of several.
    """
    parts = [name for name in names if name.lower() in _TRAIN | _HELD_OUT]
    both = any(name.lower() in _TRAIN for name in parts) and any(name.lower() in _HELD_OUT for name in parts)
    if parts and (len(parts) == len(names) or both):
        raise InvalidValueError(
            f"{root} has {', '.join(parts)}, which are parts of a data set and not classes. Give one of them, such as "
            f"{root / parts[0]}, or rename them if they are classes."
        )
