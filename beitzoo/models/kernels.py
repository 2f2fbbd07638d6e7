"""One way in, every route to the same scores."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_BYTES = 4 << 20  # scores at a time in `attend_blocked`; a share of the last cache of most server processors


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Mix values by softmax(q k^T / sqrt(D) + bias); q, k, v and the result are (B, H, N, D), bias (H, N, N).

    The bias takes the queries' dtype: cuDNN's kernel misreads a float32 bias beside half-precision queries
    (pytorch/pytorch pull request 191612).
    """
    if bias is not None and bias.requires_grad and _steps_pay(q.device.type):
        return F.dropout(attention_weights(q, k, bias), dropout) @ v
    if bias is not None and dropout == 0 and q.dtype == torch.bfloat16 and _blocks_pay(q.device.type):
        return attend_blocked(q, k, v, bias.to(q.dtype))
    mask = None if bias is None else bias.to(q.dtype).unsqueeze(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + bias), (B, H, N, N): what `attend` mixes values by."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias.to(scores.dtype)).softmax(dim=-1)


def attend_blocked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Do what `attend` does by plain products, a few heads of one image at a time, so that scores stay in the cache."""
    batch, heads, tokens, size = q.shape
    step = max(1, BLOCK_BYTES // (tokens * tokens * q.element_size()))
    mixed = q.new_empty(batch, tokens, heads, size).transpose(1, 2)  # (B, H, N, D), as the fused kernel lays it out
    for image in range(batch):
        for head in range(0, heads, step):
            part = (image, slice(head, head + step))
            scores = torch.baddbmm(bias[part[1]], q[part], k[part].transpose(1, 2), alpha=size**-0.5)
            mixed[part] = scores.softmax(dim=-1) @ v[part]
    return mixed


def _steps_pay(device_type: str) -> bool:
    """Say whether the fused kernel would leave a bias that is trained to single steps, more than are needed."""
    return device_type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _blocks_pay(device_type: str) -> bool:
    """Say whether this is inference on a CPU whose fused kernel is no faster in bfloat16 than in float32."""
    eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    return eager and device_type == "cpu" and _has_bfloat16_without_amx()


@functools.cache
def _has_bfloat16_without_amx() -> bool:
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
