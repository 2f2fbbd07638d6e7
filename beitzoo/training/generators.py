"""Random numbers of a run: seeds that are pure functions of integers, and the state of every global generator."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_CPU = torch.device("cpu")


def derive_seed(*parts: int | str) -> int:
    """Mix numbers and words to a seed: equal parts give equal seeds, on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators, which the augmentations of timm and torchvision use.

    Those of accelerators are left alone; `torch.manual_seed` would wake them in every process that loads images.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def generators_kept(device: torch.device = _CPU) -> Iterator[None]:
    """Give the global generators back the state they had before, so that what is drawn inside moves nothing outside."""
    kept = generator_states(device)
    try:
        yield
    finally:
        restore_generators(kept, device)


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the state of every global generator of this process, in plain values and tensors."""
    numpy: Any = np.random.get_state(legacy=True)
    name, keys, *rest = numpy
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    states["numpy"] = (name, keys.tolist(), *rest)
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def restore_generators(states: dict[str, Any], device: torch.device) -> None:
    """Set every global generator of this process to a state that `generator_states` returned."""
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type != "cpu" and "device" in states:  # not if they are from a machine without one
        torch.get_device_module(device).set_rng_state(states["device"])
