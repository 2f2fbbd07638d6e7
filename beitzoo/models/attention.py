"""One way in, every route to the same scores."""

from torch import Tensor
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Mix values by softmax(q k^T / sqrt(D) + bias); q, k, v and the result are (B, H, N, D), bias (H, N, N).

    The bias takes the queries' dtype: cuDNN's kernel misreads a float32 bias beside half-precision queries
    (pytorch/pytorch pull request 191612).
    """
    mask = None if bias is None else bias.to(q.dtype).unsqueeze(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + bias), (B, H, N, N): what `attend` mixes values by."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias.to(scores.dtype)).softmax(dim=-1)
