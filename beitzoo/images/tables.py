"""Parquet files of images, in the form that data sets have on the Hugging Face hub: columns `image` and `label`."""

import hashlib
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
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
from beitzoo.images.table_forms import Form, Labels, form_of, holds_bytes, image_bytes, labels_in

_logger = logging.getLogger(__name__)

# Columns of masks, as data sets on the hub call them.
MASK_COLUMNS = ("annotation", "label", "mask", "segmentation_mask")
# Bytes of a data set that are kept in memory at most; each process may have to keep its own.
_MOST_IN_MEMORY = 2**30
_ROWS_AT_A_TIME = 256


class Table:
    """The image files in one Parquet file, by row.

    Parquet is compressed in groups of rows, and a row cannot be read without its group. So the images are kept in
    memory, or copied once to an Arrow file that is mapped into memory. Processes that are forked share either; to
    others only the names of the files are sent.

    Attributes:
        path: The Parquet file.
        copy: The Arrow file; None keeps the images in memory.
    """

    def __init__(self, path: Path, form: Form, copy: Path | None) -> None:
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


def _image_bytes(path: Path, form: Form) -> Iterator[Any]:
    """Yield the image files of a table, as arrays of bytes of some hundred rows."""
    column = f"{form.image}.bytes" if form.in_struct else form.image
    with _parquet(path) as file:
        for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=[column], use_threads=False):
            yield image_bytes(batch.column(0), form)


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
    if it is `img` or the hub's notes in the file call it images. Classes are numbers or words in a column `label`, else
    `fine_label` (of CIFAR-100, which has coarse ones beside it), else the one that the hub's notes call classes; these
    notes, or else a `classes.txt`, name them. Rows without a class are left out, unless no row has one.

    Up to 1 GiB of images are kept in memory. More are copied once, uncompressed, to the folder `beitzoo/tables` beside
    the hub's cache, and anew when a file has another size or time of change.

    Raises:
        MissingFileError: There are no such files, or no rows in them.
        InvalidValueError: A file has no images, or other classes than the others, or is no Parquet file.
    """
    shards = _shards(path)
    forms = {file: form_of(file, _schema(file)) for file in shards.files}
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
    images = {file: form_of(file, _schema(file), {form.image}) for file, form in masks.items()}
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


def _mask_form(path: Path) -> Form:
    import pyarrow as pa

    schema = _schema(path)
    found = [name for name in MASK_COLUMNS if holds_bytes(schema, name)]
    if len(found) != 1:
        what = f"several columns of masks, {', '.join(found)}" if found else "no column of masks"
        raise InvalidValueError(
            f"{path} has {what}. Expected one column {', '.join(MASK_COLUMNS[:-1])} or {MASK_COLUMNS[-1]} of bytes, or "
            "of {bytes, path} as on the hub; rename or remove the others, or give other tables."
        )
    return Form(found[0], pa.types.is_struct(schema.field(found[0]).type), None, None)


def _tables(forms: dict[Path, Form]) -> list[Table]:
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


def _schema(path: Path) -> Any:
    with _parquet(path) as file:
        return file.schema_arrow


def _image_size(path: Path, form: Form) -> int:
    name = f"{form.image}.bytes" if form.in_struct else form.image
    with _parquet(path) as file:
        groups = (file.metadata.row_group(number) for number in range(file.num_row_groups))
        columns = (group.column(place) for group in groups for place in range(group.num_columns))
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == name)


def _copies() -> Path:
    return Path(constants.HF_HOME) / "beitzoo" / "tables"


def _copy_of(path: Path, form: Form) -> Path:
    """Return where the copy of a table lies: named by the file, and by its size and time of change."""
    status = path.stat()
    parts = [f"{path.absolute()}\0{form.image}", f"{status.st_size} {status.st_mtime_ns}"]
    hashes = [hashlib.sha256(part.encode("utf-8", "surrogateescape")).hexdigest()[:16] for part in parts]
    return _copies() / f"{'-'.join(hashes)}.arrow"


def _labels(path: Path, form: Form) -> Labels:
    with _parquet(path) as file:
        if form.label is None:
            return np.full(file.metadata.num_rows, -1)
        column = file.read(columns=[form.label], use_threads=False).column(0)
    return labels_in(path, form.label, column)
