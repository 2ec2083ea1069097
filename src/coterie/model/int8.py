"""Matrices rounded to whole numbers in 8 bits, a scale for each output: a quarter of the bytes that few rows wait for.

Notable: only weights are rounded; inputs and sums keep the base's precision. In float32 the product is int8.c, in which
a row comes out the same, to the bit, whatever else is in the batch; in bfloat16 it is PyTorch's. Whether a product with
the rounded matrices is faster than with the exact ones is a fact of the machine and of the number of rows: `wins_up_to`
measures it.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.model.native import built

SOURCE = Path(__file__).with_name("int8.c")
LANES = 16  # outputs in a block of int8.c
LARGEST = 127
PASSES = 3  # of each way of computing, in turns; the shortest counts
_P, _N = ctypes.c_void_p, ctypes.c_int64


class _Matrix(ctypes.Structure):
    _fields_ = [("inputs", _N), ("outputs", _N), ("w", _P), ("scale", _P)]


@cache
def _library() -> Any | None:
    library = built(SOURCE, needs=("avx2", "fma"))
    if library:
        library.coterie_int8.argtypes = [_P, _N, _P, _P, ctypes.c_int]
        library.coterie_int8.restype = None
    return library


def computes(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` by rounded matrices can be computed on this machine's processor."""
    return dtype == torch.bfloat16 or (dtype == torch.float32 and _library() is not None)


class Int8Matrix:
    """A matrix (out, in) in 8 bits. The largest number of each row becomes 127, so that zero stays zero."""

    def __init__(self, weight: Tensor) -> None:
        self.shape, self.dtype = weight.shape, weight.dtype
        largest = weight.abs().amax(1).float()
        self.scale = torch.where(largest > 0, largest / LARGEST, 1.0).to(weight.dtype)  # (out)
        rounded = (weight.float() / self.scale.float()[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        if weight.dtype == torch.bfloat16:
            self.values = rounded  # (out, in), as PyTorch wants it
            return
        out, wide = weight.shape
        blocks = -(-out // LANES)
        padded = torch.zeros(blocks * LANES, wide, dtype=torch.int8)
        padded[:out] = rounded
        self.values = padded.view(blocks, LANES, wide).transpose(1, 2).contiguous()  # as int8.c wants it
        self.scale = torch.cat([self.scale, torch.zeros(blocks * LANES - out)])
        self._struct = _Matrix(wide, out, self.values.data_ptr(), self.scale.data_ptr())

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (N, in) by the matrix, (N, out)."""
        if self.dtype == torch.bfloat16:
            out: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.values, self.scale)
        else:
            x, out = x.contiguous(), x.new_empty(len(x), self.shape[0])
            library: Any = _library()
            library.coterie_int8(
                ctypes.byref(self._struct), len(x), x.data_ptr(), out.data_ptr(), torch.get_num_threads()
            )
        return out if bias is None else out.add_(bias)


def wins_up_to(exact: Callable[[int], None], rounded: Callable[[int], None], rows: Sequence[int]) -> int:
    """The largest number of `rows`, ascending, up to which `rounded` is faster than `exact` at each; 0: at none.

    Both are called with a number of rows. They take turns, so that each finds the caches as the other has left them,
    and what else the machine does meets both.
    """
    most = 0
    for count in rows:
        shortest = [float("inf"), float("inf")]
        for _ in range(PASSES):
            for i, way in enumerate((exact, rounded)):
                started = time.perf_counter()
                way(count)
                shortest[i] = min(shortest[i], time.perf_counter() - started)
        if shortest[1] >= shortest[0]:
            break
        most = count
    return most
