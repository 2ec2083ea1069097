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
from coterie.experts.library import write_atomic_bytes

FEWEST = 50  # rows with an outcome that a fit needs
Z = 1.645  # of a one-sided bound that holds in 95 of 100 cases
RIDGE = 1.0  # penalty on the weights: 50 rows must not make a certainty


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
        write_atomic_bytes(file, json.dumps(asdict(self), indent=1).encode())


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
        weights, bias = _logistic(z[here], y[here])
        p[there] = 1 / (1 + np.exp(-np.clip(z[there] @ weights + bias, -40, 40)))
    threshold = threshold_for(p.tolist(), right, error)
    sent = p >= threshold
    weights, bias = _logistic(z, y)
    n = len(centre)
    return Confidence(
        tuple(map(float, centre)), tuple(map(float, scale)), tuple(map(float, weights[:n])),
        tuple(map(float, weights[n:])), float(bias), threshold, error, len(y), float(sent.mean()),
        float((~outcome[sent]).mean()) if sent.any() else 0.0,
    )  # fmt: skip


def _logistic(z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
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
