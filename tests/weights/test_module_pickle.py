"""Pickles of whole modules give their tensors, and none of their code runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beitzoo.models.tokenizers import Dvae
from beitzoo.weights.checkpoint import CheckpointError
from beitzoo.weights.module_pickle import read_module_pickle
from beitzoo.zoo.networks import DvaeConfig

SMALL = DvaeConfig(img_size=(32, 32), vocab_size=16, hidden_dim=8, decoder_dim=12)

# A package like OpenAI's, which exists only where the pickle is written.
PACKAGE = """
import torch
from torch import nn

class Conv2d(nn.Module):
    def __init__(self, n_in, n_out, kw):
        super().__init__()
        self.n_in, self.device = n_in, torch.device("cpu")
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw), requires_grad=False)
        self.b = nn.Parameter(torch.randn(n_out), requires_grad=False)

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Conv2d(3, 4, 7), nn.ReLU(), nn.MaxPool2d(2), Conv2d(4, 5, 1))
        self.register_buffer("halves", torch.ones(3, dtype=torch.float16))
        self.tied = self.blocks[0]

torch.manual_seed(0)
module = Encoder()
torch.save(module, "encoder.pkl")
torch.save(module.state_dict(), "expected.pth")
"""


def test_modules_of_absent_classes_give_their_tensors(tmp_path: Path) -> None:
    (tmp_path / "dall_e.py").write_text(PACKAGE)
    subprocess.run([sys.executable, "-c", "import dall_e"], cwd=tmp_path, check=True)
    expected = torch.load(tmp_path / "expected.pth")
    found = read_module_pickle(tmp_path / "encoder.pkl")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].float()) for name in expected)
    assert "dall_e" not in sys.modules


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "before 1.6"])
def test_what_is_read_is_the_dvae(part: str, as_zip: bool, tmp_path: Path) -> None:
    model = Dvae(SMALL)
    getattr(model, part).shared = getattr(model, part).blocks.input
    torch.save(getattr(model, part), tmp_path / "part.pkl", _use_new_zipfile_serialization=as_zip)
    del getattr(model, part).shared
    again = Dvae(SMALL)
    found = read_module_pickle(tmp_path / "part.pkl")
    assert torch.equal(found.pop("shared.w"), found["blocks.input.w"])
    assert len({tensor.data_ptr() for tensor in found.values()}) == len(found)
    del found["shared.b"]
    getattr(again, part).load_state_dict(found, strict=True)
    pairs = zip(getattr(model, part).parameters(), getattr(again, part).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def test_no_code_of_the_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = torch.nn.Linear(2, 2)
    module.extra = Hostile()  # type: ignore[assignment]
    torch.save(module, "hostile.pkl")
    assert read_module_pickle(Path("hostile.pkl")).keys() == {"weight", "bias"}
    torch.save(Hostile(), "alone.pkl")
    assert read_module_pickle(Path("alone.pkl")) == {}
    torch.save(module, "old.pkl", _use_new_zipfile_serialization=False)
    assert read_module_pickle(Path("old.pkl")).keys() == {"weight", "bias"}
    assert not Path("ran").exists()


def test_what_is_no_pickled_module_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file.pkl"
    for content in (b"", b"no pickle", b"PK\x03\x04 cut"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"file\.pkl is not a pickled module"):
            read_module_pickle(path)
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="'its content' is no module"):
        read_module_pickle(path)
    for as_zip in (True, False):
        torch.save(torch.nn.Linear(400, 400), path, _use_new_zipfile_serialization=as_zip)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match=r"file\.pkl is not a pickled module"):
            read_module_pickle(path)
