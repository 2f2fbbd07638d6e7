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
