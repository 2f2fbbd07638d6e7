"""Hundreds of odd and hostile files at once: a row for each, none with its neighbour's answer, all within bounds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import BAD, GOOD, encode, picture, write_corpus
from PIL import Image
from typer.testing import CliRunner

import beitzoo
from beitzoo.cli import app
from beitzoo.predict import predict

# Prepares each image given on stdin and prints its processor seconds and by how many bytes the peak of memory grew.
MEASURE = """
import json, resource, sys, warnings
from pathlib import Path
from beitzoo.images.files import ImageError, open_image
from beitzoo.images.transforms import create_transform

warnings.simplefilter("ignore")
transform = create_transform(
    input_size=(3, 224, 224), crop_pct=0.9, crop_mode="center", interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
)
usage = lambda: resource.getrusage(resource.RUSAGE_SELF)
costs = []
for path in ["beitzoo/assets/samples/coffee.jpg", *json.load(sys.stdin)]:
    before = usage()
    try:
        transform(open_image(Path(path)))
    except ImageError:
        pass
    after = usage()
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    costs.append((seconds, 1024 * (after.ru_maxrss - before.ru_maxrss)))
json.dump(costs[1:], sys.stdout)
"""


def costs(paths: list[Path]) -> list[tuple[float, int]]:
    names = json.dumps([str(path) for path in paths])
    child = subprocess.run([sys.executable, "-c", MEASURE], input=names, capture_output=True, text=True, check=True)
    return json.loads(child.stdout)


# What Pillow says about damaged files is the command's to silence; here errors would take the place of answers.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning:PIL")


def test_every_file_gets_its_own_row_or_its_own_failure(tmp_path: Path) -> None:
    outcomes = write_corpus(tmp_path)
    assert len(outcomes) > 280
    result = CliRunner().invoke(app, ["predict", *map(str, outcomes), "--json", "--topk", "10"])
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

    readable = [row for row in rows if row["error"] is None]
    model = beitzoo.create_model(pretrained=True)
    alone = predict(model, [Path(row["path"]) for row in readable], topk=10, batch_size=1)
    for row, own in zip(readable, alone, strict=True):
        together = {answer["index"]: answer["probability"] for answer in row["answers"]}
        assert together == pytest.approx({answer.index: answer.probability for answer in own.answers}, rel=1e-4)


def test_no_file_takes_long_or_much(tmp_path: Path) -> None:
    paths = list(write_corpus(tmp_path))
    for path, (seconds, growth) in zip(paths, costs(paths), strict=True):
        assert seconds < 2, path
        assert growth < 512_000_000, path


@pytest.mark.slow
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
        if mode == "I;16":
            image = Image.new(mode, (side, side), 30_000)
        else:
            image = picture(400, 300, mode).resize((side, side))
        (tmp_path / name).write_bytes(encode(image, form, **options))
    paths = sorted(tmp_path.iterdir())
    for path, (seconds, growth) in zip(paths, costs(paths), strict=True):
        print(f"{path.name}: {seconds:.2f} s, {growth / 1e6:.0f} MB")
        assert seconds < 4, path  # 2 on an idle machine
        assert growth < 512_000_000, path
