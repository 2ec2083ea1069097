"""What becomes of freed memory, in the C library (only glibc can be asked; elsewhere nothing happens) and in Python."""

import ctypes
import gc
from contextlib import suppress

ARENAS = 2  # one is the main thread's, the other is shared


def give_back() -> None:
    """Return freed memory to the system: after loading a GGUF file, 460 MiB of what took part in it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def keep() -> None:
    """Keep what is freed from now on. Given back and faulted in anew, it costs a tenth of each training step."""
    with suppress(OSError, AttributeError):
        for setting, most in ((-3, 1 << 30), (-1, (1 << 31) - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD in malloc.h
            ctypes.CDLL("libc.so.6").mallopt(setting, most)


def few_arenas() -> None:
    """Let all threads that come from now on share `ARENAS` heaps. Of itself glibc gives nearly each of a server's
    threads one of its own, up to 8 for each core: what one has freed another cannot use, so memory grows for hours."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-8, ARENAS)  # M_ARENA_MAX in malloc.h


def settle() -> None:
    """What is in memory now stays: from now on Python's collector looks only at what comes after, and often.

    It goes through everything only when a quarter as much again has grown old: with a base model loaded that is 100,000
    objects. Each closed connection leaves a few for it (asyncio's transports refer to themselves), so that those of
    thousands of customers lay about.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # it remembers how much there was the last time: now nothing
