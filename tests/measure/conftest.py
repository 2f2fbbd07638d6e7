"""What tests of measurements beside other libraries share."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch


@pytest.fixture
def no_inference_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do without inference mode: transformers keeps indices for the whole process, here for tests that train, too."""

    def without_gradients(mode: bool = True) -> AbstractContextManager[object]:
        return torch.no_grad() if mode else nullcontext()

    monkeypatch.setattr(torch, "inference_mode", without_gradients)
