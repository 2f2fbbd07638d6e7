"""The one place for BEiT: every checkpoint by name, exact, fast, trainable."""

from beitzoo.factory import create_model, save_pretrained, save_transformers, save_unilm
from beitzoo.images.transforms import create_transform, resolve_data_config
from beitzoo.models.beit import Beit
from beitzoo.models.optimize import optimize
from beitzoo.weights.checkpoint import CheckpointError
from beitzoo.weights.checksums import DownloadError
from beitzoo.zoo.checkpoints import DataConfig, PretrainedConfig
from beitzoo.zoo.networks import BeitConfig
from beitzoo.zoo.registry import UnknownModelError, get_pretrained_cfg, is_model, list_models, list_pretrained

__all__ = [
    "Beit",
    "BeitConfig",
    "CheckpointError",
    "DataConfig",
    "DownloadError",
    "PretrainedConfig",
    "UnknownModelError",
    "create_model",
    "create_transform",
    "get_pretrained_cfg",
    "is_model",
    "list_models",
    "list_pretrained",
    "optimize",
    "resolve_data_config",
    "save_pretrained",
    "save_transformers",
    "save_unilm",
]
