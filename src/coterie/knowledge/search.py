"""Searching one index: by words (BM25), by vectors (exact), both under the reader's permissions, and fused.

A question may be a long story: its clauses are searched for one by one beside the whole of it. What each search finds
best become candidates, and each candidate's signals are put on one scale and added up, and what its series lends it
(series.py), and documents that name the same fields and tools (links.py); docs/log.md has what was tried.
Sources: Robertson and Zaragoza 2009 (BM25); Rocchio 1971 (relevance feedback).
"""

import json
import math
import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tantivy
from numpy.typing import NDArray

from coterie.errors import CoterieError, StorageError
from coterie.knowledge.embed import ByWords, Embedder
from coterie.knowledge.links import lend
from coterie.knowledge.names import FUNCTION_WORDS, pairs
from coterie.knowledge.series import Series
from coterie.knowledge.store import IN_POSTGRES, allowed, meta, open_db, open_words, space_of
from coterie.knowledge.vectors import open_vectors

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
WORDS_MOST = 400  # different words of one question that are searched for
CLAUSES_MOST = 48
CLAUSE = 9  # characters: less says nothing by itself
WHOLE, EACH = 200, 100  # candidates by the whole question, and by each clause
TITLE = 2.0  # a word in title or heading counts as so many in the text
FEEDBACK, FEEDBACK_WEIGHT = 10, 0.8  # passages like one of the first ten gain
PAIRS = 0.15  # weight of pairs of words that name a document, beside all the rest
LINKED = 0.1  # weight of what documents that name the same fields and tools lend
SERIES, INTRODUCTION = 0.5, 1.0  # how much of what its series lends a document takes, and as its introduction


@dataclass(frozen=True)
class Passage:
    """A passage as it is shown: its file, its place within it (headings, or a page), its text."""

    id: int
    path: str
    title: str
    place: str
    text: str

    @property
    def where(self) -> str:
        """What a citation names, and what `passage` opens."""
        return f"{self.path} > {self.place}" if self.place else self.path


def clauses(question: str) -> list[str]:
    """The parts of a question that can be searched for by themselves: sentences, lines, parts between semicolons."""
    parts = re.split(r"(?<=[.!?:;])\s+|\n+", question)
    kept = list(dict.fromkeys(p.strip() for p in parts if len(p.strip()) >= CLAUSE))
    return kept[:CLAUSES_MOST] or [question]


class Search:
    """An index opened for reading. Several threads may ask it at once; a writer's commits are seen at once."""

    def __init__(self, folder: Path, embedder: Embedder, vectors: str = "") -> None:
        """`vectors`: address of the PostgreSQL that has the vectors. With ByWords as `embedder`, only words are
        searched for. Raises CoterieError where nothing is indexed yet, or by another embedding model, or with its
        vectors elsewhere."""
        self.folder, self.embedder = folder, embedder
        self.db = open_db(folder, writing=False)
        held, own = meta(self.db, "space"), space_of(embedder.width, embedder.name, vectors)
        width = embedder.width
        if embedder.name == ByWords.name:  # whatever model it was indexed by
            width = int(held.split(" ")[1])
            own = space_of(width, held.split(" ", 2)[2].removesuffix(IN_POSTGRES), vectors)
        if held != own:
            raise CoterieError(f"{folder.name}: indexed as {held!r}, and now {own!r} is declared; run `coterie learn`")
        self._words = open_words(folder)
        self._width = width
        self._vectors = open_vectors(folder, width, vectors, meta(self.db, "vectors"))
        self._lock = threading.Lock()
        self._seen = ("", -1, -1)

    def close(self) -> None:
        self._vectors.close()
        self.db.close()

    def refresh(self) -> None:
        """See what a writer has committed since. Raises StorageError where the vectors are missing."""
        for _ in range(3):
            self.db.execute("begin")  # one state of the database for all that is read here
            try:
                return self._read()
            except FileNotFoundError:  # packed meanwhile: the state after that names other files
                pass
            finally:
                self.db.execute("commit")
        raise StorageError(f"{self.folder}: its vectors are missing; delete it and run `coterie learn`")

    def _read(self) -> None:
        mark = meta(self.db, "stamp"), int(meta(self.db, "rows") or 0), _version(self.db)
        if mark == self._seen:
            return
        self._words.reload()
        rows = mark[1]
        found = self.db.execute(
            "select c.line, c.id, d.access, d.id from chunks c join documents d on d.id = c.document "
            "where c.line is not null order by c.id"
        )
        table = np.array(found.fetchall(), np.int64).reshape(-1, 4)
        self._access = np.zeros(rows, np.int64)  # of each row of the vectors; 0, nobody's, where it was deleted
        self._of_row = np.zeros(rows, np.int64)  # its passage
        self._access[table[:, 0]], self._of_row[table[:, 0]] = table[:, 2], table[:, 1]
        self._ids, self._row = table[:, 1], table[:, 0]  # in order of the ids
        found = self.db.execute("select id, access, series, part from documents order by id")
        files = np.array(found.fetchall(), np.int64).reshape(-1, 4)
        self._files, self._document = files, np.searchsorted(files[:, 0], table[:, 3])  # the place in it of each id's
        self._series: dict[tuple[int, ...], Series] = {}
        self._vectors.open(rows, meta(self.db, "packed"))
        self._seen = mark

    def by_words(self, question: str, classes: Sequence[int], limit: int) -> tuple[Ints, Floats]:
        """The best passages by BM25 and their scores; only those of the access classes are looked at."""
        every = dict.fromkeys(re.findall(r"[^\W_]+", question.lower()))
        words = [w for w in every if w not in FUNCTION_WORDS][:WORDS_MOST] or list(every)
        if not words or not classes:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        return self._by(" ".join(words), {"title": TITLE, "text": 1.0}, classes, limit)

    def by_pairs(self, question: str, classes: Sequence[int], limit: int) -> tuple[Ints, Floats]:
        """The same by pairs of neighbouring words that stand in the title or the path of a passage's file."""
        named = Counter(pairs(question)).most_common(WORDS_MOST)
        if not named or not classes:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        weighed = " ".join(f"{pair}^{1 + math.log(times):.2f}" for pair, times in named)
        return self._by(weighed, {"pairs": 1.0}, classes, limit)

    def _by(self, words: str, fields: dict[str, float], classes: Sequence[int], limit: int) -> tuple[Ints, Floats]:
        text = self._words.parse_query(words, list(fields), field_boosts=fields)
        may = tantivy.Query.term_set_query(self._words.schema, "access", list(classes))
        must = tantivy.Occur.Must
        query = tantivy.Query.boolean_query([(must, text), (must, tantivy.Query.const_score_query(may, 0.0))])
        searcher = self._words.searcher()
        hits = searcher.search(query, limit, count=False).hits
        if not hits:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        ids = searcher.fast_field_values("chunk", [address for _, address in hits])
        return np.array(ids, np.int64), np.array([score for score, _ in hits], np.float32)

    def by_vectors(self, vectors: Floats, classes: Sequence[int], limit: int) -> list[tuple[Ints, Floats]]:
        """For each question vector, the nearest passages and their cosines; the mask comes before the choice."""
        may = np.isin(self._access, list(classes))
        if not may.any():
            return [(np.zeros(0, np.int64), np.zeros(0, np.float32)) for _ in vectors]
        found = self._vectors.nearest(vectors, may, classes, limit)
        return [(self._of_row[lines], cosines) for lines, cosines in found]

    def find(
        self, question: str, groups: Iterable[str], limit: int,
        remembered: Callable[[Floats], dict[str, float]] = lambda _: {}, vectors: Floats | None = None,
    ) -> list[tuple[Passage, float]]:  # fmt: skip
        """The best `limit` passages that one of `groups` may read. `remembered` gives what files gain, by path, for
        the question's vector. `vectors`: of the question and its clauses, where they are known already."""
        parts = clauses(question)
        alone = len(parts) == 1
        asked = self.embedder.embed([question] if alone else [question, *parts]) if vectors is None else vectors
        by_meaning = self.embedder.name != ByWords.name
        with self._lock:
            self.refresh()
            classes = self.classes(groups)
            whole = self.by_words(question, classes, WHOLE)
            each = [whole] if alone else [self.by_words(p, classes, EACH) for p in parts]
            near = self.by_vectors(asked[:1], classes, WHOLE) if by_meaning else []
            near += self.by_vectors(asked[1:], classes, EACH) if by_meaning and not alone else []
            gains = remembered(asked[0])
            if not by_meaning:  # what the index has are vectors of another space
                asked = np.zeros((len(asked), self._width), np.float32)
            known = self._of_files(gains, classes)
            named = self.by_pairs(question, classes, WHOLE)
            found = [whole, named, *each, *near]
            ids = np.unique(np.concatenate([*(i for i, _ in found), *known.values()]))
            ids = ids[self._held(ids)]  # a writer may have dropped some meanwhile
            if not len(ids):
                return []
            series = self._of_classes(classes)
            score, lent = self._weighed(ids, asked, whole, each, named, series)
            first = series.introductions(self._place(ids), lent)
            if missing := set(first.tolist()) - set(self._place(ids).tolist()):
                ids = np.union1d(ids, self._ids[np.isin(self._document, list(missing))])
                score, _ = self._weighed(ids, asked, whole, each, named, series)
            for path, of_path in known.items():
                score[np.isin(ids, of_path)] += gains[path]
            order = np.argsort(-score, kind="stable")[:limit]
            shown = self.passages(ids[order].tolist())
            return [(shown[i], float(s)) for i, s in zip(ids[order].tolist(), score[order], strict=True) if i in shown]

    def _weighed(
        self, ids: Ints, asked: Floats, whole: tuple[Ints, Floats], each: list[tuple[Ints, Floats]],
        named: tuple[Ints, Floats], series: Series,
    ) -> tuple[Floats, Floats]:  # fmt: skip
        """The scores of candidates, and what their series lend to each. asked: vectors (1 + clauses, width)."""
        rows = self._row[np.searchsorted(self._ids, ids)]
        vectors = self._vectors.of(rows)
        cosines = vectors @ asked.T
        parts = np.maximum(cosines[:, 1:] if len(asked) > 1 else cosines, 0)
        best = np.max([_on(ids, *one) for one in each], axis=0)
        signals = (_on(ids, *whole), best, cosines[:, 0], (parts**4).sum(axis=1))
        score = sum((_scaled(s) for s in signals), start=np.zeros(len(ids), np.float32))
        if len(ids) > FEEDBACK:  # else every one is among the first, and as like as can be
            like = vectors @ vectors[np.argsort(-score, kind="stable")[:FEEDBACK]].T
            score = _scaled(score) + FEEDBACK_WEIGHT * _scaled(like.max(axis=1))
        documents, at = np.unique(self._place(ids), return_inverse=True)
        of = np.full((2, len(documents)), -np.inf, np.float32)  # the best score of each document, and its pairs
        np.maximum.at(of[0], at, score)
        np.maximum.at(of[1], at, _on(ids, *named))
        standing = _scaled(_scaled(of[0]) + PAIRS * _scaled(of[1]))
        lent, introducing = series.weigh(documents, standing)
        total = standing + SERIES * lent + INTRODUCTION * introducing
        total += LINKED * _scaled(lend(*self._names(documents), total))
        return total[at] + (score - of[0][at]), lent[at]

    def _names(self, documents: Ints) -> tuple[Ints, Ints]:
        """Which of some documents (places in the table of files, ascending) holds which name, as links.py wants it."""
        numbers = self._files[documents, 0]
        found = self.db.execute(
            "select document, name from names where document in (select value from json_each(?))",
            (json.dumps(numbers.tolist()),),
        ).fetchall()
        held = np.searchsorted(numbers, np.array([d for d, _ in found], np.int64))
        _, names = np.unique(np.array([name for _, name in found], np.str_), return_inverse=True)
        return held, np.asarray(names, np.int64)

    def _held(self, ids: Ints) -> NDArray[np.bool_]:
        """Which of some passages the index has."""
        if not len(self._ids):
            return np.zeros(len(ids), np.bool_)
        at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.asarray(self._ids[at] == ids, np.bool_)

    def _place(self, ids: Ints) -> Ints:
        """The documents of passages, as places in the table of files."""
        return np.asarray(self._document[np.searchsorted(self._ids, ids)], np.int64)

    def _of_classes(self, classes: Sequence[int]) -> Series:
        """The series of the documents of some access classes."""
        key = tuple(sorted(classes))
        if key not in self._series:
            may = np.isin(self._files[:, 1], key)
            self._series[key] = Series(self._files[:, 2], self._files[:, 3], may)
        return self._series[key]

    def _of_files(self, paths: Iterable[str], classes: Sequence[int]) -> dict[str, Ints]:
        """The passages of some files, of those that may be read."""
        marks = ",".join("?" * len(classes))
        return {
            path: np.array(
                [i for (i,) in self.db.execute(
                    "select c.id from chunks c join documents d on d.id = c.document "
                    f"where d.path = ? and c.line is not null and d.access in ({marks})", (path, *classes),
                )], np.int64,
            ) for path in paths
        }  # fmt: skip

    def classes(self, groups: Iterable[str]) -> list[int]:
        """The access classes that one of `groups` may read."""
        return allowed(self.db, groups)

    def passages(self, ids: Sequence[int]) -> dict[int, Passage]:
        """Passages by their numbers."""
        marks = ",".join("?" * len(ids))
        rows = self.db.execute(
            "select c.id, d.path, d.title, c.place, c.text from chunks c join documents d on d.id = c.document "
            f"where c.id in ({marks})", ids,
        )  # fmt: skip
        return {row[0]: Passage(*row) for row in rows}

    def passage(self, where: str, groups: Iterable[str]) -> Passage | None:
        """The passage that a citation names, where one of `groups` may read it."""
        path, _, place = where.partition(" > ")
        with self._lock:
            classes = self.classes(groups)
            marks = ",".join("?" * len(classes))
            row = self.db.execute(
                "select c.id, d.path, d.title, c.place, c.text from chunks c join documents d on d.id = c.document "
                f"where d.path = ? and c.place = ? and d.access in ({marks})", (path, place, *classes),
            ).fetchone()  # fmt: skip
        return Passage(*row) if row else None


def _version(db: sqlite3.Connection) -> int:
    """Changes with every commit of another connection."""
    return int(db.execute("pragma data_version").fetchone()[0])


def _on(ids: Ints, found: Ints, scores: Floats) -> Floats:
    """Scores on the places of `ids`, 0 for what was not found."""
    out = np.zeros(len(ids), np.float32)
    inside = np.isin(found, ids)
    out[np.searchsorted(ids, found[inside])] = scores[inside]
    return out


def _scaled(values: Floats) -> Floats:
    """With mean 0 and deviation 1 over the candidates."""
    return np.asarray((values - values.mean()) / (values.std() + 1e-6), np.float32)
