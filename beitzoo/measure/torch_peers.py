"""Peers that are torch modules, which can also be trained: our network, timm's and transformers'."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from beitzoo.errors import UnsupportedError
from beitzoo.measure import steps
from beitzoo.measure.sides import Side
from beitzoo.models.mim import MaskedImageModel
from beitzoo.models.segmentation import Segmenter
from beitzoo.saving import save_pretrained, save_transformers
from beitzoo.weights.timm_form import timm_lacks


def beitzoo_network(side: Side) -> nn.Module:
    """Copy our network."""
    model = deepcopy(side.model)
    return steps.PixelLoss(model) if isinstance(model, Segmenter) else model


def timm_network(side: Side) -> nn.Module:
    """Build timm's network of our weights."""
    import timm

    if side.mask is not None:
        raise UnsupportedError(
            f"timm has no masked image modelling to train {side.options.model} by; compare it with transformers, or "
            "give --num-classes to train it as a classifier."
        )
    if isinstance(side.model, Segmenter):
        raise UnsupportedError(f"timm has no segmentation models such as {side.options.model}; try transformers.")
    lacking = timm_lacks(side.model.backbone.config)
    if lacking is not None:
        raise UnsupportedError(f"timm cannot build {side.options.model}: {lacking}. Compare it with transformers.")
    save_pretrained(side.model, side.folder / "timm")
    network: nn.Module = timm.create_model(f"local-dir:{side.folder / 'timm'}", pretrained=True)
    return network


def transformers_network(side: Side) -> nn.Module:
    """Build transformers' network of our weights, with the outputs of ours."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = side.folder / "transformers"
    if isinstance(side.model, MaskedImageModel) and side.model.config.early_layers:
        raise UnsupportedError(
            f"transformers has no patch aggregation, with which {side.options.model} is trained; time our network "
            "alone by leaving out --compare, or use --bench inference."
        )
    save_transformers(side.model, folder)
    if isinstance(side.model, MaskedImageModel):
        return _Outputs(transformers.BeitForMaskedImageModeling.from_pretrained(folder), _logits)
    if isinstance(side.model, Segmenter):
        return _PixelOutputs(transformers.BeitForSemanticSegmentation.from_pretrained(folder), _logits)
    if side.model.num_classes:
        return _Outputs(transformers.BeitForImageClassification.from_pretrained(folder), _logits)
    config = side.model.config
    read = _mean_of_patches if config.global_pool == "avg" and not config.norm_after_pooling else _pooled
    return _Outputs(transformers.BeitModel.from_pretrained(folder), read)


class _Outputs(nn.Module):
    """A network of transformers that gives what is read of its outputs; with a mask, where that is."""

    def __init__(self, network: nn.Module, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.read = read

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return self.read(self.network(images))
        return self.read(self.network(images, bool_masked_pos=mask))[mask]

    def set_grad_checkpointing(self) -> None:
        self.network.gradient_checkpointing_enable()  # type: ignore[operator]


class _PixelOutputs(_Outputs):
    """A segmentation network of transformers, with its own loss: what `steps.PixelLoss` is for ours."""

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return self.read(self.network(images))
        loss: Tensor = self.network(images, labels=labels).loss
        return loss


def _logits(outputs: Any) -> Tensor:
    logits: Tensor = outputs.logits
    return logits


def _pooled(outputs: Any) -> Tensor:
    features: Tensor = outputs.pooler_output
    return features


def _mean_of_patches(outputs: Any) -> Tensor:
    """Pool normed tokens: where they are normed, transformers' pooler takes the class token."""
    tokens: Tensor = outputs.last_hidden_state
    return tokens[:, 1:].mean(dim=1)
