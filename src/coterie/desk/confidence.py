"""How sure the assistant is of an answer, as a probability, and from which one on it may send it.

A logistic regression on the signals of routing, retrieval and generation, fitted to answers whose outcome is known
(Platt 1999), and a threshold for a wished share of wrong answers among those sent: the lowest at which the share,
as it may be with 95% confidence and not only as it was counted, stays within it (risk-controlling prediction sets,
Bates et al. 2021, with Wilson's bound).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coterie.errors import DataError, ModelError
from coterie.evaluation.calibration import logistic, threshold_for
from coterie.files import write_atomic

FEWEST = 50  # rows with an outcome that a fit needs


@dataclass(frozen=True)
class Signals:
    """What is known of one answer. None: there was none of it.

    similarity: the router's, to its training inputs. logprob: mean over the answer's tokens, in nats. retrieval: the
    best score of the evidence.
    """

    similarity: float | None = None
    logprob: float | None = None
    retrieval: float | None = None

    def values(self) -> list[float]:
        """As numbers, NaN for none."""
        return [math.nan if v is None else v for v in (self.similarity, self.logprob, self.retrieval)]


@dataclass(frozen=True)
class Confidence:
    """Centre, scale and weight of each signal, and what its absence weighs; the bias; the threshold, and how it did on
    the rows it was set on."""

    centre: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    absent: tuple[float, ...]
    bias: float
    threshold: float
    error: float  # wished
    rows: int
    handled: float  # share of the rows at or above the threshold
    wrong: float  # share of these that are wrong

    def of(self, signals: Signals) -> float:
        """Probability that the answer is right."""
        total = self.bias
        parts = zip(signals.values(), self.centre, self.scale, self.weights, self.absent, strict=True)
        for value, centre, scale, weight, absent in parts:
            total += absent if math.isnan(value) else weight * (value - centre) / scale
        return 1 / (1 + math.exp(-max(-40.0, min(40.0, total))))

    def sure(self, signals: Signals) -> bool:
        return self.of(signals) >= self.threshold

    def save(self, file: Path) -> None:
        write_atomic(file, json.dumps(asdict(self), indent=1))


def load_confidence(file: Path) -> Confidence | None:
    """As it was saved; None where there is none. Raises ModelError where the file is damaged."""
    if not file.exists():
        return None
    try:
        given = json.loads(file.read_text())
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return Confidence(**fields)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: damaged ({error}); `coterie desk calibrate` makes it anew") from error


def fit_confidence(signals: Sequence[Signals], right: Sequence[bool], error: float) -> Confidence:
    """Learn from answers whose outcome is known. The threshold is set on what each half teaches of the other.

    Raises DataError for too few rows, or where all outcomes are the same.
    """
    if len(signals) != len(right) or len(right) < FEWEST:
        raise DataError(f"{len(right)} answers with an outcome; at least {FEWEST} are needed to know when to hand over")
    x, y = np.array([s.values() for s in signals]), np.asarray(right, np.float64)
    if y.min() == y.max():
        raise DataError("all answers are right, or all are wrong: nothing tells a sure answer from an unsure one")
    known = ~np.isnan(x)
    centre = np.where(known.any(axis=0), np.nanmean(np.where(known.any(axis=0), x, 0.0), axis=0), 0.0)
    filled = np.where(known, x, centre)
    scale = np.where(filled.std(axis=0) > 1e-9, filled.std(axis=0), 1.0)
    z = np.concatenate([(filled - centre) / scale, ~known], axis=1)
    order = np.random.default_rng(0).permutation(len(y))
    half = order[: len(y) // 2], order[len(y) // 2 :]
    p, outcome = np.zeros(len(y)), y.astype(bool)
    for here, there in (half, half[::-1]):
        weights, bias = logistic(z[here], y[here])
        p[there] = 1 / (1 + np.exp(-np.clip(z[there] @ weights + bias, -40, 40)))
    threshold = threshold_for(p.tolist(), right, error)
    sent = p >= threshold
    weights, bias = logistic(z, y)
    n = len(centre)
    return Confidence(
        tuple(map(float, centre)), tuple(map(float, scale)), tuple(map(float, weights[:n])),
        tuple(map(float, weights[n:])), float(bias), threshold, error, len(y), float(sent.mean()),
        float((~outcome[sent]).mean()) if sent.any() else 0.0,
    )  # fmt: skip
