"""The one place for BEiT: every checkpoint by name, exact, fast, trainable."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beitzoo.errors import UserError as UserError
    from beitzoo.factory import create_model as create_model
    from beitzoo.factory import create_tokenizer as create_tokenizer
    from beitzoo.images.files import open_image as open_image
    from beitzoo.images.transforms import create_transform as create_transform
    from beitzoo.images.transforms import resolve_data_config as resolve_data_config
    from beitzoo.inference.classify import predict as predict
    from beitzoo.inference.embed import embed as embed
    from beitzoo.inference.segment import SegmentOptions as SegmentOptions
    from beitzoo.inference.segment import segment as segment
    from beitzoo.models.beit import Beit as Beit
    from beitzoo.models.optimize import optimize as optimize
    from beitzoo.saving import save_pretrained as save_pretrained
    from beitzoo.saving import save_tokenizer as save_tokenizer
    from beitzoo.saving import save_transformers as save_transformers
    from beitzoo.saving import save_unilm as save_unilm
    from beitzoo.training.own_images import finetune as finetune
    from beitzoo.weights.checkpoint import CheckpointError as CheckpointError
    from beitzoo.weights.checksums import DownloadError as DownloadError
    from beitzoo.zoo.checkpoints import DataConfig as DataConfig
    from beitzoo.zoo.checkpoints import PretrainedConfig as PretrainedConfig
    from beitzoo.zoo.networks import BeitConfig as BeitConfig
    from beitzoo.zoo.registry import UnknownModelError as UnknownModelError
    from beitzoo.zoo.registry import get_pretrained_cfg as get_pretrained_cfg
    from beitzoo.zoo.registry import is_model as is_model
    from beitzoo.zoo.registry import list_models as list_models
    from beitzoo.zoo.registry import list_pretrained as list_pretrained

__version__ = "0.1.0"

# The public names and their homes. A name is imported when it is first used, so that `import beitzoo`, and with it
# every help text, does not wait for PyTorch. Type checkers read the imports above; a test holds both to be the same.
_HOMES = {
    "Beit": "beitzoo.models.beit",
    "BeitConfig": "beitzoo.zoo.networks",
    "CheckpointError": "beitzoo.weights.checkpoint",
    "DataConfig": "beitzoo.zoo.checkpoints",
    "DownloadError": "beitzoo.weights.checksums",
    "PretrainedConfig": "beitzoo.zoo.checkpoints",
    "SegmentOptions": "beitzoo.inference.segment",
    "UnknownModelError": "beitzoo.zoo.registry",
    "UserError": "beitzoo.errors",
    "create_model": "beitzoo.factory",
    "create_tokenizer": "beitzoo.factory",
    "create_transform": "beitzoo.images.transforms",
    "embed": "beitzoo.inference.embed",
    "finetune": "beitzoo.training.own_images",
    "get_pretrained_cfg": "beitzoo.zoo.registry",
    "is_model": "beitzoo.zoo.registry",
    "list_models": "beitzoo.zoo.registry",
    "list_pretrained": "beitzoo.zoo.registry",
    "open_image": "beitzoo.images.files",
    "optimize": "beitzoo.models.optimize",
    "predict": "beitzoo.inference.classify",
    "resolve_data_config": "beitzoo.images.transforms",
    "save_pretrained": "beitzoo.saving",
    "save_tokenizer": "beitzoo.saving",
    "save_transformers": "beitzoo.saving",
    "save_unilm": "beitzoo.saving",
    "segment": "beitzoo.inference.segment",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
