"""The blocks of an inference copy: what a forward pass would compute again every time is in their weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beitzoo.models import inputs, kernels
from beitzoo.models.beit import Attention, Block
from beitzoo.models.inference_linear import MakeLinear
from beitzoo.models.kernels import PositionBias
from beitzoo.zoo.networks import Pair

Attend = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Parts:
    """What an inference block is made of.

    Attributes:
        qkv: Makes the linear to queries, keys and values.
        proj: Makes the one behind attention.
        fc1: Makes the first one of the MLP.
        fc2: Makes the second one.
        attend: Mixes values, see `kernels.attend`.
        images_at_a_time: How many images a block maps together; all if None. What lies between its linears then
            stays in the cache, and needs no fresh memory.
    """

    qkv: MakeLinear
    proj: MakeLinear
    fc1: MakeLinear
    fc2: MakeLinear
    attend: Attend = kernels.attend
    images_at_a_time: int | None = None


class InferenceAttention(Attention):
    """Attention whose queries and values get their bias in the product, up to the projection."""

    def __init__(self, attn: Attention, parts: Parts) -> None:
        nn.Module.__init__(self)  # the parts are given, none is to be made
        self.config, self.num_heads, self.head_dim = attn.config, attn.num_heads, attn.head_dim
        bias = None
        if attn.q_bias is not None and attn.v_bias is not None:
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        assert isinstance(attn.qkv, nn.Linear)
        qkv = parts.qkv(attn.qkv.weight.detach(), bias)
        self.qkv, self.returns = qkv, qkv.returns
        self.q_bias = self.v_bias = None
        self.relative_position_bias_table = attn.relative_position_bias_table
        self.attend = parts.attend
        self.ready: tuple[Pair, Tensor | None] | None = None

    def make_ready(self, bias: PositionBias, like: Tensor) -> None:
        """Keep the bias of this block for one grid."""
        like = like.new_empty(0, dtype=self.returns or like.dtype)
        self.ready = bias.grid, bias.of(self.relative_position_bias_table, like)

    def forward(self, x: Tensor, bias: PositionBias | None = None) -> Tensor:
        """Map tokens (B, N, C) to mixed values (B, N, C), not yet projected."""
        return self.mix(x, self.bias_for(x, bias))

    def mix(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Do the same with the bias of this block, (H, N, N)."""
        return self.attend(self._project(x), bias).transpose(1, 2).flatten(2)

    def weights(self, x: Tensor, bias: PositionBias | None = None) -> Tensor:
        """Return how much each token (query, rows) takes from each (key, columns), (B, H, N, N)."""
        q, k, _ = self._project(x).to(x.dtype)
        return kernels.attention_weights(q, k, self.bias_for(x, bias))

    def bias_for(self, x: Tensor, bias: PositionBias | None) -> Tensor | None:
        """Return the bias of this block, (H, N, N), for tokens x."""
        grid = inputs.own_grid(x, self.config) if bias is None else bias.grid
        if self.ready is not None and self.ready[0] == grid:
            return self.ready[1]
        bias = bias or kernels.position_bias(grid, self.config, like=x)
        return bias.of(self.relative_position_bias_table, x)


class InferenceBlock(Block):
    """A block with layer scale folded into the last linear of each branch."""

    def __init__(self, block: Block, parts: Parts) -> None:
        nn.Module.__init__(self)
        self.norm1, self.norm2, self.drop_path = block.norm1, block.norm2, block.drop_path
        self.attn: InferenceAttention = InferenceAttention(block.attn, parts)
        self.proj = parts.proj(*_scaled(block.attn.proj, block.gamma_1))
        self.fc1 = parts.fc1(block.mlp.fc1.weight.detach(), block.mlp.fc1.bias.detach())
        self.fc2 = parts.fc2(*_scaled(block.mlp.fc2, block.gamma_2))
        self.images_at_a_time = parts.images_at_a_time

    def forward(self, x: Tensor, bias: PositionBias | None = None, kept: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C), or only those that are kept to (B, K, C)."""
        own = self.attn.bias_for(x, bias)
        images = self._images_at_a_time(x)
        if images == len(x):
            return self._map(x, own, kept)
        mapped = x.new_empty(x.shape if kept is None else (*kept.shape, x.shape[2]))
        for place in range(0, len(x), images):
            part = slice(place, place + images)
            mapped[part] = self._map(x[part], own, None if kept is None else kept[part])
        return mapped

    def _images_at_a_time(self, x: Tensor) -> int:
        """Return the most that divides the batch: linears may be packed for one number of tokens."""
        if not self.images_at_a_time or not kernels.is_plain(x):
            return len(x)
        return max((n for n in range(1, self.images_at_a_time + 1) if len(x) % n == 0), default=1) if len(x) else 0

    def _map(self, x: Tensor, bias: Tensor | None, kept: Tensor | None) -> Tensor:
        x = self.proj.add(x, self.attn.mix(self.norm1(x), bias))
        if kept is not None:
            x = x.take_along_dim(kept[..., None], dim=1)
        return self.fc2.add(x, self.fc1.gelu(self.norm2(x)))


def _scaled(linear: nn.Linear, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear whose outputs are scaled by gamma; halves are multiplied as float32."""
    weight, bias = linear.weight.detach(), linear.bias.detach()
    if gamma is None:
        return weight, bias
    gamma = gamma.to(torch.promote_types(gamma.dtype, torch.float32))
    return weight * gamma[:, None], bias * gamma
