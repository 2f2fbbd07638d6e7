"""Errors, exit codes and endings of every command."""

import signal
import subprocess
import sys

import pytest
from commands import SAMPLES

from beitzoo.cli import app, main


def test_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-m", "beitzoo", "predict", *[str(SAMPLES)] * 20]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline().startswith("image")
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 128 + signal.SIGPIPE


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
        "benchmark": [],
        "report": ["out", "results"],
    }
