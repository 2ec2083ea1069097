"""Metrics, each with a 95% confidence interval."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
from rapidfuzz.distance import LCSseq

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


def exact_match(answer: str, wanted: str) -> float:
    """1 where the two are the same but for white space around them."""
    return float(answer.strip() == wanted.strip())


def rouge_l(answer: str, wanted: str) -> float:
    """F1 over the longest common subsequence of words (Lin 2004, ROUGE-L of one reference, no stemming)."""
    a, b = (re.findall(r"\w+", t.lower()) for t in (answer, wanted))
    if not a or not b:
        return float(not a and not b)
    return 2 * LCSseq.similarity(a, b) / (len(a) + len(b))  # = 2PR / (P + R) with P = LCS / |a|, R = LCS / |b|


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
CALCULATOR = re.compile(r"<<[^<>]*>>")  # gsm8k writes its sums twice: 3*4=<<3*4=12>>12


def final_number(text: str) -> Decimal | None:
    """The number a worked answer ends in: the first after its last "####", else the last one; None without one."""
    worked = CALCULATOR.sub("", text)
    _, mark, tail = worked.rpartition("####")
    found = NUMBER.findall(tail)
    if not found:
        return None
    try:
        return Decimal((found[0] if mark else found[-1]).replace(",", ""))
    except InvalidOperation:
        return None


def numeric_match(answer: str, wanted: str) -> float:
    """1 where both end in the same number: 42, 42.0, $42 and "#### 42" are the same (Cobbe et al. 2021, GSM8K)."""
    said = final_number(answer)
    return float(said is not None and said == final_number(wanted))


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model is by held-out text: summed negative log-likelihood in nats, tokens scored, their bytes."""

    nats: float
    tokens: int
    bytes: int

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.bytes < 1:
            raise ValueError("no text to measure")

    @property
    def per_token(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def per_byte(self) -> float:
        """Comparable between models of different tokenizers, as perplexity per token is not."""
        return math.exp(self.nats / self.bytes)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / math.log(2)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased chance that one of k answers passes, from `passed` of `samples` tried (Chen et al. 2021, section 2.1).

    Raises ValueError where k is more than the samples or a count is negative.
    """
    if not (0 <= passed <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} cannot be told from {passed} of {samples} samples")
    return 1.0 - math.prod(1 - k / i for i in range(samples - passed + 1, samples + 1))


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
