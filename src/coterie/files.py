"""Files that are whole or not there at all, and places where one process works at a time."""

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coterie.errors import CoterieError, StorageError


@contextmanager
def alone(file: Path, busy: str, wait_s: float = 0) -> Iterator[None]:
    """Nobody else is in here with the same lock `file`; the system frees the lock of a process that is killed.

    Raises StorageError, and CoterieError, saying `busy`, where somebody is, and stays for `wait_s`.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a")
    except OSError as error:
        raise StorageError(f"{file}: cannot be written ({error.strerror})") from error
    with lock:
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    raise CoterieError(busy) from error
                time.sleep(0.02)
        yield


def check_free(path: Path) -> None:
    """Raises CoterieError where something is there already: asked before long work."""
    if path.exists():
        raise CoterieError(f"{path}: already there; name a new one")


def write_atomic(file: Path, content: str | bytes) -> None:
    """Replace `file` by `content` in one step. Raises StorageError where it cannot be written, or the disk is full."""
    scratch = file.with_name(f".tmp-{file.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        with scratch.open("wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, file)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise StorageError(f"{file}: cannot be written ({error.strerror or error})") from error
