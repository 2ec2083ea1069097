"""Mixture-of-experts feed-forward: a router gives each token to its best experts, and each expert gets one product.

Notable: no loop over tokens and no padding. The (token, choice) pairs are sorted by expert, so that each expert's
rows lie together. Where the processor has AVX2 and a C compiler is there, all experts are one call into grouped.c,
forward and backward (docs/performance.md). Elsewhere a projection is one matrix product for each expert
that has rows; on a GPU all experts go into one `grouped_mm`.
Sources: Shazeer et al. 2017 (top-k gates); Fedus et al. 2021 (Switch: top-1, capacity, balance loss, jitter, router
in float32); Zoph et al. 2022 (ST-MoE: router z-loss); Gale et al. 2022 (MegaBlocks: no dropping, no padding).
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.model import grouped as kernel

SMALL = 2_000_000  # multiply-adds from which oneDNN's product wins over F.linear's in float32
STEP = 16  # rows
Weights = Tensor | list[Tensor]  # (E, out, in), or for each expert what Decoder.pack made of its (out, in)


def score(x: Tensor, router: Tensor, jitter: float = 0.0) -> Tensor:
    """Router logits (N, E), in float32 whatever x (N, width) is; training noise is uniform in 1 +- `jitter`."""
    wide = x.float()
    if jitter:
        wide = wide * torch.empty_like(wide).uniform_(1 - jitter, 1 + jitter)
    return F.linear(wide, router.float())


def choose(logits: Tensor, k: int, normed: bool) -> tuple[Tensor, Tensor]:
    """Each token's k experts (N, k), best first, and their weights (N, k): probabilities, made to sum to 1 if `normed`.

    Top-1 as in Switch Transformers is k = 1 and not normed: the weight is then what teaches the router.
    """
    weights, experts = logits.softmax(-1).topk(k)
    return experts, weights / weights.sum(-1, keepdim=True) if normed else weights


def capacity(tokens: int, experts: int, k: int, factor: float) -> int:
    """Rows that one expert takes at most: `factor` times an even share, rounded up; every row for a factor of 0."""
    return math.ceil(factor * tokens * k / experts) if factor else tokens * k


def sort_by_expert(experts: Tensor, count: int, most: int) -> tuple[Tensor, Tensor]:
    """The places of `experts` (N, k), flattened, in order of expert, and the rows of each expert (count), on the CPU.

    An expert takes at most `most` rows: all first choices before second ones, then the earlier token first.
    """
    n, k = experts.shape
    keys, order = experts.t().reshape(-1).sort(stable=True)  # first choices of all tokens, then the second ones
    rows = torch.bincount(keys, minlength=count)
    if most < n * k and int(rows.max()) > most:
        rank = torch.arange(n * k, device=keys.device) - (rows.cumsum(0) - rows)[keys]
        order, rows = order[rank < most], rows.clamp(max=most)
    return order % n * k + order // n, rows.cpu()


def swiglu(x: Tensor) -> Tensor:
    """Gate and up side by side (M, 2F), to (M, F)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def feed_forward(
    x: Tensor, logits: Tensor, gate_up: Weights, down: Weights, k: int, normed: bool, factor: float = 0.0,
    activate: Callable[[Tensor], Tensor] = swiglu,
) -> Tensor:  # fmt: skip
    """The weighted sum, (N, width), of what each token's experts make of x (N, width).

    A choice beyond its expert's capacity adds nothing; a token that lost all its choices gets zeros, and so passes
    through the layer on the residual stream alone.
    """
    n, count = logits.shape
    experts, weights = choose(logits, k, normed)
    places, rows = sort_by_expert(experts, count, capacity(n, count, k, factor))
    known = {swiglu: kernel.SWIGLU, F.relu: kernel.RELU}.get(activate)
    if (
        known
        and isinstance(gate_up, Tensor)
        and isinstance(down, Tensor)
        and x.dtype == gate_up.dtype == down.dtype
        and kernel.takes(gate_up)
        and kernel.takes(down)
    ):
        return kernel.experts(x, weights, gate_up, down, places, rows, known)
    made = grouped(activate(grouped(x.index_select(0, places // k), gate_up, rows)), down, rows)
    made = made * weights.reshape(-1, 1).index_select(0, places).to(made.dtype)
    back = made.new_zeros(n * k, made.shape[-1]).index_copy(0, places, made)
    return back.view(n, k, -1).sum(1) if k > 1 else back


def balance_loss(logits: Tensor, k: int = 1) -> Tensor:
    """E times the sum over experts of (share of choices) x (mean probability): 1 when even (Fedus et al., eq. 4)."""
    count = logits.shape[-1]
    experts = logits.topk(k).indices.reshape(-1)
    share = torch.bincount(experts, minlength=count) / len(experts)
    return count * (share * logits.softmax(-1).mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean squared log-partition of the router, which keeps its logits small (ST-MoE, eq. 5)."""
    return logits.logsumexp(-1).square().mean()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, in) by weight (out, in), either of any strides; no gradients.

    oneDNN compiles a kernel for each new shape (about 0.5 ms), so small products stay with F.linear.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() * len(weight) > SMALL:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(x, weight)


def packed_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, in) by a weight that Decoder.pack made."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # type: ignore[no-any-return]


def by_expert(
    x: Tensor, weights: Iterable[Tensor], rows: list[int], product: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """x (M, in), the first rows[0] rows by the first weight and so on: (M, out).

    Products take their rows in multiples of STEP, with some of their neighbours' thrown away again: rows vary from
    step to step, and a kernel is compiled for every number of them.
    """
    made, start = [], 0
    for weight, count in zip(weights, rows, strict=True):
        if count:
            whole = count if count <= STEP // 2 else min(-(-count // STEP) * STEP, len(x))
            first = min(start, len(x) - whole)
            made.append(product(x[first : first + whole], weight)[start - first : start - first + count])
        start += count
    return torch.cat(made)


def grouped(x: Tensor, weights: Weights, rows: Tensor) -> Tensor:
    """x (M, in), the first rows[0] rows by the first expert's weight and so on: (M, out). Differentiable."""
    if isinstance(weights, list):
        return by_expert(x, weights, rows.tolist(), packed_product)
    if x.is_cuda and x.dtype == torch.bfloat16:
        return grouped_on_device(x, weights, rows)
    out: Tensor = _Grouped.apply(x, weights, rows)  # type: ignore[no-untyped-call]
    return out


def grouped_on_device(x: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """`grouped` as one kernel of CUDA."""
    ends = rows.cumsum(0).to(x.device, torch.int32)
    return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)


class _Grouped(torch.autograd.Function):
    """Its backward writes each expert's gradient in place; autograd would add up E of them, each as large as all."""

    @staticmethod
    def forward(ctx, x, weights, rows):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weights)
        ctx.rows = rows.tolist()
        return by_expert(x, weights, ctx.rows, product)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weights = ctx.saved_tensors
        to_x = to_weights = None
        if ctx.needs_input_grad[0]:
            to_x = by_expert(grad.contiguous(), weights.transpose(1, 2), ctx.rows, product)
        if ctx.needs_input_grad[1]:
            to_weights = torch.empty_like(weights)
            for slope, part, out in zip(grad.split(ctx.rows), x.split(ctx.rows), to_weights, strict=True):
                if not len(part):
                    out.zero_()
                elif x.dtype == torch.float32 and x.device.type == "cpu" and len(part) >= 2 * STEP:
                    out.copy_(product(slope.t(), part.t()))
                else:
                    torch.mm(slope.t(), part, out=out)
        return to_x, to_weights, None
