"""Parquet files of images, in the form that data sets have on the Hugging Face hub: columns `image` and `label`."""

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock

from beitzoo.errors import FileAccessError, InvalidValueError, UnsupportedError, UserError
from beitzoo.files import write_atomically
from beitzoo.images.classes import ShardImages, classes_of, images_of, kept_images, list_left_out
from beitzoo.images.files import Encoded, ImageError
from beitzoo.images.folders import WITHOUT_IMAGE, WITHOUT_MASK, LeftOut
from beitzoo.images.image_set import ImageSet
from beitzoo.images.shards import Shards, find_shards

_logger = logging.getLogger(__name__)

# Columns that are looked for before those that the hub's notes in a file call images and classes.
_IMAGE_NAMES = ("image", "img")
_LABEL_NAME = "label"
# Columns of masks, as data sets on the hub call them.
MASK_COLUMNS = ("annotation", "label", "mask", "segmentation_mask")
# Bytes of a data set that are kept in memory at most; each process may have to keep its own.
_MOST_IN_MEMORY = 2**30
_ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class _Form:
    """What the schema of a Parquet file says.

    Attributes:
        image: Column of the images.
        in_struct: Whether that holds their bytes in a field `bytes`.
        label: Column of the classes, if there is one.
        names: Of the classes, as the hub notes them.
    """

    image: str
    in_struct: bool
    label: str | None
    names: tuple[str, ...] | None


class Table:
    """The image files in one Parquet file, by row.

    Parquet is compressed in groups of rows, and a row cannot be read without its group. So the images are kept in
    memory, or copied once to an Arrow file that is mapped into memory. Processes that are forked share either; to
    others only the names of the files are sent.

    Attributes:
        path: The Parquet file.
        copy: The Arrow file; None keeps the images in memory.
    """

    def __init__(self, path: Path, form: _Form, copy: Path | None) -> None:
        self.path, self.copy = path, copy
        self._form = form

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "copy": self.copy, "_form": self._form}

    def open(self) -> "Table":
        """Read or copy the images now, so that processes forked later share them."""
        _ = self._starts
        return self

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> "TableRow":
        return TableRow(self.path, row, self)

    def read(self, row: int) -> bytes | None:
        """Return an image file; None if the table has none in that row."""
        chunk, place = self._place(row)
        return chunk[place].as_py()

    def size(self, row: int) -> int | None:
        """Return how many bytes it has, without reading them."""
        chunk, place = self._place(row)
        value = chunk[place].as_buffer()
        return None if value is None else value.size

    def there(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Tell of each row whether it has an image."""
        rows = [chunk.is_valid().to_numpy(zero_copy_only=False) for chunk in self._chunks]
        return np.concatenate([np.zeros(0, bool), *rows]).astype(bool)

    def _place(self, row: int) -> tuple[Any, int]:
        chunk = bisect_right(self._starts, row) - 1
        return self._chunks[chunk], row - self._starts[chunk]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *np.cumsum([len(chunk) for chunk in self._chunks]).tolist()]

    @cached_property
    def _chunks(self) -> list[Any]:
        import pyarrow as pa

        if self.copy is None:
            return list(_image_bytes(self.path, self._form))
        if not self.copy.is_file():
            _copy(self.copy, self._write)
        return pa.ipc.open_file(pa.memory_map(str(self.copy))).read_all().column(0).chunks

    def _write(self, file: Path) -> None:
        import pyarrow as pa

        if _copy_of(self.path, self._form) != self.copy:  # its images would go by the name of the old ones
            raise InvalidValueError(f"{self.path} is another file than it was when it was found. Start again.")
        schema = pa.schema([("bytes", pa.large_binary())])
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for part in _image_bytes(self.path, self._form):
                writer.write_batch(pa.record_batch([part], schema=schema))


def _copy(copy: Path, write: Callable[[Path], None]) -> None:
    """Write a copy, by the first of the processes that want it, and remove those of what the table was before."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(copy.with_suffix(".lock")):
        if not copy.is_file():
            write_atomically(copy, write)
    name, _, _ = copy.stem.rpartition("-")
    for older in copy.parent.glob(f"{name}-*"):
        if older != copy:
            older.unlink(missing_ok=True)


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file; what pyarrow finds wrong with it, now or when it is read, is an error that names it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            yield file
    except UserError:
        raise
    except UnicodeEncodeError as error:
        raise FileAccessError(f"{path} has a name that pyarrow cannot open: it is not text. Rename it.") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:
            raise FileAccessError(f"Cannot read {path}: {os.strerror(error.errno)}. Check its permissions.") from error
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> InvalidValueError:
    reason = " ".join(reason.split()).rstrip(".")
    return InvalidValueError(f"{path} cannot be read as Parquet: {reason}. Get it again, or remove it.")


def _image_bytes(path: Path, form: _Form) -> Iterator[Any]:
    """Yield the image files of a table, as arrays of bytes of some hundred rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = f"{form.image}.bytes" if form.in_struct else form.image
    with _parquet(path) as file:
        for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=[column], use_threads=False):
            values = batch.column(0)
            yield (pc.struct_field(values, "bytes") if form.in_struct else values).cast(pa.large_binary())


@dataclass(frozen=True)
class TableRow(Encoded):
    """An image file in a row of a table."""

    container: Path
    place: int
    table: Table

    @property
    def size(self) -> int | None:
        """How many bytes it has, without reading them; None if it is not there."""
        return self.table.size(self.place)

    def read(self) -> bytes:
        """Return the bytes of the image file."""
        content = self.table.read(self.place)
        if content is None:
            raise ImageError("the table has no bytes in this row")
        return content


def find_tables(path: Path) -> ImageSet:
    """Return the images of Parquet files, and their classes if they have any.

    A column `image` holds the bytes of image files, alone or in a field `bytes` beside a `path`; another name is taken
    if it is `img` or the hub's notes in the file call it images. Classes are numbers or words in a column `label`, or
    in the one that the hub's notes call classes; these notes, or else a `classes.txt`, name them. Rows without a class
    are left out, unless no row has one.

    Up to 1 GiB of images are kept in memory. More are copied once, uncompressed, to the folder `beitzoo/tables` beside
    the hub's cache, and anew when a file has another size or time of change.

    Raises:
        MissingFileError: There are no such files, or no rows in them.
        InvalidValueError: A file has no images, or other classes than the others, or is no Parquet file.
    """
    shards = _shards(path)
    forms = {file: _form(file) for file in shards.files}
    names = {form.names for form in forms.values() if form.names}
    if len(names) > 1:
        raise InvalidValueError(f"The tables at {shards.root} have different classes; give those of one data set.")
    found = [_labels(file, form) for file, form in forms.items()]
    classes = classes_of(shards, found, next(iter(names), ()))
    tables = _tables(forms)
    for table, labels in zip(tables, found, strict=True):
        if len(table) != len(labels):
            raise _damaged(table.path, f"it has {len(table)} images, but {len(labels)} rows")
    return images_of(shards, tables, classes, LeftOut())


def find_mask_tables(path: Path) -> tuple[ImageSet, Sequence[Encoded]]:
    """Return the images of Parquet files without classes, and their masks.

    A column `annotation`, `label`, `mask` or `segmentation_mask` holds the bytes of mask files in the form that images
    have; that of images is found as `find_tables` finds it. Rows without an image or without a mask are left out.

    Raises:
        MissingFileError: There are no such files, or no rows in them.
        InvalidValueError: A file has no images, no masks or several columns of masks, or is no Parquet file.
    """
    shards = _shards(path)
    masks = {file: _mask_form(file) for file in shards.files}
    images = {file: _form(file, {form.image}) for file, form in masks.items()}
    image_tables, mask_tables = _tables(images), _tables(masks)
    left_out = LeftOut()
    keep = []
    for table, mask_table in zip(image_tables, mask_tables, strict=True):
        if len(table) != len(mask_table):
            raise _damaged(table.path, f"it has {len(table)} images, but {len(mask_table)} masks")
        there, masked = table.there(), mask_table.there()
        list_left_out(shards, table, ~there, WITHOUT_IMAGE, left_out)
        list_left_out(shards, table, there & ~masked, WITHOUT_MASK, left_out)
        keep.append(there & masked)
    found = kept_images(shards, image_tables, keep, left_out)
    return found, ShardImages(mask_tables, [np.flatnonzero(kept) for kept in keep])


def _shards(path: Path) -> Shards:
    if find_spec("pyarrow") is None:
        raise UnsupportedError("Parquet files need pyarrow, which is not installed: pip install 'beitzoo[train]'")
    return find_shards(path, (".parquet",), "Parquet files")


def _mask_form(path: Path) -> _Form:
    import pyarrow as pa

    with _parquet(path) as file:
        schema = file.schema_arrow
    found = [name for name in MASK_COLUMNS if _holds_bytes(schema, name)]
    if len(found) != 1:
        what = f"several columns of masks, {', '.join(found)}" if found else "no column of masks"
        raise InvalidValueError(
            f"{path} has {what}. Expected one column {', '.join(MASK_COLUMNS[:-1])} or {MASK_COLUMNS[-1]} of bytes, or "
            "of {bytes, path} as on the hub; rename or remove the others, or give other tables."
        )
    return _Form(found[0], pa.types.is_struct(schema.field(found[0]).type), None, None)


def _tables(forms: dict[Path, _Form]) -> list[Table]:
    """Read the images into memory if they are few, or else see to it that they are copied."""
    sizes = {file: _image_size(file, form) for file, form in forms.items()}
    copied = sum(sizes.values()) > _MOST_IN_MEMORY
    tables = [Table(file, form, _copy_of(file, form) if copied else None) for file, form in forms.items()]
    missing = [sizes[table.path] for table in tables if table.copy is not None and not table.copy.is_file()]
    if missing:
        _logger.warning(
            "Copying the images of %d tables (%.1f GB) once to %s, where each can be read alone; HF_HOME moves it.",
            len(missing),
            sum(missing) / 1e9,
            _copies(),
        )
    return [table.open() for table in tables]


def _form(path: Path, masks: Collection[str] = ()) -> _Form:
    """Read the form of a table; columns of masks are not those of its images."""
    import pyarrow as pa

    with _parquet(path) as file:
        schema = file.schema_arrow
    features = _hub_features(schema.metadata or {})
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    called_images = (name for name, kind in kinds.items() if kind == "Image")
    image = next(
        (name for name in (*_IMAGE_NAMES, *called_images) if _holds_bytes(schema, name) and name not in masks), None
    )
    if image is None:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise InvalidValueError(
            f"{path} has no column of images, but {columns or 'no column at all'}. Expected a column 'image' of bytes, "
            "or of {bytes, path} as on the hub; rename it, or give other tables."
        )
    classes = [name for name, kind in kinds.items() if kind == "ClassLabel" and name in schema.names]
    label = _LABEL_NAME if _LABEL_NAME in schema.names else classes[0] if len(classes) == 1 else None
    names = features[label].get("names") if label in classes else None
    named = tuple(map(str, names)) if isinstance(names, list) else None
    return _Form(image, pa.types.is_struct(schema.field(image).type), label, named)


def _hub_features(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """Return what the hub's library notes about columns; nothing if there are no notes, or odd ones."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _holds_bytes(schema: Any, name: str) -> bool:
    import pyarrow as pa

    if schema.get_field_index(name) < 0:  # there is none, or more than one
        return False
    kind = schema.field(name).type
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        if place < 0:
            return False
        kind = kind.field(place).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _image_size(path: Path, form: _Form) -> int:
    name = f"{form.image}.bytes" if form.in_struct else form.image
    with _parquet(path) as file:
        groups = (file.metadata.row_group(number) for number in range(file.num_row_groups))
        columns = (group.column(place) for group in groups for place in range(group.num_columns))
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == name)


def _copies() -> Path:
    return Path(constants.HF_HOME) / "beitzoo" / "tables"


def _copy_of(path: Path, form: _Form) -> Path:
    """Return where the copy of a table lies: named by the file, and by its size and time of change."""
    status = path.stat()
    parts = [f"{path.absolute()}\0{form.image}", f"{status.st_size} {status.st_mtime_ns}"]
    hashes = [hashlib.sha256(part.encode("utf-8", "surrogateescape")).hexdigest()[:16] for part in parts]
    return _copies() / f"{'-'.join(hashes)}.arrow"


def _labels(path: Path, form: _Form) -> Any:
    """Read the classes of a table: numbers, -1 for none; or words, None for none."""
    import pyarrow as pa

    with _parquet(path) as file:
        if form.label is None:
            return np.full(file.metadata.num_rows, -1)
        column = file.read(columns=[form.label], use_threads=False).column(0)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if any(is_text(column.type) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        return column.to_pylist()
    if pa.types.is_integer(column.type) or pa.types.is_null(column.type):
        return column.cast(pa.int64(), safe=False).fill_null(-1).to_numpy()  # from 2^63 on it is negative: no class
    raise InvalidValueError(
        f"The column {form.label} of {path} holds {column.type}, not one class per image. Expected whole numbers or "
        "words; rename it to use the images without classes."
    )
