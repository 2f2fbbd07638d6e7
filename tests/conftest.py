"""What all tests share: one thread count, a fixed seed, and no way out of this machine."""

import os
import tempfile

# Read by the hub client when it is imported; a forgotten fixture then fails at once instead of going out, and
# nothing is written into the caches of whoever runs the tests.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="beitzoo-tests-")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ.pop("HF_TOKEN", None)
# Of each worker, and of the processes that tests start; more would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import constants
from huggingface_hub.utils import close_session


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


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
