"""What a business knows, all kinds of source together: learned, searched, opened, listed."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from coterie.business import Business, Count, Tell
from coterie.engine.engine import Engine
from coterie.errors import CoterieError, StorageError, Unreachable
from coterie.experts.instruction import weights_of
from coterie.knowledge import articles, documents, listing
from coterie.knowledge.asksql import SqlSource, open_sql
from coterie.knowledge.citation import open_row, open_triples
from coterie.knowledge.database import open_database
from coterie.knowledge.documents import Documents, Learned, permissions_mark
from coterie.knowledge.documents_spec import DocumentsSpec
from coterie.knowledge.drawing import draw
from coterie.knowledge.embed import ByWords, Embedder, Endpoint, minilm, sentence_model
from coterie.knowledge.evidence import Evidence, Reader
from coterie.knowledge.extract import settle
from coterie.knowledge.graph import Graph
from coterie.knowledge.graph_learn import learn_graph, open_graph
from coterie.knowledge.graph_source import UNSURE, GraphSource
from coterie.knowledge.record import write_failure, write_record
from coterie.knowledge.sparql import Term
from coterie.knowledge.specs import DatabaseSpec, GraphSpec, TablesSpec
from coterie.knowledge.store import meta, open_db
from coterie.knowledge.tables import open_tables
from coterie.model.pull import EMBEDDER, pull
from coterie.privacy.deidentify import MaskingFailed
from coterie.privacy.once import mask_once

NEAR = 0.2  # cosine to the question under which a passage has nothing to say to it; see docs/log.md
NEAR_BY_WORDS = 0.08  # the same where no model compares: two of five words, in a passage of a hundred
EACH = 8  # pieces of evidence asked of each source, and given of all
ASKED = 0.35  # relevance of a database from which it is worth asking a model for SQL; see docs/log.md
FURTHER = 0.2  # and by how much the best passage may be nearer to the question
AT_ONCE = 8  # sources asked beside each other
AROUND = 500  # triples looked at for a picture
REST_S, LONGEST_REST_S = 15.0, 300.0  # for which a source that gave no answer is left alone: twice as long each time
Fits = Callable[[str], bool]
Ranked = dict[str, list[tuple[float, Evidence]]]  # by source, nearest first
MEANING = ""  # stands for the embedding model among sources that gave no answer
T = TypeVar("T")
log = logging.getLogger(__name__)


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


def embedder(business: Business, tell: Tell = lambda _: None) -> Embedder:
    """The declared embedding model; one on another machine only sees masked texts. Raises CoterieError, ModelError."""
    spec = business.config.knowledge
    if spec.embeddings:
        detector = business.detector(tell)
        key = os.environ.get("COTERIE_EMBEDDINGS_KEY", "")
        return Endpoint(
            spec.embeddings, spec.embeddings_model, lambda text: mask_once(detector, [text]).texts[0], key
        )  # fmt: skip
    if model := spec.embeddings_model:
        here = business.folder / model
        return sentence_model(here if here.is_dir() else pull(model, tell, "embedding model", EMBEDDER), model)
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
    using, unusable = by, None
    if not by and any(isinstance(declared[name], DocumentsSpec) for name in asked):
        try:
            using = embedder(business, tell)
        except Exception as error:  # the sources that need none are learned all the same
            unusable = error
    for name in asked:
        try:
            if unusable and isinstance(declared[name], DocumentsSpec):
                raise unusable
            done = _learn_one(business, name, using, tell, count)
        except Exception as error:  # whatever is wrong with one source, the others are learned
            why = _why(name, error)
            tell(f"{name}: {why}")
            done = Learned(name, 0, 0, 0, 0, ((name, why),))
            shown = _hint(error) if isinstance(error, Unreachable | StorageError) else why
            with suppress(StorageError):  # it may be what went wrong
                write_failure(index_folder(business, name), shown, listing.readers_of(name, declared))
        else:
            done = replace(done, errors=(*done.errors, *_settle_readers_of(business, name)))
        yield done


def _why(name: str, error: Exception) -> str:
    """What went wrong with a source, in words; of what nobody foresaw the log has the trace."""
    if isinstance(error, CoterieError):
        return str(error)
    log.error("%s failed by a fault of ours", name, exc_info=error)
    return f"failed by a fault of ours ({type(error).__name__}); the log says more"


def _hint(error: Exception) -> str:
    """The same for whoever asks a question: no address, no user, no folder of the machine. The log has it all."""
    if isinstance(error, Unreachable):
        return "gives no answer"
    if "`coterie learn`" in str(error):
        return "is not learned, or not as it is declared now; run `coterie learn`"
    return "cannot be asked" if isinstance(error, CoterieError) else f"failed ({type(error).__name__})"


def _settle_readers_of(business: Business, documents: str) -> list[tuple[str, str]]:
    """Let the graphs that read facts in a source of documents follow what has become of these. What went wrong, which
    stands in the record of the documents until they are learned again."""
    wrong, declared = [], business.config.knowledge.sources
    for name, spec in declared.items():
        if isinstance(spec, GraphSpec) and spec.extract and spec.extract.documents == documents:
            try:
                settle(spec, index_folder(business, name), index_folder(business, documents), forget=True)
            except Exception as error:
                wrong.append((name, f"{name}: what it read in {documents} could not follow ({_why(name, error)})"))
    if wrong:
        told = [(why, [listing.readers_of(name, declared)]) for name, why in wrong]
        write_record(index_folder(business, documents), (), (), told)
    return wrong


def _learn_one(business: Business, name: str, by: Embedder | None, tell: Tell, count: Count) -> Learned:
    """One source: documents are indexed, a graph takes over its files, of a database the schema is looked at."""
    spec, folder = business.config.knowledge.sources[name], index_folder(business, name)
    if isinstance(spec, DocumentsSpec):
        assert by, "made for documents"
        if spec.salesforce:
            articles.fetch(name, spec.salesforce, business.folder / spec.path, articles.open_org(name, spec.salesforce))
        vectors = business.config.knowledge.vectors
        taken = documents.learn(name, spec, business.folder / spec.path, folder, by, tell, count, vectors)
        write_record(folder, (), (), ())  # its files have records of their own; a failure before this is over
        return taken
    if isinstance(spec, GraphSpec):
        if spec.endpoint:
            return Learned(name, 0, 0, 1, 0, (), "triples")  # it has its own data, and is asked when a question comes
        done = learn_graph(spec, business.folder, folder)
        read = index_folder(business, spec.extract.documents) if spec.extract else None
        if read is None or (read / "index.db").exists():  # else its documents bring what was read in them
            settle(spec, folder, read, forget=False)
        held = Graph(folder, spec.timeout_s).sources()
        write_record(folder, done.changed, [source.name for source in held],
                     [(why, done.told[part]) for part, why in done.problems.items()])  # fmt: skip
        triples, problems = sum(source.triples for source in held), tuple(done.problems.items())
        return Learned(name, len(done.changed), len(done.removed), done.kept, triples, problems, "triples")
    if isinstance(spec, TablesSpec):
        database, files = open_tables(name, spec, business.folder)
        files.connection()
        found = database.tables() if len(files.problems) < len(set(spec.files.values())) else {}
        wrong = list(files.problems.items())
        missing = [table for table in spec.tables if table not in spec.files]
    else:
        found, wrong = open_database(name, spec, business.folder).tables(), []
        missing = [table for table in spec.tables if table.lower() not in found]
    wrong += [(table, f"{table}: there is no such table") for table in missing]
    columns = {table: [c.name for c in schema.columns] for table, schema in found.items()}
    write_record(folder, columns, (), [(why, listing.told(spec, part)) for part, why in wrong], columns)
    return Learned(name, 0, 0, len(found), len(found), tuple(wrong), "tables")


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
        self._worded: Knowledge | None = None

    @property
    def embedder(self) -> Embedder:
        """What compares texts. Raises CoterieError, ModelError."""
        with self._opening:
            if self._by is None:
                self._by = embedder(self.business, self._tell)
            return self._by

    @property
    def comparing(self) -> Embedder:
        """The same, or what goes by words alone while that cannot be used."""
        return self._usable.embedder

    @property
    def _usable(self) -> "Knowledge":
        """These sources as they can be asked now: without the embedding model while that gives no answer."""
        return self._by_words if MEANING in self._rests else self

    @property
    def _by_words(self) -> "Knowledge":
        """The same sources, asked without an embedding model."""
        with self._opening:
            if self._worded is None:
                self._worded = Knowledge(self.business, ByWords(), self._tell, self._engine)
            return self._worded

    def close(self) -> None:
        if self._worded:
            self._worded.close()
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
        spec = declared[name]
        if isinstance(spec, GraphSpec) and spec.extract:
            self._check_readers(name, spec.extract.documents)
        with self._opening:
            if name not in self._open:
                self._open[name] = self._opened(name, spec)
            return self._open[name]

    def _check_readers(self, graph: str, documents: str) -> None:
        """What a graph read in documents has the readers that these had when they were learned. Raises CoterieError
        where coterie.toml has given them others since."""
        spec, folder = self.business.config.knowledge.sources[documents], index_folder(self.business, documents)
        assert isinstance(spec, DocumentsSpec), "the configuration says so"
        if (folder / "index.db").exists():
            with closing(open_db(folder, writing=False)) as db:
                if meta(db, "permissions") != permissions_mark(spec):
                    raise CoterieError(
                        f"{graph}: the readers of {documents}, which it read, have changed; run `coterie learn`"
                    )

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
        write for that. What is not near the question is no evidence, whatever found it. A source that fails is told to
        those who may read something of it, and the others answer; without the embedding model, by words alone.
        """
        declared = self.business.config.knowledge.sources
        if not declared:
            return []
        compared, problem = self._try(MEANING, lambda: self.embedder.embed([question]))
        if compared is None:
            tell(f"the embedding model {problem}: sources are searched by words alone")
            return self._by_words.gather(question, reader, fits, tell, limit)
        embed, vector = self.embedder.embed, compared[0]

        def first(source: Source) -> list[Evidence] | float:
            if isinstance(source, SqlSource):
                return source.relevance(question, vector, reader, embed)
            return source.search(question, reader)[:limit]

        seen = self._each(dict.fromkeys(declared, first), reader, tell)
        found = {name: said for name, said in seen.items() if not isinstance(said, float)}
        ranked = self._ranked(found, question, vector)
        passages = (near for each in ranked.values() for near, evidence in each if not evidence.query)
        worth = max(ASKED, max(passages, default=0.0) - FURTHER)
        asked = {name for name, said in seen.items() if isinstance(said, float) and said >= worth}
        rows = self._each(dict.fromkeys(asked, lambda source: source.search(question, reader)[:limit]), reader, tell)
        ranked |= self._ranked(rows, question, vector)
        return [evidence for evidence in in_turn(ranked)[:limit] if fits(evidence.text)]

    def _each(self, asks: Mapping[str, Callable[[Source], T]], reader: Reader, tell: Tell) -> dict[str, T]:
        """What each of some sources gives, asked beside each other; what went wrong is told, by source, to those who
        may read something of it."""

        def one(name: str) -> tuple[T | None, str]:
            return self._try(name, lambda: asks[name](self.source(name)))

        if len(asks) < 2:
            tried = [one(name) for name in asks]
        else:
            with ThreadPoolExecutor(min(AT_ONCE, len(asks))) as pool:
                tried = list(pool.map(one, asks))
        out, declared = {}, self.business.config.knowledge.sources
        for name, (given, problem) in zip(asks, tried, strict=True):
            if given is not None:
                out[name] = given
            elif problem and listing.readers_of(name, declared) & reader.may:
                tell(f"{name}: {problem}")
        return out

    def _try(self, name: str, ask: Callable[[], T]) -> tuple[T | None, str]:
        """What a source gives, or a hint why it gives nothing; the log has the rest."""
        rest = self._rests.get(name)
        if rest and (left := rest.until - time.monotonic()) > 0:
            return None, f"is not asked for another {left:.0f} s, as it gave no answer"
        try:
            given = ask()
        except Exception as error:  # whatever is wrong with one source, the others answer
            if name == MEANING and isinstance(error, MaskingFailed):
                raise  # the question cannot be masked: that is no fault of the model, which need not rest
            log.warning("%s: %s", name or "the embedding model", _why(name, error))
            if isinstance(error, Unreachable) or name == MEANING:
                seconds = min(2 * rest.seconds, LONGEST_REST_S) if rest else REST_S
                self._rests[name] = _Rest(time.monotonic() + seconds, seconds)
            return None, _hint(error)
        self._rests.pop(name, None)
        return given, ""

    def _ranked(self, found: Mapping[str, list[Evidence]], question: str, vector: NDArray[Any]) -> Ranked:
        """What each source found that is near the question (its `vector`), nearest first."""
        every = [(name, evidence) for name, each in found.items() for evidence in each]
        out: Ranked = {}
        if not every:
            return out
        kinds = {name: type(self._open.get(name)) for name in found}
        least = NEAR_BY_WORDS if self.embedder.name == ByWords.name else NEAR
        texts = [_row_in_words(e) if kinds[name] is SqlSource else e.text for name, e in every]
        for (name, evidence), cosine in zip(every, (self.embedder.embed(texts) @ vector).tolist(), strict=True):
            sure = kinds[name] is GraphSource and evidence.query and evidence.score >= UNSURE  # that a path was asked
            near = 1.0 if sure else cosine
            if near >= least:
                out.setdefault(name, []).append((near, evidence))
        for each in out.values():
            each.sort(key=lambda pair: -pair[0])
        return out

    def open(self, source: str, where: str, reader: Reader, query: str = "") -> Evidence | None:
        """The passage, row or triple that a citation names, where the reader may read it; `query` is what found it.
        Raises CoterieError where the query may not be asked, or the source cannot be."""
        opened = self._usable.source(source)
        if isinstance(opened, SqlSource):
            return open_row(source, opened.db, where, query, reader)
        if isinstance(opened, GraphSource):
            return open_triples(opened, where, query, reader)
        return opened.open(where, reader) if isinstance(opened, Documents) else None

    def picture(self, source: str, thing: str, reader: Reader) -> str | None:
        """The neighbourhood of a thing in a graph, as SVG, of the triples that the reader may see; None for none.
        Raises QueryRefused where `thing` is no IRI."""
        opened = self._usable.source(source)
        if not isinstance(opened, GraphSource) or not (facts := opened.around(thing, reader, AROUND)):
            return None
        ends = [Term("uri", thing), *(end for f in facts for end in (f.subject, f.object))]
        return draw(thing, facts, opened.names(ends, reader))


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
    """Every declared source with what the reader may see of it: files or tables, freshness, errors. No source is asked:
    it is what `learn` found."""
    declared = business.config.knowledge.sources
    return [listing.overview(name, declared, index_folder(business, name), reader) for name in declared]
