"""What the C library is asked to do with memory. It is asked in a process of its own, as it lasts."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

COLLECTED = """
import gc, weakref
from coterie.model.memory import settle


class Knot:
    def __init__(self):
        self.itself = self


held = [[] for _ in range(400_000)]  # as much as a server with a base model has
settle()
knot = Knot()
oldest = weakref.ref(knot)
gc.collect(1)  # it has outlived the young ones, as what hangs on an open connection does
del knot
assert oldest(), "only a whole collection takes it"
for _ in range(200_000):
    Knot()
assert not oldest()
assert len(held) == 400_000
"""
THREADS = """
import ctypes, sys, threading
from coterie.model.memory import few_arenas

few_arenas()
met = threading.Barrier(9)


def work():
    held = [bytearray(1000) for _ in range(100)]
    met.wait()  # all at once: an arena that is idle would be given to the next
    met.wait()


threads = [threading.Thread(target=work) for _ in range(8)]
for t in threads:
    t.start()
met.wait()
libc = ctypes.CDLL("libc.so.6")
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
met.wait()
"""


def test_eight_threads_share_two_heaps(tmp_path: Path) -> None:
    try:
        ctypes.CDLL("libc.so.6").malloc_info  # noqa: B018
    except (OSError, AttributeError):
        pytest.skip("only glibc has these heaps")
    subprocess.run([sys.executable, "-c", THREADS, str(tmp_path / "info.xml")], check=True)
    assert (tmp_path / "info.xml").read_text().count("<heap nr=") == 2


def test_what_hangs_in_circles_is_collected_however_much_is_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", COLLECTED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
