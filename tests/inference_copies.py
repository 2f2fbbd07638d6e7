"""Choices for inference copies as if they had been measured."""

from dataclasses import replace

from beitzoo import Beit
from beitzoo.models.choices import Choice, Choices, network_of


def made_of(model: Beit, linear: str, attention: str = "fused", images: str = "all", dtype: str = "float32") -> Choices:
    """Return choices that take one kind for all linears of a model; `packed_gelu_behind` where there is a GELU."""
    taken, config = Choice(linear), model.config
    choices = Choices(
        qkv=taken,
        proj=taken,
        fc1=taken,
        fc2=taken,
        attention=Choice(attention),
        batch_parts=Choice("1"),
        images_at_a_time=Choice(images),
        block=Choice("chosen"),
        network=network_of(config),
        dtype=dtype,
        images_like=(3, config.in_chans, *config.img_size),
        threads=1,
        instructions=(),
    )
    if linear == "packed_gelu_behind":
        packed = Choice("packed")
        return replace(choices, qkv=packed, proj=packed, fc2=packed)
    return choices
