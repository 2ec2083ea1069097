"""What added rows are worth: the same training and the same test rows, without them and with them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

ROUNDS = 2000


@dataclass(frozen=True)
class Effect:
    """Scores without and with the added rows, and the paired difference with its 95% bootstrap interval."""

    rows: int
    added: int
    test_rows: int
    without: float
    having: float
    gain: float
    low: float
    high: float

    def __str__(self) -> str:
        sure = "they help" if self.low > 0 else "they harm" if self.high < 0 else "no difference that the test can see"
        return (
            f"{self.added:,} rows added to {self.rows:,}: {self.without:.1%} becomes {self.having:.1%}, "
            f"{self.gain * 100:+.1f} points (95% interval {self.low * 100:+.1f} to {self.high * 100:+.1f}): {sure}"
        )

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "says": str(self)}


def effect(rows: int, added: int, without: Sequence[float], having: Sequence[float], seed: int = 0) -> Effect:
    """From the scores (0 to 1) of the same test rows. Raises ValueError where they are none, or differ in number."""
    difference = np.asarray(having, np.float64) - np.asarray(without, np.float64)
    if not len(difference):
        raise ValueError("no rows to measure")
    rng = np.random.default_rng(seed)
    means = [difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(ROUNDS)]
    low, high = np.quantile(means, [0.025, 0.975])
    gain = float(difference.mean())
    return Effect(rows, added, len(difference), float(np.mean(without)), float(np.mean(having)), gain,
                  float(low), float(high))  # fmt: skip
