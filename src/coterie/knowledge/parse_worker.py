"""Files parsed in a process of its own (`python -m coterie.knowledge.parse_worker`), ended where it takes too long.

Apart, because a parser cannot be stopped inside a process, and one that crashes, or takes all memory, would take
`coterie learn` along. A job is a line of JSON, {"path", "size"}, and the bytes of the file; the answer a line of JSON.
"""

import json
import os
import queue
import resource
import subprocess
import sys
import threading
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any

from coterie.errors import DataError
from coterie.knowledge.parse import Parsed, Section, parse

LIMIT_S = 120.0  # that one file may take
LEFT = "it is left until it changes (touch it)"  # how the error of a file ends that took longer
MEMORY = 4 << 30  # bytes that the process may take
PLAIN, SMALL = (".md", ".markdown", ".txt"), 64 << 10  # read here, at once, up to so many bytes


class Parsing:
    """Parses files, the larger and the harder ones in another process; that is started when one comes."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self.limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def parse(self, path: Path, content: bytes) -> Parsed:
        """The sections of a file. Raises DataError, naming the file and what is wrong with it."""
        if path.suffix.lower() in PLAIN and len(content) <= SMALL:
            return parse(path, content)
        try:
            line = self._ask(path, content)
        except queue.Empty as error:
            self.close()
            raise DataError(f"{path}: not read within {self.limit_s:g} s; {LEFT}") from error
        if not line:
            self.close()
            raise DataError(f"{path}: the process that reads it broke down (by its size, or by what is in it)")
        said = json.loads(line)
        if "error" in said:
            raise DataError(said["error"])
        return Parsed(said["title"], tuple(Section(tuple(headings), text) for headings, text in said["sections"]))

    def _ask(self, path: Path, content: bytes) -> bytes:
        """The line that answers; an empty one where the process ended. Raises queue.Empty where it takes too long."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"path": str(path), "size": len(content)}).encode() + b"\n")
            process.stdin.write(content)
            process.stdin.flush()
        except OSError:
            return b""
        return self._lines.get(timeout=self.limit_s)

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "coterie.knowledge.parse_worker"], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        lines = self._lines = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(self._process.stdout, lines), daemon=True).start()
        return self._process

    def close(self) -> None:
        """End the process; the next file starts another."""
        if self._process:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):  # what was never read
                    assert pipe is not None
                    pipe.close()
        self._process = None


def _listen(stream: IO[bytes], lines: "queue.SimpleQueue[bytes]") -> None:
    try:
        for line in chain(stream, [b""]):  # b"" when it ends
            lines.put(line)
    except ValueError:  # closed meanwhile
        lines.put(b"")


def _answer(path: Path, content: bytes) -> dict[str, Any]:
    try:
        parsed = parse(path, content)
    except DataError as error:
        return {"error": str(error)}
    except Exception as error:  # of a library that reads what others wrote; the next file may be sound
        return {"error": f"{path}: cannot be read ({type(error).__name__}: {str(error)[:200]})"}
    return {"title": parsed.title, "sections": [[s.headings, s.text] for s in parsed.sections]}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    while line := jobs.readline():
        job = json.loads(line)
        content = jobs.read(job["size"])
        answers.write(json.dumps(_answer(Path(job["path"]), content)).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
