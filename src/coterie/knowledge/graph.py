"""A knowledge graph on disk. Every source is a named graph, so each triple knows where it is from and goes with it.

Notable: one process writes, and every publish is a snapshot (hard links, so it costs milliseconds whatever the size)
that readers ask meanwhile; `current` names it, and is replaced as a whole. Who may read a source is asked before the
query: the query's data set is made of the graphs that this reader may see, and holds nothing else.
"""

import hashlib
import json
import math
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Protocol, cast
from urllib.parse import quote, unquote

import pyoxigraph as ox

from coterie.errors import Busy, CoterieError, QueryRefused, SourceError, StorageError
from coterie.files import write_atomic
from coterie.knowledge.evidence import Reader
from coterie.knowledge.sparql import Rows, check, read_answer

LIMIT = 1000  # rows of one answer
TIMEOUT_S = 5.0
WORKERS = 4  # queries at once
MEMORY = 1 << 30  # bytes that each may take; large graphs need some hundred million for what comes within the time
BATCH = 50_000  # triples written together
PREFIX = "urn:coterie:graph:"
EXTRACTED = "extracted from "  # how a source is named whose triples were read from a document; see proposals.py
REGISTER = ox.NamedNode("urn:coterie:register")  # the graph that says which graphs count, and who may read them
READER, MARK, SIZE = (ox.NamedNode(f"urn:coterie:{p}") for p in ("reader", "mark", "triples"))


class Askable(Protocol):
    """What can be asked in SPARQL: a graph on this disk, or an endpoint. fresh_s: for which what was read of the graphs
    in `seen` stays true."""

    fresh_s: float

    def select(self, query: str, reader: Reader, limit: int = LIMIT) -> Rows:
        """What `query` gives on the graphs that `reader` may see. Raises QueryRefused, SourceError or Busy."""
        ...

    def seen(self, reader: Reader) -> frozenset[str]:
        """The graphs that `reader` may see: two readers with the same get the same answers."""
        ...


@dataclass(frozen=True)
class Source:
    """One named graph: where it is from, a mark of that content, its triples, and the groups that may read it."""

    name: str
    graph: str  # its IRI
    mark: str
    triples: int
    readers: frozenset[str]


def source_of(graph: str) -> str:
    """The name of the source that a named graph's IRI was made from."""
    return unquote(graph.removeprefix(PREFIX).rpartition(":")[0]) if graph.startswith(PREFIX) else graph


class Graph:
    """The graph in `folder`; empty until something is written. Safe to ask from several threads."""

    fresh_s = math.inf  # a graph's IRI says what its content is

    def __init__(self, folder: Path, timeout_s: float = TIMEOUT_S, permissions: str | None = None) -> None:
        """`permissions`: a mark of who may read what, as it is declared now; see `permit`. None: that is not asked."""
        self.folder, self.timeout_s, self.permissions = folder, timeout_s, permissions
        self._idle: list[_Worker] = []
        self._room = threading.BoundedSemaphore(WORKERS)

    def sources(self) -> list[Source]:
        """What was published last, by name."""
        snapshot = self._snapshot()
        if snapshot is None:
            return []
        listed = json.loads((snapshot / "sources.json").read_text())
        return [Source(**{**s, "readers": frozenset(s["readers"])}) for s in listed]

    def seen(self, reader: Reader) -> frozenset[str]:
        """Raises CoterieError where other readers are declared than those that the graph was learned with."""
        if self.permissions is not None and self._snapshot() and self._permitted() != self.permissions:
            raise CoterieError(
                f"{self.folder.name}: its readers have changed since it was learned; run `coterie learn`"
            )
        return frozenset(s.graph for s in self.sources() if s.readers & reader.may)

    def permit(self, permissions: str) -> None:
        """Say that what is published has the readers that `permissions` stands for; "" for none that are declared."""
        write_atomic(self.folder / "permissions", permissions)

    def _permitted(self) -> str:
        try:
            return (self.folder / "permissions").read_text()
        except FileNotFoundError:
            return ""

    def select(self, query: str, reader: Reader, limit: int = LIMIT) -> Rows:
        check(query)
        for _ in range(3):  # a snapshot may be replaced between its name and its opening
            snapshot, graphs = self._snapshot(), sorted(self.seen(reader))
            if snapshot is None or not graphs:
                return self._ask({"snapshot": "", "query": query, "graphs": [], "limit": limit}, limit)
            job = {"snapshot": str(snapshot / "store"), "query": query, "graphs": graphs, "limit": limit}
            try:
                return self._ask(job, limit)
            except SourceError:
                if self._snapshot() == snapshot:
                    raise
        raise Busy("the graph is being replaced again and again; try again")

    def _ask(self, job: dict[str, Any], limit: int) -> Rows:
        if not self._room.acquire(timeout=self.timeout_s):
            raise Busy(f"{WORKERS} queries of the graph run already; try again")
        try:
            worker = self._idle.pop() if self._idle else _Worker()
            try:
                out = worker.ask(job, self.timeout_s)
            except BaseException:
                worker.kill()
                raise
            self._idle.append(worker)
        finally:
            self._room.release()
        if "error" in out:
            kind = QueryRefused if out["kind"] == "refused" else SourceError
            raise kind(f"{self.folder.name}: {out['error'][:300]}")
        return read_answer(out, limit)

    def close(self) -> None:
        """End the processes that ask."""
        while self._idle:
            self._idle.pop().kill()

    @contextmanager
    def writing(self) -> Iterator["Writer"]:
        """Change the graph; published at the end, or not at all where that fails. One process at a time."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            store = ox.Store(str(self.folder / "store"))
        except OSError as error:
            if "lock" in str(error).lower():
                raise CoterieError(f"{self.folder}: another process is changing this graph; let it end") from error
            raise StorageError(f"{self.folder}: the graph cannot be written ({str(error)[:200]})") from error
        writer = Writer(store)
        try:
            writer.drop_strays()  # of a run that was killed
            yield writer
            writer.drop_strays()
            if writer.removed:
                store.optimize()  # what was deleted leaves the disk as well
            self._publish(store, writer.sources())
        except OSError as error:
            raise StorageError(f"{self.folder}: the graph cannot be written ({str(error)[:200]})") from error
        finally:
            del store, writer.store

    def _publish(self, store: ox.Store, sources: list[Source]) -> None:
        root = self.folder / "snapshots"
        root.mkdir(exist_ok=True)
        number = max((int(p.name) for p in root.iterdir() if p.name.isdigit()), default=0) + 1
        listed = [{**vars(s), "readers": sorted(s.readers)} for s in sources]
        (root / str(number)).mkdir()
        store.backup(str(root / str(number) / "store"))
        write_atomic(root / str(number) / "sources.json", json.dumps(listed))
        write_atomic(self.folder / "current", str(number))
        for old in root.iterdir():
            if old.name != str(number):
                shutil.rmtree(old, ignore_errors=True)

    def _snapshot(self) -> Path | None:
        try:
            return self.folder / "snapshots" / (self.folder / "current").read_text().strip()
        except FileNotFoundError:
            return None


class Writer:
    """Changes of a graph under way."""

    def __init__(self, store: ox.Store) -> None:
        self.store, self.removed = store, False

    def sources(self) -> list[Source]:
        """As they are now, by name."""
        facts: dict[str, dict[str, list[str]]] = {}
        for quad in self.store.quads_for_pattern(None, None, None, REGISTER):
            subject = cast(ox.NamedNode, quad.subject).value
            value = cast(ox.Literal, quad.object).value
            facts.setdefault(subject, {}).setdefault(quad.predicate.value, []).append(value)
        out = [
            Source(source_of(g), g, f[MARK.value][0], int(f[SIZE.value][0]), frozenset(f.get(READER.value, ())))
            for g, f in facts.items()
        ]
        return sorted(out, key=lambda s: s.name)

    def put(self, name: str, triples: Iterable[ox.Triple | ox.Quad], readers: Collection[str], mark: str) -> Source:
        """Make `triples` all that the source `name` says; they take the place of what it said before in one step.

        Blank nodes must be told apart from those of other sources (`read_rdf` does).
        """
        before = [s for s in self.sources() if s.name == name]
        if not before or before[0].mark != mark:
            graph = ox.NamedNode(f"{PREFIX}{quote(name, safe='')}:{hashlib.sha256(mark.encode()).hexdigest()[:12]}")
            self._drop(graph)
            source = iter(triples)
            while batch := [ox.Quad(t.subject, t.predicate, t.object, graph) for t in islice(source, BATCH)]:
                self.store.extend(batch)
        else:
            graph = ox.NamedNode(before[0].graph)
        size = sum(1 for _ in self.store.quads_for_pattern(None, None, None, graph))
        facts = [(MARK, mark), (SIZE, str(size)), *((READER, r) for r in sorted(set(readers)))]
        said = " . ".join(f"{graph} {p} {ox.Literal(text)}" for p, text in facts)
        self._register([s.graph for s in before], f"INSERT DATA {{ GRAPH {REGISTER} {{ {said} }} }}")
        for old in before:
            if old.graph != graph.value:
                self._drop(ox.NamedNode(old.graph))
        return next(s for s in self.sources() if s.name == name)

    def remove(self, name: str) -> None:
        """Delete a source and every triple of it. Unknown names are no error: it is gone."""
        for source in self.sources():
            if source.name == name:
                self._register([source.graph], "")
                self._drop(ox.NamedNode(source.graph))
                self.removed = True

    def drop_strays(self) -> None:
        """Delete graphs that are not registered: begun, and never finished."""
        known = {REGISTER.value, *(s.graph for s in self.sources())}
        for graph in list(self.store.named_graphs()):
            if graph.value not in known:
                self._drop(cast(ox.NamedNode, graph))

    def _drop(self, graph: ox.NamedNode) -> None:
        self.store.remove_graph(graph)

    def _register(self, gone: list[str], insert: str) -> None:
        """Forget the graphs `gone` and take up what `insert` says, in one transaction."""
        forget = [f"DELETE WHERE {{ GRAPH {REGISTER} {{ <{g}> ?p ?o }} }}" for g in gone]
        self.store.update(" ; ".join(x for x in [*forget, insert] if x))


class _Worker:
    """A process that asks; see graph_worker.py."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "coterie.knowledge.graph_worker", str(MEMORY)], text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()

    def _listen(self, stream: IO[str]) -> None:
        for line in chain(stream, [""]):  # "" when it ends
            self.lines.put(line)

    def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Raises SourceError where no answer came in time, or none at all."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=timeout_s)
        except queue.Empty as error:
            raise SourceError(f"the graph did not answer in {timeout_s:g} s; ask for less at once") from error
        except OSError:
            line = ""
        if not line:
            raise SourceError("the process that asks the graph ended, as over too much memory; ask for less at once")
        out: dict[str, Any] = json.loads(line)
        return out

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
