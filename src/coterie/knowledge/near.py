"""Passages that nearly repeat each other: MinHash over runs of three words finds them, an edit distance decides.

Beside `data/neighbours.py`, which works on short prompts by characters: passages are ten times as long, and runs of
words cost a quarter.
"""

import re
from collections.abc import Iterable

import numpy as np
from rapidfuzz.distance import Indel
from rensa import RMinHash

BANDS, ROWS, RUN = 8, 4, 3  # finds 99.8% of pairs that share 85% of their runs
SIMILAR = 0.95  # normalised Indel similarity from which two passages say the same
_FOLD = np.uint64(0x9E3779B97F4A7C15)


def normalise(text: str) -> str:
    """Words and numbers alone, so that layout and punctuation do not count."""
    return " ".join(re.findall(r"\w+", text.lower()))


def bands(normal: str) -> list[int]:
    """BANDS hashes of a normalised passage, as signed 64-bit numbers (SQLite's); alike passages share some."""
    words = normal.split(" ")
    hashes = RMinHash(BANDS * ROWS, 1)
    hashes.update([" ".join(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))])
    values = np.array(hashes.digest(), np.uint64).reshape(BANDS, ROWS)
    mixed = np.arange(BANDS, dtype=np.uint64)  # so that equal hashes in two bands are not taken for one
    for column in values.T:
        mixed = mixed * _FOLD + column
    return [int(x) for x in mixed.view(np.int64)]


def repeats(normal: str, others: Iterable[str]) -> bool:
    """Does a passage say the same as one of the others? Numbers must be the same: a price decides what is said."""
    numbers = re.findall(r"\d+", normal)
    return any(
        numbers == re.findall(r"\d+", other) and Indel.normalized_similarity(normal, other, score_cutoff=SIMILAR) > 0
        for other in others
    )
