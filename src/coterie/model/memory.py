"""What the C library does with freed memory. Only glibc can be asked; elsewhere nothing happens."""

import ctypes
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
