"""Features of images: what the head reads, in the order of the images, of every kind of model and file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm.data
import torch
from PIL import Image

import beitzoo
from beitzoo.errors import FileAccessError, InvalidOptionError, InvalidValueError, MissingFileError
from beitzoo.images.folder_classes import ImageClasses, classes_by_folder
from beitzoo.inference.embed import Array, Reading, backbone_of, embed_each
from beitzoo.inference.feature_files import Description, feature_rows, read_features, write_features


def photos(root: Path, count: int = 3) -> list[Path]:
    paths = [root / f"{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        Image.effect_noise((60, 44 + index), 30 + 20 * index).convert("RGB").save(path)
    return paths


def random_model(**options: Any) -> beitzoo.Beit:
    """A network in which every parameter matters."""
    model = beitzoo.create_model("test_beit", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def as_timm_sees(model: beitzoo.Beit, paths: list[Path]) -> torch.Tensor:
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


@pytest.mark.parametrize("options", [{}, {"num_classes": 0}, {"global_pool": "token"}, {"use_fc_norm": False}])
def test_features_are_what_the_head_reads_of_images_as_timm_prepares_them(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model, paths = random_model(**options), photos(tmp_path)
    features = beitzoo.embed(model, paths, batch_size=2)
    assert model.training
    model.eval()
    with torch.no_grad():
        tokens = model.forward_features(as_timm_sees(model, paths))
        expected = model.forward_head(tokens, pre_logits=True).numpy()
    assert (features.shape, features.dtype) == ((3, model.num_features), np.float32)
    assert np.abs(features - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(expected[0] - expected[1]).max() > 1e-2
    assert np.abs(beitzoo.embed(beitzoo.optimize(model), paths) - expected).max() < 1e-5 * np.abs(expected).max()


def test_other_poolings_are_of_the_same_tokens(tmp_path: Path) -> None:
    """Of the network's output, and of blocks run one after the other."""
    model, paths = random_model(use_fc_norm=False).eval(), photos(tmp_path, 2)
    images = as_timm_sees(model, paths)
    with torch.no_grad():
        x, bias = model.embed(images)
        blocks = []
        for block in model.blocks:
            x = block(x, bias)
            blocks.append(x)
        outputs = {None: [model.forward_features(images)], (0, -1): [blocks[0], blocks[-1]], (-1,): [blocks[-1]]}
    for chosen, found in outputs.items():
        tokens = torch.stack(found, 1).numpy()
        token, patches = tokens[:, :, 0], tokens[:, :, 1:]
        mean = patches.mean(2)
        expected = {"mean": mean, "class": token, "both": np.concatenate([token, mean], -1), "patches": patches}
        if chosen is not None:
            expected["pooled"] = mean
        for pooling, values in expected.items():
            values = values[:, 0] if chosen is None else values
            features = beitzoo.embed(model, paths, pooling=pooling, blocks=chosen)  # type: ignore[arg-type]
            assert features.shape == values.shape == (2, *Reading(pooling, chosen).shape(model))  # type: ignore[arg-type]
            np.testing.assert_allclose(features, values, atol=1e-4 * np.abs(values).max())


def test_masked_image_and_segmentation_models_are_embedded_with_by_their_backbone(tmp_path: Path) -> None:
    paths = photos(tmp_path, 2)
    mim = beitzoo.create_model("test_beit", head="mim")
    expected = mim.backbone.eval().forward_head(mim.backbone.forward_features(as_timm_sees(mim.backbone, paths)), True)
    np.testing.assert_allclose(beitzoo.embed(mim, paths), expected.detach().numpy(), atol=1e-5)
    pixels = beitzoo.create_model("test_beit", head="segment", num_classes=3).eval()
    tokens = pixels.backbone.forward_features(as_timm_sees(pixels.backbone, paths))
    np.testing.assert_allclose(beitzoo.embed(pixels, paths), tokens[:, 1:].mean(1).detach().numpy(), atol=1e-5)
    assert Reading().describe(pixels.backbone) == "mean of the patch tokens, without a norm"
    assert Reading().describe(mim.backbone) == "mean of the patch tokens, with the trained norm"
    with pytest.raises(InvalidOptionError, match="Got a Linear; features are those of a Beit"):
        backbone_of(torch.nn.Linear(2, 2))


def test_an_image_that_cannot_be_read_is_a_row_of_nan_and_a_warning(tmp_path: Path) -> None:
    model, paths = random_model(), photos(tmp_path)
    paths[1].write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 of 3 rows are NaN: .*1\.png: the file is empty"):
        features = beitzoo.embed(model, paths)
    assert np.isnan(features).all(1).tolist() == [False, True, False]
    alone = beitzoo.embed(model, np.asarray(Image.open(paths[2])))
    np.testing.assert_allclose(alone, features[2:], atol=1e-5)
    assert beitzoo.embed(model, []).shape == (0, model.num_features)
    with pytest.raises(InvalidValueError, match="pooling='max'; it can be pooled, mean, class, both, patches"):
        beitzoo.embed(model, paths, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match=r"indices=\[9\]; there are"):
        beitzoo.embed(model, paths, blocks=[9])


@pytest.fixture
def outcomes() -> list[tuple[Array | None, str | None]]:
    features = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    return [(features[0], None), (None, "the file is empty"), (features[1], None), (features[2], None)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_files_give_back_what_was_written(
    suffix: str, dtype: Any, outcomes: list[tuple[Array | None, str | None]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("beitzoo.inference.feature_files._GROUP_BYTES", 100)  # several groups of rows
    paths, path = ["a/1.png", "a/é\udcff.png", "b/3.png", "b/4.png"], tmp_path / f"f{suffix}"
    classes = ImageClasses([0, 0, 1, 1], ("a", "b"), ["train", "train", "test", "test"])
    description = Description("m", "mean", (2, 5), (2, 5), ("a", "b"), (32, 32), dtype)
    failures = write_features(path, feature_rows(outcomes, paths, classes), 4, description)
    assert failures == [(paths[1], "the file is empty")]
    table = read_features(path)
    assert table.description == description
    assert table.status == ["ok", "the file is empty", "ok", "ok"]
    assert (table.labels.tolist(), table.parts) == (classes.labels, classes.parts)
    assert table.paths == [paths[0], "a/é\\xff.png" if suffix == ".parquet" else paths[1], *paths[2:]]
    assert np.isnan(table.features[1]).all()
    for place, (features, _) in enumerate(outcomes):
        if features is not None:
            assert (table.features[place] == features.astype(dtype)).all()
    write_features(path, feature_rows(outcomes, paths, None), 4, Description("m", "mean", None, (2, 5)))
    again = read_features(path)
    assert (again.description.names, again.description.blocks, again.labels.tolist()) == ((), None, [-1] * 4)
    assert again.parts == [""] * 4


def test_an_npy_has_the_features_alone_and_a_parquet_can_be_read_by_anyone(
    outcomes: list[tuple[Array | None, str | None]], tmp_path: Path
) -> None:
    description = Description("m", "mean", None, (2, 5))
    for suffix in (".npy", ".parquet"):
        write_features(tmp_path / f"f{suffix}", feature_rows(outcomes, list("abcd"), None), 4, description)
    features = np.load(tmp_path / "f.npy")
    assert features.shape == (4, 2, 5)
    assert np.isnan(features[1]).all()
    table = pq.read_table(tmp_path / "f.parquet")
    rows = table.to_pylist()
    assert [row["path"] for row in rows] == list("abcd")
    assert rows[1]["features"] is None
    assert rows[1]["status"] == "the file is empty"
    assert np.array_equal(np.float32(rows[3]["features"]), features[3].reshape(-1))
    assert json.loads(table.schema.metadata[b"beitzoo"])["model"] == "m"
    assert str(table.schema.field("features").type) == "fixed_size_list<element: float>[10]"


def test_what_float16_cannot_hold_is_a_failure(tmp_path: Path) -> None:
    rows = feature_rows([(np.float32([1, 7e4]), None), (np.float32([1, 6e4]), None)], "ab", None)
    failures = write_features(tmp_path / "f.npy", rows, 2, Description("m", "mean", None, (2,), dtype="float16"))
    assert failures == [("a", "a number of its features is beyond the range of float16")]
    assert np.isnan(np.load(tmp_path / "f.npy")).tolist() == [[True, True], [False, False]]


def test_what_cannot_be_written_or_read_is_said(tmp_path: Path) -> None:
    description = Description("m", "mean", None, (2,))
    with pytest.raises(InvalidValueError, match=r"does not end in .npz, .npy, .parquet"):
        write_features(tmp_path / "f.csv", [], 0, description)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(FileAccessError, match="it is a folder"):
        write_features(tmp_path / "folder.npz", (1 / 0 for _ in range(1)), 1, description)  # type: ignore[misc]
    with pytest.raises(MissingFileError, match="There is no file"):
        read_features(tmp_path / "absent.npz")
    np.save(tmp_path / "f.npy", np.zeros((2, 2)))
    with pytest.raises(InvalidValueError, match="neither names nor classes"):
        read_features(tmp_path / "f.npy")
    for suffix in (".npz", ".parquet"):
        (tmp_path / f"bad{suffix}").write_bytes(b"PK\3\4 no archive")
        with pytest.raises(InvalidValueError, match="no file of features, or a damaged one"):
            read_features(tmp_path / f"bad{suffix}")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(InvalidValueError, match="no file of features"):
        read_features(tmp_path / "other.npz")


def test_classes_are_those_of_the_folders_below_each_place() -> None:
    def classes(*listed: tuple[str, str]) -> ImageClasses | None:
        return classes_by_folder([(place, Path(path)) for place, path in listed])

    assert classes(("p", "p/cat/1.png"), ("p", "p/dog/deep/2.png"), ("q", "q/cat/3.png")) == ImageClasses(
        [0, 1, 0], ("cat", "dog"), None
    )
    parts = ImageClasses([1, 0, 1], ("cat", "dog"), ["train", "test", "validation"])
    assert classes(("p", "p/train/dog/1.png"), ("p", "p/test/cat/2.png"), ("p", "p/val/dog/3.png")) == parts
    assert (
        classes(("p/train", "p/train/dog/1.png"), ("p/test", "p/test/cat/2.png"), ("p/val", "p/val/dog/3.png")) == parts
    )
    assert classes(("p", "p/cat/1.png"), ("p", "p/2.png")) is None
    assert classes(("p", "p/cat/1.png"), ("p", "p/cat/2.png")) is None
    assert classes(("p", "p/train/1.png"), ("p", "p/val/2.png")) is None
    assert classes(("p/cat/1.png", "p/cat/1.png"), ("p/dog/2.png", "p/dog/2.png")) is None
    assert classes() is None


def test_embedding_goes_on_image_by_image(tmp_path: Path) -> None:
    model, paths = random_model(), photos(tmp_path)
    rows = embed_each(model, [*paths, tmp_path / "absent.png"], Reading("class"))
    assert [(row.path, row.error, row.features is None) for row in rows] == [
        *((path, None, False) for path in paths),
        (tmp_path / "absent.png", "there is no such file", True),
    ]
