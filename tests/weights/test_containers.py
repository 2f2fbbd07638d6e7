"""State dicts as trainers write them: under any key, behind any prefix, averaged or sharded."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from oracles import randomise
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import beitzoo
from beitzoo import Beit, CheckpointError
from beitzoo.weights import checkpoint, layouts

State = dict[str, Tensor]


@pytest.fixture
def model() -> Beit:
    return randomise(beitzoo.create_model("test_beit", num_classes=3)).eval()


def behind(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def compiled_blocks(state: State) -> State:
    return {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in state.items()}


def swa(state: State) -> State:
    return {**behind("module.")(state), "n_averaged": torch.tensor(3)}


def lightning(state: State) -> dict[str, Any]:
    return {"epoch": 3, "global_step": 100, "state_dict": behind("model.")(state), "hyper_parameters": {"lr": 1e-3}}


def head_beside_backbone(state: State) -> State:
    return {f"model.{'' if name.startswith('head.') else 'backbone.'}{name}": t for name, t in state.items()}


NAMES: dict[str, Callable[[State], State]] = {
    "ours": dict,
    "transformers": lambda state: layouts.to_transformers(state, "beit."),
}
WRITERS: dict[str, Callable[[State], Any]] = {
    "ddp": behind("module."),
    "compile": behind("_orig_mod."),
    "compiled ddp": behind("_orig_mod.module."),
    "compiled blocks": compiled_blocks,
    "averaged": swa,
    "lightning": lightning,
    "lightning net": lambda state: {"state_dict": behind("net._orig_mod.")(state)},
    "pytorch tutorial": lambda state: {"epoch": 1, "model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "net": lambda state: {"net": behind("module.")(state), "acc": 0.9},
    "network": lambda state: {"network": state},
    "deepspeed": lambda state: {"module": state, "lr_scheduler": None},
    "nested": lambda state: {"checkpoint": {"weights": state}},
    "fsdp": behind("_fsdp_wrapped_module."),
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_trainers_write_is_read(writer: str, names: str, model: Beit, tmp_path: Path) -> None:
    torch.save(WRITERS[writer](NAMES[names](model.state_dict())), tmp_path / "a.pth")
    state = checkpoint.read(tmp_path / "a.pth")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_head_beside_the_backbone_is_read(model: Beit, tmp_path: Path) -> None:
    torch.save({"state_dict": head_beside_backbone(model.state_dict())}, tmp_path / "a.ckpt")
    again = beitzoo.create_model("test_beit", checkpoint_path=tmp_path / "a.ckpt")
    assert torch.equal(again.head.weight, model.head.weight)


def test_wrappers_as_the_libraries_make_them(model: Beit, tmp_path: Path) -> None:
    wrapped: list[nn.Module] = [AveragedModel(model), ModelEmaV3(model), nn.DataParallel(model)]
    wrapped.append(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    for number, wrapper in enumerate(wrapped):
        torch.save(wrapper.state_dict(), tmp_path / f"{number}.pth")
        assert checkpoint.read(tmp_path / f"{number}.pth").keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"optimizer": {"state": torch.zeros(1)}, "epoch": 3}, r"its keys are 'optimizer', 'epoch' \('optimizer' with"),
        ({"net": {"conv1.weight": torch.zeros(1)}}, r"its keys are 'net' \('net' with conv1.weight\)"),
        ({"conv1.weight": torch.zeros(1)}, r"its parameter names are no BEiT's \(conv1.weight\)"),
        ([torch.zeros(1)], "it is a list"),
        ({}, "it is empty"),
    ],
    ids=["keys", "other network", "flat", "list", "empty"],
)
def test_what_holds_no_beit_is_named_with_its_keys(document: object, message: str, tmp_path: Path) -> None:
    torch.save(document, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("plain", "averaged"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema")],
)
def test_averaged_weights_are_taken_as_in_timm_and_said(
    plain: str, averaged: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (beitzoo.create_model("test_beit").state_dict() for _ in range(2))
    path = tmp_path / "both.pth"
    torch.save({plain: first, averaged: second, "epoch": 1}, path)
    theirs = timm.models.load_state_dict(str(path))
    with caplog.at_level(logging.WARNING):
        ours = beitzoo.create_model("test_beit", checkpoint_path=path)
    assert torch.equal(ours.cls_token, theirs["cls_token"])
    assert torch.equal(ours.cls_token, second["cls_token"])
    assert f"averaged weights ({averaged}) and plain ones ('{plain}'): the averaged were taken" in caplog.text
    assert "use_ema=False" in caplog.text
    for use_ema, expected in ((True, second), (False, first)):
        ours = beitzoo.create_model("test_beit", checkpoint_path=path, use_ema=use_ema)
        assert torch.equal(ours.cls_token, expected["cls_token"])


def test_averaged_weights_behind_a_prefix(tmp_path: Path) -> None:
    """As Lightning writes a module that holds both."""
    first, second = (beitzoo.create_model("test_beit").state_dict() for _ in range(2))
    torch.save({"state_dict": behind("model.")(first) | behind("ema_model.module.")(second)}, tmp_path / "a.ckpt")
    for use_ema, expected in ((None, second), (False, first)):
        state = checkpoint.read(tmp_path / "a.ckpt", use_ema=use_ema)
        assert state.keys() == expected.keys()
        assert torch.equal(state["cls_token"], expected["cls_token"])


def test_what_is_not_there_cannot_be_chosen(model: Beit, tmp_path: Path) -> None:
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"no averaged weights \(use_ema=True\), only 'model'"):
        beitzoo.create_model("test_beit", checkpoint_path=tmp_path / "a.pth", use_ema=True)
    torch.save({"student": model.state_dict(), "teacher": model.state_dict()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="several networks \\('student', 'teacher'\\); save the one you mean"):
        beitzoo.create_model("test_beit", checkpoint_path=tmp_path / "a.pth")


def shard(state: State, folder: Path) -> Path:
    """Write tensors to two files and an index, as transformers does."""
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_sharded_safetensors_are_read(model: Beit, tmp_path: Path) -> None:
    beitzoo.save_transformers(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = shard(layouts.to_transformers(model.state_dict(), "beit."), tmp_path)
    x = torch.randn(2, 3, 64, 64)
    for options in ({"model_name": str(tmp_path), "pretrained": True}, {"model_name": str(index), "pretrained": True}):
        assert torch.equal(beitzoo.create_model(**options).eval()(x), model(x))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index.json: its file model-00002-of-00002\.safetensors is missing"):
        beitzoo.create_model(str(tmp_path), pretrained=True)
    for text in ("[]", "{}", '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}', "\0"):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="not an index of sharded safetensors"):
            beitzoo.create_model(str(tmp_path), pretrained=True)
