"""What a network is given, checked before it is used: images, masks, and which blocks are meant."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import functional as F

from beitzoo.errors import InvalidOptionError, InvalidValueError, UnsupportedError
from beitzoo.zoo.networks import BeitConfig, Pair, check_divisible

_HOW = (
    "beitzoo.create_transform(**beitzoo.resolve_data_config(model))(beitzoo.open_image(path))[None] makes a batch of "
    "one image file"
)


def fit(images: Tensor, config: BeitConfig) -> Tensor:
    """Pad images if that was asked for; refuse those that the network was not made for.

    Args:
        images: (B, in_chans, height, width), or what torch.fx puts in the place of it.
        config: Of the network.
    """
    dynamic = config.dynamic_img_size or config.dynamic_img_pad
    if isinstance(images, Proxy):
        if dynamic:
            raise UnsupportedError(
                "torch.fx cannot trace a network that takes images of any size. Create it without dynamic_img_size "
                "and dynamic_img_pad, use torch.export, or for maps features_only=True or forward_intermediates."
            )
        return images  # yet to come, and not to be checked
    _check_is_batch(images)
    _, channels, height, width = images.shape
    if config.dynamic_img_pad:
        ph, pw = config.patch_size
        images = F.pad(images, (0, -width % pw, 0, -height % ph))
    elif config.dynamic_img_size:
        check_divisible((height, width), config.patch_size)
    if channels != config.in_chans or not (dynamic or (height, width) == config.img_size):
        size = ("height", "width") if dynamic else config.img_size
        raise InvalidValueError(
            f"Got images of shape {tuple(images.shape)}; this model takes {('batch', config.in_chans, *size)}. "
            "Resize the images, or create the model with img_size=(height, width), in_chans=channels or "
            "dynamic_img_size=True."
        )
    return images


def _check_is_batch(images: object) -> None:
    if not isinstance(images, Tensor):
        raise InvalidOptionError(f"Got a {type(images).__name__}; a model takes images as a tensor. {_HOW}.")
    if not images.is_floating_point():
        raise InvalidOptionError(f"Got images of {images.dtype}; a model takes them normalised, as floats. {_HOW}.")
    if images.ndim != 4:
        raise InvalidValueError(
            f"Got images of shape {tuple(images.shape)}; a batch has four sides, add the first by [None]."
        )


def grid_of(images: Tensor, config: BeitConfig) -> Pair:
    """Return rows and columns of patches, those of a padded last one too."""
    if not (config.dynamic_img_size or config.dynamic_img_pad):
        return config.grid_size
    (height, width), (ph, pw) = images.shape[2:], config.patch_size
    return (height + ph - 1) // ph, (width + pw - 1) // pw


def own_grid(tokens: Tensor, config: BeitConfig) -> Pair:
    """Return the network's grid, where a block is called with tokens (B, N, C) alone, if they can be of that."""
    if config.use_shared_rel_pos_bias:
        raise InvalidValueError(
            "Got tokens without positions, and the blocks of this network share their table. Give "
            "bias=model.position_bias(model.patch_embed.grid_size) too."
        )
    if config.use_rel_pos_bias and tokens.shape[1] != config.num_tokens:
        raise InvalidValueError(
            f"Got {tokens.shape[1]} tokens; this block has relative positions for {config.num_tokens}: the class token "
            f"and {config.grid_size} patches. Give those, or bias=model.position_bias(grid) for another grid. "
            "Extra tokens need a network with use_rel_pos_bias=False."
        )
    return config.grid_size


def flat_mask(bool_masked_pos: Tensor, patches: Tensor) -> Tensor:
    """Return a mask as (B, h w), whatever its shape was, for patches (B, h w, C)."""
    masked = bool_masked_pos.flatten(1) if bool_masked_pos.ndim > 1 else bool_masked_pos
    if masked.dtype != torch.bool or masked.shape != patches.shape[:2]:
        raise InvalidValueError(
            f"bool_masked_pos is {bool_masked_pos.dtype} of shape {tuple(bool_masked_pos.shape)}; "
            f"it must be torch.bool of shape {tuple(patches.shape[:2])}, True where a patch is masked."
        )
    return masked


def take_indices(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Turn the last n, these (negative from the end) or None (all) of `count` blocks into indices from the start."""
    if indices is None:
        return list(range(count))
    given = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
    if not given or not all(-count <= index < count for index in given):
        raise InvalidValueError(f"indices={indices}; there are {count} blocks, 0 to {count - 1} or {-count} to -1.")
    return [index % count for index in given]
