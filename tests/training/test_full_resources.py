"""A full disk or a full memory ends a run with what to do, and nothing that was saved is lost."""

import csv
import errno
from pathlib import Path

import pytest
import torch
from colours import colour_recipe, write_colours

from beitzoo import files
from beitzoo.errors import FileAccessError, OutOfMemoryError
from beitzoo.factory import create_model
from beitzoo.training.folder import METRICS, saved_states
from beitzoo.training.log import Log
from beitzoo.training.tasks.finetune import FinetuneTask, finetune


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full after so many writes, and has room for as many more at each attempt."""
    recipe = colour_recipe(write_colours(tmp_path / "data", per_class=6), {"save_updates": 1}, epochs=2)
    finetune(recipe, tmp_path / "whole")
    out, flush, left, attempts = tmp_path / "out", files._flush, [0], 0

    def full(path: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    monkeypatch.setattr(files, "_flush", full)
    while not (out / METRICS).exists():
        before = [path.name for path in saved_states(out)]
        attempts += 1
        assert attempts < 9
        left[0] = 24
        try:
            finetune(recipe, out)
        except FileAccessError as error:
            assert "No space left on device. Check the folder's permissions and free space" in str(error)
            assert before == [] or saved_states(out)[-1].name >= before[-1]
            if (out / "best").exists():
                create_model(f"local-dir:{out / 'best'}", pretrained=True)
    assert attempts > 1
    path = Path("best", "model.safetensors")
    assert (out / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_on_a_full_disk_says_so(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.csv", (), 0)
    log._file.close()
    with Path("/dev/full").open("w", encoding="utf-8") as device:
        log._file = device  # type: ignore[assignment]
        log._writer = csv.DictWriter(device, log.columns)
        with pytest.raises(FileAccessError, match=r"Cannot write .*log.csv: No space left on device. Check"):
            log.write({"line": "updates"})
        with pytest.raises(FileAccessError, match=r"log.csv: No space left"):
            log.close()


def test_a_full_memory_says_what_takes_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = colour_recipe(write_colours(tmp_path / "data", per_class=6), epochs=2, accumulation=2)
    loss, calls = FinetuneTask.loss, [0]

    def fails(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(FinetuneTask, "loss", fails)
    most = 0
    with pytest.raises(OutOfMemoryError, match=r"Training 3 images at a time .* train.accumulation=4 .*") as caught:
        finetune(recipe, tmp_path / "out")
    assert "train.grad_checkpointing=true (slower)" in str(caught.value)
    assert "another folder" not in str(caught.value)
    calls[0], most = 0, 3
    with pytest.raises(OutOfMemoryError, match=r"in another folder: what .*out holds is kept"):
        finetune(recipe, tmp_path / "out")
    assert [path.name for path in saved_states(tmp_path / "out")] == ["state-1"]
