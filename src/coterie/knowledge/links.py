"""Documents that name the same fields and tools lead to each other.

A procedure wants an `account_id`; another document says how it is looked up, in words that no customer uses. What links
them is the names that software gives things, words joined by "_": rare, and written alike everywhere. docs/log.md has
what was tried.
"""

import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
BEST = 20  # documents that lend
MOST, LONGEST = 200, 64  # different names of a document that count, and characters of one


def names_of(texts: Iterable[str]) -> list[str]:
    """The names of fields and tools in the texts of a document, each once, in lower case."""
    words = (word for text in texts if "_" in text for word in text.split() if "_" in word)
    found = (name for word in words for name in re.findall(r"\b[^\W_]+(?:_[^\W_]+)+\b", word))
    return list(dict.fromkeys(name.lower() for name in found if len(name) <= LONGEST))[:MOST]


def lend(documents: Ints, names: Ints, scores: Floats) -> Floats:
    """What each candidate takes from the BEST: their scores (under 0 counts as 0), each times its likeness to them,
    the cosine of the names of both, a rare one counting more. documents, names: a document and a name that it holds,
    pair by pair, as numbers from 0; scores: of each document, with mean 0."""
    if not len(names):
        return np.zeros(len(scores), np.float32)
    held = np.bincount(names)  # documents that hold each name
    weights = np.log(len(scores) / held[names]) * (held[names] > 1)
    lengths = np.sqrt(np.bincount(documents, weights**2, minlength=len(scores)))
    weights = weights / np.maximum(lengths[documents], 1e-9)
    best = np.argsort(-scores, kind="stable")[:BEST]
    lending = np.zeros(len(scores))
    lending[best] = np.maximum(scores[best], 0)
    brought = np.bincount(names, weights * lending[documents])
    taken = np.bincount(documents, weights * brought[names], minlength=len(scores))
    return np.asarray(taken - lending * (lengths > 0), np.float32)  # nobody lends to itself
