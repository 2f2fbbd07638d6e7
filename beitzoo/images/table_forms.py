"""The form of tables of images: which columns hold image files and classes, and what is in them."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beitzoo.errors import InvalidValueError, check
from beitzoo.images.classes import fault_among

# Columns that are looked for before those that the hub's notes in a file call images and classes.
_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "fine_label", "labels")

# Classes by row: numbers, -1 for none; or words, None for none; or any number of either, None where nobody says.
Labels = np.ndarray[Any, np.dtype[Any]] | list[str | None] | list[tuple[int | str, ...] | None]


@dataclass(frozen=True)
class Form:
    """What the schema of a Parquet file says.

    Attributes:
        image: Column of the images.
        in_struct: Whether that holds their bytes in a field `bytes`.
        label: Column of the classes, one of each image or a list of several, if there is one.
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
    classes = {name: found for name, feature in features.items() if (found := _class_label(feature))}
    only = [name for name in classes if name in schema.names]
    label = next((name for name in (*_LABEL_NAMES, *only[: len(only) == 1]) if name in schema.names), None)
    names = classes[label].get("names") if label in classes else None
    named = tuple(map(str, names)) if isinstance(names, list) else None
    return Form(image, pa.types.is_struct(schema.field(image).type), label, named)


def _class_label(feature: Any) -> dict[str, Any] | None:
    """Return the note about classes in a note about a column, of one class or of a list; None if there is none."""
    if isinstance(feature, list) and len(feature) == 1:  # so lists were noted before datasets 4
        feature = feature[0]
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    is_note = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    return feature if is_note else None


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
    if _is_list(column.type):
        return _label_lists(path, name, column)
    raise InvalidValueError(
        f"The column {name} of {path} holds {column.type}, not one class per image. Expected whole numbers or "
        "words, or lists of these; rename it to use the images without classes."
    )


def _is_list(kind: Any) -> bool:
    """Tell whether a column holds lists of whole numbers or of words."""
    import pyarrow as pa

    if not any(is_list(kind) for is_list in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        return False
    value = kind.value_type
    value = value.value_type if pa.types.is_dictionary(value) else value
    kinds = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(is_kind(value) for is_kind in (*kinds, pa.types.is_null))


def _label_lists(path: Path, name: str, column: Any) -> list[tuple[int | str, ...] | None]:
    """Read a column of lists of labels."""
    lists = [None if own is None else tuple(own) for own in column.to_pylist()]
    for row, own in enumerate(lists):
        fault = fault_among(own or ())
        check(
            fault is None,
            f"{path}, row {row}: among the labels in the column {name} is {fault}. Correct it; an image without labels "
            "has an empty list.",
        )
    return lists


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
