"""An environment of the tests' own; imported before everything that reads the one they are started in."""

import os
import signal
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = tempfile.mkdtemp(prefix="beitzoo-tests-")

# What tests take from whoever starts them: where programs, packages and devices are. All other variables are dropped,
# here and for the processes that tests start: HF_HUB_OFFLINE, a proxy, a narrow terminal or the rank of a cluster's
# job would change what is tested.
_KEPT = {"PATH", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR", "LD_LIBRARY_PATH", "CC", "CXX"}
_KEPT |= {"CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES"}
_KEPT_PREFIXES = ("PYTEST_", "COV_", "COVERAGE_")
_SET = {
    "HOME": HOME,  # nothing is read from the home of whoever runs the tests, or left in it
    "HF_HOME": f"{HOME}/huggingface",
    "HF_ENDPOINT": "http://127.0.0.1:9",  # a forgotten fixture fails at once instead of going out
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_XET": "1",
    "OMP_NUM_THREADS": "1",  # of each process; more would fight for the cores
    "MPLBACKEND": "agg",
    "PYTHONUTF8": "1",
    "COLUMNS": "80",
}

for name in list(os.environ):
    if name not in _KEPT and not name.startswith(_KEPT_PREFIXES):
        del os.environ[name]
os.environ.update(_SET)
os.umask(0o022)
os.chdir(ROOT)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells set it for what they start in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
