"""The decoder's small operations with their backward passes written out.

Notable: left to autograd, each of these keeps float32 copies and goes over memory several times; written out they
keep what they were given, and recompute. On a CPU that was a third of a training step (docs/performance.md).
Gradients of frozen weights are not computed: where a weight learns too, the decoder leaves it to autograd.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm of the last dimension of x (..., D) (Zhang and Sennrich 2019)."""
    if x.requires_grad and torch.is_grad_enabled() and not weight.requires_grad:
        out: Tensor = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return out
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        wide, slope = x.float(), grad.float() * weight.float()
        inverse = (torch.linalg.vecdot(wide, wide) / x.shape[-1] + ctx.eps).rsqrt_()[..., None]  # 1 / rms
        along = torch.linalg.vecdot(slope, wide)[..., None] * inverse.pow(3) / -x.shape[-1]
        return slope.mul_(inverse).addcmul_(wide, along).to(x.dtype), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (N, H, D) by tables (N, 1, D): cos twice, and sin negated, then sin."""
    if x.requires_grad and torch.is_grad_enabled():
        out: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return out
    return _rotated(x, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    return (wide * cos).addcmul_(wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.tables = cos, sin
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.tables
        return _rotated(grad, cos, -sin), None, None  # a rotation's transpose turns back


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up (N, 2 F), (N, F) (Shazeer 2020)."""
    if gate_up.requires_grad and torch.is_grad_enabled():
        out: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        to_gate, to_up = out.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
        torch.mul(grad, F.silu(gate), out=to_up)
        return out


def low_rank(
    out: Tensor, x: Tensor, downs: list[Tensor], ups: list[Tensor], spans: list[slice], scale: float
) -> Tensor:
    """Add scale * x A^T B^T to `out` (N, out) in place, for each A (R, in) and B (size, R), at B's span of columns.

    Weights may be of another precision than x; each gets its gradient in its own.
    """
    changed: Tensor = _LowRank.apply(out, x, spans, scale, *downs, *ups)  # type: ignore[no-untyped-call]
    return changed


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, spans: list[slice], scale: float, *weights: Tensor) -> Tensor:
        downs, ups = weights[: len(spans)], weights[len(spans) :]
        down = torch.cat(downs).to(x.dtype)  # (sum of R, in)
        up = x.new_zeros(out.shape[1], len(down))  # the B stand on a block diagonal
        ctx.columns, first = [], 0
        for b, span in zip(ups, spans, strict=True):
            ctx.columns.append(slice(first, first + b.shape[1]))
            up[span, ctx.columns[-1]] = b
            first += b.shape[1]
        small = (x @ down.T).mul_(scale)  # (N, sum of R)
        ctx.save_for_backward(x, small, down, up)
        ctx.spans, ctx.scale, ctx.dtypes = spans, scale, [w.dtype for w in weights]
        ctx.mark_dirty(out)
        return out.addmm_(small, up.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, small, down, up = ctx.saved_tensors
        back = (grad @ up).mul_(ctx.scale)
        to_x = back @ down if ctx.needs_input_grad[1] else None
        to_down, to_up = (back.T @ x), (grad.T @ small)
        parts = [to_down[c] for c in ctx.columns]
        parts += [to_up[s, c] for s, c in zip(ctx.spans, ctx.columns, strict=True)]
        return grad, to_x, None, None, *(p.to(d) for p, d in zip(parts, ctx.dtypes, strict=True))


@dataclass
class Padded:
    """Where the heads of packed tokens lie once their sequences are padded to one length."""

    queries: Tensor  # (N * H) row of each query, in (B, Hkv, T * G) rows
    keys: Tensor  # (N * Hkv) row of each key, in (B, Hkv, P + T) rows
    mask: Tensor  # (T * G, P + T): 0 where a query may look, else minus infinity
    count: int  # B


def written_out_attention(
    q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, Tensor] | None, padded: Padded
) -> Tensor:
    """Attention of q (N, H, D) over k, v (N, Hkv, D), padded, and `before` (P, Hkv, D), which all sequences see.

    Three small products each way: for sequences of some tens of tokens the CPU's fused backward takes five times as
    long. The heads of a group stand as queries, so keys are not repeated.
    """
    first = before or (k[:0], v[:0])
    out: Tensor = _Attention.apply(q, k, v, *first, padded)  # type: ignore[no-untyped-call]
    return out


def _fill(x: Tensor, rows: Tensor, first: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """x (N, Hkv, D) padded to `shape` (B, Hkv, P + T), `first` (P, Hkv, D) before each sequence."""
    out = x.new_zeros(shape[0] * shape[1] * shape[2], x.shape[2]).index_copy_(0, rows, x.reshape(-1, x.shape[2]))
    out = out.view(*shape, x.shape[2])
    if len(first):
        out[:, :, : len(first)] = first.transpose(0, 1)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first_k: Tensor, first_v: Tensor, padded: Padded) -> Tensor:
        heads, rows, span = k.shape[1], padded.mask.shape[0], padded.mask.shape[1]
        keys, values = (
            _fill(x, padded.keys, first, (padded.count, heads, span)) for x, first in ((k, first_k), (v, first_v))
        )
        queries = _fill(q, padded.queries, q[:0], (padded.count, heads, rows))
        scores = (queries @ keys.transpose(-1, -2)).float().mul_(q.shape[2] ** -0.5).add_(padded.mask)
        probs = scores.softmax(-1).to(q.dtype)
        ctx.save_for_backward(queries, keys, values, probs)
        ctx.padded, ctx.shape, ctx.first = padded, q.shape, len(first_k)
        return (probs @ values).view(-1, q.shape[2]).index_select(0, padded.queries).view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, probs = ctx.saved_tensors
        padded, first, size = ctx.padded, ctx.first, queries.shape[3]
        slopes = _fill(grad, padded.queries, grad[:0], queries.shape[:3])
        to_values = probs.transpose(-1, -2) @ slopes
        to_scores = torch._softmax_backward_data(slopes @ values.transpose(-1, -2), probs, -1, probs.dtype)
        to_scores.mul_(size**-0.5)
        to_keys = to_scores.transpose(-1, -2) @ queries
        to_queries = (to_scores @ keys).view(-1, size).index_select(0, padded.queries).view(ctx.shape)
        both = (to_keys, to_values)
        own = [t.view(-1, size).index_select(0, padded.keys).view(-1, keys.shape[1], size) for t in both]
        seen = [t[:, :, :first].sum(0).transpose(0, 1) if first else None for t in both]
        return to_queries, *own, *seen, None
