"""The same numbers on a GPU."""

from dataclasses import replace

import pytest
import torch
from oracles import randomise, relative_error, timm_model

from beitzoo import Beit
from beitzoo.zoo.architectures import ARCHITECTURES

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("img_size", [(224, 224), (48, 80)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_gpu_agrees_with_cpu(img_size: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    model = Beit(replace(ARCHITECTURES["beit_base_patch16_224"], depth=2, img_size=img_size)).eval()
    randomise(model)
    x = torch.randn(3, 3, *img_size)
    with torch.inference_mode():
        expected = model(x)
        logits = model.to("cuda", dtype)(x.to("cuda", dtype))
    assert relative_error(logits.float().cpu(), expected) <= tolerance


@pytest.mark.parametrize("autocast", [False, True])
def test_gpu_gradients_agree_with_timm(autocast: bool) -> None:
    model = Beit(replace(ARCHITECTURES["beit_base_patch16_224"], depth=2)).cuda()
    randomise(model)
    peer = timm_model(model.cpu()).cuda()
    model.cuda()
    x = torch.randn(2, 3, 224, 224, device="cuda")
    for network in (model, peer):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logits = network(x)
        (logits.float() * torch.linspace(-1, 1, 1000, device="cuda")).sum().backward()
    gradients = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert relative_error(parameter.grad, gradients[name].grad) <= (5e-2 if autocast else 1e-4), name
