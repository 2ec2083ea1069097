"""A mixture's experts by grouped.c: all of them in one call, from their plain weights, forward and backward.

Notable: rows are fetched, activated, weighted and put back inside the products, so nothing is copied between them; an
expert's activation is not kept for the backward pass but made again; and what teaches the router comes out of the
slope of the activations, so the experts' outputs need not be kept either.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coterie.model.native import built

SOURCE = Path(__file__).with_name("grouped.c")
PLAIN, RELU, SWIGLU = range(3)
ROWS = 12  # of a tile in grouped.c, at most
SIZES = {torch.float32: 4, torch.bfloat16: 2}
_P, _N = ctypes.c_void_p, ctypes.c_int64


class _Shape(ctypes.Structure):
    _fields_ = [("bf", _N), ("experts", _N), ("threads", _N), ("ends", _P)]


class _Product(ctypes.Structure):
    _fields_ = [("inputs", _N), ("outputs", _N), ("source", _P), ("to", _P), ("scale", _P), ("before", _P),
                ("out", _P), ("stands", _N), ("activation", _N)]  # fmt: skip


@cache
def _library() -> Any | None:
    library = built(SOURCE)
    if library:
        library.coterie_grouped.argtypes = [_P] * 5
        library.coterie_grouped_weights.argtypes = [_P, _N, _N, *[_P] * 6]
        library.coterie_activated.argtypes = [_P, _N, _N, ctypes.c_int, *[_P] * 6]
        library.coterie_activated.restype = None
    return library


def takes(weights: Tensor) -> bool:
    """Whether experts of these weights (E, out, in) can be computed here: bfloat16 goes in pairs, where at all."""
    library = _library() if weights.device.type == "cpu" and weights.is_contiguous() else None
    if library is None:
        return False
    pairs = weights.dtype == torch.bfloat16 and weights.shape[-1] % 2 == 0 and library.coterie_num() == 2
    return weights.dtype == torch.float32 or pairs


class _Call:
    """Rows in order of expert: `rows` (E), on the CPU, says how many each has."""

    def __init__(self, rows: Tensor, dtype: torch.dtype) -> None:
        self.ends, self.dtype = rows.cumsum(0), dtype
        self.count, self.experts = int(self.ends[-1]), len(rows)
        self.shape = _Shape(dtype == torch.bfloat16, self.experts, torch.get_num_threads(), self.ends.data_ptr())
        self.library: Any = _library()

    def _scratch(self, rows: int, width: int) -> Tensor:
        words = -(-width * SIZES[self.dtype] // 4)
        return torch.empty(rows * words, dtype=torch.int32)

    def product(
        self, x: Tensor, weights: Tensor, out: Tensor, *, stands: bool, source: Tensor | None = None,
        activation: int = PLAIN, scale: Tensor | None = None, to: Tensor | None = None, before: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`out` = x, its rows from `source`, by each expert's weights (out, in), or (in, out) if they do not stand."""
        outputs, inputs = weights.shape[1:] if stands else weights.shape[:0:-1]
        packed = self._scratch(self.count + self.experts * (ROWS - 1), inputs)
        places = (None if t is None else t.data_ptr() for t in (source, to, scale, before))
        product = _Product(inputs, outputs, *places, out.data_ptr(), stands, activation)
        self._check(self.library.coterie_grouped(
            ctypes.byref(self.shape), ctypes.byref(product), x.data_ptr(), weights.data_ptr(), packed.data_ptr()
        ))  # fmt: skip
        return out

    def weights(self, slope: Tensor, x: Tensor, like: Tensor, whence: Tensor | None, source: Tensor | None) -> Tensor:
        """The slope of each expert's weights, where `slope` is that of its products with x."""
        out = torch.empty_like(like)
        outputs, inputs = like.shape[1:]
        packed = self._scratch(self.count + self.experts, -(-outputs // ROWS) * ROWS * (4 // SIZES[self.dtype]))
        self._check(self.library.coterie_grouped_weights(
            ctypes.byref(self.shape), inputs, outputs, slope.data_ptr(), None if whence is None else whence.data_ptr(),
            x.data_ptr(), None if source is None else source.data_ptr(), out.data_ptr(), packed.data_ptr(),
        ))  # fmt: skip
        return out

    def _check(self, failed: int) -> None:
        if failed:
            raise MemoryError("the experts' products found no memory for their buffers")


def experts(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, places: Tensor, rows: Tensor, activation: int
) -> Tensor:
    """The sum, (N, width), over k choices of each token of x (N, width), each by its expert and times weights (N, k).

    places (M): which choices, in order of expert, `rows` (E) for each; choices that are not among them add nothing.
    """
    made: Tensor = _Experts.apply(x, weights, gate_up, down, places, rows, activation)  # type: ignore[no-untyped-call]
    return made


def _summed(choices: Tensor, k: int) -> Tensor:
    return choices.view(-1, k, choices.shape[1]).sum(1) if k > 1 else choices


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, places: Tensor, rows: Tensor,
        activation: int,
    ) -> Tensor:  # fmt: skip
        x, k, call = x.contiguous(), weights.shape[1], _Call(rows, x.dtype)
        source = places // k if k > 1 else places
        scale = weights.reshape(-1).float().index_select(0, places)
        before = x.new_empty(call.count, gate_up.shape[1]) if any(ctx.needs_input_grad) else None
        hidden = x.new_empty(call.count, down.shape[2])
        call.product(x, gate_up, hidden, stands=True, source=source, activation=activation, before=before)
        out = (x.new_empty if call.count == weights.numel() else x.new_zeros)(weights.numel(), down.shape[1])
        call.product(hidden, down, out, stands=True, scale=scale, to=places)
        ctx.save_for_backward(x, gate_up, down, places, source, scale, before)
        ctx.call, ctx.activation, ctx.weights = call, activation, weights
        return _summed(out, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, places, source, scale, before = ctx.saved_tensors
        call, grad, weights = ctx.call, grad.contiguous(), ctx.weights
        slope, made = x.new_empty(2, call.count, down.shape[2])
        call.product(grad, down, slope, stands=False, source=source)
        inner, to_scale = torch.empty_like(before), torch.empty_like(scale)
        call.library.coterie_activated(
            ctypes.byref(call.shape), call.count, down.shape[2], ctx.activation, before.data_ptr(), slope.data_ptr(),
            scale.data_ptr(), made.data_ptr(), inner.data_ptr(), to_scale.data_ptr(),
        )  # fmt: skip
        to_x = to_weights = to_gate_up = to_down = None
        if ctx.needs_input_grad[0]:
            whole = call.count == weights.numel()
            to_x = (x.new_empty if whole else x.new_zeros)(weights.numel(), x.shape[1])
            to_x = _summed(call.product(inner, gate_up, to_x, stands=False, to=places), weights.shape[1])
        if ctx.needs_input_grad[1]:
            to_weights = weights.new_zeros(weights.numel()).index_copy_(0, places, to_scale.to(weights.dtype))
            to_weights = to_weights.view_as(weights)
        if ctx.needs_input_grad[2]:
            to_gate_up = call.weights(inner, x, gate_up, None, source)
        if ctx.needs_input_grad[3]:
            to_down = call.weights(grad, made, down, source, None)
        return to_x, to_weights, to_gate_up, to_down, None, None, None
