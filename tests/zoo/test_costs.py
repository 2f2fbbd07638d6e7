"""Costs by closed formula are those of the network that is built."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from beitzoo.models import kernels
from beitzoo.models.beit import Beit
from beitzoo.models.mim import MaskedImageModel
from beitzoo.models.segmentation import Segmenter
from beitzoo.zoo import costs
from beitzoo.zoo.architectures import ARCHITECTURES
from beitzoo.zoo.networks import MimConfig, SegmenterConfig

FIELDS: list[dict[str, Any]] = [
    {"num_classes": 0},
    {"qkv_bias": False, "init_values": 0.0, "use_rel_pos_bias": False},
    {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": True, "use_mask_token": True},
    {"img_size": (48, 80), "patch_size": (8, 16), "in_chans": 1, "mlp_ratio": 2.5, "global_pool": "token"},
]
HEADS = [
    MimConfig(vocab_size=40),
    MimConfig(vocab_size=40, early_layers=1, head_layers=1),
    MimConfig(vocab_size=40, early_layers=ARCHITECTURES["test_beit"].depth, shared_lm_head=False),
]


def test_parameters_are_counted_for_every_architecture() -> None:
    configs = [*ARCHITECTURES.values(), *(replace(ARCHITECTURES["test_beit"], **fields) for fields in FIELDS)]
    for config in configs:
        with torch.device("meta"):
            model = Beit(config)
        assert costs.parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_masked_image_models_are_counted(head: MimConfig) -> None:
    config = replace(ARCHITECTURES["test_beit"], num_classes=0, use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    config = replace(config, use_mask_token=True, use_fc_norm=False)
    model = MaskedImageModel(Beit(config), head).eval()
    assert costs.parameters(config, head) == sum(parameter.numel() for parameter in model.parameters())
    mask = torch.arange(16)[None] < 5
    # In steps, as for classifiers. Under the counter the last MLPs run on all tokens.
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 3, 64, 64), mask)
    spared = (16 - 5) * 2 * config.embed_dim * config.hidden_dim
    mlps = {0: 1, 1: 2, config.depth: 1}[head.early_layers]
    assert counter.get_total_flops() == 2 * (costs.mim_macs(config, head, masked=5) + mlps * spared)


@pytest.mark.parametrize(
    "heads",
    [
        SegmenterConfig(num_classes=7, auxiliary_channels=10, auxiliary_convs=2, pool_scales=(1, 3)),
        SegmenterConfig(num_classes=7, auxiliary_channels=0, out_indices=(0, 1, 1, 2)),
        SegmenterConfig(num_classes=7, decoder="linear"),
    ],
    ids=str,
)
def test_segmentation_models_are_counted(heads: SegmenterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(ARCHITECTURES["test_beit"], num_classes=0, depth=4, img_size=(48, 80))
    model = Segmenter(Beit(config), heads).eval()
    assert costs.parameters(config, heads) == sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(kernels, "is_hooked", lambda module: True)  # in the steps of the definition
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 3, 48, 80))
    assert counter.get_total_flops() == 2 * costs.macs(config, heads)


def test_columns_are_in_timms_units() -> None:
    config = ARCHITECTURES["beit_base_patch16_384"]
    assert costs.columns(config) == {"param_count": 86.74, "infer_gmacs": 55.48, "infer_macts": 101.56}
    assert costs.input_size(replace(config, img_size=(32, 48), in_chans=1)) == "1x32x48"
