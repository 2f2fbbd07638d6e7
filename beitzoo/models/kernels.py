"""What depends on the device: attention scores, the position bias and products of few tokens, each with its fast path.

A fast path is taken where it pays and `is_eager` or `is_plain` allows it. Everywhere else the standard calls of
PyTorch are made, which all that traces, transforms, compiles or counts them knows.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from beitzoo.models import position
from beitzoo.zoo.networks import BeitConfig, Pair, ResizeRule

BLOCK_BYTES = 4 << 20  # scores at a time in `attend_blocked`; a share of the last cache of most server processors
FEW_SCORES = 125_000  # up to here (3 heads at 224 pixels) one lookup takes less time than the steps of a strip

# One image at 224 pixels has 197 tokens. MKL makes less of so few rows than of a batch of four narrower products, which
# need not be shared out between threads. On AMD cores with 256-bit registers those ran 1.1 to 1.3 times as fast for all
# linears of base and large at 50 to 200 rows with two threads, 1.03 to 1.07 times with one; at 394 rows, or for the
# narrower linears of tiny and small, nothing was gained or something lost.
PARTS = 4
MOST_TOKENS = 256
LEAST_WIDTH = 768  # of inputs and of outputs


# ---- where fast paths are allowed ---------------------------------------------------------------------------


def is_eager() -> bool:
    """Say whether operators run at once and as they are called.

    The one rule for all fast paths, with what `is_plain` adds to it: not while tracing, compiling or exporting, and not
    under a transform (vmap, grad, jvp), forward-mode differentiation or a dispatch mode, which sees every operator.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    try:
        return not _is_transformed() and torch._C._len_torch_dispatch_stack() == 0
    except AttributeError:  # none of these names is promised; without one of them there are no fast paths
        return False


def is_plain(*tensors: Tensor) -> bool:
    """Say whether operators run at once, and on ordinary tensors of a CPU: no subclasses, no other layouts."""
    return is_eager() and all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.device.type == "cpu"
        for tensor in tensors
    )


def is_plain_inference(*tensors: Tensor) -> bool:
    """Say whether they do, and no gradient is wanted."""
    return not torch.is_grad_enabled() and is_plain(*tensors)


def _is_transformed() -> bool:
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


@functools.cache
def cpu_has(feature: Literal["avx2", "avx512", "avx512_bf16", "amx_tile", "vnni"]) -> bool:
    """Say whether the processor has these instructions, as far as this PyTorch can tell."""
    probe = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return probe is not None and bool(probe())


# ---- attention ----------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Mix values by softmax(q k^T / sqrt(D) + bias); q, k, v and the result are (B, H, N, D), bias (H, N, N).

    The bias takes the queries' dtype: cuDNN's kernel misreads a float32 bias beside half-precision queries
    (pytorch/pytorch pull request 191612).
    """
    if _steps_are_needed() or (bias is not None and _steps_pay(q, bias)):
        return F.dropout(attention_weights(q, k, bias), dropout) @ v
    if bias is not None and dropout == 0 and _blocks_pay(q, bias):
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
    mixed = q.new_empty(batch, tokens, heads, size).transpose(1, 2)  # (B, H, N, D), strides as the fused kernel's
    for image in range(batch):
        for head in range(0, heads, step):
            part = (image, slice(head, head + step))
            scores = torch.baddbmm(bias[part[1]], q[part], k[part].transpose(1, 2), alpha=size**-0.5)
            mixed[part] = scores.softmax(dim=-1) @ v[part]
    return mixed


def _steps_are_needed() -> bool:
    """Say whether the fused kernel lacks a rule: for transforms and forward-mode differentiation, and for ONNX."""
    if torch.compiler.is_exporting():
        return torch.onnx.is_in_onnx_export()
    if torch.compiler.is_compiling():
        return False
    try:
        return _is_transformed()
    except AttributeError:
        return False


def _steps_pay(q: Tensor, bias: Tensor) -> bool:
    """Say whether the fused kernel would leave a bias that is trained to single steps, more than are needed."""
    return torch.is_grad_enabled() and is_plain(q, bias) and bias.requires_grad


def _blocks_pay(q: Tensor, bias: Tensor) -> bool:
    """Say whether this is inference on a CPU whose fused kernel is no faster in bfloat16 than in float32."""
    return is_plain_inference(q, bias) and q.dtype == torch.bfloat16 and _has_bfloat16_without_amx()


def _has_bfloat16_without_amx() -> bool:
    return cpu_has("avx512_bf16") and not cpu_has("amx_tile")


# ---- position -----------------------------------------------------------------------------------------------


@dataclass
class PositionBias:
    """What one forward pass knows about positions; made before the first block, and the same for all.

    A block reads it and keeps nothing. Plain, as tools that shard or offload rebuild it from its fields.

    Attributes:
        grid: Rows and columns of patches of these images.
        table_grid: Those that the tables are made for.
        rule: How a table is fitted from one to the other.
        index: The table row of each pair of tokens, (N, N); made where it is needed if None.
        shared: The bias that all blocks have in common, (H, N, N), or None.
        workspace: Where the blocks' biases are written, one after the other; None where each gets fresh memory.
    """

    grid: Pair
    table_grid: Pair
    rule: ResizeRule
    index: Tensor | None = None
    shared: Tensor | None = None
    workspace: "Workspace | None" = None

    def of(self, table: Tensor | None, like: Tensor) -> Tensor | None:
        """Return the bias of a block with this table, (H, N, N), in the dtype of its queries; None if there is none.

        If there is a workspace, what is returned holds until the next call.
        """
        shared = None if self.shared is None else self.shared.to(like.device, like.dtype)
        if table is None:
            return shared
        table = position.resize_table(table, self.table_grid, self.grid, self.rule)
        if self.workspace is not None and self.workspace.takes(table, like.dtype):
            own = self.workspace.write(table, self.grid)
            return own if shared is None else own.add_(shared)
        own = position.bias(table, self._index_for(table), like.dtype)
        return own if shared is None else own + shared

    def _index_for(self, table: Tensor) -> Tensor:
        if self.index is None:
            return position.relative_position_index(self.grid, table.device)
        # Of a model that is spread over devices, most blocks are elsewhere. (What torch.fx traces has no device.)
        return self.index.to(table.device) if isinstance(table, Tensor) else self.index


def position_bias(
    grid: Pair, config: BeitConfig, like: Tensor, shared: position.RelativePositionBias | None = None
) -> PositionBias:
    """Make what the blocks of one forward pass need to know about positions.

    Args:
        grid: Rows and columns of patches of these images.
        config: Of the network.
        like: Says device and dtype, and whether a gradient may be wanted.
        shared: The table that all blocks have in common.
    """
    tables = config.use_rel_pos_bias
    workspace = Workspace.for_grid(grid, config.num_heads, like) if tables and is_plain_inference(like) else None
    bias = PositionBias(grid, config.grid_size, config.resize_rule, workspace=workspace)
    if shared is not None or (tables and workspace is None):
        bias.index = position.relative_position_index(grid, like.device)
    if shared is not None:
        bias.shared = shared(bias.index, config.grid_size, grid, config.resize_rule)
    return bias


@dataclass
class Workspace:
    """Memory for the bias of one block at a time: at 512 pixels, finding fresh memory costs more than filling it.

    Attributes:
        scores: (H, N, N or more), rows padded as `position.bias` pads them.
        rows: Table rows that are looked up for every block, of all pairs of tokens or of a strip (`_write_strip`).
    """

    scores: Tensor
    rows: Tensor

    @classmethod
    def for_grid(cls, grid: Pair, heads: int, like: Tensor) -> "Workspace":
        """Make one for a grid, and the dtype in which `like` is computed with."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else like.dtype
        tokens = 1 + grid[0] * grid[1]
        padding = -tokens % position.ROW_MULTIPLE
        scores = like.new_empty((heads, tokens, tokens + padding), dtype=dtype)
        if scores.numel() <= FEW_SCORES:
            return cls(scores, F.pad(position.relative_position_index(grid, like.device), (0, padding)).flatten())
        return cls(scores, _strip_rows(grid, like.device))

    def takes(self, table: Tensor, dtype: torch.dtype) -> bool:
        """Say whether a bias from this table can be written here."""
        return self.scores.dtype == dtype and is_plain_inference(table, self.scores)

    def write(self, table: Tensor, grid: Pair) -> Tensor:
        """Write what `position.bias` returns, (H, N, N)."""
        columns = table.to(self.scores.dtype).t().contiguous()  # (H, table rows)
        if self.rows.numel() == self.scores[0].numel():
            torch.index_select(columns, 1, self.rows, out=self.scores.flatten(1))
        else:
            _write_strip(self.scores, columns, grid, self.rows)
        return self.scores[..., : self.scores.shape[1]]


def _strip_rows(grid: Pair, device: torch.device) -> Tensor:
    """Return the table rows of the strip that `_write_strip` cuts up, one after the other."""
    h, w = grid
    x = torch.arange(w, device=device)
    dy = torch.arange(2 * h - 2, -1, -1, device=device)
    rows = dy[None, :, None] * (2 * w - 1) + (x[:, None] - x[None, :] + w - 1)[:, None, :]  # (w, 2h - 1, w)
    return rows.flatten()


def _write_strip(scores: Tensor, columns: Tensor, grid: Pair, rows: Tensor) -> None:
    """Write the bias into (H, N, N or more) from a transposed table, (H, table rows), by copying windows of a strip.

    Between patches the bias depends on the offset alone. So for all queries of one image row it is a window
    of one strip, (H, w, (2h - 1) w), which moves by w for the next row: a small lookup, then h copies of long runs.
    """
    h, w = grid
    out = scores[..., : 1 + h * w]
    strip = columns.index_select(1, rows).view(-1, w, (2 * h - 1) * w)
    to_patch, from_patch, to_itself = columns[:, -position.CLASS_ROWS :].unbind(1)
    out[:, 0] = to_patch[:, None]
    out[:, 1:, 0] = from_patch[:, None]
    out[:, 0, 0] = to_itself
    for y in range(h):
        start = (h - 1 - y) * w
        out[:, 1 + y * w : 1 + (y + 1) * w, 1:] = strip[:, :, start : start + h * w]


# ---- linears ------------------------------------------------------------------------------------------------


def linear_with_bias(module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """Call a linear without a bias and add this one: inside the product, where that is free, if nobody would miss it.

    What stands in for the linear (an adapter, a quantised one), and what is hooked to it, is called as a module.
    """
    if bias is None:
        return module(x)
    watched = is_hooked(module) or _all_modules_are_hooked() or not is_eager()
    if type(module) is nn.Linear and module.bias is None and isinstance(x, Tensor) and not watched:
        return linear(x, module.weight, bias)
    y = module(x)
    return y + bias.to(y.dtype)


def is_hooked(module: nn.Module) -> bool:
    """Say whether more happens in a call of this module than its own forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _all_modules_are_hooked() -> bool:
    probe = getattr(nn.modules.module, "_has_any_global_hook", None)
    return probe is None or bool(probe())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map (..., inputs) to (..., outputs), as `torch.nn.functional.linear` does; few tokens by narrower products."""
    if not _parts_pay(x, weight):
        return F.linear(x, weight, bias)
    tokens = x.flatten(0, -2).expand(PARTS, -1, -1)
    weights = weight.unflatten(0, (PARTS, -1)).transpose(1, 2)  # (parts, inputs, outputs / parts)
    y = torch.bmm(tokens, weights) if bias is None else torch.baddbmm(bias.view(PARTS, 1, -1), tokens, weights)
    return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


def _parts_pay(x: Tensor, weight: Tensor) -> bool:
    """Say whether this is float32 inference on a CPU with MKL, with few tokens and wide layers."""
    return (
        is_plain_inference(x, weight)
        and x.dtype == weight.dtype == torch.float32
        and 0 < x.numel() <= MOST_TOKENS * x.shape[-1]
        and x.ndim > 1
        and min(weight.shape) >= LEAST_WIDTH
        and weight.shape[0] % PARTS == 0
        and torch.backends.mkl.is_available()
        and PARTS % torch.get_num_threads() == 0
        and not torch.is_autocast_enabled("cpu")
    )
