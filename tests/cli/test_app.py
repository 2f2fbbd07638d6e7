"""What all commands share: errors, exit codes, endings, encodings, and help texts that do not wait for PyTorch."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import SAMPLES, run
from PIL import Image

from beitzoo import cli
from beitzoo.cli import app, main
from beitzoo.errors import InvalidValueError

COMMANDS = ["list", "info", "download", "verify", "predict", "evaluate", "probe", "reconstruct", "finetune", "pretrain"]
COMMANDS += ["train-tokenizer", "tokenize", "replay", "collect", "benchmark", "report"]


def beitzoo_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "beitzoo", *arguments]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment})


def test_help_and_misspelt_commands_do_not_import_pytorch() -> None:
    """So that they are there in a fraction of a second."""
    arguments = [["--help"], ["--version"], ["lst"], ["list"], *([command, "--help"] for command in COMMANDS)]
    script = f"""
import sys
from beitzoo.cli import main
for arguments in {arguments}:
    sys.argv = ["beitzoo", *arguments]
    try:
        main()
    except SystemExit:
        print("IMPORTED", *arguments, {{"torch", "timm", "numpy", "PIL", "huggingface_hub"}} & {{*sys.modules}})
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    told = [line for line in result.stdout.splitlines() if line.startswith("IMPORTED")]
    assert told == [f"IMPORTED {' '.join(one)} set()" for one in arguments]


@pytest.mark.slow
def test_core_commands_need_no_extra() -> None:
    extras = ["accelerate", "sklearn", "scipy", "matplotlib", "pyarrow", "onnx", "onnxruntime", "openvino"]
    extras += ["transformers", "simplejpeg"]
    script = f"""
import sys
sys.modules |= dict.fromkeys({extras})  # importing any of them fails
from beitzoo.cli import main
for arguments in (["predict", "{SAMPLES}/digit_3.png"], ["info", "test_beit"], ["list", "--markdown"],
                  ["benchmark", "--model", "test_beit", "--bench", "profile"]):
    sys.argv = ["beitzoo", *arguments]
    try:
        main()
    except SystemExit as end:
        print("ENDED", end.code)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert [line for line in result.stdout.splitlines() if line.startswith("ENDED")] == ["ENDED 0"] * 4, result.stderr


def test_version() -> None:
    assert run("--version").stdout == "beitzoo 0.1.0\n"


def test_usage_errors_are_plain() -> None:
    """No boxes and no escape codes, on terminals neither."""
    result = run("lst", env={"FORCE_COLOR": "1"}, color=True)
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: No such command 'lst'. Did you mean 'list'?\n")
    for told in (result.stderr, run("predict", "--help", env={"FORCE_COLOR": "1"}, color=True).stdout):
        assert told.isascii()
        assert "\x1b" not in told


def test_the_user_is_told_what_the_user_can_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else is a fault of beitzoo, and its traceback is what to report."""

    def fail(error: Exception) -> None:
        def command(*arguments: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(cli.models, "list_models", command)

    fail(InvalidValueError("Three is no colour."))
    assert (run("list").exit_code, run("list").stderr) == (2, "Error: Three is no colour.\n")
    assert isinstance(run("--debug", "list").exception, InvalidValueError)
    for full in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 4 bytes.")):
        fail(full)
        assert run("list").exit_code == 2
        assert run("list").stderr.startswith("Error: There is not enough memory.")
        assert run("--debug", "list").exception is full
    for own in (ValueError("x"), KeyError("y"), OSError(errno.EIO, "z"), AssertionError(), NotImplementedError()):
        fail(own)
        assert run("list").exception is own


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "--pretrained"],
        pytest.param(
            ["predict", "--no-optimize", "-mbeit_nano_patch4_32", *[str(SAMPLES)] * 20], marks=pytest.mark.slow
        ),
    ],
)
def test_a_closed_pipe_is_quiet(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "beitzoo", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        if arguments[0] == "predict":  # closed in the midst of rows; where rows are few, before the first
            assert child.stdout.read(5) == b"image"
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 128 + signal.SIGPIPE


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "beitzoo", "list"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("Error: The output cannot be written: No space left on device.")


def test_any_file_name_can_be_written() -> None:
    """Bytes that are no text come out as they are, and what the encoding lacks as an escape."""
    bytes_written = io.BytesIO()
    stream = io.TextIOWrapper(bytes_written, encoding="ascii")
    cli._accept_any_file_name(stream)
    stream.write("a\udcff\udce9é日\U0001f600\ud800z")
    stream.flush()
    assert bytes_written.getvalue() == rb"a" + b"\xff\xe9" + rb"\xe9\u65e5\U0001f600\ud800z"


def test_no_file_name_ends_a_run(tmp_path: Path) -> None:
    for name in ("é日.png", "\udcff.png"):
        with Image.open(SAMPLES / "digit_3.png") as image:
            image.save(tmp_path / name, format="png")
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    result = beitzoo_process("predict", str(tmp_path), "-mbeit_nano_patch4_32", "--format", "csv", **ascii_only)
    # A busy machine takes long enough to be told how far it is.
    said = [line for line in result.stderr.splitlines() if not line.endswith(b" per second")]
    assert (result.returncode, said) == (0, [])
    assert rb"/\xe9\u65e5.png" in result.stdout
    assert b"/\xff.png" in result.stdout


def test_libraries_are_silent(tmp_path: Path) -> None:
    """Warnings and logs of theirs are no message to a user; ours are, and whoever asks for theirs gets them."""
    script = """
import logging, sys, warnings
from beitzoo import cli
def noisy(*arguments, **options):
    warnings.warn("their warning")
    logging.getLogger("their.module").warning("their log")
    logging.getLogger("beitzoo.module").warning("our log")
    return []
cli.models.list_models = noisy
sys.argv = ["beitzoo", "list"]
cli.main()
"""
    quiet = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (quiet.returncode, quiet.stderr) == (0, "our log\n")
    asked = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True)
    assert "their warning" in asked.stderr


def test_shells_complete_commands() -> None:
    asked = {"_BEITZOO_COMPLETE": "complete_bash", "COMP_WORDS": "beitzoo ver", "COMP_CWORD": "1"}
    assert beitzoo_process(**asked).stdout.decode().split() == ["verify"]
    script = beitzoo_process(_BEITZOO_COMPLETE="source_bash").stdout.decode()
    assert "_BEITZOO_COMPLETE=complete_bash" in script


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
        "list": ["markdown", "pattern", "pretrained", "tokenizers"],
        "info": ["as_json", "name"],
        "predict": [
            "batch_size",
            "checkpoint",
            "device",
            "form",
            "images",
            "models",
            "optimized",
            "output",
            "topk",
            "workers",
        ],
        "segment": [
            "checkpoint",
            "device",
            "flip",
            "images",
            "mode",
            "model",
            "optimized",
            "out",
            "overlays",
            "scales",
            "short_side",
            "stride",
            "workers",
        ],
        "embed": [
            "batch_size",
            "blocks",
            "checkpoint",
            "device",
            "dtype",
            "images",
            "model",
            "optimized",
            "out",
            "pooling",
            "workers",
        ],
        "download": ["cache_dir", "models"],
        "verify": ["as_json", "cache_dir", "models"],
        "convert-tokenizer": ["cache_dir", "decoder", "encoder", "name", "out"],
        "finetune": ["checkpoint", "data", "dry_run", "model", "out", "recipe", "resume", "settings"],
        "pretrain": ["out", "recipe", "settings"],
        "train-tokenizer": ["out", "recipe", "settings"],
        "replay": ["run"],
        "evaluate": [
            "as_json",
            "batch_size",
            "checkpoint",
            "classes",
            "confusion",
            "crop",
            "data",
            "device",
            "dtype",
            "flip",
            "ignore",
            "mode",
            "model_list",
            "models",
            "optimized",
            "outputs",
            "per_class",
            "real_labels",
            "recipe",
            "reduce_zero_label",
            "results_file",
            "retry_failed",
            "scales",
            "short_side",
            "sizes",
            "split_seed",
            "stride",
            "workers",
        ],
        "probe": [
            "as_json",
            "batch_size",
            "blocks",
            "checkpoint",
            "data",
            "device",
            "features",
            "keep_features",
            "label_seed",
            "models",
            "neighbours",
            "optimized",
            "picture",
            "poolings",
            "probes",
            "results_file",
            "split_seed",
            "test_data",
            "train_images",
            "train_per_class",
            "workers",
        ],
        "collect": ["as_json", "results_file", "runs"],
        "benchmark": [],
        "report": ["out", "results", "run"],
        "reconstruct": ["device", "images", "masked", "model", "out", "seed", "tokenizer"],
        "tokenize": ["batch_size", "device", "out", "recipe", "settings", "views"],
    }
