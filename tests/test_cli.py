"""The commands: what they print, and how they fail."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_hub import FakeHub
from PIL import Image
from typer.testing import CliRunner, Result

import beitzoo
from beitzoo.cli import app, main

SAMPLES = Path("beitzoo/assets/samples")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_list() -> None:
    assert run("list").stdout.split() == beitzoo.list_models()
    assert run("list", "beitv2*", "--pretrained").stdout.split() == beitzoo.list_pretrained("beitv2*")


def test_info() -> None:
    facts = json.loads(run("info", "beit_base_patch16_224", "--json").stdout)
    accuracy = {(row["data"], row["source"][:4]): row["top1"] for row in facts.pop("accuracy")}
    assert accuracy["imagenet", "timm"] == 85.238
    assert accuracy["imagenet-a", "timm"] == 50.747
    assert accuracy["imagenet", "micr"] == 85.2
    assert (facts.pop("images_per_second") is None) == (facts.pop("measured_on") is None)
    assert facts == {
        "model": "beit_base_patch16_224.in22k_ft_in22k_in1k",
        "parameters": 86_530_984,
        "gmacs": 17.56,
        "activations_millions": 23.9,
        "classes": 1000,
        "input_size": [3, 224, 224],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "weights": [
            "hub timm/beit_base_patch16_224.in22k_ft_in22k_in1k/model.safetensors at main",
            "hub microsoft/beit-base-patch16-224/model.safetensors at main",
            "hub microsoft/beit-base-patch16-224/pytorch_model.bin at main",
            "https://github.com/addf400/files/releases/download/v1.0/beit_base_patch16_224_pt22k_ft22kto1k.pth",
        ],
        "license": "MIT",
        "paper": "https://arxiv.org/abs/2106.08254",
    }
    table = run("info", "beit_base_patch16_224").stdout
    assert "86,530,984" in table
    assert "17.56" in table
    assert "imagenet: top1 85.238, top5 97.654 (timm" in table


def test_info_of_a_pretrained_backbone() -> None:
    facts = json.loads(run("info", "beitv2_large_patch16_224.mim_in1k", "--json").stdout)
    assert (facts["parameters"], facts["classes"]) == (303_137_216, 0)


def test_info_of_an_architecture_without_weights() -> None:
    facts = json.loads(run("info", "test_beit", "--json").stdout)
    assert (facts["weights"], facts["license"]) == ([], None)
    assert "none" in run("info", "test_beit").stdout


def test_predict_as_json() -> None:
    result = run("predict", str(SAMPLES / "*.png"), "--format", "json", "--topk", "2")
    rows = json.loads(result.stdout)
    assert result.exit_code == 0
    assert [row["answers"][0]["label"] for row in rows] == list("0123456789")
    assert all(len(row["answers"]) == 2 and row["error"] is None for row in rows)


def test_predict_names_a_failure_and_exits_with_one(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"")
    result = run("predict", str(SAMPLES / "digit_3.png"), str(tmp_path / "broken.png"), "--format", "json")
    rows = json.loads(result.stdout)
    assert result.exit_code == 1
    assert rows[0]["answers"][0]["label"] == "3"
    assert rows[1]["error"].startswith("not an image")
    assert rows[1]["answers"] == []
    assert "1 of 2 images have no answer; each says why." in result.stderr
    strange = tmp_path / "a[b]long[copy]name[red].png"
    strange.write_bytes((SAMPLES / "digit_3.png").read_bytes())
    table = run("predict", str(strange), str(tmp_path / "broken.png")).stdout.splitlines()
    assert table[1].startswith(f"{strange}  3 ")
    assert table[2].startswith(str(tmp_path / "broken.png"))
    assert "not an image" in table[2]


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


def test_predict_turns_photos_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(SAMPLES / "digit_6.png") as upright:
        upright.rotate(180).save(tmp_path / "turned.png", exif=exif)
        upright.rotate(180).save(tmp_path / "plain.png")
    rows = json.loads(run("predict", str(tmp_path / "*.png"), "--format", "json").stdout)
    assert [row["answers"][0]["label"] == "6" for row in rows] == [False, True]


def test_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-m", "beitzoo", "predict", *[str(SAMPLES)] * 20]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline().startswith("image")
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 1


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


def test_download_then_verify(fake_hub: FakeHub, tmp_path: Path) -> None:
    beitzoo.save_pretrained(beitzoo.create_model("test_beit"), tmp_path / "repo")
    fake_hub.serve_folder(tmp_path / "repo")
    name, cache = "hf-hub:owner/name", ("--cache-dir", str(tmp_path / "cache"))
    result = run("download", "beit_nano_patch4_32.dig*", name, "hf-hub:owner/absent", *cache)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["beit_nano_patch4_32.digits", name]
    assert "hf-hub:owner/absent: Could not get owner/absent/config.json" in result.stderr
    assert run("verify", name, *cache).stdout == f"verified        {lines[1]}\n"
    weights = Path(lines[1].split("  ")[1]).resolve()
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"?")
    result = run("verify", name, "--json", *cache)
    (row,) = json.loads(result.stdout)
    assert (result.exit_code, row["model"], row["state"]) == (1, name, "damaged")
    assert run("download", name, *cache).exit_code == 0
    assert weights.read_bytes() == content


def test_verify_looks_at_all_that_is_here(fake_hub: FakeHub) -> None:
    result = run("verify")
    assert result.exit_code == 0
    assert result.stdout.split()[:2] == ["verified", "beit_nano_patch4_32.digits"]
    result = run("verify", "beit_base_patch16_224")
    assert (result.exit_code, result.stdout) == (1, "not downloaded  beit_base_patch16_224\n")
    assert fake_hub.requests == []


def test_evaluate_prints_and_appends_rows(tmp_path: Path) -> None:
    model, table = "beit_nano_patch4_32.digits", tmp_path / "r.csv"
    result = run("evaluate", model, model, "--data", "digits", "--results-file", str(table))
    assert result.exit_code == 0
    assert "± 0.00 (mean ± sd of 2)" in result.stdout
    assert len(table.read_text().splitlines()) == 3


def test_report_draws_and_writes(tmp_path: Path) -> None:
    result = run("report", "--results", str(tmp_path))
    assert isinstance(result.exception, ValueError)
    assert "There are no measured rows" in str(result.exception)
    assert len(list((tmp_path / "accuracy").glob("*.csv"))) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "beit_bas_patch16_224"], "did you mean 'beit_base_patch16_224'"),
        (["predict", "x.png", "--model", "local-dir:/absent"], "config.json"),
        (["finetune", "absent.toml", "--out", "/tmp/absent"], "There is no recipe absent.toml"),
        (["finetune", "configs/finetune/digits.toml", "--out", "x", "--set", "train.lr=-1"], "train.lr"),
        (["predict", "x.png", "--device", "gpu"], "There is no device 'gpu' here"),
        (["predict", str(SAMPLES / "digit_1.png"), "--output", "tests"], "tests is a folder"),
        (["download", "nothing*"], "No checkpoint matches 'nothing*'"),
        (["info", "beit_base_patch16_224.mim"], "it has in22k_ft_in22k_in1k"),
        (["evaluate", "beit_nano_patch4_32.digits", "--data", "/absent"], "CLASS/IMAGE"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_two(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["beitzoo", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert message in error


def test_the_package_is_a_command() -> None:
    result = subprocess.run([sys.executable, "-m", "beitzoo", "list", "test*"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "test_beit\n")


def test_the_options_are_frozen() -> None:
    """A new option is a decision; it shows up here."""
    from typer.main import get_command

    commands = get_command(app).commands  # type: ignore[attr-defined]
    options = {name: sorted(p.name for p in command.params) for name, command in commands.items()}
    assert options == {
        "list": ["markdown", "pattern", "pretrained"],
        "info": ["as_json", "name"],
        "predict": ["batch_size", "device", "form", "images", "models", "output", "topk", "workers"],
        "download": ["cache_dir", "models"],
        "verify": ["as_json", "cache_dir", "models"],
        "finetune": ["out", "recipe", "settings"],
        "evaluate": ["as_json", "data", "device", "models", "results_file", "split_seed"],
        "report": ["out", "results"],
    }
