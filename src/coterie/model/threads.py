"""The processor's threads, which torch keeps waiting in a pool for each thread that once computed."""

import ctypes
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

PAUSE_HARD = 2  # omp_pause_hard in omp.h


def give_back_pool() -> None:
    """Let go of the calling thread's pool; its next computation makes a new one, which takes microseconds.

    With more threads in all pools than processors, OpenMP stops waiting actively, and each of the hundreds of small
    operations of a decoding step wakes its helpers through the kernel: 27 ms instead of 18 (docs/performance.md).
    So whoever has computed, and now rests, gives its pool back. Where OpenMP is not GNU's, nothing happens.
    """
    for library in _openmp():
        with suppress(AttributeError):
            library.omp_pause_resource_all(PAUSE_HARD)


@cache
def _openmp() -> list[ctypes.CDLL]:
    """GNU's OpenMP, as torch brings it. Looked for once: the pool is given back after each routed request."""
    found = []
    for file in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        with suppress(OSError):
            found.append(ctypes.CDLL(str(file)))
    return found
