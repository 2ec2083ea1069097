"""Matrices rounded to whole numbers in 8 bits, a scale and an offset for every 32 of a row: a third of float32's bytes.

Notable: only weights are rounded; inputs and sums stay in float32 (int8.c), and a row of a product comes out the same,
to the bit, whatever else is in the batch. A group is rounded in the better of two ways: evenly about zero, or evenly
from its least to its largest number. That is how GGUF's Q8_0 and Q4_1 have stored theirs, in groups of 32 as well: what
was read from those is kept as it is, up to float32's own rounding (1e-7).
Whether a product with rounded matrices is faster than with the exact ones is a fact of the machine and of the number
of rows: `wins_up_to` measures it.
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
GROUP = 32  # inputs that share a scale, in int8.c too
AT_ONCE = 256  # outputs that are rounded together, so that they stay in the cache: three times as fast
PASSES = 3  # of each way of computing, in turns; the shortest counts
_P, _N = ctypes.c_void_p, ctypes.c_int64


class _Matrix(ctypes.Structure):
    _fields_ = [("inputs", _N), ("outputs", _N), ("w", _P), ("scales", _P)]


@cache
def _library() -> Any | None:
    library = built(SOURCE, needs=("avx2", "fma"))
    if library:
        library.coterie_int8.argtypes = [_P, _N, _P, _P, ctypes.c_int]
        library.coterie_int8.restype = None
    return library


def computes(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` by rounded matrices can be computed on this machine's processor."""
    return dtype == torch.float32 and _library() is not None


class Int8Matrix:
    """A matrix (out, in) in 8 bits."""

    def __init__(self, weight: Tensor) -> None:
        self.shape = weight.shape
        out, wide = weight.shape
        blocks, groups = -(-out // LANES), -(-wide // GROUP)
        padded = weight.new_zeros(blocks * LANES, groups * GROUP)
        padded[:out, :wide] = weight
        parts = [_round(part) for part in padded.view(-1, groups, GROUP).split(AT_ONCE)]
        values, scales = (torch.cat(each) for each in zip(*parts, strict=True))
        values = values.view(blocks, LANES, -1)[:, :, :wide]
        self.values = values.transpose(1, 2).contiguous()  # (blocks, in, 16)
        self.scales = scales.view(blocks, LANES, groups, 2).permute(0, 2, 3, 1).contiguous()  # (blocks, groups, 2, 16)
        self._struct = _Matrix(wide, out, self.values.data_ptr(), self.scales.data_ptr())

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (N, in) by the matrix, (N, out)."""
        x, out = x.contiguous(), x.new_empty(len(x), self.shape[0])
        library: Any = _library()
        library.coterie_int8(ctypes.byref(self._struct), len(x), x.data_ptr(), out.data_ptr(), torch.get_num_threads())
        return out if bias is None else out.add_(bias)


def _round(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers in 8 bits for groups (out, G, 32) of a matrix, and the scale and offset of each (out, G, 2)."""
    least, largest = groups.aminmax(dim=2, keepdim=True)
    around = torch.maximum(-least, largest) / 127
    between = (largest - least) / 255
    errors, ways = [], []
    for scale, offset in ((around, torch.zeros_like(around)), (between, least + 128 * between)):
        scale = torch.where(scale > 0, scale, 1.0)
        values = ((groups - offset) / scale).round_().clamp_(-128, 127)
        errors.append((torch.addcmul(offset, values, scale) - groups).square_().sum(2, keepdim=True))
        ways.append((values.to(torch.int8), scale, offset))
    even = errors[0] <= errors[1]
    values, scale, offset = (torch.where(even, first, second) for first, second in zip(*ways, strict=True))
    return values, torch.cat([scale, offset], dim=2)


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
