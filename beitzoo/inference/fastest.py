"""Which form of a model computes many images fastest: the one rule of all commands and functions."""

from collections.abc import Iterable
from itertools import chain, islice
from typing import TypeVar

from beitzoo.errors import UserError
from beitzoo.models import kernels
from beitzoo.models.beit import Beit
from beitzoo.models.optimize import InferenceBeit, optimize

Item = TypeVar("Item")

# What a user of a command is told.
OPTIMIZED = "The optimized copy computes, the same to rounding; --no-optimize leaves it out."
# Making the copy of a base network took as long as its passes over one to four images, and the copy saved a quarter to
# half of each pass (two AMD cores, idle to busy): it has paid for itself after about eight.
HANDFUL = 8


def for_many_images(model: Beit, count: int, *, inplace: bool = False) -> Beit:
    """Return the network that computes so many images fastest, with the same outputs to rounding.

    On a CPU and for more than a handful of images it is the inference copy that `optimize` makes. Elsewhere or for
    fewer images, and where the network is watched or changed so that no copy can be made (hooks, adapters), it is the
    network itself.

    Args:
        model: The network.
        count: How many images there will be.
        inplace: Put the copy in the place of the network, whose memory it takes; it is not to be used again.
    """
    if count <= HANDFUL or model.cls_token.device.type != "cpu" or isinstance(model, InferenceBeit):
        return model
    if any(map(kernels.is_hooked, model.modules())):
        return model
    try:
        return optimize(model, inplace=inplace)
    except UserError:  # not of the plain network, which is no fault here
        return model


def count_ahead(images: Iterable[Item]) -> tuple[int, Iterable[Item]]:
    """Return how many images there are, at most one more than a handful, and all images; no others are read for it."""
    rest = iter(images)
    first = list(islice(rest, HANDFUL + 1))
    return len(first), chain(first, rest)
