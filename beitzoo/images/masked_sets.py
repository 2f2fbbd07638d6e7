"""Images with masks: which mask belongs to which image, in folders, in a CSV or in tables of the hub's form."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from PIL import Image

from beitzoo.errors import FileAccessError, InvalidValueError, MissingFileError, check
from beitzoo.files import full_path
from beitzoo.images.classes import CLASSES_FILE, names_in
from beitzoo.images.csv_rows import NOT_THERE, file_in, part_in, read_rows
from beitzoo.images.files import Encoded, ImageError, as_image
from beitzoo.images.folders import WITHOUT_IMAGE, WITHOUT_MASK, LeftOut, images_below, why_not
from beitzoo.images.image_set import ImageSet, Joined, TimesOfChange, digest_of, size_of, with_held_out
from beitzoo.images.label_maps import IGNORE, LabelMap, MaskLabels, UnlabelledError, read_label_map
from beitzoo.images.shards import PART_OF, arrange
from beitzoo.images.tables import find_mask_tables
from beitzoo.zoo.labels import ade20k_classes

MaskSource = Literal["annotations", "pairs", "parquet"]

# Names of the folders of images and of masks: ADE20K's, two that are as common, and mmsegmentation's.
IMAGE_FOLDERS = ("images", "img_dir")
MASK_FOLDERS = ("annotations", "masks", "labels", "ann_dir")

SAME_NAME = "of one name, so that it is unknown which belong together"
OUTSIDE_PARTS = "outside of the parts of the data set"

_LAYOUT = "images/NAME.jpg and annotations/NAME.png, or images/training/NAME.jpg and annotations/training/NAME.png"


@dataclass(frozen=True)
class LabelOptions:
    """What a person says about masks; with a `classes.txt` beside the images it becomes `MaskLabels`.

    Attributes:
        classes: Names of the classes in the order of their numbers, or `ade20k`. Without them, the lines of a
            `classes.txt`, or else the names in the colour table.
        reduce_zero_label: See `MaskLabels`, as of the others.
        ignore: Numbers that stand for no class.
        colours: Of masks in colour; None or empty where masks hold numbers.
    """

    classes: tuple[str, ...] | Literal["ade20k"] | None = None
    reduce_zero_label: bool = False
    ignore: Iterable[int] = ()
    colours: Mapping[str, tuple[int, ...]] | None = None


@dataclass(frozen=True)
class MaskedSet:
    """Images and their masks, before they are split and augmented. It pickles to little more than names of files.

    Attributes:
        images: The images; they have no classes of their own.
        masks: The mask of each image.
        labels: What the pixels of masks stand for.
    """

    images: ImageSet
    masks: Sequence[Path | Encoded]
    labels: MaskLabels

    def __len__(self) -> int:
        return len(self.masks)

    def load(self, index: int, in_chans: int = 3) -> tuple[Image.Image, LabelMap]:
        """Decode an image, upright, and its mask as label map (H, W) of the same size.

        Raises:
            ImageError: The image or the mask cannot be read.
            MaskError: The mask does not fit the image or the classes, or no pixel has a class.
        """
        image = as_image(self.images.images[index], in_chans)
        return image, self.load_mask(index, image.size)

    def load_mask(self, index: int, size: tuple[int, int] | None = None) -> LabelMap:
        """Read the mask of an image alone; `size` is the image's width and height, or None to trust that it fits.

        Raises:
            ImageError: It cannot be read; says which mask it is.
            MaskError: It does not fit the size or the classes.
            UnlabelledError: It fits, and no pixel has a class.
        """
        try:
            label_map = read_label_map(self.masks[index], self.labels, size)
            if label_map.min(initial=IGNORE) == IGNORE:
                raise UnlabelledError("no pixel has a class")
            return label_map
        except ImageError as error:
            raise type(error)(f"its mask {self.mask_name(index)}: {error}") from error

    def mask_name(self, index: int) -> str:
        """Say which mask it is: its path below the folder of the data set, or TABLE:ROW."""
        mask = self.masks[index]
        path, place = (mask.container, f":{mask.place}") if isinstance(mask, Encoded) else (mask, "")
        root = self.images.root
        return f"{path.relative_to(root) if root is not None and path.is_relative_to(root) else path}{place}"

    @cached_property
    def version(self) -> str:
        """First digits of a sha256 that is another when images or masks were exchanged, or masks stand for others.

        As `ImageSet.version`, nothing in the files is read.
        """
        return digest_of(self._lines())

    def version_of(self, indices: Iterable[int]) -> str:
        """Return first digits of a sha256 of the `version`, and of which of the images are meant."""
        return digest_of([self.version, repr([*indices])])

    def _lines(self) -> Iterator[str]:
        changed, labels = TimesOfChange(), self.labels
        colours = None if labels.colours is None else [*labels.colours.items()]
        yield repr((self.images.version, labels.names, labels.reduce_zero_label, sorted(labels.ignore), colours))
        for index, mask in enumerate(self.masks):
            yield repr((self.mask_name(index), size_of(mask), changed.of(mask)))

    def describe(self) -> list[str]:
        """Say what was found and what was left out, in a few lines."""
        where = "" if self.images.root is None else f" in {self.images.root}"
        first = f"{len(self):,} images with masks of {len(self.labels.names):,} classes{where}"
        return [first, *self.images.describe()[1:]]


def find_masked_images(source: MaskSource, path: Path, labels: MaskLabels | LabelOptions = LabelOptions()) -> MaskedSet:
    """Find images and their masks.

    Args:
        source: In which form they are. `annotations`: a folder with `images` (or `img_dir`) and `annotations` (or
            `masks`, `labels`, `ann_dir`) in it. An image and a mask of one name, whatever their suffixes, are a pair,
            in folders within them too. Both may have folders of parts: `training`, `validation`, `test`, or as
            `shards.PARTS` has them. `pairs`: a CSV with the columns `image`, `mask` and perhaps `part`; paths are
            relative to its folder. `parquet`: tables with a column of images and one of masks, see `find_mask_tables`.
        path: The folder; the CSV; or of tables a folder, one file or a pattern.
        labels: What the pixels of masks stand for. A `classes.txt` beside the images must agree with it.

    Raises:
        MissingFileError: There are no images with masks.
        FileAccessError: A folder or file cannot be read.
        InvalidValueError: It is not a data set of this form, or nothing says what its classes are.
    """
    path = full_path(path)
    masks: Sequence[Path | Encoded]
    match source:
        case "annotations":
            found, masks, folders = *_of_folders(path), [path]
        case "pairs":
            found, masks, folders = *_of_pairs(path), [path.parent]
        case "parquet":
            found, masks = find_mask_tables(path)
            assert found.root is not None
            folders = [found.root, path if path.is_dir() else path.parent]
    return MaskedSet(found, masks, _resolved(labels, folders))


def guess_masked_source(path: Path) -> MaskSource:
    """Tell by names whether what lies there is a CSV of pairs, tables with masks or folders of images and masks."""
    if path.suffix.lower() == ".csv":
        return "pairs"
    if path.suffix.lower() == ".parquet" or any(any(path.glob(f"{place}*.parquet")) for place in ("", "data/")):
        return "parquet"
    return "annotations"


def with_held_out_masks(masked: MaskedSet, held_out: MaskedSet) -> MaskedSet:
    """Return a set of both, of which the second is the part `test`; see `with_held_out`.

    Raises:
        InvalidValueError: Their masks stand for other classes, or an image is in both.
    """
    check(
        masked.labels == held_out.labels,
        f"The masks of {masked.images.root} and {held_out.images.root} stand for other classes; both need the same.",
    )
    images = with_held_out(masked.images, held_out.images)
    return MaskedSet(images, Joined(masked.masks, held_out.masks), masked.labels)


def _resolved(given: MaskLabels | LabelOptions, folders: Sequence[Path]) -> MaskLabels:
    """Return what pixels stand for; names that are given must be those of a `classes.txt`, if there is one."""
    file = next((folder / CLASSES_FILE for folder in folders if (folder / CLASSES_FILE).is_file()), None)
    listed = () if file is None else names_in(file)
    labels = given if isinstance(given, MaskLabels) else _labels_of(given, listed, folders[0] / CLASSES_FILE)
    if listed and listed != labels.names:
        place = next((n for n, (a, b) in enumerate(zip(listed, labels.names, strict=False)) if a != b), None)
        what = f"{len(listed)} classes" if place is None else f"{listed[place]!r} as class {place}"
        other = f"{len(labels.names)}" if place is None else f"{labels.names[place]!r}"
        raise InvalidValueError(
            f"{file} has {what}, where {other} is expected. Both must name the same classes in the same order; correct "
            "or remove the file."
        )
    return labels


def _labels_of(options: LabelOptions, listed: tuple[str, ...], file: Path) -> MaskLabels:
    colours = {name: _colour(name, parts) for name, parts in (options.colours or {}).items()} or None
    names = tuple(name for name, _ in ade20k_classes()) if options.classes == "ade20k" else options.classes
    names = names or listed or tuple(colours or ())
    if not names:
        raise InvalidValueError(
            f"Nothing names the classes of the masks. Write a name a line to {file}, in the order of their numbers, or "
            "name them in the recipe (task.labels.classes)."
        )
    return MaskLabels(tuple(names), options.reduce_zero_label, frozenset(options.ignore), colours)


def _colour(name: str, parts: Sequence[int]) -> tuple[int, int, int]:
    check(len(parts) == 3, f"The colour of {name} is {tuple(parts)}; expected red, green and blue, each from 0 to 255.")
    return parts[0], parts[1], parts[2]


def _of_folders(root: Path) -> tuple[ImageSet, list[Path]]:
    check(not root.is_file(), f"{root} is a file; expected a folder with {_LAYOUT}.")
    left_out = LeftOut()
    images = _in_parts(root / _one_of(root, IMAGE_FOLDERS, "images"), root, left_out)
    masks = _in_parts(root / _one_of(root, MASK_FOLDERS, "masks"), root, left_out)
    pairs = _paired(images, masks, root, left_out)
    if not pairs:
        raise MissingFileError(
            ". ".join([f"No images with masks below {root}; expected {_LAYOUT}", *left_out.describe()])
        )
    return _set_of(pairs, root, left_out)


def _one_of(root: Path, names: Sequence[str], kind: str) -> str:
    there = [name for name in names if (root / name).is_dir()]
    if not there:
        raise MissingFileError(f"There is no folder {' or '.join(names)} of {kind} in {root}; expected {_LAYOUT}.")
    check(
        len(there) == 1,
        f"{root} has {' and '.join(there)}, and only one of them can hold the {kind}. Move the others away, or list "
        "the pairs in a CSV.",
    )
    return there[0]


def _in_parts(folder: Path, root: Path, left_out: LeftOut) -> dict[tuple[str, str], list[Path]]:
    """Find the files of a folder, by the part they are in (empty for none) and their name in it without suffix."""
    try:
        inside = {path.name: path.is_dir() for path in folder.iterdir()}
    except OSError as error:
        raise FileAccessError(f"The folder {folder} cannot be listed: {error.strerror}. Give another one.") from error
    parts = {name: PART_OF[name.lower()] for name in sorted(inside) if inside[name] and name.lower() in PART_OF}
    for name in sorted(inside.keys() - parts.keys()) if parts else ():
        left_out.add(why_not(name, inside[name]) or OUTSIDE_PARTS, f"{folder.name}/{name}")
    found = defaultdict(list)
    for below, part in ((folder / name, part) for name, part in (parts or {"": ""}).items()):
        for file in images_below(below, left_out, root):
            found[part, os.path.splitext(file.relative_to(below).as_posix())[0]].append(file)
    return found


def _paired(
    images: Mapping[tuple[str, str], list[Path]],
    masks: Mapping[tuple[str, str], list[Path]],
    root: Path,
    left_out: LeftOut,
) -> list["_Pair"]:
    """Put together what has one name; what has no partner, or more than one, is left out."""
    pairs = []
    for key in sorted(images.keys() | masks.keys()):
        own, others = images.get(key, []), masks.get(key, [])
        if len(own) == len(others) == 1:
            pairs.append(_Pair(key[0], own[0], others[0]))
            continue
        reason = WITHOUT_MASK if not others else WITHOUT_IMAGE if not own else SAME_NAME
        for file in (*own, *others):
            left_out.add(reason, str(file.relative_to(root)))
    return pairs


@dataclass(frozen=True)
class _Pair:
    """An image file and its mask; the part is empty where none is named."""

    part: str
    image: Path
    mask: Path


def _set_of(pairs: Sequence[_Pair], root: Path, left_out: LeftOut) -> tuple[ImageSet, list[Path]]:
    """Put the pairs of each part one after the other."""
    order, own = arrange([pair.part for pair in pairs])
    images = [pairs[place].image for place in order]
    return ImageSet(images, None, (), root, left_out, own), [pairs[place].mask for place in order]


def _of_pairs(path: Path) -> tuple[ImageSet, list[Path]]:
    left_out = LeftOut()
    pairs, lines = [], dict[Path, int]()
    for line, row in read_rows(path, (("image",), ("mask",))):
        pair = _pair(row, f"{path}, line {line}", path.parent)
        first = lines.setdefault(pair.image, line)
        check(first == line, f"{path}, lines {first} and {line}: both name {row['image']}. Remove one of them.")
        missing = [file for file in (pair.image, pair.mask) if not file.is_file()]
        for file in missing:
            left_out.add(NOT_THERE, os.path.relpath(file, path.parent))
        if not missing:
            pairs.append(pair)
    if not pairs:
        raise MissingFileError(
            ". ".join([f"No images with masks in {path}; write a row for each pair", *left_out.describe()])
        )
    root = Path(os.path.commonpath([path.parent.absolute(), *(pair.image.parent for pair in pairs)]))
    return _set_of(pairs, root, left_out)


def _pair(row: Mapping[str, str], place: str, folder: Path) -> _Pair:
    image, mask = (file_in(row, name, place, folder) for name in ("image", "mask"))
    check(image != mask, f"{place}: image and mask are the same file, {image}. Name the mask of this image.")
    return _Pair(part_in(row, place), image, mask)
