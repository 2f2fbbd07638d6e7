"""A part `test`, in whatever form the images come, is never trained on, chooses nothing, and is measured once."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from colours import COLOURS, colour_recipe
from PIL import Image
from torch import Tensor

from beitzoo.images.loading import Sample
from beitzoo.images.splits import Split
from beitzoo.training.data import LoadedImages
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe
from beitzoo.training.tasks.finetune import finetune, prepare

PARTS = {"train": 6, "val": 3, "test": 3}


def images_of(part: str) -> list[tuple[str, bytes, int]]:
    """Name, file and class of each image of a part."""
    found = []
    for number in range(PARTS[part]):
        file = io.BytesIO()
        Image.new("RGB", (40, 40), COLOURS[number % 3]).save(file, "PNG")
        found.append((f"{part}{number}", file.getvalue(), number % 3))
    return found


def as_folders(root: Path) -> Path:
    for part in PARTS:
        for name, content, label in images_of(part):
            (root / part / COLOURS[label]).mkdir(parents=True, exist_ok=True)
            (root / part / COLOURS[label] / f"{name}.png").write_bytes(content)
    return root


def as_csv(root: Path) -> Path:
    rows = ["path,label,part"]
    for part in PARTS:
        for name, content, label in images_of(part):
            (root / f"{name}.png").write_bytes(content)
            rows.append(f"{name}.png,{COLOURS[label]},{part}")
    (root / "list.csv").write_text("\n".join(rows) + "\n")
    return root / "list.csv"


def as_csv_of_several(root: Path) -> Path:
    path = as_csv(root)
    path.write_text(path.read_text().replace("label", "labels").replace("red", "red;blue"))
    return path


def table_of(part: str) -> pa.Table:
    found = images_of(part)
    images = [{"bytes": content, "path": f"{name}.png"} for name, content, _ in found]
    return pa.table({"image": images, "label": [label for *_, label in found]})


def as_tables(root: Path) -> Path:
    for part in PARTS:
        pq.write_table(table_of(part), root / f"{part}.parquet")
    return root


def as_saved(root: Path) -> Path:
    for part in PARTS:
        (root / part).mkdir()
        table = table_of(part)
        with pa.OSFile(str(root / part / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        (root / part / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(PARTS)}))
    return root


def as_tars(root: Path) -> Path:
    for part in PARTS:
        with tarfile.open(root / f"{part}.tar", "w") as tar:
            for name, content, label in images_of(part):
                for member, data in ((f"{name}.png", content), (f"{name}.cls", str(label).encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return root


def recipe_of(data: Path, source: str, labels: str = "one") -> Recipe:
    document = colour_recipe(data, {"tensorboard": False}, epochs=1, batch_size=3).model_dump()
    document["data"].update(source=source, val_fraction=None)
    document["task"]["labels"] = labels
    return Recipe.model_validate(document)


@pytest.mark.parametrize(
    ("source", "write"),
    [("folder", as_folders), ("csv", as_csv), ("parquet", as_tables), ("arrow", as_saved), ("webdataset", as_tars)],
)
def test_parts_are_what_they_are_called(source: str, write: Callable[[Path], Path], tmp_path: Path) -> None:
    task, _ = prepare(recipe_of(write(tmp_path), source), Processes(0, 1, torch.device("cpu")))
    assert task.split == Split([*range(6)], [*range(6, 9)], [*range(9, 12)])
    parts = [part for part, count in PARTS.items() for _ in range(count)]
    assert all(task.images.identity(index)[0].startswith(part) for index, part in enumerate(parts))


@pytest.mark.parametrize(("labels", "write"), [("one", as_csv), ("many", as_csv_of_several)])
def test_a_test_part_is_used_once_at_the_end(
    labels: str, write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sample] = []
    plain = LoadedImages._load

    def watched(self: LoadedImages, sample: Sample) -> Tensor:
        seen.append(sample)
        return plain(self, sample)

    monkeypatch.setattr(LoadedImages, "_load", watched)
    (tmp_path / "data").mkdir()
    metrics = finetune(recipe_of(write(tmp_path / "data"), "csv", labels), tmp_path / "run")
    train, val, test = range(6), range(6, 9), range(9, 12)
    assert {sample.image for sample in seen if sample.epoch is not None} == set(train)
    measured = [sample.image for sample in seen if sample.epoch is None]
    assert measured == [*val, *test]
    assert seen[-3:] == [Sample(None, image) for image in test]
    assert metrics["test_count"] == 3
