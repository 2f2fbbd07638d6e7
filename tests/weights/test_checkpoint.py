"""Tensors go in strictly and come out whole."""

import os
from pathlib import Path

import pytest
import torch
from oracles import randomise
from safetensors.torch import save_file

import beitzoo
from beitzoo import Beit, CheckpointError, files
from beitzoo.weights import checkpoint
from beitzoo.zoo.architectures import ARCHITECTURES


@pytest.fixture
def model() -> Beit:
    network = Beit(ARCHITECTURES["test_beit"])
    randomise(network)
    return network


def test_saved_tensors_come_back_bit_equal(model: Beit, tmp_path: Path) -> None:
    checkpoint.save(model.state_dict(), tmp_path / "a" / "w.safetensors")
    state = checkpoint.read(tmp_path / "a" / "w.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["w.safetensors"]


def test_a_model_on_meta_takes_tensors_over(model: Beit) -> None:
    with torch.device("meta"):
        empty = Beit(model.config)
    state = model.state_dict()
    checkpoint.load(empty, state, "the file", model.config)
    assert empty.head.weight.data_ptr() == state["head.weight"].data_ptr()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(empty.eval()(x), model.eval()(x))
    assert all(p.requires_grad and p.is_leaf for p in empty.parameters())


def test_mismatch_lists_what_differs_and_changes_nothing(model: Beit) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    del state["blocks.1.attn.q_bias"]
    state["norm.weight"] = torch.zeros(64)
    state["head.weight"] = torch.zeros(7, 64)
    state["cls_token"] = torch.zeros(1, 1, 64, dtype=torch.int64)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(model, state, "some.safetensors", model.config)
    message = str(caught.value)
    assert message.startswith("some.safetensors is not a checkpoint of this network")
    for line in (
        "  - blocks.1.attn.q_bias (64,)",
        "  + norm.weight (64,)",
        "  ~ head.weight: (7, 64), expected (10, 64)",
        "  ~ cls_token: torch.int64, expected floating point",
    ):
        assert line in message.splitlines()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_long_list_is_cut_and_counted(model: Beit) -> None:
    with pytest.raises(CheckpointError, match=r"\.\.\. and 19 more"):
        checkpoint.load(model, {}, "empty", model.config)


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64, b"PK\x03\x04 a zip"])
def test_a_file_of_another_kind_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"w\.safetensors: it is not a readable (safetensors file|PyTorch checkpoint)"
    ):
        checkpoint.read(path)


def test_a_pickle_of_old_pytorch_is_named_and_a_header_that_begins_like_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"cls_token": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"PyTorch before 1\.6"):
        checkpoint.read(path)
    for length in range(40):  # of the header, whose low byte comes first; one of them is 0x80
        path = tmp_path / "w.safetensors"
        save_file({"cls_token": torch.ones(1)}, path, metadata={"x": "y" * 8 * length})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert checkpoint.read(path).keys() == {"cls_token"}


def test_a_truncated_file_is_named(model: Beit, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"w\.safetensors: it is not a readable"):
        checkpoint.read(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "folder"])
def test_what_is_done_to_a_users_file_is_not_done_to_the_model(kind: str, model: Beit, tmp_path: Path) -> None:
    """Written in place (cp, scp, rsync --inplace), cut short, or saved over by the run that started from it."""
    beitzoo.save_pretrained(model, tmp_path / "folder")
    path = tmp_path / "folder" / "model.safetensors"
    if kind == "pickle":
        path = tmp_path / "a.pth"
        torch.save({"model": model.state_dict()}, path)
    if kind == "folder":
        loaded = beitzoo.create_model(str(tmp_path / "folder"), pretrained=True).eval()
    else:
        loaded = beitzoo.create_model("test_beit", checkpoint_path=path).eval()
    x = torch.randn(1, 3, 64, 64)
    before = loaded(x)
    with path.open("r+b") as file:  # the same inode
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded(x), before)
    os.truncate(path, 0)
    assert torch.equal(loaded(x), before)
    assert torch.equal(before, model.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_both_ways_of_reading_give_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "cls_token": torch.randn(1, 1, 7, dtype=dtype),
        "scalar": torch.tensor(3.0, dtype=dtype),
        "none": torch.empty(0, 4, dtype=dtype),
        "flag": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    torch.save(tensors, tmp_path / "a.pth")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pth"):
        for map_file in (True, False):
            state = checkpoint.read(path, map_file=map_file)
            assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
            assert state["cls_token"].dtype == dtype


def test_only_files_of_a_cache_are_mapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[bool] = []
    read = checkpoint.read

    def spy(path: Path, *, map_file: bool = False, use_ema: bool | None = None) -> dict[str, torch.Tensor]:
        seen.append(map_file)
        return read(path, map_file=map_file, use_ema=use_ema)

    monkeypatch.setattr(checkpoint, "read", spy)
    model = beitzoo.create_model(pretrained=True)
    beitzoo.save_pretrained(model, tmp_path)
    beitzoo.create_model(f"local-dir:{tmp_path}", pretrained=True)
    beitzoo.create_model(checkpoint_path=tmp_path / "model.safetensors")
    assert seen == [True, False, False]
