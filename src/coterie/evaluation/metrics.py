"""Metrics, each with a 95% confidence interval."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Z = 1.959963984540054  # the normal quantile of a two-sided 95% interval


@dataclass(frozen=True)
class Interval:
    """A value between 0 and 1 and its 95% confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"

    def json(self) -> dict[str, float]:
        return {k: round(v, 5) for k, v in asdict(self).items()}


def wilson(hits: int, total: int) -> Interval:
    """A proportion with its score interval (Wilson 1927). Raises ValueError for total < 1."""
    if total < 1:
        raise ValueError("no rows to measure")
    p, z2 = hits / total, Z * Z
    middle = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    return Interval(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))  # p: rounding, at 0 and 1


def bootstrap(scores: Sequence[float], seed: int = 0, rounds: int = 2000) -> Interval:
    """The mean of `scores` with a percentile bootstrap interval (Efron 1979). Raises ValueError when empty."""
    if not scores:
        raise ValueError("no rows to measure")
    values = np.asarray(scores, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(rounds)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def token_f1(answer: str, wanted: str) -> float:
    """Harmonic mean of precision and recall over words (Rajpurkar et al. 2016, SQuAD)."""
    a, b = (Counter(re.findall(r"\w+", t.lower())) for t in (answer, wanted))
    shared = sum((a & b).values())
    if not shared:
        return float(not a and not b)
    precision, recall = shared / sum(a.values()), shared / sum(b.values())
    return 2 * precision * recall / (precision + recall)


def macro_f1(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Mean over the wanted labels of each label's F1."""
    hits = Counter(a for a, w in zip(answers, wanted, strict=True) if a == w)
    said, right = Counter(answers), Counter(wanted)
    return float(np.mean([2 * hits[label] / (said[label] + right[label]) for label in right]))


def summarise(answers: Sequence[str], wanted: Sequence[str], choices: bool) -> dict[str, Any]:
    """The figures of an evaluation: accuracy and macro-F1 for choices, token-F1 and exact match for free text."""
    exact = sum(a.strip() == w.strip() for a, w in zip(answers, wanted, strict=True))
    if choices:
        return {"accuracy": wilson(exact, len(wanted)).json(), "macro_f1": round(macro_f1(answers, wanted), 5)}
    overlap = [token_f1(a, w) for a, w in zip(answers, wanted, strict=True)]
    return {"token_f1": bootstrap(overlap).json(), "exact_match": wilson(exact, len(wanted)).json()}
