"""What all tests share: an environment of their own, a fixed seed, and no way out of this machine."""

import isolation

# isort: split

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import constants
from huggingface_hub.utils import close_session

torch.set_num_threads(1)  # a plugin of pytest may have imported PyTorch before


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_unconfigure() -> None:
    shutil.rmtree(isolation.HOME, ignore_errors=True)


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """Stand in for the hub; caches and waits are small and the test's own."""
    hub = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.setattr("time.sleep", lambda seconds: hub.stopping.wait(min(seconds, 0.01)))
    close_session()
    yield hub
    close_session()
    hub.stop()
