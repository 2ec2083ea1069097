"""Run code that a model wrote, to see whether it passes its tests (pass@k).

What it guards against, and what it does not:
- always: a process of its own with limits on processor seconds, memory, sizes of files and of output, open files, and
  a clock that kills the whole process group; an empty environment (no keys or tokens to read); a temporary folder as
  home and working folder, deleted afterwards; nothing on stdin; Python's isolated mode.
- on Linux kernels that allow it (`Outcome.locks` says): no network, by a network namespace of its own; no files but
  its own folder, Python and the system's libraries, by Landlock. Without the namespace, sockets are refused inside
  Python only, which determined code gets around. macOS and older kernels have neither lock.
- not: flaws of the kernel or of Python, a flood of new processes (bounded by time only), or learning what the machine
  is like. It keeps mistakes and mischief of a small model in; for code of an enemy use a virtual machine.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from coterie.evaluation.metrics import pass_at_k

CAGE = Path(__file__).with_name("_cage.py")
OUTPUT_MOST = 1 << 16  # characters kept of what the code prints; it may write FILE_BYTES
FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Of one run."""

    seconds: float = 5.0  # on the clock
    cpu_seconds: int = 5
    memory_bytes: int = 512 << 20  # of address space


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `locks` names what the kernel granted: network, files, both or neither."""

    passed: bool
    why: str  # "" where it passed; else timeout, or the last line of the error
    output: str
    seconds: float
    locks: tuple[str, ...]


def run(code: str, limits: Limits = Limits()) -> Outcome:
    """Run `code` as a Python program: it passes where it comes to its last line, not where it merely exits."""
    with tempfile.TemporaryDirectory(prefix="coterie-sandbox-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        (folder / "program.py").write_text(code, encoding="utf-8", errors="replace")
        told, tell = os.pipe()
        command = [sys.executable, "-I", "-S", str(folder / "cage.py"), str(folder), str(limits.memory_bytes),
                   str(limits.cpu_seconds), str(FILE_BYTES), str(tell), str(folder / "program.py")]  # fmt: skip
        (folder / "cage.py").write_bytes(CAGE.read_bytes())  # the package's folder is out of the cage's reach
        started = time.monotonic()
        with (folder / "output.txt").open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=folder,
                env={"HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
                start_new_session=True, pass_fds=(tell,),
            )  # fmt: skip
            os.close(tell)
            try:
                code_of_exit: int | None = process.wait(limits.seconds)
            except subprocess.TimeoutExpired:
                code_of_exit = None
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
                process.wait()
        seconds = time.monotonic() - started
        os.set_blocking(told, False)  # a child that lives on in another session may hold the other end open
        letters = b""
        with contextlib.suppress(BlockingIOError):
            letters = os.read(told, 8)
        os.close(told)
        with (folder / "output.txt").open("rb") as written:
            said = written.read(OUTPUT_MOST).decode("utf-8", "replace")
    locks = tuple(word for letter, word in (("n", "network"), ("f", "files")) if letter.encode() in letters)
    if code_of_exit is None:
        return Outcome(False, "timeout", said, seconds, locks)
    if code_of_exit in (-signal.SIGXCPU, -signal.SIGKILL):
        return Outcome(False, "processor time", said, seconds, locks)
    if code_of_exit == 0:
        ended = b"!" in letters
        return Outcome(ended, "" if ended else "left before its last line", said, seconds, locks)
    last = said.strip().splitlines()[-1] if said.strip() else f"exit code {code_of_exit}"
    return Outcome(False, last[:300], said, seconds, locks)


def passing(
    answers: Sequence[Sequence[str]], tests: Sequence[str], ks: Sequence[int] = (1,), limits: Limits = Limits()
) -> dict[str, float]:  # fmt: skip
    """pass@k over problems: `answers[i]` are samples for problem i, each run with `tests[i]` after it."""
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        passed = [
            sum(o.passed for o in pool.map(lambda a, t=test: run(f"{a}\n\n{t}\n", limits), samples))
            for samples, test in zip(answers, tests, strict=True)
        ]
    return {
        f"pass@{k}": sum(pass_at_k(len(a), p, k) for a, p in zip(answers, passed, strict=True)) / len(answers)
        for k in ks
    }
