"""Passages that nearly repeat each other: MinHash over runs of three words finds them, an edit distance decides.

Beside `data/neighbours.py`, which works on short prompts by characters: passages are ten times as long, and runs of
words cost a quarter. Of the runs, those that begin with a long word are hashed: which they are depends on the words
alone, so that alike passages still share them.
"""

import re
import zlib

from rapidfuzz.distance import Indel
from rensa import RMinHash

BANDS, ROWS, LONG = 4, 3, 7  # finds 98% of pairs that share 85% of their runs
SIMILAR = 0.95  # normalised Indel similarity from which two passages say the same


def normalise(text: str) -> str:
    """Without layout and case."""
    return " ".join(text.lower().split())


def bands(normal: str, readers: int) -> list[int]:
    """BANDS hashes of a normalised passage, as signed 64-bit numbers (SQLite's); alike passages share some, if they
    have the same numbers and are for the same readers."""
    words = normal.split(" ")
    runs = [f"{a} {b} {c}" for a, b, c in zip(words, words[1:], words[2:], strict=False) if len(a) >= LONG]
    hashes = RMinHash(BANDS * ROWS, 1)
    hashes.update(runs or [normal])
    values = hashes.digest()
    same = readers, zlib.crc32(_numbers(normal).encode())
    return [hash((*same, band, *values[band * ROWS : (band + 1) * ROWS])) for band in range(BANDS)]


def _numbers(text: str) -> str:
    return re.sub(r"\D+", " ", text).strip()


def repeats(normal: str, other: str) -> bool:
    """Do two passages say the same? Numbers must be the same: a price decides what is said."""
    alike = _numbers(normal) == _numbers(other)
    return alike and Indel.normalized_similarity(normal, other, score_cutoff=SIMILAR) > 0
