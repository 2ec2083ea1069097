"""What added rows are worth: the same training and the same test rows, without them and with them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from coterie.evaluation.significance import paired_bootstrap

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


def effect(rows: int, added: int, without: Sequence[float], having: Sequence[float]) -> Effect:
    """From the scores (0 to 1) of the same test rows. Raises ValueError where they are none, or differ in number."""
    gain = paired_bootstrap(without, having, rounds=ROUNDS)
    return Effect(
        rows, added, len(having), float(np.mean(without)), float(np.mean(having)), gain.value, gain.low, gain.high
    )
