"""Does a model that says 90% get 9 of 10 right? Reliability and expected calibration error (Naeini et al. 2015)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


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
