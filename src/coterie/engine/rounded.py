"""Decoding from weights in 8 bits, where that is faster than from the exact ones: measured when the engine starts.

Notable: only tokens that are being written are computed with rounded weights. Prompts are read with the exact ones:
many rows at once wait for arithmetic and not for memory. What routers, classifiers and training read stays exact too.
"""

import logging
from dataclasses import dataclass

import torch

from coterie.model import int8
from coterie.model.decoder import Decoder

SAMPLE = 64 << 20  # bytes of exact weights that one pass of the measurement reads: more than a cache holds
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rounded:
    """A base model in 8 bits, and up to how many rows it decodes faster than the exact one."""

    decoder: Decoder
    most: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes beside the exact weights."""
        return sum(matrix.nbytes for matrix in self.decoder.int8.values())


@torch.inference_mode()
def rounded(exact: Decoder, slots: int) -> Rounded | None:
    """`exact` in 8 bits, for batches of up to `slots` rows; None where it is faster for none. Takes a second or two."""
    if exact.device.type != "cpu" or not int8.computes(exact.dtype):
        log.warning(
            "weights = int8 changes nothing here: it needs a C compiler, and a CPU with AVX2 that computes in float32"
        )
        return None
    light = exact.in_int8()
    names, read = list[str](), 0
    for name in exact.matrices:
        if read < SAMPLE:
            names.append(name)
            read += exact.weights[name].nbytes

    def passes(decoder: Decoder, rows: int) -> None:
        for name in names:
            decoder.linear(exact.weights["embed"].new_ones(rows, exact.weights[name].shape[1]), name)

    counts = sorted({1 << n for n in range(slots.bit_length())} | {slots})
    most = int8.wins_up_to(lambda rows: passes(exact, rows), lambda rows: passes(light, rows), counts)
    chosen = Rounded(light, most) if most else None
    taken = f", {chosen.nbytes / 2**20:.0f} MiB beside the exact ones" if chosen else ""
    log.info("weights in 8 bits decode faster up to %d of %d requests at once%s", most, slots, taken)
    return chosen
