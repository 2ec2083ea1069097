"""Which experts a request wakes, if any: the nearest to its text, as near as that expert's own inputs usually are.

One product of the text's vector with the means of all experts gives a shortlist, which is compared closely. There an
expert's score is the sum of two: the mean cosine of the text to its three nearest training inputs, in a space whitened
by the covariance within experts, so that what varies inside every subject (length, politeness, names) counts little;
and a ridge regression of "is it this expert's?", in closed form from the experts' means and covariances. An expert is
left out where fewer than a share `abstain` of its own inputs, each left out in turn, score as low as the text (a
conformal p-value, Vovk et al. 2005); when all are left out the base model answers. The best two, where they are close,
are compared directly by what tells their own inputs apart (a kernel ridge regression on the pair). Shares come from a
softmax whose temperature is fitted to the experts' own inputs (Guo et al. 2017).

Notable: an expert's statistics never depend on another's. What is pooled is a mean over the covariances of at most
POOLED experts, those whose names have the lowest hashes, so it depends on which experts there are and not on the
order in which they came, and in a large library an expert that comes or goes nearly never changes it.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from coterie.errors import CoterieError, ModelError
from coterie.routing.space import Background, Floats
from coterie.routing.statistics import Statistics, Summary

SHORTLIST = 8  # experts compared closely, or as many as may answer together where those are more
NEAREST = 3  # training inputs that a similarity is the mean over
POOLED = 32  # experts whose covariances are pooled: 5.3 MB each for a base model of width 576
SHRINKAGE = 10  # of the covariance toward the plain distance, times dimensions / inputs
RIDGE = 0.5  # penalty of the regression, times dimensions / inputs, as a share of the mean variance
REGRESSION = 0.3  # weight of the regression in the score, where the cosine has weight 1
KEPT = 64  # experts whose whitened samples are kept in memory: at most 3.7 MB each at that width
DUEL = 0.4  # weight of the comparison of the best two, where the cosine has weight 1
CLOSE = 0.1  # apart in score, from which on the best two are not compared
DUELLISTS = 512  # inputs of each that the comparison is learned from
SHARPNESS, PENALTY = 2.0, 0.03  # of its kernel exp(SHARPNESS (cosine - 1)), and of its ridge
DUELS = 4096  # pairs that are remembered, 4 kB each
OWN = 512  # of an expert's sample, the inputs whose own scores are known
BLOCKS = 8  # of columns, in a product with a triangle: 9/16 of the whole
LONE = 0.6  # similarity asked for by an expert that was trained on a single input
FITTED, FITTED_INPUTS = 8, 32  # experts, and inputs of each, that the temperature is fitted to
TEMPERATURE = 0.05  # where there is nothing to fit it to
log = logging.getLogger(__name__)
Ints = NDArray[np.int64]
Doubles = NDArray[np.float64]
Open = Callable[[], Statistics]


@dataclass(frozen=True)
class Scored:
    """How one expert stands to a text. `usual`: the share of its own inputs that are as far from the others."""

    name: str
    similarity: float
    threshold: float
    usual: float
    probability: float  # that the text is this expert's, among those on the shortlist
    nearest: tuple[tuple[str, float], ...]  # where the nearest training inputs came from, and their cosines


@dataclass(frozen=True)
class Decision:
    """The experts chosen with their shares, best first, which sum to 1; empty: the base model. And all that scored."""

    chosen: tuple[tuple[str, float], ...]
    scored: tuple[Scored, ...]

    @property
    def similarity(self) -> float | None:
        """Of the expert chosen, or of the one that came nearest."""
        wanted = self.chosen[0][0] if self.chosen else None
        found = [s.similarity for s in self.scored if wanted in (None, s.name)]
        return found[0] if found else None


@dataclass(frozen=True)
class _Sample:
    """An expert's sample, whitened and of unit length (n, width); own scores of OWN of them, and the same sorted."""

    units: Floats
    scores: Floats
    own: Floats
    where: tuple[str, ...]


class Router:
    """The experts' means in one array, (experts, width), and what is derived from them."""

    def __init__(self, background: Background) -> None:
        self.background = background
        self._names: list[str] = []
        self._open: dict[str, Open] = {}
        self._ranks: dict[str, str] = {}
        self._means = np.zeros((16, len(background.centre)), np.float32)  # around the background's
        self._scatters: dict[str, Floats] = {}  # of the pooled experts
        self._counts: dict[str, int] = {}  # their inputs
        self._units = np.zeros_like(self._means)  # means, whitened and of unit length
        self._fresh = 0  # rows of `_units` that are up to date
        self._derived: tuple[Floats, Floats] | None = None  # from them; None: to be made
        self._samples: OrderedDict[str, _Sample] = OrderedDict()
        self._duels: OrderedDict[tuple[str, str], Floats] = OrderedDict()  # what tells two experts apart
        self._temperature: float | None = None
        self.lost: dict[str, str] = {}  # experts whose statistics could not be read again, and why

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def add(self, name: str, known: Summary, reopen: Open | None = None) -> None:
        """Know an expert, or a new version of it: by its whole statistics, or by their summary and `reopen`, which
        reads them whenever they are needed, so that they need not be kept.

        Raises ModelError where they were made on another base model, or cannot be read.
        """
        if known.space != self.background.space or len(known.mean) != self._means.shape[1]:
            raise ModelError(
                f"{name}: its routing statistics are of another base model or version; "
                f"`coterie fit`, or `coterie experts learn-route {name} --inputs FILE`, makes them anew"
            )
        if name in self._open:
            self.remove(name)
        whole, order = known if isinstance(known, Statistics) else None, rank(name)
        last = max(self._scatters, key=self._ranks.__getitem__, default=None)
        pooled = len(self._scatters) < POOLED or (last is not None and order < self._ranks[last])
        if reopen is None:
            assert whole, "a summary comes with a way to read the rest"
            reopen = partial(_same, whole)
        if pooled:
            whole = whole or reopen()  # raises before anything is changed
            self._scatters[name], self._counts[name] = whole.scatter, whole.count
            if last and len(self._scatters) > POOLED:
                del self._scatters[last], self._counts[last]
            self._forget_pooled()
        self.lost.pop(name, None)
        if len(self._names) == len(self._means):
            self._means, self._units = (np.concatenate([a, np.zeros_like(a)]) for a in (self._means, self._units))
        self._means[len(self._names)] = known.mean - self.background.centre
        self._names.append(name)
        self._open[name], self._ranks[name] = reopen, order

    def remove(self, name: str) -> None:
        """Forget an expert; the last one takes its row."""
        place, end = self._names.index(name), len(self._names) - 1
        self._names[place], self._means[place] = self._names[end], self._means[end]
        self._units[place] = self._units[end]
        self._fresh = end if self._fresh > end else min(self._fresh, place)
        self._names.pop()
        del self._open[name], self._ranks[name]
        self._samples.pop(name, None)
        for pair in [pair for pair in self._duels if name in pair]:
            del self._duels[pair]
        if name in self._scatters:
            del self._scatters[name], self._counts[name]
            others = [n for n in self._names if n not in self._scatters]
            if others:
                heir = min(others, key=self._ranks.__getitem__)
                with suppress(CoterieError):  # said when it is next looked at
                    found = self._open[heir]()
                    self._scatters[heir], self._counts[heir] = found.scatter, found.count
            self._forget_pooled()

    def route(
        self, vector: Floats, top_k: int = 1, abstain: float = 0.03, only: Collection[str] | None = None,
        sure: bool = False,
    ) -> Decision:  # fmt: skip
        """The experts for a text with this vector (width).

        At most `top_k`, fewer where fewer are near enough. `only`: no others than these. `sure`: however far they are.
        """
        if not self._names:
            return Decision((), ())
        text, regressed = self._see(vector[None])[0], self._regress(vector[None])[0]
        found: list[tuple[float, str, _Sample, Floats, Ints]] = []
        for value, name in self._shortlist(text, regressed, only, max(top_k, SHORTLIST)):
            sample = self._sample(name)
            if sample is not None:
                cosines = sample.units @ text
                first = _first(cosines)
                found.append((float(_score(cosines[first].mean(), value)), name, sample, cosines, first))
        found.sort(key=lambda f: (-f[0], f[1]))
        scores = np.array([f[0] for f in found])
        if len(found) > 1 and scores[0] - scores[1] < CLOSE:
            lean = DUEL / 2 * self._duel(found[0][1:4], found[1][1:4])
            scores[:2] += (lean, -lean)
            order = np.argsort(-scores, kind="stable")
            found, scores = [found[i] for i in order], scores[order]
        logits = scores / self._fit_temperature()
        odds = np.exp(logits - logits.max(initial=-np.inf)) if found else logits
        odds /= max(odds.sum(), 1e-30)
        scored = tuple(
            Scored(
                name, similarity, float(sample.own[int(abstain * (len(sample.own) - 1))]),
                float(np.searchsorted(sample.own, similarity, "right") + 1) / (len(sample.own) + 1),
                float(share), tuple((sample.where[i], float(cosines[i])) for i in first),
            )
            for (similarity, name, sample, cosines, first), share in zip(found, odds, strict=True)
        )  # fmt: skip
        near = [s for s in scored if sure or s.similarity >= s.threshold][:top_k]
        total = sum(s.probability for s in near)
        shares = [s.probability / total if total > 0 else 1 / len(near) for s in near]
        return Decision(tuple((s.name, share) for s, share in zip(near, shares, strict=True) if share > 0), scored)

    def _forget_pooled(self) -> None:
        self._derived, self._temperature, self._fresh = None, None, 0
        self._samples.clear()
        self._duels.clear()

    def _pooled(self) -> tuple[Floats, Floats]:
        """What whitens a vector, (width, width), and a root of what makes the means a regression, one wider.

        Both by Cholesky, with nothing below the diagonal; any root gives the same cosines.
        """
        if self._derived is None:
            members = list(self._scatters)
            places = {name: i for i, name in enumerate(self._names)}
            within = (self.background.scatter + sum(self._scatters.values())) / (len(members) + 1)
            level = max(float(np.trace(within)) / len(within), 1e-12)
            # Fewer inputs than dimensions say little of the covariance: without this shrinkage what an expert has
            # seen stands out so much from what it has not that it turns its own subject away (docs/routing.md).
            few = len(within) / sum(self._counts.values())
            shrink, eye = SHRINKAGE * few / (1 + SHRINKAGE * few), np.eye(len(within))
            # Second moments of [vector, 1] over all experts, each counting alike, and the background as one more.
            means = np.zeros((len(members) + 1, len(within)))
            means[1:] = self._means[[places[name] for name in members]]
            moments = np.ones((len(within) + 1, len(within) + 1))
            moments[:-1, :-1] = within + means.T @ means / len(means) + RIDGE * few * level * eye
            moments[:-1, -1] = moments[-1, :-1] = means.mean(axis=0)
            self._derived = _root((1 - shrink) * within + shrink * level * eye), _root(moments)
        return self._derived

    def _see(self, vectors: Floats) -> Floats:
        """`vectors` (n, width) around the centre, whitened and of unit length."""
        return _unit(_upper(vectors - self.background.centre, self._pooled()[0]))

    def _regress(self, vectors: Floats) -> Floats:
        """What the product with [an expert's mean, 1] makes the regression's value of, (n, width + 1)."""
        solved: Floats = self._half(vectors) @ self._pooled()[1].T / np.float32(len(self._names) + 1)
        return solved

    def _half(self, vectors: Floats) -> Floats:
        """[vectors, 1] by the root of the regression, (n, width + 1): their products with each other are its own."""
        ones = np.ones((len(vectors), 1), np.float32)
        return _upper(np.concatenate([vectors - self.background.centre, ones], axis=1), self._pooled()[1])

    def _shortlist(
        self, text: Floats, regressed: Floats, only: Collection[str] | None, most: int
    ) -> list[tuple[float, str]]:
        """Regression's value and name of the `most` experts whose means come first by their cosine."""
        end = len(self._names)
        if self._fresh < end:
            self._units[self._fresh : end] = self._see(self._means[self._fresh : end] + self.background.centre)
            self._fresh = end
        cosines, wanted = self._units[:end] @ text, None if only is None else set(only)
        places = [i for i, name in enumerate(self._names) if wanted is None or name in wanted]
        if len(places) > most:
            some = np.array(places)
            places = some[np.argpartition(-cosines[some], most)[:most]].tolist()
        values = np.clip(self._means[places] @ regressed[:-1] + regressed[-1], -1, 1)
        return [(float(value), self._names[i]) for value, i in zip(values, places, strict=True)]

    def _sample(self, name: str) -> _Sample | None:
        """An expert's sample; None where its file has gone bad, whereupon the expert is left out."""
        if name not in self._samples:
            try:
                statistics = self._open[name]()
            except CoterieError as error:
                self.lost[name] = str(error)
                log.warning("left out of routing: %s", error)
                self.remove(name)
                return None
            vectors = statistics.sample.astype(np.float32)
            units, scores = self._see(vectors), np.array([LONE], np.float32)
            if len(units) > 1:
                cosines = units[:OWN] @ units.T
                np.fill_diagonal(cosines, -np.inf)
                scores = _score(_nearest(cosines), self._left_out(vectors[:OWN], statistics))
            self._samples[name] = _Sample(units, scores, np.sort(scores), statistics.where)
            if len(self._samples) > KEPT:
                self._samples.popitem(last=False)
        self._samples.move_to_end(name)
        return self._samples[name]

    def _duel(self, one: tuple[str, _Sample, Floats], other: tuple[str, _Sample, Floats]) -> float:
        """How much more the text is like inputs of `one` than of `other`, about 1 to -1; each with its cosines to them.

        A kernel ridge regression on the inputs that both keep, in closed form, with their classes weighing alike.
        """
        one_first = one[0] < other[0]
        pair = (one, other) if one_first else (other, one)
        names = pair[0][0], pair[1][0]
        cosines = np.concatenate([known[:DUELLISTS] for _, _, known in pair])
        if names not in self._duels:
            units = [sample.units[:DUELLISTS] for _, sample, _ in pair]
            sides = np.repeat(np.array([1, -1], np.float32), [len(u) for u in units])
            penalty = np.repeat([2 * len(u) / len(sides) for u in units], [len(u) for u in units])
            together = np.concatenate(units)
            kernel = np.exp(SHARPNESS * (together @ together.T - 1))
            kernel[np.diag_indices(len(kernel))] += (PENALTY * penalty).astype(np.float32)
            self._duels[names] = np.linalg.solve(kernel, sides).astype(np.float32)
            if len(self._duels) > DUELS:
                self._duels.popitem(last=False)
        self._duels.move_to_end(names)
        margin = float(np.exp(SHARPNESS * (cosines - 1)) @ self._duels[names])
        return margin if one_first else -margin

    def _left_out(self, vectors: Floats, statistics: Statistics) -> Floats:
        """The regression's value for an expert's own inputs (n, width), had each not been learned from.

        The closed form of leave-one-out for a linear smoother: (y' - h) / (1 - h) for a target of 1 and leverage h.
        """
        own, mean, experts = self._half(vectors), self._half(statistics.mean[None])[0], len(self._names) + 1
        value = own @ mean / experts
        leverage = np.clip((own**2).sum(axis=1) / experts / max(statistics.count, 2), 0, 0.9)
        out: Floats = np.clip((value - leverage) / (1 - leverage), -1, 1).astype(np.float32)
        return out

    def _fit_temperature(self) -> float:
        """The temperature under which the experts' own inputs, each left out in turn, are most probable."""
        if self._temperature is None:
            some = sorted(self._scatters, key=self._ranks.__getitem__)[:FITTED]
            samples = {name: sample for name in some if (sample := self._sample(name))}
            known = {name: place for place, name in enumerate(self._names)}
            rows: list[Floats] = []
            for right, (name, sample) in enumerate(samples.items()):
                if len(sample.units) < 2:
                    continue
                vectors = self._open[name]().sample[:FITTED_INPUTS].astype(np.float32)
                solved, inputs = self._regress(vectors), sample.units[:FITTED_INPUTS]
                values = (solved[:, :-1] @ self._means[known[n]] + solved[:, -1] for n in samples)
                pairs = zip(samples.values(), values, strict=True)
                scores = np.stack([_score(_nearest(inputs @ s.units.T), np.clip(v, -1, 1)) for s, v in pairs], axis=1)
                scores[:, right] = sample.scores[:FITTED_INPUTS]
                rows += [np.concatenate([row[right : right + 1], np.delete(row, right)]) for row in scores]
            self._temperature = TEMPERATURE
            if len(samples) > 1 and rows:
                found, grid = (
                    np.stack(rows).astype(np.float64),
                    np.geomspace(0.02, 0.5, 40),
                )  # the right expert stands first
                losses = [float(-_log_softmax(found / t)[:, 0].mean()) for t in grid]
                self._temperature = float(grid[int(np.argmin(losses))])
        return self._temperature


def rank(name: str) -> str:
    """Where an expert stands among those that are pooled: the lowest are."""
    return hashlib.sha256(name.encode()).hexdigest()


def _same(statistics: Statistics) -> Statistics:
    return statistics


def _root(covariance: Doubles) -> Floats:
    """An upper triangle whose product with its transpose is the inverse of `covariance`."""
    lower = np.asarray(np.linalg.cholesky(covariance), np.float64)
    root: Floats = _inverse(lower).T.astype(np.float32, order="C")
    return root


def _inverse(lower: Doubles) -> Doubles:
    """Of a lower triangle, by halves: a quarter of the time that NumPy's takes, which is for any matrix."""
    if len(lower) <= 128:
        return np.asarray(np.linalg.inv(lower), np.float64)
    half, out = len(lower) // 2, np.zeros_like(lower)
    out[:half, :half], out[half:, half:] = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    out[half:, :half] = -out[half:, half:] @ (lower[half:, :half] @ out[:half, :half])
    return out


def _upper(x: Floats, triangle: Floats) -> Floats:
    """x (n, width) @ triangle (width, width), by blocks, so that the zeros below the diagonal are left out."""
    step = -(-len(triangle) // BLOCKS)
    ends = [(start, min(start + step, len(triangle))) for start in range(0, len(triangle), step)]
    return np.concatenate([x[:, :end] @ triangle[:end, start:end] for start, end in ends], axis=1)


def _unit(x: Floats) -> Floats:
    unit: Floats = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)).astype(np.float32)
    return unit


def _nearest(cosines: Floats) -> Floats:
    """Mean of the NEAREST highest in each row, (rows); of those that are finite."""
    k = min(NEAREST, cosines.shape[-1])
    best = np.partition(cosines, -k, axis=-1)[..., -k:]
    counted = np.isfinite(best)
    mean: Floats = np.where(counted, best, 0).sum(axis=-1) / np.maximum(counted.sum(axis=-1), 1)
    return mean.astype(np.float32)


def _first(cosines: Floats) -> Ints:
    """The places of the NEAREST highest, the highest first."""
    some = np.argpartition(cosines, -NEAREST)[-NEAREST:] if len(cosines) > NEAREST else np.arange(len(cosines))
    best: Ints = some[np.argsort(-cosines[some], kind="stable")]
    return best


def _score(cosine: Floats, regression: Floats | float) -> Floats:
    """Both in one number between -1 and 1."""
    score: Floats = ((cosine + REGRESSION * regression) / (1 + REGRESSION)).astype(np.float32)
    return score


def _log_softmax(x: Doubles) -> Doubles:
    shifted = x - x.max(axis=1, keepdims=True)
    out: Doubles = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return out
