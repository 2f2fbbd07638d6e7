"""The repository keeps its own promises: tools are clean, the README runs, continuous integration is the README."""

import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from beitzoo import cli

README = Path("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["lint-imports"]],
    ids=lambda command: " ".join(command),
)
def test_tools_are_clean(command: list[str]) -> None:
    result = subprocess.run([tool(command[0]), *command[1:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_readme_is_short_and_starts_with_its_two_commands() -> None:
    lines = README.splitlines()
    assert len(lines) <= 200
    commands = [line for line in lines[:12] if line.startswith("pip install")]
    assert commands == [
        "pip install -e . && beitzoo predict beitzoo/assets/samples/*.png",
        "pip install -e '.[test]' && pytest",
    ]
    first_python = next(number for number, line in enumerate(lines, 1) if line.startswith("```python"))
    assert first_python < 20


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    assert "pip install -e '.[test]' && pytest" in Path(".ci/run").read_text().splitlines()


@pytest.mark.parametrize("code", [body for language, body in BLOCKS if language == "python"])
def test_readme_python_runs(code: str, tmp_path: Path) -> None:
    exec(compile(code.replace("runs/", f"{tmp_path}/"), "README.md", "exec"), {})


def test_readme_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as written and in order, but training for one epoch of few images and timing a small model for one step.

    What a person has under `data/` is made up.
    """
    make_street_scenes(tmp_path / "data" / "camvid")
    lines = [line for language, body in BLOCKS if language == "bash" for line in body.splitlines()]
    commands = [part.strip() for line in lines for part in line.split("&&") if "pip install" not in part]
    assert len(commands) >= 8
    for command in commands:
        if "pytest" in command:
            continue
        for place, ours in (("data/", "data/"), ("runs/", ""), ("results/", "")):
            command = re.sub(rf"(?<![\w/]){place}", f"{tmp_path}/{ours}", command)
        program, *arguments = shlex.split(command)
        short = []
        if program == "python" or arguments[0] == "benchmark":
            arguments = [word.replace("beit_base_patch16_224", "test_beit") for word in arguments]
            short = ["--num-warm-iter", "0", "--num-bench-iter", "1"]
        elif arguments[0] in ("finetune", "pretrain", "train-tokenizer"):
            fewer = ("train.epochs=1", "data.train_per_class=7", "data.test_fraction=0.05")
            if arguments[1] == "camvid":
                fewer = ("train.updates=2", "train.batch_size=2")
            # Pictures have tests of their own.
            short = [word for setting in (*fewer, "run.pictures=false") for word in ("--set", setting)]
        elif arguments[0] == "probe":
            short = ["--train-images", "70", "--blocks", "-1"]
        if program == "python":
            arguments[0] = arguments[0].removesuffix(".py")  # whose door is that of the command
        monkeypatch.setattr(sys, "argv", ["beitzoo", *arguments, *short])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0, command
    assert (tmp_path / "digits" / "metrics.json").exists()
    assert (tmp_path / "benchmark.csv").exists()


def make_street_scenes(folder: Path) -> None:
    """Write images and masks of CamVid's classes as the recipe expects them."""
    generator = random.Random(0)
    for part in ("training", "validation", "test"):
        for kind in ("images", "annotations"):
            (folder / kind / part).mkdir(parents=True)
        for name in ("a", "b"):
            Image.new("RGB", (48, 36), tuple(generator.randbytes(3))).save(folder / "images" / part / f"{name}.png")
            mask = Image.frombytes("L", (48, 36), bytes(generator.choices(range(12), k=48 * 36)))
            mask.save(folder / "annotations" / part / f"{name}.png")
    (folder / "classes.txt").write_text("\n".join(f"class {number}" for number in range(11)))


def test_nothing_of_one_machine_is_in_the_repository() -> None:
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True).stdout.splitlines()
    texts = [Path(name) for name in files if Path(name).suffix in {".py", ".md", ".toml", ".csv", ".json"}]
    found = [str(path) for path in texts if re.search(r"(?<![\w.])/(root|home/\w+)/", path.read_text(encoding="utf-8"))]
    assert found == []


def test_shipped_files_are_small() -> None:
    weights = list(Path("beitzoo/assets").glob("*.safetensors"))
    assert weights
    assert all(path.stat().st_size < 2_000_000 for path in weights)
