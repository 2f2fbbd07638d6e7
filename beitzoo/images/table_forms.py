"""The form of tables of images: which columns hold image files and classes, and what is in them."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beitzoo.errors import InvalidValueError

# Columns that are looked for before those that the hub's notes in a file call images and classes.
_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "fine_label")

# Classes by row: numbers, -1 for none; or words, None for none.
Labels = np.ndarray[Any, np.dtype[Any]] | list[str | None]


@dataclass(frozen=True)
class Form:
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


def form_of(path: Path, schema: Any, masks: Collection[str] = ()) -> Form:
    """Read the form of a table off its schema; columns of masks are not those of its images.

    Raises:
        InvalidValueError: No column holds images.
    """
    import pyarrow as pa

    features = _hub_features(schema.metadata or {})
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    called_images = (name for name, kind in kinds.items() if kind == "Image")
    image = next(
        (name for name in (*_IMAGE_NAMES, *called_images) if holds_bytes(schema, name) and name not in masks), None
    )
    if image is None:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise InvalidValueError(
            f"{path} has no column of images, but {columns or 'no column at all'}. Expected a column 'image' of bytes, "
            "or of {bytes, path} as on the hub; rename it, or give other tables."
        )
    classes = [name for name, kind in kinds.items() if kind == "ClassLabel" and name in schema.names]
    only = classes if len(classes) == 1 else []
    label = next((name for name in (*_LABEL_NAMES, *only) if name in schema.names), None)
    names = features[label].get("names") if label in classes else None
    named = tuple(map(str, names)) if isinstance(names, list) else None
    return Form(image, pa.types.is_struct(schema.field(image).type), label, named)


def image_bytes(column: Any, form: Form) -> Any:
    """Return the image files of an array, as an array of bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return (pc.struct_field(column, "bytes") if form.in_struct else column).cast(pa.large_binary())


def labels_in(path: Path, name: str, column: Any) -> Labels:
    """Read the classes of a column.

    Raises:
        InvalidValueError: It holds something else; the message names the table and the column.
    """
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if any(is_text(column.type) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        return column.to_pylist()
    if pa.types.is_integer(column.type) or pa.types.is_null(column.type):
        return column.cast(pa.int64(), safe=False).fill_null(-1).to_numpy()  # from 2^63 on it is negative: no class
    raise InvalidValueError(
        f"The column {name} of {path} holds {column.type}, not one class per image. Expected whole numbers or "
        "words; rename it to use the images without classes."
    )


def _hub_features(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """Return what the hub's library notes about columns; nothing if there are no notes, or odd ones."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def holds_bytes(schema: Any, name: str) -> bool:
    """Tell whether a column holds bytes, alone or in a field `bytes`."""
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
