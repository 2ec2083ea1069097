"""Does a model that says 90% get 9 of 10 right? Reliability and expected calibration error (Naeini et al. 2015); how a
signal becomes a probability (Platt 1999), and from which one on few enough are wrong (Bates et al. 2021)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Z = 1.645  # of a one-sided bound that holds in 95 of 100 cases
RIDGE = 1.0  # penalty on the weights: 50 rows must not make a certainty


@dataclass(frozen=True)
class Bin:
    """Rows of like confidence: the confidences' ends and mean, and the share that was right."""

    low: float
    high: float
    confidence: float
    accuracy: float
    rows: int


def reliability(confidences: Sequence[float], right: Sequence[bool], bins: int = 10) -> list[Bin]:
    """Bins of equal mass, the least confident first: as many rows in each, give or take one.

    Equal confidences may be cut apart by a bin's edge; they keep the order of the rows. Raises ValueError where
    there is nothing to bin or a confidence is not in 0..1.
    """
    if len(confidences) != len(right) or not confidences or bins < 1:
        raise ValueError(f"{len(confidences)} confidences and {len(right)} outcomes cannot be put in {bins} bins")
    p, hit = np.asarray(confidences, np.float64), np.asarray(right, np.float64)
    if not ((p >= 0) & (p <= 1 + 1e-6)).all():
        raise ValueError("a confidence must be between 0 and 1")
    order = np.argsort(p, kind="stable")
    parts = [rows for rows in np.array_split(order, min(bins, len(order))) if len(rows)]
    return [Bin(float(p[r].min()), float(p[r].max()), float(p[r].mean()), float(hit[r].mean()), len(r)) for r in parts]


def calibration(confidences: Sequence[float], right: Sequence[bool], bins: int = 10) -> dict[str, Any]:
    """Expected calibration error, mean |confidence - accuracy| weighted by rows, and the table it comes from."""
    table = reliability(confidences, right, bins)
    error = sum(b.rows * abs(b.confidence - b.accuracy) for b in table) / len(confidences)
    rows = [{k: round(v, 5) for k, v in asdict(b).items()} for b in table]
    return {"ece": round(error, 5), "reliability": rows}


def threshold_for(confidence: Sequence[float], right: Sequence[bool], error: float) -> float:
    """The lowest confidence from which on at most `error` of the answers are wrong; above all where there is none."""
    p, wrong = np.asarray(confidence, np.float64), ~np.asarray(right, bool)
    order = np.argsort(-p, kind="stable")
    sent = np.arange(1, len(order) + 1)
    share = np.cumsum(wrong[order]) / sent
    spread = Z * np.sqrt(share * (1 - share) / sent + Z**2 / (4 * sent**2))
    risk = (share + Z**2 / (2 * sent) + spread) / (1 + Z**2 / sent)  # Wilson 1927
    last = np.append(p[order][1:] != p[order][:-1], True)  # equal confidences are sent together or not at all
    good = np.flatnonzero((risk <= error) & last)
    return float(p[order][good[-1]]) if len(good) else math.nextafter(max(float(p.max(initial=0.0)), 1.0), 2)


def logistic(z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights (signals) and bias of a ridge logistic regression, by Newton's method."""
    design = np.concatenate([z, np.ones((len(z), 1))], axis=1)
    penalty = np.diag([RIDGE] * z.shape[1] + [1e-6])
    w = np.zeros(design.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(design @ w, -40, 40)))
        step = np.linalg.solve(
            design.T @ (design * (p * (1 - p))[:, None]) + penalty + 1e-9 * np.eye(len(w)),
            design.T @ (y - p) - penalty @ w,
        )
        w = w + step * min(1.0, 5.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-8:
            break
    return w[:-1], float(w[-1])
