"""Facts that a graph takes from documents: read passage by passage, decided, and gone with what they were read in.

Notable: a fact stands as long as the passage that it was read in stands in its document, so one rule holds for
documents that are changed and that are gone; and whoever may read the document may read it. Which passages have been
read is kept, so that reading goes on where it was stopped.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import lru_cache
from itertools import islice
from pathlib import Path

from coterie.engine.engine import Engine
from coterie.engine.request import Adapter
from coterie.errors import CoterieError, StorageError
from coterie.files import alone, write_atomic
from coterie.knowledge.evidence import Reader
from coterie.knowledge.graph import EXTRACTED, Graph
from coterie.knowledge.proposals import Pending, Proposal, propose, put_accepted
from coterie.knowledge.specs import ExtractSpec, GraphSpec
from coterie.knowledge.store import open_db

BATCH = 8  # passages whose proposals are kept together


def pending(folder: Path) -> Pending:
    """The proposals for the graph in `folder`."""
    return Pending(folder / "proposals.jsonl")


class Standing:
    """The documents as they are indexed: who may read them, and what stands in them."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.texts = lru_cache(maxsize=64)(self._texts)

    def readers(self, where: str) -> frozenset[str]:
        """The groups that may read a document; nobody, where it is gone."""
        row = self.db.execute(
            "select a.groups from documents d join access a on a.id = d.access where d.path = ?", (where,)
        ).fetchone()
        return frozenset(json.loads(row[0])) if row else frozenset()

    def _texts(self, where: str) -> frozenset[str]:
        found = self.db.execute(
            "select c.text from chunks c join documents d on d.id = c.document where d.path = ?", (where,)
        )
        return frozenset(text for (text,) in found)

    def stands(self, proposal: Proposal) -> bool:
        return proposal.passage in self.texts(proposal.where)


def settle(spec: GraphSpec, folder: Path, documents: Path | None, forget: bool) -> None:
    """Make what is accepted, and stands, the graph's, and nothing else of what was read in documents.

    documents: the folder of their index. forget: they have just been learned, so what does not stand is gone for good.
    """
    graph, proposals = Graph(folder, spec.timeout_s), pending(folder)
    before = any(s.name.startswith(EXTRACTED) for s in graph.sources())
    if spec.extract is None or documents is None:
        if before:
            with graph.writing() as writer:
                for source in writer.sources():
                    if source.name.startswith(EXTRACTED):
                        writer.remove(source.name)
        for file in (proposals.file, _read_file(folder)):
            file.unlink(missing_ok=True)
        return
    if not proposals.file.exists() and not before:
        return
    with closing(open_db(documents, writing=False)) as db:
        at = Standing(db)
        if forget and (gone := proposals.forget(lambda p: not at.stands(p))):
            again = {_mark(spec.extract, p.where, p.passage) for p in gone}  # should it come back, it is read again
            write_atomic(_read_file(folder), "".join(f"{mark}\n" for mark in sorted(_read(folder) - again)))
        put_accepted(graph, proposals, spec.base, at.readers, at.stands)


def read_documents(
    spec: GraphSpec, folder: Path, documents: Path, engine: Engine, adapter: Adapter | None = None,
    count: Callable[[int, int], None] = lambda _d, _t: None,
) -> int:  # fmt: skip
    """Let a model propose what it reads in passages that it has not read yet; the declared rule decides what it may.
    How many proposals are new. What has been read stays read where this is stopped. Raises CoterieError."""
    extract, proposals, new = spec.extract, pending(folder), 0
    assert extract is not None, "only graphs that say so read documents"
    busy = f"{folder.name}: another process reads documents for it; let it end"
    with alone(folder / "reading.lock", busy), closing(open_db(documents, writing=False)) as db:
        read, seen = _read(folder), 0
        (total,) = db.execute("select count(*) from chunks where repeats is null").fetchone()
        passages = _passages(db)
        while batch := list(islice(passages, BATCH)):
            marks = {_mark(extract, *passage): passage for passage in batch}
            todo = {mark: passage for mark, passage in marks.items() if mark not in read}
            if todo:
                new += proposals.add(propose(engine, todo.values(), extract.relations, adapter))
                with _read_file(folder).open("a") as file:
                    file.writelines(f"{mark}\n" for mark in todo)
            count(seen := seen + len(batch), total)
        proposals.decide_by(lambda p: True if p.relation in extract.accept else None)
    settle(spec, folder, documents, forget=False)
    return new


def readable(folder: Path, documents: Path, reader: Reader) -> list[Proposal]:
    """The proposals from documents that `reader` may read, as they came."""
    listed = pending(folder).read()
    if not listed or not (documents / "index.db").exists():
        return []
    with closing(open_db(documents, writing=False)) as db:
        at = Standing(db)
        mine = {where: bool(at.readers(where) & reader.may) for where in {p.where for p in listed}}
        return [p for p in listed if mine[p.where]]


def decide(
    spec: GraphSpec, folder: Path, documents: Path, ids: frozenset[str], accept: bool, by: str, reader: Reader
) -> int:
    """Accept or reject those of `ids` that `reader` may read; the graph follows at once. How many were changed."""
    mine = ids & {p.id for p in readable(folder, documents, reader)}
    changed = pending(folder).decide(mine, accept, by)
    if changed:
        try:
            settle(spec, folder, documents, forget=False)
        except StorageError:
            raise
        except CoterieError as error:
            raise CoterieError(f"{error}. The decision is kept, and holds after the next `coterie learn`") from error
    return changed


def _passages(db: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """Document and text of each passage, but for those that repeat another."""
    yield from db.execute(
        "select d.path, c.text from chunks c join documents d on d.id = c.document where c.repeats is null "
        "order by d.path, c.id"
    )


def _mark(extract: ExtractSpec, where: str, text: str) -> str:
    said = json.dumps([where, text, sorted(extract.relations), extract.expert])
    return hashlib.sha256(said.encode()).hexdigest()[:24]


def _read_file(folder: Path) -> Path:
    return folder / "read.txt"


def _read(folder: Path) -> set[str]:
    file = _read_file(folder)
    return set(file.read_text().split()) if file.exists() else set()
