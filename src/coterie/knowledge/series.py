"""Documents that stand together lift each other: a series that has much to say to a question, and its introduction.

A task that needs one document of a series often needs its introduction too, which says little in the words of the
question. A series of over MOST documents is a heap, and tells nothing. docs/log.md has what was tried.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
MOST = 64  # documents of a series
BEST = 5  # of its documents count for a series
INTRODUCED = 16  # series whose introductions are looked at, though nothing found them


class Series:
    """The series among the documents that one reader may see; what they may not see changes nothing for them."""

    def __init__(self, marks: Ints, parts: Ints, may: NDArray[np.bool_]) -> None:
        """Of each document: its series (0: none) and its part of it (-1: none), see names.py; and whether it may be
        seen."""
        self.of = np.full(len(marks), -1, np.int64)  # the series of each document, numbered from 0, or -1
        inside = np.flatnonzero(may & (marks != 0))
        _, numbers, sizes = np.unique(marks[inside], return_inverse=True, return_counts=True)
        fit = (sizes >= 2) & (sizes <= MOST)
        renumber = np.where(fit, np.cumsum(fit) - 1, -1)
        self.of[inside] = renumber[numbers]
        self.count = int(fit.sum())
        self.first = np.full(self.count, -1, np.int64)  # the document that introduces each series, or -1
        known = inside[(self.of[inside] >= 0) & (parts[inside] >= 0)]
        for document in known[np.argsort(-parts[known], kind="stable")]:
            self.first[self.of[document]] = document

    def weigh(self, documents: Ints, scores: Floats) -> tuple[Floats, Floats]:
        """What its series lends to each document: the mean of its BEST best scores, given those of each (mean 0,
        deviation 1; under it counts as 0); and the same again for introductions, 0 for others."""
        series = np.zeros(len(documents), np.float32)
        if not self.count or not len(documents):
            return series, series
        best, of = np.maximum(scores, 0), self.of[documents]
        order = np.lexsort((-best, of))
        order = order[of[order] >= 0]
        starts = np.searchsorted(of[order], of[order])  # where the series of each begins
        counted = order[np.arange(len(order)) - starts < BEST]
        sums = np.zeros(self.count, np.float32)
        np.add.at(sums, of[counted], best[counted] / BEST)
        held = of >= 0
        series[held] = sums[of[held]]
        first = np.zeros(len(documents), np.bool_)
        first[held] = self.first[of[held]] == documents[held]
        return series, series * first

    def introductions(self, documents: Ints, lent: Floats) -> Ints:
        """The introductions of the series that lend most, given what is lent to passages of `documents`."""
        held = self.of[documents] >= 0
        order = np.argsort(-lent[held], kind="stable")
        best = list(dict.fromkeys(self.of[documents[held]][order].tolist()))[:INTRODUCED]
        found = self.first[np.array(best, np.int64)]
        return found[found >= 0]
