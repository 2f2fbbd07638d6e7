"""predict: what it prints, and how it fails."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import SAMPLES, run
from PIL import Image
from typer.testing import CliRunner

import beitzoo
from beitzoo.cli import app
from beitzoo.inference import fastest
from beitzoo.inference.fastest import OPTIMIZED


def test_predict_as_json() -> None:
    result = run("predict", str(SAMPLES / "*.png"), "--format", "json", "--topk", "2")
    rows = json.loads(result.stdout)
    assert result.exit_code == 0
    assert [row["answers"][0]["label"] for row in rows] == list("0123456789")
    assert all(len(row["answers"]) == 2 and row["error"] is None for row in rows)


def test_many_images_are_classified_by_the_optimized_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two models, which is said once; --no-optimize leaves it out."""
    asked = (
        "predict",
        str(SAMPLES / "digit_*.png"),
        "-mbeit_nano_patch4_32.digits",
        "-mbeit_nano_patch4_32",
    )
    monkeypatch.setattr(fastest, "HANDFUL", 9)
    copied, plain = run(*asked), run(*asked, "--no-optimize")
    assert (copied.exit_code, copied.stdout) == (0, plain.stdout)
    assert copied.stderr == f"{OPTIMIZED}\n"
    assert plain.stderr == ""
    listed = run("predict", "-", "-mbeit_nano_patch4_32", input=f"{SAMPLES / 'digit_3.png'}\n")
    assert listed.stderr == f"{OPTIMIZED}\n"


def test_predict_names_a_failure_and_exits_with_one(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"")
    result = run("predict", str(SAMPLES / "digit_3.png"), str(tmp_path / "broken.png"), "--format", "json")
    rows = json.loads(result.stdout)
    assert result.exit_code == 1
    assert rows[0]["answers"][0]["label"] == "3"
    assert rows[1]["error"] == "the file is empty"
    assert rows[1]["answers"] == []
    assert "1 of 2 images have no answer; each says why." in result.stderr
    strange = tmp_path / "a[b]long[copy]name[red].png"
    strange.write_bytes((SAMPLES / "digit_3.png").read_bytes())
    table = run("predict", str(strange), str(tmp_path / "broken.png")).stdout.splitlines()
    assert table[1].startswith(f"{strange}  3 ")
    assert table[2].startswith(str(tmp_path / "broken.png"))
    assert "the file is empty" in table[2]


def test_predict_with_several_models_as_csv(tmp_path: Path) -> None:
    model = beitzoo.create_model("beit_nano_patch4_32.digits", pretrained=True, num_classes=4)
    beitzoo.save_pretrained(model, tmp_path / "four")
    names = ["beit_nano_patch4_32.digits", f"local-dir:{tmp_path / 'four'}"]
    out = tmp_path / "out" / "rows.csv"
    result = run(
        "predict", str(SAMPLES / "digit_[45].png"), *(f"-m{name}" for name in [*names, names[0]]), "--format", "csv",
        "--topk", "5", "--output", str(out),
    )  # fmt: skip
    assert (result.exit_code, result.stdout) == (0, "")
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [(Path(row["path"]).stem, row["model"]) for row in rows] == [
        (image, name) for image in ("digit_4", "digit_5") for name in names
    ]
    assert [row["label_1"] for row in rows[::2]] == ["4", "5"]
    assert {row["label_5"] for row in rows[1::2]} == {""}
    assert {row["label_1"] for row in rows[1::2]} <= set("0123")


def test_predict_takes_a_list_from_stdin(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes((SAMPLES / "digit_8.png").read_bytes())
    listed = f"{SAMPLES}/digit_2.png\n\n{tmp_path}/sub\r\n/absent.png\na\0b*\n{SAMPLES}/digit_[1].png\n".encode()
    result = CliRunner().invoke(
        app,
        ["predict", str(SAMPLES / "digit_1.png"), "-", "--format", "json", "--topk", "1"],
        input=listed + b"\xff\xfe.png",
    )
    rows = json.loads(result.stdout)
    assert [row["answers"][0]["label"] for row in rows if row["answers"]] == ["1", "2", "8"]
    failed = ["/absent.png", "a\0b*", f"{SAMPLES}/digit_[1].png", "\udcff\udcfe.png"]
    assert [row["path"] for row in rows if row["error"]] == failed
    assert result.exit_code == 1


@pytest.mark.parametrize(("form", "expected"), [("table", ""), ("json", "[]\n")])
def test_predict_says_when_there_is_nothing(form: str, expected: str, tmp_path: Path) -> None:
    nothing = run("predict", "-", "--format", form)
    assert (nothing.exit_code, nothing.stdout) == (1, expected)
    assert "nothing was listed on stdin" in nothing.stderr
    for place in (tmp_path, tmp_path / "*.png"):
        (row,) = json.loads(run("predict", str(place), "--format", "json").stdout)
        assert row["path"] == str(place)
        assert row["error"] in ("a folder, not an image", "there is no such file")


def test_predict_says_who_answers_when_nobody_was_named() -> None:
    told = "No --model was named, so beit_nano_patch4_32.digits answers, which reads handwritten digits"
    digit = str(SAMPLES / "digit_1.png")
    assert told in run("predict", digit).stderr
    assert run("predict", digit, "-m", "beit_nano_patch4_32").stderr == ""


def test_predict_writes_what_the_file_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "digit.png").write_bytes((SAMPLES / "digit_1.png").read_bytes())
    for name in ("rows.json", "rows.csv"):
        assert run("predict", "~/digit.png", "--output", f"~/{name}").exit_code == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["path"], row["answers"][0]["label"]) == (str(tmp_path / "digit.png"), "1")
    (line,) = csv.DictReader((tmp_path / "rows.csv").read_text().splitlines())
    assert line["label_1"] == "1"
    refused = run("predict", "~/digit.png", "--output", str(tmp_path / "rows.jsonl"))
    assert (refused.exit_code, "what a .jsonl file holds is not known" in refused.stderr) == (2, True)


def test_predict_counts_what_it_passes_over(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", "IMG_1.HEIC", "notes.txt", "list.csv"):
        (tmp_path / name).write_bytes((SAMPLES / "digit_1.png").read_bytes())
    result = run("predict", str(tmp_path), "-m", "beit_nano_patch4_32")
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 2)
    assert result.stderr.splitlines() == [
        "Left out 1, hidden, or left by a tool: ._a.png",
        "Left out 1, HEIC, which is not decoded here (convert them to JPEG or PNG): IMG_1.HEIC",
        "Left out 2, not called like images: list.csv, notes.txt",
    ]


def test_predict_takes_weights_of_ones_own(tmp_path: Path) -> None:
    beitzoo.save_pretrained(beitzoo.create_model(pretrained=True), tmp_path)
    weights = ["--checkpoint", str(tmp_path / "model.safetensors")]
    digit = str(SAMPLES / "digit_7.png")
    rows = json.loads(run("predict", digit, "-m", "beit_nano_patch4_32", *weights, "--format", "json").stdout)
    assert rows[0]["answers"][0]["label"] == "7"
    refused = run("predict", digit, "-m", "test_beit", "-m", "beit_nano_patch4_32", *weights)
    assert (refused.exit_code, "--checkpoint is one file, and 2 models are named" in refused.stderr) == (2, True)


def test_predict_turns_photos_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(SAMPLES / "digit_6.png") as upright:
        upright.rotate(180).save(tmp_path / "turned.png", exif=exif)
        upright.rotate(180).save(tmp_path / "plain.png")
    rows = json.loads(run("predict", str(tmp_path / "*.png"), "--format", "json").stdout)
    assert [row["answers"][0]["label"] == "6" for row in rows] == [False, True]


def test_ctrl_c_keeps_the_rows_that_are_done(tmp_path: Path) -> None:
    """The list on stdin never ends, so that only the signal ends the run."""
    out, partial = tmp_path / "rows.json", tmp_path / "rows.json.partial"
    command = [sys.executable, "-m", "beitzoo", "predict", "-", "-b", "2", "--format", "json", "--output", str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stderr is not None
        child.stdin.write(f"{SAMPLES}\n".encode())
        child.stdin.flush()
        deadline = time.monotonic() + 60
        while not (partial.exists() and partial.read_text().count("path") >= 6) and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        error = child.stderr.read().decode()
    assert child.returncode == 130
    assert f"The rows so far are in {partial}." in error
    assert "Traceback" not in error
    rows = json.loads(partial.read_text())
    assert len(rows) >= 6
    assert all(row["answers"] for row in rows)
    assert not out.exists()
