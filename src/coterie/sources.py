"""What a business knows, all kinds of source together: learned, searched, opened, listed."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from coterie.business import Business, Count, Tell
from coterie.engine.engine import Engine
from coterie.errors import CoterieError, Unreachable
from coterie.experts.instruction import weights_of
from coterie.knowledge import articles, documents
from coterie.knowledge.asksql import SqlSource, open_sql
from coterie.knowledge.database import open_database
from coterie.knowledge.documents import Documents, Learned
from coterie.knowledge.documents_spec import DocumentsSpec
from coterie.knowledge.embed import Embedder, Endpoint, minilm
from coterie.knowledge.evidence import Evidence, Reader
from coterie.knowledge.graph import Graph
from coterie.knowledge.graph_learn import learn_graph, open_graph
from coterie.knowledge.graph_source import UNSURE, GraphSource
from coterie.knowledge.specs import DatabaseSpec, GraphSpec, TablesSpec
from coterie.knowledge.tables import open_tables
from coterie.privacy.once import mask_once

NEAR = 0.2  # cosine to the question under which a passage has nothing to say to it; see docs/log.md
EACH = 8  # pieces of evidence asked of each source, and given of all
ASKED = 0.35  # relevance of a database from which it is worth asking a model for SQL; see docs/log.md
FURTHER = 0.2  # and by how much the best passage may be nearer to the question
AT_ONCE = 8  # sources asked beside each other
REST_S, LONGEST_REST_S = 15.0, 300.0  # for which a source that gave no answer is left alone: twice as long each time
Fits = Callable[[str], bool]
Ranked = dict[str, list[tuple[float, Evidence]]]  # by source, nearest first
T = TypeVar("T")


class Source(Protocol):
    """One source of any kind, opened."""

    name: str

    def search(self, question: str, reader: Reader) -> list[Evidence]:
        """What it has to say that the reader may read, best first."""
        ...


@dataclass(frozen=True)
class _Rest:
    """A source that gave no answer, left alone until `until` (of time.monotonic), for `seconds` in all."""

    until: float
    seconds: float
    why: str


def embedder(business: Business, tell: Tell = lambda _: None) -> Embedder:
    """The declared embedding model; one on another machine only sees masked texts. Raises CoterieError, ModelError."""
    spec = business.config.knowledge
    if spec.embeddings:
        detector = business.detector(tell)
        key = os.environ.get("COTERIE_EMBEDDINGS_KEY", "")
        return Endpoint(
            spec.embeddings, spec.embeddings_model, lambda text: mask_once(detector, [text]).texts[0], key
        )  # fmt: skip
    return minilm(tell=tell)


def index_folder(business: Business, name: str) -> Path:
    """Where a source's index is kept."""
    return business.folder / ".coterie" / "knowledge" / name


def learn(
    business: Business, names: list[str] | None = None, tell: Tell = lambda _: None,
    count: Count = lambda _w, _d, _t: None, by: Embedder | None = None,
) -> Iterator[Learned]:  # fmt: skip
    """Bring the indexes of all declared sources, or of `names`, up to date. One that fails does not stop the others:
    it is told as an error of its own."""
    declared = business.config.knowledge.sources
    if not declared:
        raise CoterieError(f"{business.folder}/coterie.toml declares no [knowledge.NAME]; see docs/knowledge.md")
    for name in names or declared:
        if name not in declared:
            known = ", ".join(declared)
            raise CoterieError(f"{business.folder}/coterie.toml declares no source {name!r}; declared: {known}")
    asked = list(dict.fromkeys(names or declared))
    needs = any(isinstance(declared[name], DocumentsSpec) for name in asked)
    using = by or (embedder(business, tell) if needs else None)
    for name in asked:
        try:
            yield _learn_one(business, name, using, tell, count)
        except CoterieError as error:
            tell(f"{name}: {error}")
            yield Learned(name, 0, 0, 0, 0, ((name, str(error)),))


def _learn_one(business: Business, name: str, by: Embedder | None, tell: Tell, count: Count) -> Learned:
    """One source: documents are indexed, a graph takes over its files, of a database the schema is looked at."""
    spec, folder = business.config.knowledge.sources[name], index_folder(business, name)
    if isinstance(spec, DocumentsSpec):
        assert by, "made for documents"
        if spec.salesforce:
            articles.fetch(name, spec.salesforce, business.folder / spec.path, articles.open_org(name, spec.salesforce))
        vectors = business.config.knowledge.vectors
        return documents.learn(name, spec, business.folder / spec.path, folder, by, tell, count, vectors)
    if isinstance(spec, GraphSpec):
        if spec.endpoint:
            return Learned(name, 0, 0, 1, 0, ())  # it has its own data, and is asked when a question comes
        done = learn_graph(spec, business.folder, folder)
        triples = sum(source.triples for source in Graph(folder, spec.timeout_s).sources())
        return Learned(name, len(done.changed), len(done.removed), done.kept, triples, tuple(done.problems.items()))
    if isinstance(spec, TablesSpec):
        database, files = open_tables(name, spec, business.folder)
        files.connection()
        found = database.tables() if len(files.problems) < len(set(spec.files.values())) else {}
        wrong = list(files.problems.items())
        missing = [table for table in spec.tables if table not in spec.files]
    else:
        found, wrong = open_database(name, spec, business.folder).tables(), []
        missing = [table for table in spec.tables if table.lower() not in found]
    wrong += [(table, "there is no such table") for table in missing]
    return Learned(name, 0, 0, len(found), len(found), tuple(wrong))


class Knowledge:
    """Every source of a business, opened when first asked for; one that cannot be opened does not stop the others."""

    def __init__(
        self, business: Business, by: Embedder | None = None, tell: Tell = lambda _: None,
        engine: Callable[[], Engine] | None = None,
    ) -> None:  # fmt: skip
        """Nothing is loaded before it is needed. `engine` writes SQL where a source asks for it; without one, an engine
        of its own is opened then."""
        self.business, self._tell = business, tell
        self._by, self._given, self._own = by, engine, list[Engine]()
        self._open: dict[str, Source] = {}
        self._opening = threading.RLock()
        self._rests: dict[str, _Rest] = {}

    @property
    def embedder(self) -> Embedder:
        """What compares texts. Raises CoterieError, ModelError."""
        with self._opening:
            if self._by is None:
                self._by = embedder(self.business, self._tell)
            return self._by

    def close(self) -> None:
        for source in self._open.values():
            if isinstance(source, Documents):
                source.close()
            elif isinstance(source, GraphSource) and isinstance(source.graph, Graph):
                source.graph.close()
        for engine in self._own:
            engine.close()

    def _engine(self) -> Engine:
        if self._given:
            return self._given()
        with self._opening:
            if not self._own:
                self._own.append(self.business.engine())
        return self._own[0]

    def source(self, name: str) -> Source:
        """A source, opened. Raises CoterieError: not declared, not learned yet."""
        declared = self.business.config.knowledge.sources
        if name not in declared:
            raise CoterieError(f"there is no source {name!r}; there are: {', '.join(declared) or 'none'}")
        with self._opening:
            if name not in self._open:
                self._open[name] = self._opened(name, declared[name])
            return self._open[name]

    def _opened(self, name: str, spec: DocumentsSpec | GraphSpec | DatabaseSpec | TablesSpec) -> Source:
        folder = index_folder(self.business, name)
        if isinstance(spec, DocumentsSpec):
            vectors = self.business.config.knowledge.vectors
            return Documents(name, spec, folder, self.embedder, self.business.folder, vectors)
        if isinstance(spec, GraphSpec):
            return open_graph(name, spec, folder, self.embedder.embed)
        library, expert = self.business.library, spec.expert
        return open_sql(
            name, spec, self.business.folder, self._engine,
            lambda: weights_of(library.facts(expert)) if expert else None,
        )  # fmt: skip

    def gather(
        self, question: str, reader: Reader, fits: Fits = lambda _: True, tell: Tell = lambda _: None,
        limit: int = EACH,
    ) -> list[Evidence]:  # fmt: skip
        """What the sources have to say to a question, the best of each first, of that what `fits`.

        Documents and graphs are searched; a database is asked only where the question is about it, as a model must
        write for that. What is not near the question is no evidence, whatever found it. A source that fails is told,
        and the others answer.
        """
        declared = self.business.config.knowledge.sources
        if not declared:
            return []
        embed = self.embedder.embed
        vector = embed([question])[0]

        def first(source: Source) -> list[Evidence] | float:
            if isinstance(source, SqlSource):
                return source.relevance(question, vector, reader, embed)
            return source.search(question, reader)[:limit]

        seen = self._each(dict.fromkeys(declared, first), tell)
        found = {name: said for name, said in seen.items() if not isinstance(said, float)}
        ranked = self._ranked(found, question, vector)
        passages = (near for each in ranked.values() for near, evidence in each if not evidence.query)
        worth = max(ASKED, max(passages, default=0.0) - FURTHER)
        asked = {name for name, said in seen.items() if isinstance(said, float) and said >= worth}
        rows = self._each(dict.fromkeys(asked, lambda source: source.search(question, reader)[:limit]), tell)
        ranked |= self._ranked(rows, question, vector)
        return [evidence for evidence in in_turn(ranked)[:limit] if fits(evidence.text)]

    def _each(self, asks: Mapping[str, Callable[[Source], T]], tell: Tell) -> dict[str, T]:
        """What each of some sources gives, asked beside each other; what went wrong is told, by source."""
        if len(asks) < 2:
            tried = [self._try(name, ask) for name, ask in asks.items()]
        else:
            with ThreadPoolExecutor(min(AT_ONCE, len(asks))) as pool:
                tried = list(pool.map(self._try, asks.keys(), asks.values()))
        out = {}
        for name, (given, problem) in zip(asks, tried, strict=True):
            if problem:
                tell(f"{name}: {problem}")
            elif given is not None:
                out[name] = given
        return out

    def _try(self, name: str, ask: Callable[[Source], T]) -> tuple[T | None, str]:
        """What a source gives, or why it gives nothing."""
        rest = self._rests.get(name)
        if rest and (left := rest.until - time.monotonic()) > 0:
            return None, f"not asked for another {left:.0f} s, as it gave no answer ({rest.why})"
        try:
            given = ask(self.source(name))
        except Unreachable as error:
            seconds = min(2 * rest.seconds, LONGEST_REST_S) if rest else REST_S
            self._rests[name] = _Rest(time.monotonic() + seconds, seconds, str(error))
            return None, str(error)
        except CoterieError as error:
            return None, str(error)
        self._rests.pop(name, None)
        return given, ""

    def _ranked(self, found: Mapping[str, list[Evidence]], question: str, vector: NDArray[Any]) -> Ranked:
        """What each source found that is near the question (its `vector`), nearest first."""
        every = [(name, evidence) for name, each in found.items() for evidence in each]
        out: Ranked = {}
        if not every:
            return out
        kinds = {name: type(self._open.get(name)) for name in found}
        texts = [_row_in_words(e) if kinds[name] is SqlSource else e.text for name, e in every]
        for (name, evidence), cosine in zip(every, (self.embedder.embed(texts) @ vector).tolist(), strict=True):
            sure = kinds[name] is GraphSource and evidence.query and evidence.score >= UNSURE  # that a path was asked
            near = 1.0 if sure else cosine
            if near >= NEAR:
                out.setdefault(name, []).append((near, evidence))
        for each in out.values():
            each.sort(key=lambda pair: -pair[0])
        return out

    def open(self, source: str, where: str, reader: Reader) -> Evidence | None:
        """The passage that a citation names, where the reader may read it. Rows and triples come with their answer."""
        opened = self.source(source)
        return opened.open(where, reader) if isinstance(opened, Documents) else None


def in_turn(ranked: Ranked) -> list[Evidence]:
    """The best of each source, the nearest before, then the second of each, and so on: none pushes another out."""
    placed = [(place, -near, e) for each in ranked.values() for place, (near, e) in enumerate(each)]
    return [evidence for _, _, evidence in sorted(placed, key=lambda p: p[:2])]


def _row_in_words(evidence: Evidence) -> str:
    """A row with the names and values of the statement that found it: "COUNT(*): 3" says nothing by itself. Words of
    SQL stand there in upper case."""
    said = re.findall(r"'([^']*)'|([^\W\d_]+)", evidence.query)
    return f"{' '.join(value or name for value, name in said if value or not name.isupper())}: {evidence.text}"


def overview(business: Business, reader: Reader) -> list[dict[str, Any]]:
    """Every declared source with what the reader may see of it: files or tables, freshness, errors."""
    out = []
    for name, spec in business.config.knowledge.sources.items():
        folder = index_folder(business, name)
        if isinstance(spec, DocumentsSpec):
            out.append(documents.overview(name, spec, folder, reader))
            continue
        head: dict[str, Any] = {"name": name, "kind": spec.kind, "description": spec.description, "indexed": None}
        try:
            files, errors = _parts(business, name, reader)
        except CoterieError as error:
            files, errors = [], [str(error)]
        out.append(head | {"files": files, "passages": sum(f["passages"] for f in files), "errors": errors})
    return out


def _parts(business: Business, name: str, reader: Reader) -> tuple[list[dict[str, Any]], list[str]]:
    """The named graphs of a graph, or the tables of a database, that the reader may see; triples and columns count.
    And what is wrong with those that they may see."""
    spec, folder = business.config.knowledge.sources[name], index_folder(business, name)
    if isinstance(spec, GraphSpec):
        if spec.endpoint:
            graphs = spec.endpoint_graphs or {spec.endpoint: spec.readers}
            mine = {graph: readers for graph, readers in graphs.items() if set(readers) & reader.may}
            return [_part(graph, f"at {spec.endpoint}", 0, sorted(readers)) for graph, readers in mine.items()], []
        sources = Graph(folder, spec.timeout_s).sources()
        return [_part(s.name, "triples", s.triples, sorted(s.readers)) for s in sources if s.readers & reader.may], []
    assert not isinstance(spec, DocumentsSpec), "documents have an overview of their own"
    problems: list[str] = []
    if isinstance(spec, TablesSpec):
        database, loaded = open_tables(name, spec, business.folder)
        problems = loaded.problems_for(reader)
        seen = database.views(reader) if len(loaded.problems) < len(set(spec.files.values())) else {}
    else:
        seen = open_database(name, spec, business.folder).views(reader)
    return [_part(table, ", ".join(view.columns), len(view.columns), []) for table, view in seen.items()], problems


def _part(path: str, title: str, passages: int, readers: list[str]) -> dict[str, Any]:
    return {"path": path, "title": title, "passages": passages, "indexed": None, "readers": readers, "error": None}
