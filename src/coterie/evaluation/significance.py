"""Is one expert really better than another? Both have answered the same rows, so rows are compared in pairs."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Difference:
    """The mean of b less the mean of a, its 95% interval, and the chance of as much by luck alone (two-sided)."""

    value: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f}), p = {self.p:.3g}"

    def json(self) -> dict[str, float]:
        return {k: round(v, 6) for k, v in asdict(self).items()}


def paired_bootstrap(a: Sequence[float], b: Sequence[float], seed: int = 0, rounds: int = 10_000) -> Difference:
    """Resample rows with both their scores (Efron & Tibshirani 1993; Koehn 2004).

    The interval is the percentile one; p asks how often a resample strays as far from the difference as the
    difference is from zero, and is never below 1 / (rounds + 1). Raises ValueError where the rows do not pair.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} rows cannot be compared in pairs")
    gaps = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    rng, n, seen = np.random.default_rng(seed), len(gaps), float(gaps.mean())
    step = max(1, 4_000_000 // n)  # keeps the matrix of drawn rows at 32 MB
    means = np.concatenate([
        gaps[rng.integers(0, n, (min(step, rounds - start), n))].mean(axis=1) for start in range(0, rounds, step)
    ])  # fmt: skip
    low, high = np.quantile(means, [0.025, 0.975])
    strayed = int((np.abs(means - seen) >= abs(seen) - 1e-12).sum())
    return Difference(seen, float(low), float(high), (strayed + 1) / (rounds + 1))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test (1947): of the rows that one gets right and the other wrong, a fair coin?

    Raises ValueError where the rows do not pair.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} rows cannot be compared in pairs")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / (1 << n))


def compare_scores(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Difference, interval and p; for scores that are all right or wrong, McNemar's p and the rows it rests on."""
    out: dict[str, Any] = {"rows": len(a), "difference": paired_bootstrap(a, b).json()}
    if set(a) | set(b) <= {0.0, 1.0}:
        right_a, right_b = [bool(x) for x in a], [bool(x) for x in b]
        out["mcnemar_p"] = mcnemar(right_a, right_b)
        out["only_a_right"] = sum(x and not y for x, y in zip(right_a, right_b, strict=True))
        out["only_b_right"] = sum(y and not x for x, y in zip(right_a, right_b, strict=True))
    return out
