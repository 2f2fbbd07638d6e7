"""What `optimize` chose for a model, and for what: a plain record that can be kept, printed and given again."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from beitzoo.errors import InvalidValueError, describe_invalid
from beitzoo.zoo.networks import BeitConfig

ImagesLike = tuple[int, int, int, int]  # batch, channels, height and width


@dataclass(frozen=True)
class Choice:
    """One thing that was chosen.

    Attributes:
        taken: Its name.
        speedup: Time of the plain one over its time, 1.0 where there was nothing to choose from.
    """

    taken: str
    speedup: float = 1.0


@dataclass(frozen=True)
class Choices:
    """What was taken for each part of a block, and for which network, input and machine that was measured.

    Attributes:
        qkv: The linear to queries, keys and values: `plain`, `packed`, `packed_for_tokens` (packed for one number of
            tokens), `convolution`, `int8` (activations scaled per token) or `int8_image` (per image).
        proj: The one behind attention.
        fc1: The first one of the MLP with its GELU; also `packed_gelu_behind`.
        fc2: The second one.
        attention: `fused`, or `blocked` (plain products, a few heads at a time), or between 8-bit linears
            `blocked_bfloat16` (the same in that precision).
        batch_parts: In how many parts a batch is computed at the same time, each with its share of the threads.
        images_at_a_time: How many images of a batch, or of such a part, a block maps together, or `all`.
        block: `chosen`, or `plain` if the choices together were no faster than the plain block.
        network: Channels, heads, hidden channels of the MLP, and blocks.
        dtype: Of the weights: `float32`, `bfloat16`, `int8`, ...
        images_like: Batch, channels, height and width that were measured with.
        threads: That PyTorch computed with.
        instructions: Of the processor, as far as PyTorch can tell.
    """

    qkv: Choice
    proj: Choice
    fc1: Choice
    fc2: Choice
    attention: Choice
    batch_parts: Choice
    images_at_a_time: Choice
    block: Choice
    network: tuple[int, int, int, int]
    dtype: str
    images_like: ImagesLike
    threads: int
    instructions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return numbers, texts, lists and dicts, as JSON has them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Choices":
        """Make what `to_dict` returned into a record again.

        Raises:
            ValueError: It is something else.
        """
        from pydantic import TypeAdapter, ValidationError  # late: whoever measures needs none of it

        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            raise InvalidValueError(
                f"Got choices that optimize() did not make: {describe_invalid(error)}. "
                "Give model.choices of another copy, or its to_dict()."
            ) from None

    def check_fits(self, config: BeitConfig, dtype: str) -> None:
        """Refuse choices that were made for another network or dtype."""
        ours, theirs = (network_of(config), dtype), (self.network, self.dtype)
        if ours != theirs:
            raise InvalidValueError(
                f"Got choices made for a network of {_describe(*theirs)}; this one is of {_describe(*ours)}. "
                "Leave them out to measure, or give those of such a network."
            )


def network_of(config: BeitConfig) -> tuple[int, int, int, int]:
    """Return what of a network decides its speed beside the images: channels, heads, hidden channels and blocks."""
    return config.embed_dim, config.num_heads, config.hidden_dim, config.depth


def dtype_name(dtype: torch.dtype | Literal["int8"]) -> str:
    """Return float32, bfloat16, int8, ..."""
    return str(dtype).removeprefix("torch.")


def _describe(network: tuple[int, int, int, int], dtype: str) -> str:
    width, heads, hidden, depth = network
    return f"{depth} blocks, {width} channels, {heads} heads and {hidden} hidden channels in {dtype}"
