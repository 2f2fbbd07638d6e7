"""embed: the files that it writes, what it says, and how it fails."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import SAMPLES, run

import beitzoo
from beitzoo.files import write_atomically
from beitzoo.inference.feature_files import read_features

MODEL = "beit_nano_patch4_32.digits"
DIGITS = sorted(SAMPLES.glob("digit_*.png"))


def test_embed_writes_a_row_for_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the optimized copy and by the model, as the Python function gives them."""
    monkeypatch.setattr("beitzoo.inference.fastest.HANDFUL", 9)
    expected = beitzoo.embed(beitzoo.create_model(pretrained=True), DIGITS)
    for options in ([], ["--no-optimize"]):
        result = run("embed", str(SAMPLES / "digit_*.png"), "-m", MODEL, "--out", str(tmp_path / "f.npz"), *options)
        assert (result.exit_code, result.stdout) == (0, "")
        assert ("The optimized copy computes" in result.stderr) == (not options)
        assert "10 rows, mean of the patch tokens, with the trained norm: 96 float32; no classes." in result.stderr
        table = read_features(tmp_path / "f.npz")
        assert table.paths == [str(path) for path in DIGITS]
        np.testing.assert_allclose(table.features, expected, atol=1e-4)
        assert (table.description.model, table.description.img_size) == (MODEL, (32, 32))
    few = run("embed", str(DIGITS[3]), "--out", str(tmp_path / "g.npy"), "--dtype", "float16")
    assert f"No --model was named, so {MODEL} makes the features" in few.stderr
    assert "optimized" not in few.stderr
    features = np.load(tmp_path / "g.npy")
    assert features.dtype == np.float16
    np.testing.assert_allclose(features, expected[3:4], atol=5e-3)


def test_classes_and_parts_are_those_of_the_folders(tmp_path: Path) -> None:
    for part, digits in (("train", DIGITS[:6]), ("test", DIGITS[6:])):
        for path in digits:
            target = tmp_path / "data" / part / ("odd" if int(path.stem[-1]) % 2 else "even") / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (tmp_path / "data" / "train" / "odd" / "notes.txt").write_text("no image")
    out = tmp_path / "f.parquet"
    result = run(
        "embed", str(tmp_path / "data"), "-m", MODEL, "--out", str(out), "--blocks", "all", "--pooling", "both"
    )
    assert result.exit_code == 0, result.stderr
    assert "Left out 1, not called like images: train/odd/notes.txt" in result.stderr
    assert "side by side of blocks 0, 1, 2, 3, before any norm: 4 x 192 float32; 2 classes." in result.stderr
    table = read_features(out)
    assert table.parts == ["test"] * 4 + ["train"] * 6
    assert [table.description.names[label] for label in table.labels] == [
        "odd" if int(Path(path).stem[-1]) % 2 else "even" for path in table.paths
    ]


def test_an_unreadable_image_is_a_row_and_exit_code_one(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"")
    result = run("embed", str(tmp_path / "broken.png"), str(DIGITS[0]), "-m", MODEL, "--out", str(tmp_path / "f.npz"))
    assert result.exit_code == 1
    assert "broken.png: the file is empty" in result.stderr
    table = read_features(tmp_path / "f.npz")
    assert table.status == ["the file is empty", "ok"]
    assert np.isnan(table.features).all(1).tolist() == [True, False]


@pytest.mark.parametrize("model", [[], ["-m", "beit_nano_patch4_32"]])
def test_a_file_of_features_names_the_weights_that_were_given(model: list[str], tmp_path: Path) -> None:
    beitzoo.save_pretrained(beitzoo.create_model("beit_nano_patch4_32"), tmp_path)
    weights = tmp_path / "model.safetensors"
    result = run("embed", str(DIGITS[0]), *model, "--checkpoint", str(weights), "--out", str(tmp_path / "f.npz"))
    assert result.exit_code == 0, result.stderr
    table = read_features(tmp_path / "f.npz")
    assert table.description.model == str(weights)
    expected = beitzoo.embed(beitzoo.create_model(str(tmp_path), pretrained=True), DIGITS[:1])
    np.testing.assert_allclose(table.features, expected, atol=1e-5)


@pytest.mark.parametrize("ending", ["npz", "npy", "parquet"])
def test_an_interrupted_run_leaves_what_was_there(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that were written before stay as they are, and nothing half written is beside them."""
    out = tmp_path / f"f.{ending}"
    out.write_bytes(b"of before")

    def interrupted(embeddings: Iterable[Any], *_: object) -> Iterator[Any]:
        yield next(iter(embeddings))
        raise KeyboardInterrupt

    monkeypatch.setattr("beitzoo.progress.watch", interrupted)
    result = run("embed", *map(str, DIGITS), "-m", MODEL, "--out", str(out))
    assert result.exit_code != 0
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(out.name, b"of before")]


def test_what_a_killed_run_left_of_the_same_file_is_removed(tmp_path: Path) -> None:
    """A file that a living process writes stays, and so does what was left of another."""

    left = {}
    for name in ("f.npz", "g.npz"):

        def copy(partial: Path, name: str = name) -> None:
            left[name] = partial

        write_atomically(tmp_path / name, copy)
        left[name].write_bytes(b"half")
    kept: list[bool] = []

    def embed_too(partial: Path) -> None:
        assert run("embed", str(DIGITS[0]), "-m", MODEL, "--out", str(tmp_path / "f.npz")).exit_code == 0
        kept.append(partial.exists())

    write_atomically(tmp_path / "f.npz", embed_too)
    assert kept == [True]
    assert not left["f.npz"].exists()
    assert left["g.npz"].read_bytes() == b"half"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "f.csv"], "f.csv does not end in .npz, .npy, .parquet"),
        (["--out", "f.npz", "--blocks", "9"], "there are 4 blocks, 0 to 3 or -4 to -1"),
        (["--out", "f.npz", "--blocks", "some"], "--blocks 'some' are no numbers"),
        (["--out", "f.npz", "-m", "beit_bas"], "beit_bas"),
    ],
)
def test_what_cannot_be_embedded_is_one_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = str(DIGITS[0].resolve())
    monkeypatch.chdir(tmp_path)
    result = run("embed", sample, *arguments)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert list(tmp_path.iterdir()) == []
