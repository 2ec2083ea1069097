"""Texts as vectors without a model: words and pairs of words, weighted by TF-IDF (Spärck Jones 1972)."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]  # (texts, width)
Embed = Callable[[Sequence[str]], Vectors]  # what callers pass in: texts to vectors
MOST = 2048  # words and pairs that are told apart; the probe's work grows with its cube


@dataclass(frozen=True)
class TfIdf:
    """`places` maps a word or a pair of words to its dimension, whose rarity is `idf` (width)."""

    places: dict[str, int]
    idf: NDArray[np.float32]

    @classmethod
    def learn(cls, texts: Sequence[str], most: int = MOST) -> "TfIdf":
        """The `most` commonest features that two texts share."""
        seen: Counter[str] = Counter()
        for text in texts:
            seen.update(set(_features(text)))
        kept = [(f, n) for f, n in seen.most_common(most) if n > 1] or seen.most_common(1)
        idf = np.log(max(len(texts), 1) / np.array([n for _, n in kept] or [1], np.float32)) + 1
        return cls({f: i for i, (f, _) in enumerate(kept)}, idf.astype(np.float32))

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Vectors of unit length (or zero, where no feature is known), (texts, width)."""
        out = np.zeros((len(texts), len(self.idf)), np.float32)
        for i, text in enumerate(texts):
            for feature, count in Counter(_features(text)).items():
                if (j := self.places.get(feature)) is not None:
                    out[i, j] = (1 + np.log(count)) * self.idf[j]
        return unit(out)


def unit(x: Vectors) -> Vectors:
    """Rows scaled to length 1; a row of zeros stays."""
    length: Vectors = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
    return x / length


def _features(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return words + [f"{a} {b}" for a, b in pairwise(words)]
