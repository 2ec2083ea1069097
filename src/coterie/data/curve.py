"""Is it enough? A learning curve on growing subsets, and what more data would bring.

Scores follow a power law, score(n) = a - b * n^-c (Hestness et al. 2017; Viering & Loog 2021). We fit it to the
measured sizes and read off twice and four times the data, with an interval from a bootstrap over test rows and
repeats. The interval covers the noise of the measurement, not a curve of another shape: treat far sizes with care.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.data.features import Embed, TfIdf
from coterie.data.probe import fit as fit_probe

Floats = NDArray[np.float64]
# Trains on the examples with these numbers and returns the score of each test row, 0 to 1.
Measure = Callable[[NDArray[np.int64]], Sequence[float]]

EXPONENTS = np.linspace(0.05, 2.0, 40)
ROUNDS = 400  # bootstrap rounds
SMALLEST = 16  # rows of the first size
FURTHER = (2, 4)  # times the data


@dataclass(frozen=True)
class PowerLaw:
    """score(n) = a - b * n^-c, with b >= 0 and a <= 1."""

    a: float
    b: float
    c: float

    def __call__(self, n: float) -> float:
        return float(self.a - self.b * n**-self.c)


@dataclass(frozen=True)
class Point:
    """The score at one size, mean over repeats and test rows, with its 95% interval."""

    rows: int
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Forecast:
    """What `rows` rows would score, and the gain over today's, each with a 95% interval."""

    times: int
    rows: int
    score: float
    gain: float
    low: float
    high: float

    def __str__(self) -> str:
        how = {2: "twice", 4: "four times"}.get(self.times, f"{self.times} times")
        return (f"{how} the data ({self.rows:,} rows): about {self.gain * 100:+.1f} points "
                f"(95% interval {self.low * 100:+.1f} to {self.high * 100:+.1f})")  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """The measured points, the law through them, and where it leads."""

    points: tuple[Point, ...]
    law: PowerLaw
    forecasts: tuple[Forecast, ...]
    test_rows: int

    def json(self) -> dict[str, Any]:
        return {"points": [vars(p) for p in self.points], "law": vars(self.law), "test_rows": self.test_rows,
                "forecasts": [{**vars(f), "says": str(f)} for f in self.forecasts]}  # fmt: skip


def sizes(rows: int, steps: int) -> list[int]:
    """`steps` growing sizes, each a constant factor over the last, ending with all `rows`."""
    first = min(rows, max(SMALLEST, rows // 2 ** (steps - 1)))
    return sorted({round(n) for n in np.geomspace(first, rows, steps)})


def subsets(labels: Sequence[str], size: int, repeat: int, seed: int = 0) -> NDArray[np.int64]:
    """Numbers of `size` rows drawn at random with every label's share kept; smaller subsets lie within larger ones."""
    rng = np.random.default_rng([seed, repeat])
    share, turn = Counter(labels), Counter[str]()
    keys = np.empty(len(labels))
    for i in rng.permutation(len(labels)):  # each label's rows are spread evenly over the order
        keys[i] = (turn[labels[i]] + rng.random()) / share[labels[i]]
        turn[labels[i]] += 1
    return np.sort(np.argsort(keys, kind="stable")[:size]).astype(np.int64)


def learning_curve(
    measure: Measure, labels: Sequence[str], steps: int = 6, repeats: int = 3, seed: int = 0,
    tell: Callable[[int, int], None] = lambda _d, _t: None,
) -> Curve:  # fmt: skip
    """Measure growing subsets of the rows with these `labels`, `repeats` times each, and fit the law.

    `tell` hears of measurements done, and of how many there are. The largest size is measured once.
    """
    wanted = sizes(len(labels), steps)
    jobs = [(n, r) for n in wanted for r in range(repeats if n < len(labels) else 1)]
    scores: dict[int, list[Sequence[float]]] = {n: [] for n in wanted}
    for done, (n, r) in enumerate(jobs):
        tell(done, len(jobs))
        scores[n].append(measure(subsets(labels, n, r, seed)))
    tell(len(jobs), len(jobs))
    return fit_curve({n: np.asarray(s, np.float64) for n, s in scores.items()}, seed)


def fit_curve(scores: dict[int, Floats], seed: int = 0) -> Curve:
    """The curve through `scores`: for each size an array (repeats, test rows)."""
    ns = np.array(sorted(scores), np.float64)
    means = np.array([scores[int(n)].mean() for n in ns])
    law = fit_power_law(ns, means)
    rng = np.random.default_rng(seed)
    tests = scores[int(ns[0])].shape[1]
    drawn = np.empty((ROUNDS, len(ns)))
    for k in range(ROUNDS):
        rows = rng.integers(0, tests, tests)  # the same test rows for every size: the gain is a paired difference
        for j, n in enumerate(ns):
            s = scores[int(n)]
            drawn[k, j] = s[rng.integers(0, len(s), len(s))][:, rows].mean()
    laws = _fit_laws(ns, drawn)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    points = tuple(
        Point(int(n), float(m), float(lo), float(hi)) for n, m, lo, hi in zip(ns, means, low, high, strict=True)
    )
    return Curve(points, law, tuple(_forecast(law, laws, int(ns[-1]), t) for t in FURTHER), tests)


def _forecast(law: PowerLaw, laws: Sequence[PowerLaw], rows: int, times: int) -> Forecast:
    gains = [one(rows * times) - one(rows) for one in laws]
    low, high = np.quantile(gains, [0.025, 0.975])
    gain = law(rows * times) - law(rows)
    return Forecast(times, rows * times, law(rows * times), gain, min(float(low), gain), max(float(high), gain))


def fit_power_law(ns: Floats, scores: Floats) -> PowerLaw:
    """The law nearest to `scores` (sizes) by least squares. A falling curve, or one of two points, is flat."""
    (law,) = _fit_laws(ns, scores[None])
    return law


def _fit_laws(ns: Floats, scores: Floats) -> list[PowerLaw]:
    """A law for each row of `scores` (rows, sizes): the best a and b for each exponent of a grid, then the best."""
    mean = scores.mean(axis=1)
    found = np.stack([mean, np.zeros_like(mean), np.ones_like(mean)])  # a, b, c of each row
    least = ((scores - mean[:, None]) ** 2).sum(axis=1)
    for c in EXPONENTS if len(ns) > 2 else ():
        x = ns**-c
        b = -((x - x.mean()) * (scores - mean[:, None])).sum(axis=1) / ((x - x.mean()) ** 2).sum()
        a = mean + b * x.mean()
        over = a > 1  # no score passes 1: the best slope under that ceiling
        b = np.where(over, ((1 - scores) * x).sum(axis=1) / (x * x).sum(), b)
        a = np.where(over, 1.0, a)
        loss = ((scores - (a[:, None] - b[:, None] * x)) ** 2).sum(axis=1)
        better = (b >= 0) & (loss < least)
        found[:, better] = np.stack([a, b, np.full_like(a, c)])[:, better]
        least = np.where(better, loss, least)
    return [PowerLaw(float(a), float(b), float(c)) for a, b, c in found.T]


def probe_measure(
    texts: Sequence[str], labels: Sequence[str], tests: Sequence[str], wanted: Sequence[str], embed: Embed | None = None
) -> Measure:
    """Measures subsets in seconds by a probe on vectors that are computed once (TF-IDF is learned on each subset)."""
    vectors = (embed(texts), embed(tests)) if embed else None

    def measure(rows: NDArray[np.int64]) -> list[float]:
        chosen = [labels[i] for i in rows]
        if vectors:
            train, test = vectors[0][rows], vectors[1]
        else:
            tfidf = TfIdf.learn([texts[i] for i in rows])
            train, test = tfidf([texts[i] for i in rows]), tfidf(tests)
        said = fit_probe(train, chosen)[0].predict(test)
        return [float(a == b) for a, b in zip(said, wanted, strict=True)]

    return measure
