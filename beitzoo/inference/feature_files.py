"""Files of features: a row per image, written atomically as npz, npy or Parquet, and read again by probes."""

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from beitzoo.errors import FileAccessError, InvalidValueError, MissingFileError, UnsupportedError, check
from beitzoo.files import full_path, remove_abandoned, write_atomically
from beitzoo.images.folder_classes import ImageClasses
from beitzoo.inference.embed import Array, Pooling

Precision = Literal["float32", "float16"]

# The status of an image that has features; else it is the reason.
OK = "ok"
# What Parquet writes at a time, and holds until then.
_GROUP_BYTES = 64_000_000
# The key of the description in the metadata of a Parquet file.
_KEY = b"beitzoo"

# Images without features, with the reason.
Failures = list[tuple[str, str]]


class FeatureRow(NamedTuple):
    """One row of a file: an image with its features, or with the reason why it has none.

    Attributes:
        path: Which image.
        features: None where there are none.
        status: `ok`, or the reason.
        label: Its class, -1 where images have none.
        part: `train`, `validation`, `test`, or empty.
    """

    path: str
    features: Array | None
    status: str = OK
    label: int = -1
    part: str = ""


@dataclass(frozen=True)
class Description:
    """What is the same for all rows of a file.

    Attributes:
        model: Name of the network.
        pooling: How tokens became one feature.
        blocks: Whose output was read, counted from 0; None for that of the network.
        shape: Of the features of an image.
        names: Of the classes; none where images have none.
        img_size: Height and width that images had in front of the network.
        dtype: Of the numbers in the file.
    """

    model: str
    pooling: Pooling
    blocks: tuple[int, ...] | None
    shape: tuple[int, ...]
    names: tuple[str, ...] = ()
    img_size: tuple[int, int] | None = None
    dtype: Precision = "float32"


@dataclass(frozen=True)
class FeatureTable:
    """What a file of features holds.

    Attributes:
        description: Of all rows.
        features: (images, *shape); NaN in rows without.
        paths: Which images.
        status: `ok` of each image that has features, or the reason.
        labels: Class of each image; -1 where there are no classes.
        parts: What each image is for, or empty.
    """

    description: Description
    features: Array
    paths: list[str]
    status: list[str]
    labels: Array
    parts: list[str]


def feature_rows(
    outcomes: Iterable[tuple[Array | None, str | None]], paths: Iterable[str], classes: ImageClasses | None
) -> Iterator[FeatureRow]:
    """Put together what was computed of images with what is known of them.

    Args:
        outcomes: Of each image its features, or why there are none.
        paths: Which images.
        classes: Of the same images in the same order.
    """
    for place, ((features, error), path) in enumerate(zip(outcomes, paths, strict=True)):
        row = FeatureRow(path, features, OK if error is None else error)
        if classes is not None:
            row = row._replace(label=classes.labels[place], part=classes.parts[place] if classes.parts else "")
        yield row


def check_name(path: Path) -> None:
    """Refuse a file whose name says nothing that features are written as, or that needs what is not installed.

    Raises:
        InvalidValueError: Another ending than .npz, .npy and .parquet.
        UnsupportedError: Parquet without pyarrow.
    """
    check(
        path.suffix.lower() in _WRITERS,
        f"{path} does not end in {', '.join(_WRITERS)}: npz has features, paths and classes, npy the features alone, "
        "and Parquet is written without holding all in memory. Name the file by one of them.",
    )
    if path.suffix.lower() == ".parquet":
        _pyarrow()


def write_features(path: Path, rows: Iterable[FeatureRow], count: int, description: Description) -> Failures:
    """Write a file of features atomically, as its name says; return which images have none, and why.

    npz and npy hold all rows in memory until they are written. In npy there are the features alone, in the order of the
    images; rows without are NaN. Parquet is written as rows come; rows without are null, and of file names that are not
    UTF-8 the other bytes are escaped. What a killed process left of the same file is removed.

    Args:
        path: Ends in .npz, .npy or .parquet.
        rows: As many as `count`.
        count: Of the rows.
        description: Of all rows.

    Raises:
        InvalidValueError: The name ends otherwise.
        FileAccessError: The file cannot be written; known before the first row is asked for, but for a full disk.
    """
    check_name(path)
    write = _WRITERS[path.suffix.lower()]
    failed: Failures = []

    def fitting() -> Iterator[FeatureRow]:
        for row in (_in_dtype(row, description.dtype) for row in rows):
            if row.features is None:
                failed.append((row.path, row.status))
            yield row

    remove_abandoned(path)
    write_atomically(path, lambda temporary: write(temporary, fitting(), count, description))
    return failed


def read_features(path: Path) -> FeatureTable:
    """Read a file that `write_features` wrote as npz or Parquet.

    Raises:
        MissingFileError: There is no such file.
        FileAccessError: It cannot be read.
        InvalidValueError: It is no such file.
    """
    path = full_path(path)
    read = {".npz": _read_npz, ".parquet": _read_parquet}.get(path.suffix.lower())
    if read is None:
        raise InvalidValueError(
            f"{path} is not read here: give a .npz or .parquet that beitzoo embed wrote. A .npy has neither names nor "
            "classes."
        )
    try:
        return read(path)
    except FileNotFoundError as error:
        raise MissingFileError(f"There is no file {path}; beitzoo embed makes one.") from error
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidValueError(
            f"{path} is no file of features, or a damaged one: {error}. Make it with beitzoo embed."
        ) from error
    except OSError as error:
        raise FileAccessError(f"Cannot read {path}: {error.strerror or error}. Check its permissions.") from error


def _in_dtype(row: FeatureRow, dtype: Precision) -> FeatureRow:
    """Return a row in the dtype of the file; one with a number beyond its range has no features."""
    if row.features is None:
        return row
    with np.errstate(over="ignore"):
        features = row.features.astype(dtype)
    if not np.isfinite(features).all():
        return row._replace(features=None, status=f"a number of its features is beyond the range of {dtype}")
    return row._replace(features=features)


def _filled(rows: Iterable[FeatureRow], count: int, description: Description) -> tuple[Array, list[FeatureRow]]:
    """Return the features of all rows, and the rows without them."""
    features = np.full((count, *description.shape), np.nan, dtype=description.dtype)
    bare = []
    for place, row in enumerate(rows):
        if row.features is not None:
            features[place] = row.features
        bare.append(row._replace(features=None))
    assert len(bare) == count, (len(bare), count)
    return features, bare


def _write_npy(path: Path, rows: Iterable[FeatureRow], count: int, description: Description) -> None:
    features, _ = _filled(rows, count, description)
    with path.open("wb") as file:
        np.save(file, features, allow_pickle=False)


def _write_npz(path: Path, rows: Iterable[FeatureRow], count: int, description: Description) -> None:
    features, bare = _filled(rows, count, description)
    arrays: dict[str, Any] = {
        "features": features,
        "paths": np.array([row.path for row in bare], dtype=np.str_),
        "status": np.array([row.status for row in bare], dtype=np.str_),
        "model": np.array(description.model),
        "pooling": np.array(description.pooling),
    }
    if description.blocks is not None:
        arrays["blocks"] = np.array(description.blocks, dtype=np.int64)
    if description.img_size is not None:
        arrays["img_size"] = np.array(description.img_size, dtype=np.int64)
    if description.names:
        arrays["labels"] = np.array([row.label for row in bare], dtype=np.int64)
        arrays["class_names"] = np.array(description.names, dtype=np.str_)
    if any(row.part for row in bare):
        arrays["parts"] = np.array([row.part for row in bare], dtype=np.str_)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _read_npz(path: Path) -> FeatureTable:
    # Opened here: NumPy leaves a file open that is no archive.
    with path.open("rb") as opened:
        if not zipfile.is_zipfile(opened):
            raise ValueError("it is no npz archive")
        with np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    features, count = arrays["features"], len(arrays["features"])
    description = Description(
        model=str(arrays["model"]),
        pooling=str(arrays["pooling"]),  # type: ignore[arg-type] # checked by whoever uses it
        blocks=tuple(arrays["blocks"].tolist()) if "blocks" in arrays else None,
        shape=features.shape[1:],
        names=tuple(arrays["class_names"].tolist()) if "class_names" in arrays else (),
        img_size=tuple(arrays["img_size"].tolist()) if "img_size" in arrays else None,
        dtype=features.dtype.name,
    )
    return FeatureTable(
        description,
        features,
        arrays["paths"].tolist(),
        arrays["status"].tolist(),
        arrays.get("labels", np.full(count, -1)),
        arrays["parts"].tolist() if "parts" in arrays else [""] * count,
    )


def _write_parquet(path: Path, rows: Iterable[FeatureRow], count: int, description: Description) -> None:
    pa, pq = _pyarrow()
    size = int(np.prod(description.shape))
    features = pa.list_(pa.from_numpy_dtype(np.dtype(description.dtype)), size)
    columns = [("path", pa.string()), ("status", pa.string()), ("features", features)]
    columns += [("label", pa.int64()), ("part", pa.string())]
    schema = pa.schema(columns, metadata={_KEY: json.dumps(asdict(description)).encode()})
    at_a_time = max(_GROUP_BYTES // (size * np.dtype(description.dtype).itemsize), 1)
    rest = iter(rows)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(rest, at_a_time)):
            # Nulls have a place among the values, which nobody reads.
            values = [np.zeros(size, description.dtype) if row.features is None else row.features for row in group]
            flat = pa.array(np.concatenate([one.reshape(-1) for one in values]))
            missing = pa.array([row.features is None for row in group])
            arrays = [
                pa.array([_as_utf8(row.path) for row in group], pa.string()),
                pa.array([row.status for row in group], pa.string()),
                pa.FixedSizeListArray.from_arrays(flat, type=features, mask=missing),
                pa.array([None if row.label < 0 else row.label for row in group], pa.int64()),
                pa.array([row.part or None for row in group], pa.string()),
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _read_parquet(path: Path) -> FeatureTable:
    _, pq = _pyarrow()
    with pq.ParquetFile(path) as file:
        known = json.loads((file.schema_arrow.metadata or {})[_KEY])
        lists = {name: tuple(known[name]) for name in ("shape", "names", "blocks", "img_size") if known[name]}
        description = Description(**{**known, "names": (), "shape": (), **lists})
        features = np.full((file.metadata.num_rows, *description.shape), np.nan, dtype=description.dtype)
        columns: dict[str, list[Any]] = {name: [] for name in ("path", "status", "label", "part")}
        start = 0
        for batch in file.iter_batches():
            for name, values in columns.items():
                values += batch.column(name).to_pylist()
            column, part = batch.column("features"), features[start : start + batch.num_rows]
            # Flattened, nulls are left out.
            there = column.is_valid().to_numpy(zero_copy_only=False)
            part[there] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, *description.shape)
            start += batch.num_rows
    labels = np.array([-1 if label is None else label for label in columns["label"]], dtype=np.int64)
    parts = [part or "" for part in columns["part"]]
    return FeatureTable(description, features, columns["path"], columns["status"], labels, parts)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "Parquet needs pyarrow; install it with: pip install 'beitzoo[embed]', or write .npz."
        ) from error
    return pyarrow, pyarrow.parquet


def _as_utf8(path: str) -> str:
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


_Writer = Callable[[Path, Iterable[FeatureRow], int, Description], None]
_WRITERS: dict[str, _Writer] = {".npz": _write_npz, ".npy": _write_npy, ".parquet": _write_parquet}
