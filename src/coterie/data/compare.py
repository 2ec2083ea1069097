"""Is it like production? Training data against what people really ask.

Drift is a classifier two-sample test (Lopez-Paz & Oquab 2017): how well can a classifier tell the two apart, as the
area under the ROC curve; 0.5 is not at all. Coverage is the share of production inputs with a near training input,
where near means: as near as 95% of training inputs are to their own nearest neighbour. What is not covered is
grouped, the most frequent group first.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.data.features import Embed, TfIdf, Vectors, unit
from coterie.data.probe import fit
from coterie.data.split import normalise
from coterie.errors import DataError
from coterie.evaluation.metrics import Interval, wilson

SAMPLE = 4000  # inputs of each side that are compared; larger files are sampled
FAR = 0.05  # share of training inputs that count as far from the others
ALIKE = 0.5  # cosine from which two uncovered inputs share a group
EXAMPLES = 5


@dataclass(frozen=True)
class Missing:
    """Production inputs without a near training input that are like each other: how many, and some of them."""

    count: int
    share: float
    examples: tuple[dict[str, str], ...]  # place and text


@dataclass(frozen=True)
class Likeness:
    """How training data stands to production inputs."""

    train_rows: int
    production_rows: int
    coverage: Interval
    drift: Interval  # area under the ROC curve: 0.5 the same, 1 told apart always
    threshold: float  # cosine from which a training input is near
    missing: tuple[Missing, ...]

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        if self.drift.low <= 0.55 and self.coverage.value >= 0.9:
            return "The training data looks like production."
        if self.coverage.value < 0.7:
            return "Much of what people ask has nothing like it in the training data: add rows for the groups below."
        if self.drift.low > 0.8:
            return "Production is easily told from the training data: its subjects, wording or shares differ."
        return "Production differs somewhat from the training data; the groups below are what it lacks."

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def compare(
    train: Sequence[str],
    production: Sequence[tuple[str, str]],
    embed: Embed | None = None,
    groups: int = 10,
    seed: int = 0,
) -> Likeness:
    """`train` texts against `production` (place, text). Without `embed`, vectors are TF-IDF. Raises DataError.

    Texts that are the same when normalised weigh in production as often as they come, in training once.
    """
    rng = np.random.default_rng(seed)
    once = list({normalise(t): t for t in train}.values())
    ours, theirs = _sample(once, rng), _sample(production, rng)
    if len(ours) < 10 or len(theirs) < 10:
        raise DataError(f"{len(once)} training and {len(production)} production inputs: at least 10 of each are needed")
    texts = ours + [text for _, text in theirs]
    raw = embed(texts) if embed else TfIdf.learn(texts)(texts)
    vectors = unit(raw - raw[: len(ours)].mean(axis=0)) if embed else raw  # what all embeddings share says nothing
    a, b = vectors[: len(ours)], vectors[len(ours) :]
    own = _nearest(a, a, skip_self=True)
    threshold = float(np.quantile(own, FAR))
    near = _nearest(b, a) >= threshold - 1e-6
    far = np.flatnonzero(~near)
    clusters = _groups(b[far], groups)
    missing = tuple(
        Missing(
            len(c),
            len(c) / len(b),
            tuple({"place": theirs[far[i]][0], "text": theirs[far[i]][1]} for i in c[:EXAMPLES]),
        )
        for c in clusters
    )
    first = {normalise(text): i for i, (_, text) in reversed(list(enumerate(theirs)))}  # copies would know each other
    drift = _auc(a, b[sorted(first.values())], rng)
    return Likeness(len(train), len(production), wilson(int(near.sum()), len(near)), drift, threshold, missing)


def _sample(items: Sequence[Any], rng: np.random.Generator) -> list[Any]:
    if len(items) <= SAMPLE:
        return list(items)
    return [items[i] for i in np.sort(rng.permutation(len(items))[:SAMPLE])]


def _nearest(x: Vectors, among: Vectors, skip_self: bool = False) -> Vectors:
    """The highest cosine of each row of `x` with a row of `among`, (rows of x)."""
    out = []
    for start in range(0, len(x), 1024):
        cosines = x[start : start + 1024] @ among.T
        if skip_self:
            rows = np.arange(len(cosines))
            cosines[rows, start + rows] = -1
        out.append(cosines.max(axis=1))
    nearest: Vectors = np.concatenate(out)
    return nearest


def _auc(a: Vectors, b: Vectors, rng: np.random.Generator) -> Interval:
    """How well the probe tells `a` from `b`, on rows that it did not see, with Hanley & McNeil's interval (1982)."""
    n = min(len(a), len(b))
    a, b = a[rng.permutation(len(a))[:n]], b[rng.permutation(len(b))[:n]]
    probe, alone = fit(np.vstack([a, b]), ["train"] * n + ["production"] * n)
    score = alone[:, probe.classes.index("production")]
    ranks = _ranks(score)
    auc = float((ranks[n:].sum() - n * (n + 1) / 2) / (n * n))
    q1, q2 = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    error = float(np.sqrt(max(0.0, auc * (1 - auc) + (n - 1) * (q1 + q2 - 2 * auc * auc)) / (n * n)))
    return Interval(auc, max(0.0, auc - 1.96 * error), min(1.0, auc + 1.96 * error))


def _ranks(x: Vectors) -> NDArray[np.float64]:
    """Ranks from 1, ties share their mean."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2)[place]
    return ranks


def _groups(x: Vectors, most: int) -> list[list[int]]:
    """Up to `most` groups of alike rows of `x`, the largest first, each led by the row that is like most others."""
    left = np.ones(len(x), bool)
    alike = x @ x.T >= ALIKE
    np.fill_diagonal(alike, True)  # a text without a known word is like itself alone
    counts = alike.sum(axis=1)
    out: list[list[int]] = []
    while left.any() and len(out) < most:
        centre = int(np.where(left, counts, 0).argmax())
        members = np.flatnonzero(alike[centre] & left)
        out.append([centre, *(i for i in members.tolist() if i != centre)])
        left[members] = False
        counts -= alike[:, members].sum(axis=1)
    return sorted(out, key=len, reverse=True)
