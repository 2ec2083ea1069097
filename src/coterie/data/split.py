"""Which rows teach and which measure: fixed, disjoint, and free of near-duplicates across the two."""

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Indel

from coterie.data.read import Example

Item = TypeVar("Item")
SIMILAR = 0.95  # normalised Indel similarity from which two prompts count as the same
PART = 4096  # rows looked at together
CELLS = 20_000_000  # similarities computed at once: 20 MB


def normalise(text: str) -> str:
    """`text` in small letters, words only; as it is where it has no words."""
    return " ".join(re.findall(r"\w+", text.lower())) or text.strip()


def hold_out(keys: Sequence[Hashable], share: float, most: int, seed: int) -> tuple[list[int], list[int]]:
    """Split rows at random into those to train on and those held out, a `share` of them but at most `most`.

    Rows of equal key stay on one side. At least one row is held out, unless all have the same key.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    shuffled = list(groups.values())
    shuffled = [shuffled[k] for k in np.random.default_rng(seed).permutation(len(shuffled))]
    wanted = min(most, max(1, round(len(keys) * share)), len(keys) - 1)
    held: list[int] = []
    for group in shuffled:
        if len(held) + len(group) <= wanted:
            held += group
    if not held and len(shuffled) > 1:
        held = min(shuffled, key=len)  # every group is larger than what was wanted
    chosen = set(held)
    return [i for i in range(len(keys)) if i not in chosen], sorted(held)


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


def leaks(train: Sequence[str], test: Sequence[str]) -> list[int]:
    """Numbers of the training prompts that (nearly) repeat a test prompt, by normalised Indel similarity."""
    wanted = list({normalise(t) for t in test})
    if not wanted or not train:
        return []
    scores = process.cdist(
        [normalise(t) for t in train], wanted, scorer=Indel.normalized_similarity, score_cutoff=SIMILAR,
        workers=-1, dtype=np.uint8, score_multiplier=100,
    )  # fmt: skip
    return [int(i) for i in np.flatnonzero(scores.max(axis=1) > 0)]


def mark_leaks(examples: Iterable[Example], test: Sequence[str]) -> Iterator[tuple[Example, bool]]:
    """Each example, and whether it repeats a prompt of `test`. Holds a part of them in memory at a time."""
    several = max(1, min(PART, CELLS // max(1, len(test))))
    rest = iter(examples)
    while part := list(islice(rest, several)):
        leaked = set(leaks([e.asked for e in part], test))
        yield from ((example, i in leaked) for i, example in enumerate(part))
