"""A folder of documents as a source: learned incrementally, searched under permissions.

`learn` follows what is new, changed, gone or whose readers changed, by hash; a file that cannot be read is reported
and keeps its place in the list, and the rest is indexed. What the system would not give this time (a file, a folder)
is not gone: what was indexed of it stays, and it is tried again.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from coterie.data.read import read_objects
from coterie.errors import CoterieError, DataError
from coterie.files import alone
from coterie.knowledge import parse_worker
from coterie.knowledge.articles import link_of
from coterie.knowledge.chunk import Chunk, chunks
from coterie.knowledge.documents_spec import KINDS, DocumentsSpec
from coterie.knowledge.embed import Embedder, Floats
from coterie.knowledge.evidence import Evidence, Reader
from coterie.knowledge.search import Search
from coterie.knowledge.store import File, Store, files, meta, open_db

BATCH = 512  # passages that become searchable together
FOUND = 8  # passages that a search gives where it is not told
ALIKE, GAIN = 0.6, 4.0  # cosine from which an earlier question speaks for its documents, and the most they gain
Tell = Callable[[str], None]
Count = Callable[[str, int, int], None]
Read = tuple[File, list[Chunk] | None]  # a file and its passages; None: those that it has
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learned:
    """What `learn` did: files new or changed, gone, as before, and what could not be read: file and why. passages: how
    much the source holds, in its `unit`."""

    source: str
    indexed: int
    dropped: int
    kept: int
    passages: int
    errors: tuple[tuple[str, str], ...]
    unit: str = "passages"


def listed(root: Path, spec: DocumentsSpec) -> tuple[list[tuple[str, Path]], dict[str, str]]:
    """The files of a source, their name within it and where they lie; and what could not be looked at, and why: a
    folder by its name and "/". Links that lead out of the source are left out. Raises DataError (root)."""
    try:
        if root.is_file():
            return [(root.name, root)], {}
        if not root.is_dir():
            raise DataError(f"{root}: there is no such folder")
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror})") from error
    found, missed, inside = list[tuple[str, Path]](), dict[str, str](), root.resolve()

    def unlisted(error: OSError) -> None:
        if Path(error.filename) == root:
            raise DataError(f"{root}: cannot be listed ({error.strerror})") from error
        name = _shown(Path(error.filename).relative_to(root).as_posix() + "/")
        missed[name] = f"{name}: cannot be listed ({error.strerror})"

    for at, folders, names in os.walk(root, onerror=unlisted):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(at, name) for name in names if not name.startswith(".")):
            name = file.relative_to(root).as_posix()
            if file.suffix.lower() not in KINDS or not any(fnmatchcase(name, glob) for glob in spec.files):
                continue
            try:
                if not file.is_file() or not file.resolve().is_relative_to(inside):
                    continue
            except OSError as error:
                missed[_shown(name)] = f"{_shown(name)}: cannot be read ({error.strerror})"
                continue
            if _shown(name) != name:
                missed[_shown(name)] = f"{_shown(name)}: its name is not UTF-8; rename it"
            else:
                found.append((name, file))
    return sorted(found, key=lambda one: one[1]), missed


def _shown(name: str) -> str:
    """A name that can be stored and said, where the system gave bytes that are not UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")


def readers(spec: DocumentsSpec, name: str) -> tuple[str, ...]:
    """The groups that may read a file: those of the last rule that fits it, else those of the source. A rule for files
    of a folder fits its name, which ends in "/"."""
    inside = name if name.endswith("/") else "\0"
    fitting = [
        rule.readers
        for rule in spec.permissions
        if any(fnmatchcase(name, glob) or glob.startswith(inside) for glob in rule.files)
    ]
    return tuple(sorted(set(fitting[-1] if fitting else spec.readers)))


def permissions_mark(spec: DocumentsSpec) -> str:
    """Of what decides who may read: an index with another mark is not searched."""
    return json.dumps([spec.readers, [(p.files, p.readers) for p in spec.permissions]])


def learn(
    name: str, spec: DocumentsSpec, root: Path, folder: Path, embedder: Embedder, tell: Tell = lambda _: None,
    count: Count = lambda _w, _d, _t: None, vectors: str = "",
) -> Learned:  # fmt: skip
    """Bring the index in `folder` up to date with the files in `root`. Raises DataError (root), StorageError."""
    todo, missed = listed(root, spec)
    indexed = dropped = 0
    with alone(folder.with_suffix(".lock"), f"{folder.name}: another `coterie learn` is at work on it; let it end"):
        store = Store(folder, embedder.width, embedder.name, vectors)
        parsing = parse_worker.Parsing(parse_worker.LIMIT_S)
        try:
            known = {f.path: f for f in store.files()}
            there = {path for path, _ in todo} | missed.keys()
            unlisted = tuple(path for path in missed if path.endswith("/"))
            gone = {path for path in known.keys() - there if not path.startswith(unlisted)}
            with store.batch():
                for path in gone:
                    store.drop(path)
                    dropped += not path.endswith("/")
                store.set("permissions", permissions_mark(spec))
                for path, file in known.items():  # who may read less, may from now on, whatever else comes
                    if path not in gone and file.groups != readers(spec, path):
                        store.drop(path)
                known = {f.path: f for f in store.files()}
                for path, why in missed.items():
                    store.note(_unread(path, why, known.get(path), spec))
            known = {f.path: f for f in store.files()}
            again = list(todo)
            while again:
                work, again = again, []
                for at, batch in _batches(work, known, spec, parsing):
                    with store.batch():
                        for file, passages in batch:
                            if passages is None:
                                store.note(file)
                            else:
                                store.put(file, passages)
                                indexed += 1
                        store.finish(embedder.embed(store.pending()))
                    count(f"indexing {name}", at, len(work))
                known = {f.path: f for f in store.files()}
                again = [(p, f) for p, f in todo if p in known and not known[p].sha256]  # had repeated what is gone
            store.pack()
            total = sum(f.passages for f in known.values())
            found = tuple((f.path, f.error) for f in known.values() if f.error)
        finally:
            parsing.close()
            store.close()
    for _, why in found:
        tell(f"{name}: {why}")
    return Learned(name, indexed, dropped, max(0, len(todo) - indexed), total, found)


def _batches(
    todo: list[tuple[str, Path]], known: dict[str, File], spec: DocumentsSpec, parsing: parse_worker.Parsing
) -> Iterator[tuple[int, list[Read]]]:
    """Files that are new or changed, parsed, about BATCH passages at a time, and how many files have been seen."""
    batch: list[Read] = []
    held = 0
    for at, (path, place) in enumerate(todo, 1):
        file = _read(path, place, known.get(path), spec, parsing)
        if file is not None:
            batch.append(file)
            held += len(file[1] or ())
        if held >= BATCH or (at == len(todo) and batch):
            yield at, batch
            batch, held = [], 0


def _read(
    path: str, place: Path, before: File | None, spec: DocumentsSpec, parsing: parse_worker.Parsing
) -> Read | None:
    """A file and its passages, with what is wrong where it cannot be read; None where it is as it was."""
    sha256, size, changed, title, error = "unread", 0, 0, "", ""
    passages: list[Chunk] = []
    try:
        facts = place.stat()
        size, changed = facts.st_size, facts.st_mtime_ns
        same = before and before.sha256 and (before.size, before.changed) == (size, changed)
        if before and same and (not before.error or before.error.endswith(parse_worker.LEFT)):
            return None
        if size > spec.max_mb * (1 << 20):
            raise DataError(f"{path}: {size / (1 << 20):.0f} MiB; over max_mb = {spec.max_mb:g}, so it is not read")
        content = place.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if before and before.sha256 == sha256 and not before.error:
            return None
        if before and before.sha256 == sha256 and before.passages:  # it could not be read for a while
            return replace(before, size=size, changed=changed, error=""), None
        parsed = parsing.parse(Path(path), content)  # by this name: readers see no folder of the machine
        title, passages = parsed.title, chunks(parsed)
    except CoterieError as wrong:
        error = str(wrong)
    except OSError as wrong:
        file = _unread(path, f"{path}: cannot be read ({wrong.strerror})", before, spec)
        return None if file == before else (file, None)
    except Exception as wrong:  # ours, or of a library that reads what others wrote; the next file may be sound
        log.exception("%s: cannot be read", path)
        error = f"{path}: cannot be read ({type(wrong).__name__})"
    known = (before.sha256, before.size, before.changed, before.error) if before else ()
    if error and known == (sha256, size, changed, error):
        return None
    return File(path, sha256, size, changed, title, readers(spec, path), error), passages


def _unread(path: str, why: str, before: File | None, spec: DocumentsSpec) -> File:
    """A file that the system would not give: as it was before, and why."""
    known = before or File(path, "", 0, 0, "", readers(spec, path))
    return replace(known, sha256=known.sha256 or "unread", error=why)


class Documents:
    """A learned source, opened for asking."""

    def __init__(
        self, name: str, spec: DocumentsSpec, folder: Path, embedder: Embedder, base: Path = Path(), vectors: str = ""
    ) -> None:
        """Raises CoterieError where it is not indexed yet, or its readers have changed since."""
        self.name, self.spec = name, spec
        self.searching = Search(folder, embedder, vectors)
        self.judged = Judged(base / spec.judged, embedder) if spec.judged else None

    def close(self) -> None:
        self.searching.close()

    def _check(self) -> None:
        if meta(self.searching.db, "permissions") != permissions_mark(self.spec):
            raise CoterieError(f"{self.name}: its readers have changed since it was indexed; run `coterie learn`")

    def search(self, question: str, reader: Reader, limit: int = FOUND) -> list[Evidence]:
        """The best passages that the reader may read."""
        self._check()
        gains = self.judged.gains if self.judged else lambda _: {}
        found = self.searching.find(question, reader.may, limit, gains)
        return [Evidence(self.name, p.where, p.text, score, link=self._link(p.path)) for p, score in found]

    def open(self, where: str, reader: Reader) -> Evidence | None:
        """The passage that a citation names, where the reader may read it."""
        self._check()
        found = self.searching.passage(where, reader.may)
        return Evidence(self.name, found.where, found.text, 0.0, link=self._link(found.path)) if found else None

    def _link(self, path: str) -> str:
        return link_of(self.spec.salesforce, path) if self.spec.salesforce else ""


class Judged:
    """Questions of the past, and the documents that people found to serve them.

    A new question that is like one of them (cosine over ALIKE) lends its documents up to GAIN standard deviations,
    rising with the likeness; an unlike one changes nothing.
    """

    def __init__(self, file: Path, embedder: Embedder) -> None:
        rows = [row for _, row in read_objects(file, question=str, documents=list)]
        self.paths = [[str(path) for path in row["documents"]] for row in rows]
        self.vectors = embedder.embed([row["question"] for row in rows])

    def gains(self, question: Floats) -> dict[str, float]:
        """What each document gains, by path, for a question's vector."""
        if not self.paths:
            return {}
        like = np.clip((self.vectors @ question - ALIKE) / (1 - ALIKE), 0, 1)
        missed: dict[str, float] = {}
        for i in np.argsort(-like, kind="stable")[:8]:
            for path in self.paths[i] if like[i] > 0 else ():
                missed[path] = missed.get(path, 1.0) * (1 - float(like[i]))
        return {path: GAIN * (1 - m) for path, m in missed.items()}


def overview(name: str, spec: DocumentsSpec, folder: Path, reader: Reader) -> dict[str, Any]:
    """What a source holds, for lists: the files that the reader may read, their freshness, what went wrong."""
    head = {"name": name, "kind": spec.kind, "description": spec.description, "unit": "passages"}
    try:
        db = open_db(folder, writing=False)
    except CoterieError as error:
        return {**head, "files": [], "errors": [str(error)], "passages": 0, "indexed": None}
    try:
        own = [f for f in files(db) if set(f.groups) & reader.may]
    finally:
        db.close()
    return {
        **head, "passages": sum(f.passages for f in own), "indexed": max((f.indexed for f in own), default=None),
        "errors": [f.error for f in own if f.error],
        "files": [
            {"path": f.path, "title": f.title, "passages": f.passages, "indexed": f.indexed, "readers": list(f.groups),
             "error": f.error} for f in own
        ],
    }  # fmt: skip
