"""Where a token is: relative position biases, and how position parameters follow a new grid.

Two tokens that are (dy, dx) apart get a learned bias per head on their attention score, looked up in a
table of (2h - 1)(2w - 1) + 3 rows: one for each offset in a grid of h x w patches, row-major, and three
for the class token, which has no place (to a patch, from a patch, to itself). BEiT, section 2.1;
`modeling_finetune.py`, class `Attention`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.zoo.networks import CLASS_ROWS as CLASS_ROWS
from beitzoo.zoo.networks import Pair, ResizeRule
from beitzoo.zoo.networks import table_rows as table_rows

ROW_MULTIPLE = 8


def relative_position_index(grid: Pair, device: torch.device) -> Tensor:
    """Return the table row of every pair of tokens, (N, N) with N = 1 + h w; queries are rows."""
    h, w = grid
    y = torch.arange(h, device=device)[:, None].expand(h, w).flatten()
    x = torch.arange(w, device=device).expand(h, w).flatten()
    dy = y[:, None] - y[None, :] + h - 1
    dx = x[:, None] - x[None, :] + w - 1
    index = F.pad(dy * (2 * w - 1) + dx, (1, 0, 1, 0))  # (N, N)
    to_patch, from_patch, to_itself = range(table_rows(grid) - CLASS_ROWS, table_rows(grid))
    index[0, :] = to_patch
    index[:, 0] = from_patch
    index[0, 0] = to_itself
    return index


def bias(table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Look up the bias of every pair of tokens, (H, N, N), in a table of (rows, H) by an index (N, N).

    Selecting columns of the transposed table rather than rows of the table gives the attention layout
    at once, and its backward is a sum over columns instead of a sort. That sum has one term for every pair with
    the same offset, too many for half precision: so the result is cast, not the table.

    Rows are padded to a multiple of 8 and cut back to N: fused kernels on GPUs copy a bias that is not aligned so.
    """
    columns = table.t().contiguous()  # (H, rows)
    tokens = index.shape[1]
    padded = F.pad(index, (0, -tokens % ROW_MULTIPLE))
    return columns.index_select(1, padded.flatten()).view(-1, *padded.shape).to(dtype)[..., :tokens]


class RelativePositionBias(nn.Module):
    """The table that all blocks share during pretraining.

    It is asked by a call, so that tools which fetch parameters when a module is called (offloading, sharding) see it.
    """

    def __init__(self, grid: Pair, num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(table_rows(grid), num_heads))

    def forward(self, index: Tensor, source: Pair, target: Pair, rule: ResizeRule) -> Tensor:
        """Return the bias for a grid, (H, N, N), by its index and from the table of this or another grid."""
        table = resize_table(self.relative_position_bias_table, source, target, rule)
        return bias(table, index, table.dtype)


def resize_table(table: Tensor, source: Pair, target: Pair, rule: ResizeRule = "geometric_cubic") -> Tensor:
    """Fit a bias table, (rows, H), to another grid; the three rows of the class token stay.

    All rules are linear along each axis, so two small matrices say it all, for oblong grids too:

    - `geometric_cubic` (unilm): offsets near zero keep their bias, far ones are stretched, their distances
      growing as a geometric series; between them a cubic spline. The original evaluates SciPy's `interp2d`,
      since removed. Plain resizing cost BEiT's authors accuracy on dense tasks (microsoft/unilm issue 376).
      An axis that keeps its size keeps its values.
    - `geometric_linear` (timm): the same offsets with straight lines between them; an axis that keeps its
      size is stretched too if the other changes.
    - `bilinear` (transformers): the table as an image.
    """
    if source == target:
        return table
    offsets, class_rows = table[:-CLASS_ROWS], table[-CLASS_ROWS:]
    wide = torch.float32 if table.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    maps = [_axis_map(old, new, rule).to(table.device, wide) for old, new in zip(source, target, strict=True)]
    squares = offsets.to(wide).view(2 * source[0] - 1, 2 * source[1] - 1, -1)
    resized = torch.einsum("ij,jkh,lk->ilh", maps[0], squares, maps[1]).flatten(0, 1)
    return torch.cat([resized.to(table.dtype), class_rows])


def resize_pos_embed(pos_embed: Tensor, source: Pair, target: Pair) -> Tensor:
    """Fit absolute embeddings, (1, N, C), to another grid: bicubic, the class token's unchanged (unilm)."""
    if source == target:
        return pos_embed
    prefix, patches = pos_embed[:, :1], pos_embed[:, 1:]
    maps = patches.transpose(1, 2).unflatten(2, source).float()  # (1, C, h, w)
    resized = F.interpolate(maps, size=target, mode="bicubic", align_corners=False)
    return torch.cat([prefix, resized.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def _axis_map(old: int, new: int, rule: ResizeRule) -> Tensor:
    """Return the (2 new - 1, 2 old - 1) matrix that resizes one axis of offsets."""
    identity = torch.eye(2 * old - 1, dtype=torch.float64, device="cpu")
    if rule == "bilinear":
        return F.interpolate(identity[None], size=2 * new - 1, mode="linear", align_corners=False)[0].t()
    if rule == "geometric_cubic" and old == new:
        return identity
    points = _geometric_offsets(old - 1, new - 1)
    at = torch.arange(1 - new, new, dtype=torch.float64, device="cpu").clamp(points[0], points[-1])
    degree = min(1 if rule == "geometric_linear" else 3, len(points) - 1)
    # A cubic is not-a-knot: its second and last but one point carry no knot.
    inner = points[1:-1] if degree == 1 else points[2:-2]
    knots = torch.cat([points[:1].expand(degree + 1), inner, points[-1:].expand(degree + 1)])
    return _splines(knots, degree, at) @ torch.linalg.inv(_splines(knots, degree, points))


def _geometric_offsets(count: int, reach: int) -> Tensor:
    """Place `count` offsets on each side of 0 at 1, 1 + q, 1 + q + q^2, ... so that the last is at `reach`.

    q is found by bisection in [1.01, 1.5] to 1e-6, bounds and precision as in the original: a grid that
    shrinks ends at the lower bound, and offsets past the reach are cut.
    """
    low, high, ratio = 1.01, 1.5, 1.01
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**count) / (1 - ratio) > reach:
            high = ratio
        else:
            low = ratio
    side = (ratio ** torch.arange(count, dtype=torch.float64, device="cpu")).cumsum(0)
    return torch.cat([-side.flip(0), side.new_zeros(1), side])


def _splines(knots: Tensor, degree: int, at: Tensor) -> Tensor:
    """Evaluate the B-splines of a clamped knot vector, (points, splines), by the Cox-de Boor recursion."""
    spans = len(knots) - 1
    # The last span is closed on the right, or the end point would belong to no span.
    span = torch.searchsorted(knots, at, right=True).sub(1).clamp(degree, spans - degree - 1)
    values = F.one_hot(span, spans).to(knots.dtype)
    for k in range(1, degree + 1):
        left, right = knots[: spans - k], knots[k + 1 :]
        rise = (at[:, None] - left) / (knots[k:-1] - left)
        fall = (right - at[:, None]) / (right - knots[1 : spans - k + 1])
        # Repeated knots give 0/0, which the recursion defines as 0.
        values = rise.nan_to_num(0, 0, 0) * values[:, :-1] + fall.nan_to_num(0, 0, 0) * values[:, 1:]
    return values
