"""Which form of a model computes many images fastest: the one rule of all commands."""

from beitzoo.models.beit import Beit
from beitzoo.models.optimize import InferenceBeit, optimize

# Making the copy of a base network took as long as its passes over one to four images, and the copy saved a quarter to
# half of each pass (two AMD cores, idle to busy): it has paid for itself after about eight.
HANDFUL = 8


def for_many_images(model: Beit, count: int) -> tuple[Beit, str | None]:
    """Return the network to use for so many images, and what a user must be told of it.

    On a CPU and for more than a handful it is the inference copy that `optimize` makes, the same to rounding, in the
    place of the network, whose memory it takes. Elsewhere, or for fewer, it is the network itself, and nothing is said.

    Args:
        model: The network; not to be used again.
        count: How many images there will be.
    """
    if count <= HANDFUL or model.cls_token.device.type != "cpu" or isinstance(model, InferenceBeit):
        return model, None
    return optimize(
        model, inplace=True
    ), "The optimized copy computes, the same to rounding; --no-optimize leaves it out."
