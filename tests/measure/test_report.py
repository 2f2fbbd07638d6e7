"""Tables and pictures show what is in the results, and can be read."""

import csv
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from beitzoo.errors import InvalidValueError, MissingFileError
from beitzoo.evaluation.evaluate import COLUMNS as ACCURACY_COLUMNS
from beitzoo.measure import report
from beitzoo.measure.sweep import BENCHMARK_COLUMNS, COMPARISON_COLUMNS, DATA_COLUMNS, LOADING_COLUMNS
from beitzoo.results import ENVIRONMENT, Row, Table, read_rows
from beitzoo.zoo.accuracy import DATA_SETS, headline, published
from beitzoo.zoo.pretrained import PRETRAINED

RESULTS = Path("results")
TABLES = [f"{name}.csv" for name in DATA_SETS if name != "digits"]
STEMS = ("accuracy-speed", "ratio-inference-float32-beitzoo", "ratio-train-float32-beitzoo")
PICTURES = [f"{stem}.{suffix}" for stem in STEMS for suffix in ("png", "svg")]
STAMP: Row = {name: "x" for name in ENVIRONMENT}
SPEEDS = {
    "beit_base_patch16_224": 4.6,
    "beit_base_patch16_384": 1.4,
    "beit_large_patch16_224": 1.3,
    "beit_large_patch16_384": 0.42,
    "beit_large_patch16_512": 0.19,
    "beitv2_base_patch16_224": 4.5,
    "beitv2_large_patch16_224": 1.31,
}


def add_speed(results: Path, model: str, **values: object) -> None:
    size = model.partition(".")[0][-3:]
    row = {"precision": "float32", "infer_batch_size": 1, "input_size": f"3x{size}x{size}", **STAMP, "model": model}
    Table(results / "benchmark.csv", BENCHMARK_COLUMNS).append(row | values)  # type: ignore[arg-type]


def add_ratio(results: Path, **values: object) -> None:
    row = {"subject": "beitzoo", "subject_precision": "float32", "precision": "float32", "bench": "inference", **STAMP}
    Table(results / "comparison.csv", COMPARISON_COLUMNS).append(row | values)  # type: ignore[arg-type]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for model, speed in SPEEDS.items():
        add_speed(tmp_path, model, infer_step_time_median=1000 / speed)
    for model in SPEEDS:
        for ratio, peer in ((1.2, "timm"), (1.1, "openvino")):
            add_ratio(tmp_path, model=model, peer=peer, batch_size=1, ratio=ratio, ratio_low=1.0, ratio_high=1.3)
    add_ratio(tmp_path, model="test_beit", peer="timm", batch_size=8, ratio=9, bench="train")
    add_ratio(tmp_path, model="test_beit", peer="openvino", batch_size=1, error="no")
    return tmp_path


def test_pictures_are_drawn_of_what_there_is(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    paths = report.write_report(results, out)
    assert paths == [*(out / "plots" / name for name in PICTURES), *(out / "accuracy" / name for name in TABLES)]
    for path in paths[:6:2]:
        with Image.open(path) as image:
            assert min(image.size) > 200
            assert len(image.convert("P").getcolors() or ()) > 10
    drawn = [path.read_text() for path in paths[1:6:2]]
    assert all(">images per second" in text or ">time of the peer" in text for text in drawn)  # letters, not outlines
    for name, figure in report._figures(read_rows(results / "comparison.csv")).items():  # drawn again, the same
        assert report._save(figure, tmp_path / name)[1].read_text() == (out / "plots" / f"{name}.svg").read_text()


def test_a_folder_without_rows_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="There is no folder"):
        report.write_report(tmp_path / "absent", tmp_path / "out")
    add_ratio(tmp_path, model="test_beit", peer="openvino", error="no")
    with pytest.raises(InvalidValueError, match=r"No CSV in .* has rows to draw; measure some"):
        report.write_report(tmp_path, tmp_path / "out")
    (tmp_path / "cut.csv").write_text("a,b\n1")
    with pytest.raises(InvalidValueError, match=r"cut\.csv does not end with a line break"):
        report.write_report(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_label_covers_another(results: Path) -> None:
    figure = report._figures(read_rows(results / "benchmark.csv"))["accuracy-speed"]
    axes = figure.axes[0]
    labels = [text for text in axes.texts if re.match(r"(base|large) \d+ ", text.get_text())]
    boxes = [label.get_window_extent() for label in labels]
    assert len(boxes) == 13
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)
    assert any("x threads, torch x" in text.get_text() for text in axes.texts)


def test_later_rows_replace_earlier_ones_and_failures_are_left_out(results: Path) -> None:
    add_ratio(results, model="beit_base_patch16_224", peer="timm", batch_size=1, ratio=1.5)
    older = ({"device": "another"}, {"threads": "y"}, {"torch": "y"})
    for other in (*older, {"peer": "unknown"}):
        add_ratio(results, **{"model": "beit_base_patch16_224", "peer": "timm", "batch_size": 1, "ratio": 7, **other})
    groups = report._groups(read_rows(results / "comparison.csv"))
    assert list(groups) == [("inference", "float32", "beitzoo"), ("train", "float32", "beitzoo")]
    rows = groups["inference", "float32", "beitzoo"]
    assert len(rows) == 14
    assert next(row["ratio"] for row in rows if row["peer"] == "timm") == "1.5"


def test_a_picture_shows_one_machine_that_of_the_newest_row_and_names_it(results: Path) -> None:
    newer = "AMD EPYC, 2 cores, AVX-512 VNNI"
    asked = {"model": "test_beit", "batch_size": 1, "device": newer, "date": "x-later"}
    add_ratio(results, **asked, peer="timm", ratio=2, subject_error=0.001, peer_error=0.0123)
    add_ratio(results, **asked, peer="openvino", ratio=3, subject_error=1e-6, peer_error=1e-6)
    rows = read_rows(results / "comparison.csv")
    figures = report._figures(rows)
    texts = [text.get_text() for text in figures["ratio-inference-float32-beitzoo"].axes[0].texts]
    assert [text for text in texts if "off by" in text] == ["off by 1.2 %, ours 0.1 %"]
    (caption,) = (text for text in texts if "threads" in text)
    assert caption.endswith(f"\n{newer}, x threads, torch x. x-later.")
    # Another picture is of its own newest rows.
    texts = [text.get_text() for text in figures["ratio-train-float32-beitzoo"].axes[0].texts]
    assert any(text.endswith("\nx, x threads, torch x. x.") for text in texts)


def test_speed_is_the_newest_plain_row_of_the_checkpoint_or_its_architecture(tmp_path: Path) -> None:
    def rate(name: str) -> float:
        row = report._speed_of(name, report.measured_speeds(read_rows(tmp_path / "benchmark.csv")))
        return report.images_per_second(row) if row else 0.0

    name = "beit_base_patch16_224.in22k_ft_in22k_in1k"
    assert rate(name) == 0
    add_speed(tmp_path, "beit_base_patch16_224", infer_step_time_median=1000 / 1, date="2026-01-01")
    add_speed(tmp_path, "beit_base_patch16_224", infer_step_time_median=1000 / 2, date="2025-01-01")
    others = ({"precision": "bfloat16"}, {"infer_batch_size": 8}, {"options": "--channels-last"}, {"error": "no"})
    for other in (*others, {"input_size": "3x384x384"}):
        add_speed(tmp_path, "beit_base_patch16_224", infer_step_time_median=1000 / 9, date="2027-01-01", **other)
    assert rate(name) == 1
    add_speed(tmp_path, name, infer_step_time_median=1000 / 3)
    assert rate(name) == pytest.approx(3)
    add_speed(tmp_path, name, infer_step_time_median=1000 / 9, device="another", date="2025-01-01")
    assert rate(name) == pytest.approx(3)


@pytest.mark.parametrize("data", [name for name in DATA_SETS if name != "digits"])
def test_the_tables_of_accuracies_are_those_of_the_zoo(data: str) -> None:
    """Written by `beitzoo report`."""
    text = (RESULTS / "accuracy" / f"{data}.csv").read_text()
    assert text == report.accuracy_table(data)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(published(data=data)) > 0
    assert all(row["model"] in PRETRAINED and row["source"] for row in rows)
    timms = "model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation"
    compared = ",top1_diff,top5_diff,rank_diff" if DATA_SETS[data] else ""
    if data != "ade20k":
        assert text.splitlines()[0] == f"{timms}{compared},source"


def test_a_row_of_accuracy_reads_as_in_timm() -> None:
    line = report.accuracy_table("imagenet-real").splitlines()[-1]
    assert line == (
        "beitv2_base_patch16_224.in1k_ft_in1k,224,89.271,10.729,98.249,1.751,86.53,0.9,bicubic,+3.675,+0.735,-62,"
        '"timm results/results-imagenet-real.csv, October 2025"'
    )


def test_the_small_models_accuracy_is_the_measured_one() -> None:
    (digits,) = published(data="digits")
    row = next(csv.DictReader((RESULTS / "digits.csv").read_text().splitlines()))
    assert (str(digits.top1), str(digits.top5), str(digits.img_size)) == (row["top1"], row["top5"], row["img_size"])
    assert headline("beit_nano_patch4_32.digits") == digits


def test_every_column_is_explained() -> None:
    explained = set(re.findall(r"`(\w+)`", (RESULTS / "README.md").read_text().partition("## Columns")[2]))
    columns = {*BENCHMARK_COLUMNS, *COMPARISON_COLUMNS, *ACCURACY_COLUMNS}
    for path in RESULTS.glob("**/*.csv"):
        columns |= set(path.read_text().splitlines()[0].split(","))
    assert columns - explained == set()


def test_the_results_of_this_repository_have_the_columns_of_this_version() -> None:
    tables = {
        "benchmark": BENCHMARK_COLUMNS,
        "comparison": COMPARISON_COLUMNS,
        "data_path": DATA_COLUMNS,
        "loading": LOADING_COLUMNS,
    }
    for name, columns in tables.items():
        assert (RESULTS / f"{name}.csv").read_text().splitlines()[0] == ",".join(columns)
