"""Costs by closed formula are those of the network that is built."""

from dataclasses import replace
from typing import Any

import torch

from beitzoo.models.beit import Beit
from beitzoo.zoo import costs
from beitzoo.zoo.architectures import ARCHITECTURES

FIELDS: list[dict[str, Any]] = [
    {"num_classes": 0},
    {"qkv_bias": False, "init_values": 0.0, "use_rel_pos_bias": False},
    {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": True, "use_mask_token": True},
    {"img_size": (48, 80), "patch_size": (8, 16), "in_chans": 1, "mlp_ratio": 2.5, "global_pool": "token"},
]


def test_parameters_are_counted_for_every_architecture() -> None:
    configs = [*ARCHITECTURES.values(), *(replace(ARCHITECTURES["test_beit"], **fields) for fields in FIELDS)]
    for config in configs:
        with torch.device("meta"):
            model = Beit(config)
        assert costs.parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_columns_are_in_timms_units() -> None:
    config = ARCHITECTURES["beit_base_patch16_384"]
    assert costs.columns(config) == {"param_count": 86.74, "infer_gmacs": 55.48, "infer_macts": 101.56}
    assert costs.input_size(replace(config, img_size=(32, 48), in_chans=1)) == "1x32x48"
