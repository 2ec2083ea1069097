"""Look for known values in files as they lie on the disk: databases, their logs, indexes, logs of programs.

Notable: a file is looked through once for all values together, by the first four bytes of each, so that thousands of
values cost little more than one.
"""

import json
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.errors import StorageError

CHUNK = 1 << 22  # bytes
BEGIN = 4  # bytes that all values have, as the shortest has so many letters
SHORTEST = 4  # letters: shorter values stand in any file by chance


@dataclass(frozen=True)
class Hit:
    """A value in a file, at a byte. `value` is its number in the list that was looked for: a report quotes nothing."""

    file: str
    at: int
    value: int


def scan(places: Iterable[Path], values: list[str]) -> list[Hit]:
    """Every file among `places` and in the folders among them, looked through for every value of at least `SHORTEST`
    letters: in UTF-8 and UTF-16, in any case (of ASCII), as JSON and URLs write it. Raises StorageError."""
    wanted = [(n, form) for n, value in enumerate(values) if len(value) >= SHORTEST for form in _forms(value)]
    begins: dict[int, list[tuple[int, bytes]]] = {}
    for number, form in wanted:
        begins.setdefault(int.from_bytes(form[:BEGIN], "little"), []).append((number, form))
    hits: list[Hit] = []
    for file in _files(places):
        hits += _in_file(file, begins)
    return sorted(set(hits), key=lambda h: (h.file, h.at))


def _forms(value: str) -> set[bytes]:
    """In small letters, as files are looked through; what is not ASCII is tried in small letters and in capitals."""
    cases = {value, value.lower(), value.upper()}
    texts = {t for v in cases for t in (v, json.dumps(v)[1:-1], urllib.parse.quote(v), urllib.parse.quote_plus(v))}
    return {t.encode(code).lower() for t in texts for code in ("utf-8", "utf-16-le", "utf-16-be")}


def _files(places: Iterable[Path]) -> Iterator[Path]:
    for place in places:
        yield from (sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place])


def _in_file(file: Path, begins: dict[int, list[tuple[int, bytes]]]) -> Iterator[Hit]:
    overlap = max((len(form) for found in begins.values() for _, form in found), default=1) - 1
    keys = np.array(sorted(begins), np.uint32)
    start, tail = 0, b""
    try:
        with file.open("rb") as opened:
            while piece := opened.read(CHUNK):
                data = tail + piece.lower()
                four = _fours(data)
                nearest = np.searchsorted(keys, four).clip(max=len(keys) - 1) if len(keys) else four[:0]
                for at in np.flatnonzero(keys[nearest] == four[: len(nearest)]).tolist():
                    for number, form in begins[int(four[at])]:
                        if data.startswith(form, at):
                            yield Hit(str(file), start - len(tail) + at, number)
                start += len(piece)
                tail = data[-overlap:] if overlap else b""
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror})") from error


def _fours(data: bytes) -> NDArray[np.uint32]:
    """The number that each four bytes in a row make, little end first."""
    each = np.frombuffer(data, np.uint8).astype(np.uint32)
    count = max(0, len(each) - BEGIN + 1)
    out: NDArray[np.uint32] = sum(
        (each[n : n + count] << np.uint32(8 * n) for n in range(BEGIN)), np.zeros(count, np.uint32)
    )
    return out
