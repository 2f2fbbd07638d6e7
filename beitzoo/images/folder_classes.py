"""Classes and parts of images by the folders that they are in, for images that were listed by place."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from beitzoo.images.shards import PARTS

_PART_OF = {word: part for part, words in PARTS.items() for word in words}


@dataclass(frozen=True)
class ImageClasses:
    """Classes of some images, and what each image is for.

    Attributes:
        labels: Class of each.
        names: Of the classes, in their order.
        parts: `train`, `validation` or `test` for each; None where nobody says.
    """

    labels: list[int]
    names: tuple[str, ...]
    parts: list[str] | None


def classes_by_folder(listed: Sequence[tuple[str, Path]]) -> ImageClasses | None:
    """Return the classes of images that lie in class folders, PLACE/CLASS/IMAGE; None where they do not.

    Every place must be a folder, every image in a folder below it, and there must be two classes or more. Where the
    places, or all folders in them, are called train, val and test, these are parts, with classes below.

    Args:
        listed: Images, each with the place that named it.
    """
    below = []
    for place, image in listed:
        folder = Path(os.path.expanduser(place))
        folders = image.relative_to(folder).parts[:-1] if folder in image.parents else ()
        if not folders:
            return None
        below.append((_PART_OF.get(folder.resolve().name.lower()), folders))
    parts = [part for part, _ in below]
    first = [_PART_OF.get(folders[0].lower()) for _, folders in below]
    depth = 0
    if below and all(first):
        parts, depth = first, 1
        if any(len(folders) < 2 for _, folders in below):
            return None
    classes = [folders[depth] for _, folders in below]
    names = tuple(sorted(set(classes)))
    if len(names) < 2:
        return None
    number = {name: place for place, name in enumerate(names)}
    known = [part for part in parts if part]
    return ImageClasses([number[name] for name in classes], names, known if len(known) == len(below) else None)
