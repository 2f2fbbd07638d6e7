"""Hundreds of odd and hostile files at once: a row for each, none with its neighbour's answer, all within bounds."""

import contextlib
import ctypes
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from corpus import BAD, GOOD, encode, picture, write_corpus
from PIL import Image
from typer.testing import CliRunner

import beitzoo
from beitzoo.cli import app
from beitzoo.images.files import ImageError, open_image
from beitzoo.images.transforms import create_transform
from beitzoo.inference.classify import predict


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def costs(paths: list[Path]) -> list[tuple[float, int]]:
    """Measure in a fresh process: in one that ran other tests, their freed memory is used again and nothing grows."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_costs, (paths,))


def _costs(paths: list[Path]) -> list[tuple[float, int]]:
    """Prepare each image; return how many times the processor time of a photograph it takes, and the bytes at its peak.

    The photograph is taken again where an image takes long, as all slows down where a machine does.
    """
    transform = create_transform(
        input_size=(3, 224, 224), crop_pct=0.9, crop_mode="center", interpolation="bicubic", mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )  # fmt: skip

    def seconds(path: Path) -> float:
        start = time.process_time()
        with contextlib.suppress(ImageError):
            transform(open_image(path))
        return time.process_time() - start

    release = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
    photograph = Path("beitzoo/assets/samples/coffee.jpg")
    seconds(photograph)
    unit = seconds(photograph)
    measured = []
    for path in paths:
        release(0)  # what earlier files freed
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = memory("VmRSS")
        taken, growth = seconds(path), memory("VmHWM") - before
        if taken > 2 * unit:
            unit = max(unit, seconds(photograph))
        measured.append((taken / unit, growth))
    return measured


# What Pillow says about damaged files is the command's to silence; here errors would take the place of answers.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning:PIL")

measured_by_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is reset through /proc only"
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take ten times as long over hundreds of batches of one small image."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_every_file_gets_its_own_row_or_its_own_failure(outcomes: dict[Path, str]) -> None:
    assert len(outcomes) > 280
    result = CliRunner().invoke(app, ["predict", *map(str, outcomes), "--format", "json", "--topk", "10"])
    rows = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [row["path"] for row in rows] == [str(path) for path in outcomes]
    failed = [row for row in rows if row["error"] is not None]
    assert f"{len(failed)} of {len(rows)} images have no answer" in result.stderr
    assert all(bool(row["answers"]) == (row["error"] is None) for row in rows)
    for row in rows:
        outcome = outcomes[Path(row["path"])]
        assert outcome != GOOD or row["error"] is None, row
        assert outcome != BAD or row["error"], row

    readable = [row for row in rows if row["error"] is None][::3]
    model = beitzoo.create_model(pretrained=True)
    alone = predict(model, [Path(row["path"]) for row in readable], topk=10, batch_size=1)
    for row, own in zip(readable, alone, strict=True):
        together = {answer["index"]: answer["probability"] for answer in row["answers"]}
        assert together == pytest.approx({answer.index: answer.probability for answer in own.answers}, rel=1e-4)


@measured_by_linux
@pytest.mark.usefixtures("one_thread")
def test_no_file_takes_long_or_much(outcomes: dict[Path, str]) -> None:
    paths = list(outcomes)
    measured = costs(paths)
    for path, (photographs, growth) in zip(paths, measured, strict=True):
        assert photographs < 200, path  # 44 measured at most, of an image as long as a street
        assert growth < 512_000_000, path
    # The measurement sees what is there: 4 bytes for each of 17 million pixels.
    street = next(growth for path, (_, growth) in zip(paths, measured, strict=True) if "1x60000.png" in path.name)
    assert street > 60_000_000


@measured_by_linux
@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_largest_images_that_are_opened_take_no_more(tmp_path: Path) -> None:
    """One file of each costly kind, of nearly as many pixels as are decoded at most."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, form, mode, side, options in (
        ("a.png", "PNG", "RGBA", 7900, {"compress_level": 1}),
        ("b.jpg", "JPEG", "CMYK", 7900, {}),
        ("c.jpg", "JPEG", "RGB", 7900, {"exif": exif}),
        ("d.jpg", "JPEG", "RGB", 5590, {"progressive": True, "subsampling": 0}),
        ("e.webp", "WEBP", "RGBA", 5590, {"method": 0}),
        ("f.tiff", "TIFF", "I;16", 5590, {}),
        ("g.tiff", "TIFF", "RGB", 7900, {"compression": "tiff_lzw"}),
    ):
        image = Image.new(mode, (side, side), 30000) if mode == "I;16" else picture(400, 300, mode).resize((side, side))
        (tmp_path / name).write_bytes(encode(image, form, **options))
    paths = sorted(tmp_path.iterdir())
    for path, (photographs, growth) in zip(paths, costs(paths), strict=True):
        print(f"{path.name}: {photographs:.0f} photographs, {growth / 1e6:.0f} MB")
        assert photographs < 1200, path  # the RGBA picture measured 615
        assert growth < 512_000_000, path
