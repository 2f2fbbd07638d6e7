"""Which form of a model computes many images fastest: the one rule of all commands and functions."""

from collections.abc import Iterable
from itertools import chain, islice
from typing import TypeVar

import torch
from torch import nn

from beitzoo.errors import UserError
from beitzoo.models import kernels
from beitzoo.models.beit import Beit
from beitzoo.models.choices import ImagesLike
from beitzoo.models.optimize import InferenceBeit, optimize
from beitzoo.models.segmentation import Segmenter

Item = TypeVar("Item")
Network = TypeVar("Network", Beit, Segmenter)

# What a user of a command is told.
OPTIMIZED = "The optimized copy computes, the same to rounding; --no-optimize leaves it out."
# Windows of a photograph, 4 to 3, by whose passes the copy of a segmentation model is chosen.
WINDOWS = 2
# An estimate: `optimize` measures for a second with a base network and two cores, which is as long as its passes over
# five images, and the copy saves about a tenth of a pass: it has paid for itself after about fifty. (Of a segmentation
# model, UPerNet on a base network with windows of 512 pixels, two cores of AVX-512: it measures for 5 s and saves 0.34
# of 9.3 s for each image, as most of the time goes into the decoder's convolutions: paid after 15.)
HANDFUL = 50

# What rows call what computed.
PLAIN, COPY = "plain network", "inference copy"


def computed_by(model: nn.Module) -> str:
    """Say, as rows do, whether a model, or the network in it, is the inference copy that `optimize` makes."""
    return COPY if any(isinstance(module, InferenceBeit) for module in model.modules()) else PLAIN


def pays(count: int, device: torch.device) -> bool:
    """Tell whether a copy for so many images computes the rest faster than it takes to be made."""
    return count > HANDFUL and device.type == "cpu"


def for_many_images(model: Network, count: int, batch_size: int, *, inplace: bool = False) -> Network:
    """Return the network that computes so many images fastest, with the same outputs to rounding.

    On a CPU and for more than a handful of images it is the inference copy that `optimize` makes. Elsewhere or for
    fewer images, and where the network is watched or changed so that no copy can be made (hooks, adapters), it is the
    network itself.

    Args:
        model: The network, or the segmentation model.
        count: How many images there will be.
        batch_size: Of the passes to come, for which the copy is chosen; of segmentation models windows.
        inplace: Put the copy in the place of the network, whose memory it takes; it is not to be used again.
    """
    backbone = model.backbone if isinstance(model, Segmenter) else model
    if not pays(count, backbone.cls_token.device) or isinstance(backbone, InferenceBeit):
        return model
    if any(map(kernels.is_hooked, model.modules())):
        return model
    try:
        return optimize(model, inplace=inplace, images_like=batch_like(backbone, count, batch_size))
    except UserError:  # not of the plain network, which is no fault here
        return model


def batch_like(model: Beit, count: int, batch_size: int) -> ImagesLike:
    """Return batch, channels, height and width of the passes over so many images."""
    return min(count, batch_size), model.config.in_chans, *model.config.img_size


def count_ahead(images: Iterable[Item]) -> tuple[int, Iterable[Item]]:
    """Return how many images there are, at most one more than a handful, and all images; no others are read for it."""
    rest = iter(images)
    first = list(islice(rest, HANDFUL + 1))
    return len(first), chain(first, rest)
