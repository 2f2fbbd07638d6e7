"""Data sets of images in their forms: the digits, folders, and, from rooms of their own, lists, tables and tars."""

import os
import re
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from PIL import Image

from beitzoo.errors import FileAccessError, InvalidValueError, MissingFileError, UnsupportedError, check
from beitzoo.files import full_path
from beitzoo.images.arrow_sets import is_saved, saved_images
from beitzoo.images.csv_sets import listed_images
from beitzoo.images.folders import EMPTY_CLASSES, OUTSIDE, LeftOut, images_below, why_not
from beitzoo.images.image_set import ImageSet
from beitzoo.images.shards import PART_OF, PARTS, arrange
from beitzoo.images.tables import find_tables
from beitzoo.images.tars import find_tars

Source = Literal["digits", "folder", "images", "csv", "parquet", "arrow", "webdataset"]

_SUFFIXES: dict[str, Source] = {".parquet": "parquet", ".tar": "webdataset"}
# Names of folders that are parts of a data set.
_TRAIN = set(PARTS["train"])
_HELD_OUT = {*PARTS["validation"], *PARTS["test"]}
# What a person may write who means a data set on the hub, by its page or its name.
_HUB_NAME = re.compile(r"(?:hf:|https?:/+huggingface\.co/datasets/)?([\w.-]+(?:/[\w.-]+)?)")
_LOOKED_AT = 20


def find_images(source: Source, path: Path | None = None) -> ImageSet:
    """Find the images of a data set.

    Args:
        source: In which form it is: `digits`; `folder`, with a subfolder per class; `images`, a folder of images
            without classes; `csv`, a list of paths and labels; `parquet`, tables in the hub's form; `arrow`, a folder
            that `save_to_disk` of the library datasets wrote; `webdataset`, tars.
        path: Where it is. Of tables and tars a folder, one file or a pattern. The digits are nowhere.

    Raises:
        MissingFileError: There are no images.
        FileAccessError: A folder or file cannot be read.
        InvalidValueError: It is not a data set of this form.
    """
    if source == "digits":
        return digits()
    check(path is not None, f"The source {source!r} needs a path; say where the images are.")
    assert path is not None
    match source:
        case "folder":
            return labelled_folder(path)
        case "images":
            return folder_of_images(path)
        case "csv":
            return listed_images(path)
        case "arrow":
            return saved_images(path)
        case "parquet":
            return find_tables(path)
        case "webdataset":
            return find_tars(path)


def guess_source(path: Path) -> Source:
    """Tell by names whether what lies there is a list, tables or tars of images, or images in class folders."""
    if path.suffix.lower() == ".csv":
        return "csv"
    if is_saved(path):
        return "arrow"
    for suffix, source in _SUFFIXES.items():
        if path.suffix.lower() == suffix or _holds(path, suffix):
            return source
    return "folder"


def _holds(path: Path, suffix: str) -> bool:
    """Tell whether a folder, or one in it as in the hub's repositories, holds such a file.

    Of the folders in it the first entries are looked at only: they may be classes of thousands of images.
    """
    try:
        inside = [*path.iterdir()]
        below = (entry for folder in inside if folder.is_dir() for entry in islice(folder.iterdir(), _LOOKED_AT))
        return any(entry.name.endswith(suffix) for entry in chain(inside, below))
    except OSError:  # it is said when the images are looked for
        return False


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

    Parts of the data set may be above the classes: `train` beside `val`, `test` or both, as `shards.PARTS` calls them.
    A subfolder that is hidden, left by a tool or without an image is no class; `ImageSet.left_out` says which were.

    Raises:
        MissingFileError: No such folder, or no images in subfolders of it.
        FileAccessError: The folder cannot be listed.
        InvalidValueError: Some of its subfolders are called like parts of a data set, and the others not; or a part
            has classes that are not trained on.
    """
    root = full_path(root)
    left_out = LeftOut()
    folders = _class_folders(root, root, left_out)
    classes = [
        (part, name, list(images_below(folder / name, left_out, base=root)))
        for part, folder in _own_parts(root, folders)
        for name in (_class_folders(folder, root, left_out) if part else folders)
    ]
    for part, name, files in classes:
        if not files:
            left_out.add(EMPTY_CLASSES, f"{part}/{name}" if part else name)
    found = [(part, name, file) for part, name, files in classes for file in files]
    if not found:
        raise MissingFileError(
            ". ".join([f"No images in class folders below {root}; expected {root}/CLASS/IMAGE", *left_out.describe()])
        )
    names = tuple(dict.fromkeys(name for part, name, _ in found if part in ("", "train")))
    for part, name, file in found:
        check(
            name in names,
            f"{file.parent} is of the part {part}, but {name} is no class of the images to train on "
            f"({', '.join(names[:5])}); give all parts the same class folders.",
        )
    number = {name: place for place, name in enumerate(names)}
    _, parts = arrange([part for part, _, _ in found])  # they are in their order already
    return ImageSet([file for *_, file in found], [number[name] for _, name, _ in found], names, root, left_out, parts)


def _own_parts(root: Path, names: Sequence[str]) -> list[tuple[str, Path]]:
    """Return the folders of parts, with the name of each part, in order; or the root alone, as no part."""
    parts = {name: PART_OF[name.lower()] for name in names if name.lower() in PART_OF}
    twice = len(set(parts.values())) < len(parts)
    if len(parts) < len(names) or "train" not in parts.values() or len(parts) < 2 or twice:
        _refuse_parts(root, names, all_alone=True)
        return [("", root)]
    return sorted(((part, root / name) for name, part in parts.items()), key=lambda own: list(PARTS).index(own[0]))


def folder_of_images(root: Path) -> ImageSet:
    """Return all images below a folder, however deep, without classes.

    Raises:
        MissingFileError: No such folder, or no images in it.
        FileAccessError: The folder cannot be listed.
        InvalidValueError: It holds a part to train on beside one that is held out.
    """
    root = full_path(root)
    _refuse_parts(root, [name for name, is_folder in _entries(root, "it") if is_folder], all_alone=False)
    left_out = LeftOut()
    images = list(images_below(root, left_out))
    if not images:
        raise MissingFileError(". ".join([f"No images below {root}; give another folder", *left_out.describe()]))
    return ImageSet(images, None, (), root, left_out)


def _entries(root: Path, form: str) -> list[tuple[str, bool]]:
    """Return the names in a folder, and whether each is of a folder itself."""
    try:
        return sorted((path.name, path.is_dir()) for path in root.iterdir())
    except FileNotFoundError as error:
        raise MissingFileError(
            f"There is no folder {root}; expected one with images in {form}.{_how_to_download(root)}"
        ) from error
    except NotADirectoryError as error:
        raise FileAccessError(
            f"{root} is a file, and no CSV, Parquet or tar file; expected a folder with images in CLASS/IMAGE."
        ) from error
    except OSError as error:
        raise FileAccessError(f"The folder {root} cannot be listed: {error.strerror}. Give another one.") from error


def _how_to_download(root: Path) -> str:
    """Say how to get a data set of the hub, if a place that is not there is called like one."""
    name = _HUB_NAME.fullmatch(os.path.relpath(root))
    if name is None or name[1].startswith("."):
        return ""
    folder = name[1].rpartition("/")[2]
    return (
        f" If you mean {name[1]} of the Hugging Face hub, get it first with `hf download {name[1]} --repo-type dataset "
        f"--local-dir {folder}`, and give that folder."
    )


def _class_folders(folder: Path, root: Path, left_out: LeftOut) -> list[str]:
    """Name the subfolders that may be classes; list what else there is by its path below the root."""
    entries = _entries(folder, f"{folder}/CLASS/IMAGE")
    for name, is_folder in entries:
        if reason := why_not(name, is_folder) or (None if is_folder else OUTSIDE):
            left_out.add(reason, (folder / name).relative_to(root).as_posix())
    return [name for name, is_folder in entries if is_folder and why_not(name, is_folder) is None]


def _refuse_parts(root: Path, names: Sequence[str], all_alone: bool) -> None:
    """Refuse a root whose subfolders are train and val: a classifier of the two is not what anyone wants.

    "train" is also something to ride on, so the name alone says nothing where it is one class of several.
    """
    parts = [name for name in names if name.lower() in _TRAIN | _HELD_OUT]
    both = any(name.lower() in _TRAIN for name in parts) and any(name.lower() in _HELD_OUT for name in parts)
    if both or (all_alone and parts and len(parts) == len(names)):
        raise InvalidValueError(
            f"{root} has {', '.join(parts)}, which are parts of a data set and not classes. Give one of them, such as "
            f"{root / parts[0]} (in a recipe, data.test_path takes the other), or rename them if they are classes."
        )
