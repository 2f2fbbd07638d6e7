"""Folders that `save_to_disk` of the library datasets wrote: Arrow files of images, and JSON that says which."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from beitzoo.errors import InvalidValueError, UnsupportedError, UserError
from beitzoo.files import full_path, read_text
from beitzoo.images.classes import classes_of, images_of
from beitzoo.images.folders import LeftOut
from beitzoo.images.image_set import ImageSet
from beitzoo.images.shards import PART_OF, PARTS, Shards
from beitzoo.images.table_forms import Form, Labels, form_of, image_bytes, labels_in
from beitzoo.images.tables import Table

# What `save_to_disk` writes: of a DatasetDict which folders in it are its splits, of each Dataset its files.
_SPLITS_FILE, _STATE_FILE = "dataset_dict.json", "state.json"


def is_saved(path: Path) -> bool:
    """Tell whether a folder is one that `save_to_disk` wrote."""
    return any((full_path(path) / name).is_file() for name in (_SPLITS_FILE, _STATE_FILE))


class SavedTable(Table):
    """The image files in one Arrow file, by row; the file is mapped into memory and nothing of it is copied."""

    def __init__(self, path: Path, form: Form) -> None:
        super().__init__(path, form, None)

    @cached_property
    def _chunks(self) -> list[Any]:
        with _stream(self.path) as stream:
            return [image_bytes(batch.column(self._form.image), self._form) for batch in stream]


def saved_images(path: Path) -> ImageSet:
    """Return the images of a data set that `save_to_disk` wrote, and their classes if it has any.

    Columns are found as `find_tables` finds them. Splits of a `DatasetDict` are parts of the set.

    Raises:
        MissingFileError: There are no images.
        InvalidValueError: It is no such folder, or a split is called like no part of a data set.
    """
    if find_spec("pyarrow") is None:
        raise UnsupportedError("Arrow files need pyarrow, which is not installed: pip install 'beitzoo[train]'")
    root = full_path(path)
    shards = Shards(root, _parts(root))
    forms = {file: _form(file) for file in shards.files}
    names = {form.names for form in forms.values() if form.names}
    if len(names) > 1:
        raise InvalidValueError(f"The parts of {root} have different classes; give one of them.")
    found = [_labels(file, form) for file, form in forms.items()]
    tables = [SavedTable(file, form).open() for file, form in forms.items()]
    return images_of(shards, tables, classes_of(shards, found, next(iter(names), ())), LeftOut())


def _parts(root: Path) -> dict[str, list[Path]]:
    """Find the files of each part, in the order that parts have everywhere."""
    if not (root / _SPLITS_FILE).is_file():
        return {"train": _files(root)}
    splits = _json(root / _SPLITS_FILE, "splits")
    if len(splits) == 1:
        return {"train": _files(root / splits[0])}
    unknown = [name for name in splits if name.lower() not in PART_OF]
    parts = {PART_OF[name.lower()]: root / name for name in splits if name not in unknown}
    if unknown or len(parts) < len(splits) or "train" not in parts:
        raise InvalidValueError(
            f"{root} has the splits {', '.join(splits)}, and expected are train beside validation, test or both. Give "
            f"the folder of one of them, such as {root / splits[0]}."
        )
    return {part: _files(parts[part]) for part in PARTS if part in parts}


def _files(folder: Path) -> list[Path]:
    state = folder / _STATE_FILE
    if _json(state, "_indices_files", []):
        raise InvalidValueError(
            f"{folder} was saved by an old version, as rows chosen from others. Load it, call flatten_indices() and "
            "save it again."
        )
    return [folder / str(file["filename"]) for file in _json(state, "_data_files")]


def _json(path: Path, key: str, default: Any = None) -> Any:
    try:
        value = json.loads(read_text(path)).get(key, default)
        if isinstance(value, list):
            return value
        reason = f"it has no list {key!r}"
    except (ValueError, AttributeError) as error:
        reason = str(error)
    raise InvalidValueError(f"{path} is not what save_to_disk writes: {reason}. Save the data set again.")


@contextmanager
def _stream(path: Path) -> Iterator[Any]:
    """Open an Arrow file; what pyarrow finds wrong with it is an error that names it."""
    import pyarrow as pa

    try:
        yield pa.ipc.open_stream(pa.memory_map(str(path)))
    except UserError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InvalidValueError(f"{path} cannot be read as Arrow: {reason}. Save the data set again.") from error


def _form(path: Path) -> Form:
    with _stream(path) as stream:
        return form_of(path, stream.schema)


def _labels(path: Path, form: Form) -> Labels:
    import pyarrow as pa

    with _stream(path) as stream:
        table = stream.read_all()
    if form.label is None:
        return np.full(len(table), -1)
    column = table.column(form.label)
    return labels_in(path, form.label, pa.chunked_array(column.chunks, column.type))
