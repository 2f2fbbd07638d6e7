"""What depends on the device: attention scores, the position bias and products, each with its fast path.

A fast path is taken where it pays and `is_eager` or `is_plain` allows it. Everywhere else the standard calls of
PyTorch are made, which all that traces, transforms, compiles or counts them knows.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from beitzoo.models import position
from beitzoo.zoo.networks import BeitConfig, Pair, ResizeRule

Instructions = Literal["avx2", "avx512", "vnni", "avx512_bf16", "amx_tile"]

LEAST_ROWS = 1024  # of a linear in bfloat16; fewer do not repay the packing of its weight
LEAST_SCORES = 200_000  # of one image; fewer (3 heads at 224 pixels) two threads share out worse than those of a batch
BLOCK_BYTES = 4 << 20  # scores at a time in `attend_blocked`; a share of the last cache of most server processors


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
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not _is_several(tensor)
        for tensor in tensors
    )


def is_plain_inference(*tensors: Tensor) -> bool:
    """Say whether they do, and no gradient is wanted."""
    return not torch.is_grad_enabled() and is_plain(*tensors)


def _is_transformed() -> bool:
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def _is_several(tensor: Tensor) -> bool:
    """Say whether it is one of the many gradients that `torch.autograd.grad(..., is_grads_batched=True)` takes."""
    probe = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)
    return probe is not None and bool(probe(tensor))


@functools.cache
def cpu_has(feature: Instructions) -> bool:
    """Say whether the processor has these instructions, as far as this PyTorch can tell."""
    probe = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return probe is not None and bool(probe())


# ---- attention ----------------------------------------------------------------------------------------------


def attend(qkv: Tensor, bias: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Mix values by softmax(q k^T / sqrt(D) + bias).

    The bias takes the queries' dtype: cuDNN's kernel misreads a float32 bias beside half-precision queries
    (pytorch/pytorch pull request 191612).

    Args:
        qkv: Queries, keys and values, (3, B, H, N, D).
        bias: Of positions, (H, N, N).
        dropout: Share of the weights that is dropped.

    Returns:
        Mixed values, (B, H, N, D).
    """
    trained = bias is not None and _is_trained(qkv, bias)
    if trained and dropout == 0 and qkv.shape[2] * qkv.shape[3] ** 2 >= LEAST_SCORES:
        mixed: Tensor = _Attention.apply(_for_products(qkv), bias)
        return mixed
    q, k, v = qkv.unbind(0)
    if trained or _steps_are_needed():
        return F.dropout(attention_weights(q, k, bias), dropout) @ v
    mask = None if bias is None else bias.to(q.dtype).unsqueeze(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + bias), (B, H, N, N): what `attend` mixes values by."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias.to(scores.dtype)).softmax(dim=-1)


def attend_blocked(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """Do what `attend` does by plain products, a few heads of one image at a time, so that scores stay in the cache.

    Without gradients and on a CPU; anything else is left to `attend`.
    """
    if bias is None or not is_plain(qkv, bias) or qkv.requires_grad or bias.requires_grad:
        return attend(qkv, bias)
    q, k, v = qkv.unbind(0)
    bias = bias.to(q.dtype)
    batch, heads, tokens, size = q.shape
    step = max(1, BLOCK_BYTES // (tokens * tokens * q.element_size()))
    mixed = q.new_empty(batch, tokens, heads, size).transpose(1, 2)  # (B, H, N, D), strides as the fused kernel's
    for image in range(batch):
        for head in range(0, heads, step):
            part = (image, slice(head, head + step))
            scores = torch.baddbmm(bias[part[1]], q[part], k[part].transpose(1, 2), alpha=size**-0.5)
            mixed[part] = scores.softmax(dim=-1) @ v[part]
    return mixed


def attend_blocked_bfloat16(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """Do the same in bfloat16."""
    return attend_blocked(qkv.bfloat16(), bias)


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


def _is_trained(qkv: Tensor, bias: Tensor) -> bool:
    """Say whether a bias is trained on a CPU: the fused kernel would leave it to single steps, more than are needed."""
    if not torch.is_grad_enabled() or not is_plain(qkv, bias):
        return False
    return qkv.requires_grad and bias.requires_grad and qkv.dtype == bias.dtype


class _Attention(torch.autograd.Function):
    """Attention whose bias is trained, one image at a time, so that its scores stay in the cache both ways.

    The gradient of queries, keys and values lies in memory as the output of the linear that made them.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor) -> Tensor:
        _, batch, heads, tokens, size = qkv.shape
        weights = qkv.new_empty(batch, heads, tokens, tokens)
        mixed = qkv.new_empty(batch, tokens, heads, size).transpose(1, 2)
        exact = bias.to(torch.promote_types(bias.dtype, torch.float32))  # a softmax of halves takes longer
        for image in range(batch):
            q, k, v = qkv[:, image].unbind(0)
            scores = torch.add(exact, torch.bmm(q, k.transpose(1, 2)), alpha=size**-0.5)
            weights[image] = scores.softmax(-1)
            mixed[image] = torch.bmm(weights[image], v)
        ctx.save_for_backward(qkv, bias, weights)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        qkv, bias, weights = ctx.saved_tensors
        (gradient,) = gradients
        if torch.is_grad_enabled() or not is_plain(gradient):
            return _gradients_in_steps(qkv, bias, gradient)
        _, batch, heads, tokens, size = qkv.shape
        to_qkv = qkv.new_empty(batch, tokens, 3, heads, size).permute(2, 0, 3, 1, 4)
        to_bias = torch.zeros(bias.shape, dtype=torch.promote_types(bias.dtype, torch.float32))
        for image in range(batch):
            (q, k, v), (to_q, to_k, to_v) = qkv[:, image].unbind(0), to_qkv[:, image].unbind(0)
            to_mixed = _for_products(gradient[image])
            to_weights = torch.bmm(to_mixed, v.transpose(1, 2))
            to_scores = torch._softmax_backward_data(to_weights, weights[image], -1, weights.dtype)
            to_bias += to_scores
            torch.mul(torch.bmm(to_scores, k), size**-0.5, out=to_q)
            torch.mul(torch.bmm(to_scores.transpose(1, 2), q), size**-0.5, out=to_k)
            to_v.copy_(torch.bmm(weights[image].transpose(1, 2), to_mixed))
        return to_qkv, to_bias.to(bias.dtype)


def _for_products(tensor: Tensor) -> Tensor:
    """Copy halves once: oneDNN would copy their views for each product. MKL reads views of float32 where they lie."""
    return tensor.contiguous() if tensor.itemsize == 2 else tensor


def _gradients_in_steps(qkv: Tensor, bias: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of attention by operators that can be differentiated in turn, or transformed."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        q, k, v = qkv.unbind(0)
        mixed = attention_weights(q, k, bias) @ v
    return torch.autograd.grad(mixed, (qkv, bias), gradient, create_graph=create_graph)


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

    def beside(self) -> "PositionBias":
        """Return the same for another thread, with a workspace of its own."""
        return self if self.workspace is None else replace(self, workspace=self.workspace.fresh())

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
        rows: Table rows of the strip that is looked up for every block (`_write_strip`).
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
        return cls(scores, _strip_rows(grid, like.device))

    def fresh(self) -> "Workspace":
        """Return another one."""
        return replace(self, scores=torch.empty_like(self.scores))

    def takes(self, table: Tensor, dtype: torch.dtype) -> bool:
        """Say whether a bias from this table can be written here."""
        return self.scores.dtype == dtype and is_plain_inference(table, self.scores)

    def write(self, table: Tensor, grid: Pair) -> Tensor:
        """Write what `position.bias` returns, (H, N, N)."""
        columns = table.to(self.scores.dtype).t().contiguous()  # (H, table rows)
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


def call_linear(module: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Call a linear by its fastest product if nobody would miss the call, with a bias if it has none of its own.

    What stands in for the linear (an adapter, a quantised one), and what is hooked to it, is called as a module.
    """
    watched = is_hooked(module) or _all_modules_are_hooked() or not is_eager()
    if type(module) is nn.Linear and isinstance(x, Tensor) and not watched and (bias is None or module.bias is None):
        return linear(x, module.weight, module.bias if bias is None else bias)
    y = module(x)
    return y if bias is None else y + bias.to(y.dtype)


def is_hooked(module: nn.Module) -> bool:
    """Say whether more happens in a call of this module than its own forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def is_any_hooked(model: nn.Module) -> bool:
    """Say whether that is so of any module in it."""
    return _all_modules_are_hooked() or any(is_hooked(module) for module in model.modules())


def _all_modules_are_hooked() -> bool:
    probe = getattr(nn.modules.module, "_has_any_global_hook", None)
    return probe is None or bool(probe())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map (..., inputs) to (..., outputs), as `torch.nn.functional.linear` does, by the fastest product."""
    parameters = [weight] if bias is None else [weight, bias]
    if x.ndim < 2 or x.numel() == 0 or not is_plain(x, *parameters):
        return F.linear(x, weight, bias)
    y: Tensor
    if _onednn_pays(x, *parameters):
        y = _Product.apply(x.flatten(0, -2), weight, bias)
    elif _convolution_pays(x, *parameters):
        cast = None if bias is None else bias.to(torch.bfloat16)
        y = _Convolution.apply(x.flatten(0, -2).to(torch.bfloat16), weight.to(torch.bfloat16), cast)
    else:
        return F.linear(x, weight, bias)
    return y.unflatten(0, x.shape[:-1])


def _onednn_pays(*tensors: Tensor) -> bool:
    """Say whether this is float32 on a CPU with 512-bit registers, where oneDNN may be faster than MKL.

    A rule and no measurement: a training that goes on has to compute as it did before. On two AMD cores oneDNN's
    products ran 1.1 to 1.2 times as fast as MKL's for a batch of eight images of 197 tokens, 1.5 times for one. Intel's
    processors were not measured; those with AMX keep MKL, which is made for them.
    """
    return (
        _has_onednn_products()
        and all(tensor.dtype == torch.float32 for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def _convolution_pays(x: Tensor, *parameters: Tensor) -> bool:
    """Say whether this is bfloat16, by its dtype or by autocast, of many rows on a CPU that has it in 512 bits.

    A rule, as above. Both calls end in oneDNN, but a convolution packs its weight first and a linear does not: on two
    AMD cores it was 1.05 to 1.1 times as fast for 1,576 rows and as fast for 788. AMX was not measured.
    """
    tensors = (x, *parameters)
    if torch.is_autocast_enabled("cpu"):
        cast = torch.get_autocast_dtype("cpu") == torch.bfloat16
        right = cast and all(tensor.dtype in (torch.float32, torch.bfloat16) for tensor in tensors)
    else:
        right = all(tensor.dtype == torch.bfloat16 for tensor in tensors)
    return right and x.numel() >= LEAST_ROWS * x.shape[-1] and _has_bfloat16_convolutions()


@functools.cache
def _has_onednn_products() -> bool:
    """Say whether they pay on this processor, and this PyTorch has the operator, which it does not promise to keep."""
    has_them = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_them and cpu_has("avx512") and not cpu_has("amx_tile")


@functools.cache
def _has_bfloat16_convolutions() -> bool:
    """Say whether they pay on this processor."""
    return torch.backends.mkldnn.is_available() and cpu_has("avx512_bf16") and not cpu_has("amx_tile")


class _Product(torch.autograd.Function):
    """x w^T + b by oneDNN. Its gradients are products in turn, so it can be differentiated as often as one likes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            linear(gradient, weight.t(), None) if to_x else None,
            gradient.t() @ x if to_weight else None,  # MKL is as fast here
            gradient.sum(0) if to_bias else None,
        )


class _Convolution(torch.autograd.Function):
    """x w^T + b as a convolution of 1 x 1 pixel, for x (rows, inputs)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _as_rows(torch.conv2d(_as_image(x), weight[..., None, None], bias))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        to_x, to_weight, to_bias = ctx.needs_input_grad
        times = torch.mm if torch.is_grad_enabled() or not is_plain(gradient) else _times
        # First, as the gradient was just written. Where it is narrow, its transposition costs less than it saves.
        bias_gradient = gradient.sum(0) if to_bias else None
        narrow = weight.shape[0] < weight.shape[1]
        return (
            times(gradient, weight) if to_x else None,
            (times if narrow else torch.mm)(gradient.t(), x) if to_weight else None,
            bias_gradient,
        )


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Return a b as a transposed convolution of 1 x 1 pixel."""
    return _as_rows(torch.conv_transpose2d(_as_image(a.contiguous()), b[..., None, None]))


def _as_image(rows: Tensor) -> Tensor:
    """View (rows, C) as an image of one line, (1, C, 1, rows), channels last."""
    return rows[None, None].permute(0, 3, 1, 2)


def _as_rows(image: Tensor) -> Tensor:
    return image[0, :, 0].t()
