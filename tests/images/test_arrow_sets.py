"""Folders of `save_to_disk`: written here as datasets 5.2 does, without that library."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_tables import STRUCT, png, shades

from beitzoo.errors import InvalidValueError, MissingFileError
from beitzoo.images.arrow_sets import saved_images
from beitzoo.images.datasets import find_images, guess_source

NAMES = ["ant", "bee", "cat"]


def save(folder: Path, shards: Sequence[Sequence[tuple[int | None, int]]], **state: Any) -> Path:
    """Write shards of images, by their shade, and fine labels, in Arrow's stream format, two rows a batch."""
    features = {
        "img": {"_type": "Image"},
        "fine_label": {"names": NAMES, "_type": "ClassLabel"},
        "coarse_label": {"names": ["x", "y"], "_type": "ClassLabel"},
    }
    notes = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema({"img": STRUCT, "fine_label": pa.int64(), "coarse_label": pa.int64()}, notes)
    folder.mkdir(parents=True)
    files = [f"data-{number:05}-of-{len(shards):05}.arrow" for number in range(len(shards))]
    for file, rows in zip(files, shards, strict=True):
        images = [{"bytes": None if shade is None else png(shade), "path": "x.png"} for shade, _ in rows]
        columns = {"img": images, "fine_label": [label for _, label in rows], "coarse_label": [0] * len(rows)}
        with pa.OSFile(str(folder / file), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            stream.write_table(pa.table(columns, schema), max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in files], **state}))
    return folder


def test_a_saved_data_set(tmp_path: Path) -> None:
    path = save(tmp_path / "set", [[(10, 2), (20, 0), (None, 1)], [(30, 1)], []])
    assert guess_source(path) == "arrow"
    images = pickle.loads(pickle.dumps(find_images("arrow", path)))
    assert (images.names, images.labels, images.parts) == (tuple(NAMES), [2, 0, 1, 1], {})
    assert shades(images, [0, 1, 3]) == [10, 20, 30]
    assert images.identity(3) == ("data-00001-of-00003.arrow:0", str(len(png(30))))
    assert images.identity(2)[1] == ""


def test_a_saved_data_set_of_several_labels(tmp_path: Path) -> None:
    features = {
        "img": {"_type": "Image"},
        "tags": {"_type": "List", "feature": {"names": NAMES, "_type": "ClassLabel"}},
    }
    notes = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema({"img": STRUCT, "tags": pa.list_(pa.int64())}, notes)
    columns = {"img": [{"bytes": png(9), "path": "x.png"}] * 3, "tags": [[2, 1], [], [0]]}
    with pa.OSFile(str(tmp_path / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        stream.write_table(pa.table(columns, schema), max_chunksize=2)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    images = saved_images(tmp_path)
    assert (images.names, images.labels, images.label_sets) == (tuple(NAMES), None, [(1, 2), (), (0,)])


def test_splits_are_parts(tmp_path: Path) -> None:
    save(tmp_path / "test", [[(10, 0)]])
    save(tmp_path / "train", [[(20, 1), (30, 2)]])
    dictionary = tmp_path / "dataset_dict.json"
    dictionary.write_text('{"splits": ["test", "train"]}')
    images = saved_images(tmp_path)
    assert (images.parts, images.labels) == ({"train": range(2), "test": range(2, 3)}, [1, 2, 0])
    assert shades(images) == [20, 30, 10]
    dictionary.write_text('{"splits": ["train", "extra"]}')
    with pytest.raises(InvalidValueError, match=r"has the splits train, extra, .*such as .*train"):
        saved_images(tmp_path)
    dictionary.write_text('{"splits": ["train"]}')
    assert saved_images(tmp_path).parts == {}


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "set", [[(10, 2)]], _indices_files=[{"filename": "indices.arrow"}])
    with pytest.raises(InvalidValueError, match="call flatten_indices"):
        saved_images(path)
    state = path / "state.json"
    for text, reason in (("{", "Expecting"), ("[]", "no attribute"), ('{"_data_files": 1}', "no list '_data_files'")):
        state.write_text(text)
        with pytest.raises(InvalidValueError, match=rf"state.json is not what save_to_disk writes: .*{reason}"):
            saved_images(path)
    state.write_text('{"_data_files": [{"filename": "absent.arrow"}]}')
    with pytest.raises(InvalidValueError, match=r"absent.arrow cannot be read as Arrow"):
        saved_images(path)
    (path / "absent.arrow").write_bytes(b"x" * 100)
    with pytest.raises(InvalidValueError, match=r"absent.arrow cannot be read as Arrow"):
        saved_images(path)
    state.write_text('{"_data_files": []}')
    with pytest.raises(MissingFileError, match="No images in the files"):
        saved_images(path)
