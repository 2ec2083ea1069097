"""Code that a model wrote runs apart: it passes, fails or is stopped, and reaches nothing it should not."""

import contextlib
import socket
import time
from pathlib import Path

import pytest

from coterie.evaluation.sandbox import Limits, passing, run

QUICK = Limits(seconds=3, cpu_seconds=1, memory_bytes=256 << 20)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("print('hi')", ""),
        ("import json, math, re, collections, itertools, sqlite3, heapq", ""),
        ("assert 1 + 1 == 3", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("x = 'a' * 10**10", "MemoryError"),
        ("open('big', 'wb').write(b'x' * 10**7)", "File too large"),
        ("import sys; sys.exit(0)", "left before its last line"),
        ("import os; os._exit(0)", "left before its last line"),
        ("import os; os.kill(os.getpid(), 9)", "processor time"),
        ("import time; time.sleep(60)", "timeout"),
        ("while True: pass", "processor time|timeout"),
        ("\ud800", "SyntaxError|NameError"),
        ("import numpy", "ModuleNotFoundError"),
    ],
)
def test_a_program_passes_only_where_it_comes_to_its_end(code: str, why: str) -> None:
    outcome = run(code, QUICK)
    assert outcome.passed == (why == ""), outcome
    assert any(w in outcome.why for w in why.split("|")), outcome


def test_it_sees_no_environment_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    outcome = run("import os\nprint(dict(os.environ))\nprint(os.getcwd())\nopen('note', 'w').write('x')")
    assert outcome.passed, outcome
    assert "hunter2" not in outcome.output
    assert not Path(outcome.output.splitlines()[-1]).exists()


def test_it_reaches_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=2)"
        outcome = run(code, QUICK)
    assert not outcome.passed
    assert any(word in outcome.why for word in ("unreachable", "no network in the sandbox")), outcome


def alive(group: int) -> bool:
    """Whether a process of the group still runs."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state = stat.read_text().rpartition(")")[2].split()
            if int(state[2]) == group and state[0] not in "ZX":
                return True
    return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_what_it_started_is_ended_with_it() -> None:
    outcome = run("import os, time\nif os.fork() == 0:\n    time.sleep(300)\nprint(os.getpid())", QUICK)
    assert outcome.passed, outcome
    for _ in range(100):  # a kill is carried out a moment later
        if not alive(int(outcome.output)):
            break
        time.sleep(0.1)
    assert not alive(int(outcome.output))


def test_it_reads_no_files_of_the_user_where_the_kernel_has_landlock(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    outcome = run(f"print(open({str(secret)!r}).read())", QUICK)
    if "files" not in outcome.locks:
        pytest.skip("this kernel has no Landlock: the sandbox says so and does not claim to hide files")
    assert not outcome.passed
    assert "hunter2" not in outcome.output
    assert "Permission" in outcome.why
    assert not run(f"open({str(tmp_path / 'new')!r}, 'w')", QUICK).passed


def test_pass_at_k_counts_answers_that_pass_their_tests() -> None:
    right, wrong = "def double(x):\n    return 2 * x", "def double(x):\n    return x"
    figures = passing(
        [[right, wrong, wrong, "exit()"], [right, right, right, right]], ["assert double(2) == 4"] * 2, ks=(1, 2)
    )
    assert figures == {"pass@1": pytest.approx((0.25 + 1) / 2), "pass@2": pytest.approx((0.5 + 1) / 2)}
