"""What a quality report says: the shape of a data set, and findings that name rows and how to mend them."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHOWN = 1000  # rows that a finding names; it counts and mends them all

Rows = NDArray[np.int64]  # numbers of rows, counted over the usable rows of all files in order


@dataclass
class Finding:
    """A fault, the rows that have it, and the fixes that mend it (names for `fix`)."""

    name: str
    title: str
    grave: bool
    advice: str
    fixes: tuple[str, ...] = ()
    rows: Rows = field(default_factory=lambda: np.zeros(0, np.int64))
    notes: dict[int, str] = field(default_factory=dict)  # row: what exactly
    like: dict[int, int] = field(default_factory=dict)  # row: the row that it repeats; its place ends the note
    drops: Rows | None = None  # rows that the fix drops, where that is not `rows`
    places: list[dict[str, str]] = field(default_factory=list)  # place, text and note of the first SHOWN
    count: int = 0

    def json(self) -> dict[str, Any]:
        out = {k: getattr(self, k) for k in ("name", "title", "grave", "count", "advice", "fixes")}
        return {**out, "rows": self.places, "rows_left_out": self.count - len(self.places)}


@dataclass
class Report:
    """What a data set looks like, and what is wrong with it."""

    files: list[str]
    rows: int
    unusable: int
    lengths: dict[str, Any]  # tokens: by, total, mean, p50, p95, p99, longest, histogram
    labels: dict[str, int] | None  # rows of each label; None for free text
    languages: dict[str, int]
    sources: dict[str, int]
    licences: dict[str, int]
    synthetic: int
    test_rows: int
    findings: list[Finding]

    def json(self) -> dict[str, Any]:
        plain = {k: v for k, v in asdict(self).items() if k != "findings"}
        return {**plain, "findings": [f.json() for f in self.findings]}
