"""Near-duplicates in a file of any size: MinHash finds the candidates (Broder 1997), an edit distance decides.

Notable: only 16 hashes (128 bytes) for each row stay in memory; texts are looked up again, and only those that share
a hash with another row.
"""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Indel
from rensa import RMinHash

BANDS, ROWS = 16, 4  # finds 99% of pairs that share 70% of their pieces, 12% of those that share 30%
PIECE = 4  # characters
SIMILAR = 0.92  # normalised Indel similarity from which two prompts are near-duplicates
DEEP = 64  # rows of one bucket that a row is compared with: bounds the work where thousands are alike


def bands(text: str) -> bytes:
    """BANDS hashes of a normalised text, 8 bytes each; alike texts share some."""
    minhash = RMinHash(BANDS * ROWS, 1)
    minhash.update([text[i : i + PIECE] for i in range(max(1, len(text) - PIECE + 1))])
    values = np.array(minhash.digest(), np.uint64).reshape(BANDS, ROWS)
    mixed = np.zeros(BANDS, np.uint64)
    for column in values.T:
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + column
    return mixed.tobytes()


def candidates(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Numbers of the rows of `hashes` (rows, BANDS) that share a hash with another row, in order."""
    shared = np.zeros(len(hashes), bool)
    for column in hashes.T:
        order = np.argsort(column, kind="stable")
        same = column[order][1:] == column[order][:-1]
        shared[order[1:][same]] = True
        shared[order[:-1][same]] = True
    return np.flatnonzero(shared).astype(np.int64)


def repeats(rows: Iterable[tuple[int, str, bytes]], similar: float = SIMILAR) -> dict[int, int]:
    """Of `rows` (number, normalised text, bands), in order: each row that nearly repeats one before it, and which.

    A row that repeats another is not compared with further, so what is kept has no near-duplicates left (but for
    pairs that MinHash misses, or beyond DEEP).
    """
    buckets: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    kept: dict[int, str] = {}
    out: dict[int, int] = {}
    for number, text, hashes in rows:
        keys = list(enumerate(np.frombuffer(hashes, np.uint64).tolist()))
        near = {other for key in keys for other in buckets[key]}
        match = next(
            (o for o in sorted(near) if Indel.normalized_similarity(text, kept[o], score_cutoff=similar) > 0), None
        )
        if match is not None:
            out[number] = match
            continue
        kept[number] = text
        for key in keys:
            if len(buckets[key]) < DEEP:
                buckets[key].append(number)
    return out
