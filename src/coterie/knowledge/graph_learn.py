"""`coterie learn` of a graph: its files and tables as named graphs, only what changed, and the path finder."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyoxigraph as ox
from sqlalchemy import Engine, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from coterie.data.read import Row, read_objects
from coterie.errors import CoterieError, DataError, SourceError, first_line
from coterie.knowledge.database import postgresql_engine, sqlite_engine
from coterie.knowledge.endpoint import Endpoint
from coterie.knowledge.entities import Embed, plain
from coterie.knowledge.evidence import Reader
from coterie.knowledge.graph import EXTRACTED, Graph
from coterie.knowledge.graph_source import GraphSource
from coterie.knowledge.mapping import csv_rows, map_rows, relation, table_rows
from coterie.knowledge.paths import COUNT, LIST, Asked, Finder, mask
from coterie.knowledge.rdf import check_shapes, read_rdf
from coterie.knowledge.shape import TYPE
from coterie.knowledge.specs import GraphSpec
from coterie.store.database import located

Triples = Callable[[], Iterator[ox.Triple | ox.Quad]]


@dataclass
class Learned:
    """What learning came to. `problems`: source and why it could not be taken; what it said before still stands.
    `told`: of each problem, sets of groups: whoever is in each of them may know of it."""

    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    kept: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    told: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Wanted:
    name: str
    readers: tuple[str, ...]
    mark: Callable[[], str]  # equal while the content is
    triples: Triples


def learn_graph(spec: GraphSpec, root: Path, folder: Path) -> Learned:
    """Bring the graph in `folder` up to date with the files and tables of `spec`, whose paths are from `root`."""
    done, graph = Learned(), Graph(folder, spec.timeout_s)
    with graph.writing() as writer:
        known = {s.name: s for s in writer.sources()}
        wanted = list(_wanted(spec, root, done))
        for source in wanted:
            before = known.get(source.name)
            try:
                mark = source.mark()
                if spec.shapes:  # what fits these shapes may not fit others
                    mark = f"{mark} {_digest(root / spec.shapes)}"
                if before is None or before.mark != mark:
                    if spec.shapes:
                        check_shapes(source.triples(), root / spec.shapes)
                    done.changed.append(source.name)
                else:
                    done.kept += 1
                writer.put(source.name, source.triples(), source.readers, mark)
            except SourceError as error:
                done.changed = [n for n in done.changed if n != source.name]
                done.problems[source.name], done.told[source.name] = str(error), [source.readers]
                if before:  # who may read it changes all the same
                    writer.put(source.name, (), source.readers, before.mark)
        for name in sorted(known.keys() - {w.name for w in wanted}):
            if not name.startswith(EXTRACTED):  # those go with their documents
                writer.remove(name)
                done.removed.append(name)
    graph.permit(permissions_mark(spec))  # after what it speaks of: a run that is killed in between leaves it closed
    _learn_paths(spec, root, folder, done)
    if "examples" in done.problems:  # a line of them may speak of anything that is known here
        done.told["examples"] = [source.readers for source in wanted]
    return done


def permissions_mark(spec: GraphSpec) -> str:
    """Of what decides who may read: a graph that was learned with another is not asked."""
    held = [*((p.files, p.readers) for p in spec.parts), *((t.table or t.file, t.readers) for t in spec.tables)]
    return json.dumps(held) if held else ""


def open_graph(name: str, spec: GraphSpec, folder: Path, embed: Embed | None = None) -> GraphSource:
    """The source that `learn_graph` made, or the endpoint. It raises CoterieError when it is asked, and other readers
    are declared than those it was learned with."""
    file = folder / "finder.safetensors"
    finder = Finder.load(file) if file.exists() else None
    if spec.endpoint:
        endpoint = Endpoint(spec.endpoint, spec.endpoint_graphs, spec.readers, spec.timeout_s)
        return GraphSource(name, endpoint, finder, embed, named=bool(spec.endpoint_graphs))
    return GraphSource(name, Graph(folder, spec.timeout_s, permissions_mark(spec)), finder, embed)


def _wanted(spec: GraphSpec, root: Path, done: Learned) -> Iterator[_Wanted]:
    """Each source that the declaration names; patterns that match no file are problems."""
    seen: set[str] = set()
    for part in spec.parts:
        for pattern in part.files:
            files = _files(root, pattern)
            if not files:
                done.problems[pattern], done.told[pattern] = f"{pattern}: no such file in {root}", [tuple(part.readers)]
            for file in files:
                name = str(file.relative_to(root))
                if name not in seen:
                    seen.add(name)
                    yield _Wanted(name, tuple(part.readers), lambda f=file: _digest(f),  # type: ignore[misc]
                                  lambda f=file: read_rdf(f, spec.base))  # type: ignore[misc]  # fmt: skip
    engine = _engine(spec, root) if spec.database else None
    for table in spec.tables:
        rows = _rows(engine, table.table, root / table.file)
        made: Triples = lambda t=table, r=rows: map_rows(t, r(), spec.base)  # type: ignore[misc]  # noqa: E731
        about = table.model_dump_json(exclude={"readers"})
        yield _Wanted(
            table.table or table.file, tuple(table.readers), lambda a=about, m=made: _hash(a, m()), made  # type: ignore[misc]
        )  # fmt: skip


def _files(root: Path, pattern: str) -> list[Path]:
    try:
        return sorted(f for f in root.glob(pattern) if f.is_file())
    except (NotImplementedError, ValueError, IndexError):  # of pathlib: a pattern that begins at the root, or is none
        return []


def _engine(spec: GraphSpec, root: Path) -> Engine:
    """The database that `tables` names tables of; SQLite and PostgreSQL are only read. Raises CoterieError."""
    try:
        url = make_url(located(spec.database, root))
        if url.get_backend_name() == "sqlite" and url.database:
            return sqlite_engine(Path(url.database))
        if url.get_backend_name() == "postgresql":
            return postgresql_engine("database", url, spec.timeout_s)
        return create_engine(url)
    except (ArgumentError, ImportError) as error:
        raise CoterieError(f"database: cannot be used ({first_line(error)})") from error


def _rows(engine: Engine | None, table: str, file: Path) -> Callable[[], Iterator[Any]]:
    if table:
        assert engine is not None, "GraphSpec asks for `database`"
        return lambda: table_rows(engine, table)
    return lambda: csv_rows(file)


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise SourceError(f"{file}: cannot be read ({error.strerror})") from error


def _hash(about: str, triples: Iterator[ox.Triple | ox.Quad]) -> str:
    digest = hashlib.sha256(about.encode())
    for triple in triples:
        digest.update(str(triple).encode())
    return digest.hexdigest()


def _learn_paths(spec: GraphSpec, root: Path, folder: Path, done: Learned) -> None:
    """Train the path finder on the declared examples, where these changed."""
    file, mark = folder / "finder.safetensors", folder / "finder.mark"
    if not spec.examples:
        file.unlink(missing_ok=True)
        return
    files = [f for p in spec.examples for f in _files(root, p) or [root / p]]
    try:
        now = ",".join(_digest(f) for f in files)
        if file.exists() and mark.exists() and mark.read_text() == now:
            return
        rows = [asked for f in files for asked in read_asked(f, spec.base)]
        finder = Finder(_all_labels(spec, folder))
        finder.learn(rows)
    except CoterieError as error:
        done.problems["examples"] = str(error)
        return
    finder.save(file)
    mark.write_text(now)


def _all_labels(spec: GraphSpec, folder: Path) -> dict[str, str]:
    """The words of all relations, whoever may see them: only what is learned of them is kept."""
    source = open_graph("", spec, folder)
    if not isinstance(source.graph, Graph):
        return {}  # an endpoint may be down, and need not be asked to learn
    try:
        everyone = Reader("", frozenset(r for s in source.graph.sources() for r in s.readers))
        return source.labels(everyone)
    finally:
        source.graph.close()


def read_asked(file: Path, base: str) -> Iterator[Asked]:
    """Questions with their paths. A line has `question`, `names` (the words of it that name the thing), `path`, a list
    of relations ("^" before one that is followed backwards; plain words stand for a relation under `base`, and
    "^rdf:type" leads from a type to its things), and may have `count`: true. Raises DataError, naming file and line."""
    rows = read_objects(file, question=str, names=str, path=list)
    return (asked_of(row, base, where) for where, row in rows)


def asked_of(row: Row, base: str, where: str) -> Asked:
    """One such line, read. Raises DataError, naming `where` it stands."""
    question, names = row["question"], row["names"]
    words, named = plain(question).split(), plain(names).split()
    at = next((i for i in range(len(words)) if named and words[i : i + len(named)] == named), -1)
    if at < 0:
        raise DataError(f"{where}: the question does not say {names!r}")
    relations = tuple(_relation(str(r), base) for r in row["path"])
    return Asked(mask(question, at, at + len(named)), relations, COUNT if row.get("count") else LIST)


def _relation(words: str, base: str) -> str:
    back, name = ("^", words[1:]) if words.startswith("^") else ("", words)
    if name == "rdf:type":
        return back + TYPE
    return back + (name if ":" in name else relation(base, name).value)
