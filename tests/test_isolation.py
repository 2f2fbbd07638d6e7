"""The tests give the same answers wherever and by whomever they are started."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from isolation import ROOT

# What clusters, containers and shells of users set; each has changed the outcome of some project's tests.
HOSTILE = {
    "HF_HUB_OFFLINE": "1",
    "HF_TOKEN": "hf_none",
    "HF_ENDPOINT": "http://127.0.0.1:1",
    "HF_HUB_CACHE": "/proc/nowhere",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_CACHE": "/proc/nowhere",
    "TORCH_HOME": "/proc/nowhere",
    "TORCH_LOGS": "+dynamo",
    "TORCHINDUCTOR_CACHE_DIR": "/proc/nowhere",
    "TORCHDYNAMO_DISABLE": "1",
    "TORCH_NUM_THREADS": "3",
    "OMP_NUM_THREADS": "3",
    "MKL_NUM_THREADS": "3",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "HTTP_PROXY": "http://127.0.0.1:1",
    "http_proxy": "http://127.0.0.1:1",
    "HOME": "/proc/nowhere",
    "XDG_CACHE_HOME": "/proc/nowhere",
    "MPLBACKEND": "TkAgg",
    "MPLCONFIGDIR": "/proc/nowhere",
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONWARNINGS": "always",
    "COLUMNS": "20",
    "NO_COLOR": "1",
    "FORCE_COLOR": "1",
    "TERM": "dumb",
    "TZ": "Asia/Kathmandu",
}


@pytest.mark.slow
def test_a_hostile_environment_changes_nothing(tmp_path: Path) -> None:
    """The whole suite, started from a folder elsewhere, in the background, with a umask that lets nobody else read."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests")],
        cwd=tmp_path,
        env={**os.environ, **HOSTILE},
        umask=0o077,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr
