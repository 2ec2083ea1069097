"""Which rows teach and which measure: fixed, disjoint, and free of near-duplicates across the two."""

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Indel

Item = TypeVar("Item")
SIMILAR = 0.95  # normalised Indel similarity from which two prompts count as the same


def normalise(text: str) -> str:
    """`text` in small letters, words only."""
    return " ".join(re.findall(r"\w+", text.lower()))


def hold_out(prompts: Sequence[str], share: float, most: int, seed: int) -> tuple[list[int], list[int]]:
    """Split rows at random into those to train on and those held out (at least 1, at most `most`).

    Rows whose prompts are the same when normalised stay on one side.
    """
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(normalise(prompt), []).append(i)
    keys = list(groups)
    wanted = min(most, max(1, round(len(prompts) * share)))
    held: list[int] = []
    for k in np.random.default_rng(seed).permutation(len(keys))[:-1]:
        if len(held) >= wanted:
            break
        held += groups[keys[k]]
    chosen = set(held)
    return [i for i in range(len(prompts)) if i not in chosen], sorted(held)


def draw(items: Iterable[Item], most: int, seed: int = 0) -> list[Item]:
    """`most` of a stream by chance, in its order (reservoir sampling, Vitter 1985); 0: all of it."""
    rng = np.random.default_rng(seed)
    kept: list[tuple[int, Item]] = []
    for n, item in enumerate(items):
        if not most or n < most:
            kept.append((n, item))
        elif (place := int(rng.integers(0, n + 1))) < most:
            kept[place] = (n, item)
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])]


def leaks(train: Sequence[str], test: Sequence[str], similar: float = SIMILAR) -> list[int]:
    """Numbers of the training prompts that (nearly) repeat a test prompt, by normalised Indel similarity."""
    wanted = list({normalise(t) for t in test})
    if not wanted:
        return []
    out: list[int] = []
    step = max(1, 20_000_000 // len(wanted))  # keeps the matrix of similarities at 20 MB
    for start in range(0, len(train), step):
        rows = [normalise(t) for t in train[start : start + step]]
        scores = process.cdist(
            rows, wanted, scorer=Indel.normalized_similarity, score_cutoff=similar, workers=-1,
            dtype=np.uint8, score_multiplier=100,
        )  # fmt: skip
        out += [start + int(i) for i in np.flatnonzero(scores.max(axis=1) > 0)]
    return out
