"""The index of one folder of documents: passages in SQLite, words in tantivy, vectors as vectors.py keeps them.

SQLite says what holds. A batch is written in this order: vectors are appended, tantivy commits, SQLite commits with
tantivy's stamp. Whoever is killed in between leaves vectors that SQLite does not know, which the next writer cuts off,
or a tantivy index with another stamp, which the next writer makes anew from SQLite. Readers leave out numbers that
SQLite does not know. Where most of the vectors' rows are nobody's any more, `pack` copies the others into new files,
and one commit of SQLite names these and numbers the rows anew; the next writer deletes the files that it does not name.

Who may read is an access class, a number for each set of groups: a term in tantivy, and a number for each row of the
vectors. Both searches (search.py) look only at the classes that the reader may see, before they choose their best.
"""

import json
import logging
import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tantivy
from numpy.typing import NDArray

from coterie.errors import CoterieError, StorageError
from coterie.knowledge.chunk import Chunk
from coterie.knowledge.links import names_of
from coterie.knowledge.names import pairs, series_of
from coterie.knowledge.near import bands, normalise, repeats
from coterie.knowledge.vectors import Mapped, drop_table, open_vectors

Floats = NDArray[np.float32]
HEAP = 64 << 20  # bytes that tantivy may hold while it writes
CACHE = 64 << 20  # and SQLite: the hashes of near-duplicates are read and written all over their table
SPARE = 512  # rows of the vectors that may be nobody's, whatever the index holds
FORMAT = "4"
IN_POSTGRES = " in PostgreSQL"
log = logging.getLogger(__name__)

TABLES = """
create table if not exists meta(key text primary key, value text);
create table if not exists access(id integer primary key, groups text unique);
create table if not exists documents(
  id integer primary key, path text unique, sha256 text, size integer, changed integer, title text, access integer,
  indexed text, error text, series integer, part integer);
create table if not exists chunks(
  id integer primary key autoincrement, document integer, place text, text text, line integer, repeats integer);
create table if not exists names(document integer, name text, primary key(document, name)) without rowid;
create index if not exists chunks_document on chunks(document);
create index if not exists chunks_repeats on chunks(repeats) where repeats is not null;
create table if not exists bands(hash integer, chunk integer, primary key(hash, chunk)) without rowid;
"""


@dataclass(frozen=True)
class File:
    """A file as it was when it was indexed. changed: its time in nanoseconds. error: "" where it could be read."""

    path: str
    sha256: str
    size: int
    changed: int
    title: str
    groups: tuple[str, ...]
    error: str = ""
    indexed: str = ""
    passages: int = 0


def open_db(folder: Path, writing: bool) -> sqlite3.Connection:
    """The database of an index. Raises CoterieError where there is none, StorageError where it is damaged."""
    file = folder / "index.db"
    if not writing and not file.exists():
        raise CoterieError(f"{folder.name}: not indexed yet; run `coterie learn`")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(file, timeout=30, check_same_thread=False, isolation_level=None)
        db.execute("pragma journal_mode=wal")
        if writing:
            db.execute(f"pragma cache_size=-{CACHE >> 10}")
            db.executescript(TABLES)
        db.execute("select 1 from meta").fetchone()
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from error
    except sqlite3.Error as error:
        raise StorageError(f"{file}: cannot be used ({error}); delete {folder} and run `coterie learn`") from error
    return db


def space_of(width: int, space: str, vectors: str) -> str:
    """What an index must have been made with, to be searched or gone on with."""
    return f"{FORMAT} {width} {space}{IN_POSTGRES if vectors else ''}"


def meta(db: sqlite3.Connection, key: str) -> str:
    """A fact about the index, "" where it is not there."""
    row = db.execute("select value from meta where key = ?", (key,)).fetchone()
    return str(row[0]) if row else ""


def open_words(folder: Path) -> tantivy.Index:
    """tantivy's part of the index in `folder`, made where it is absent."""
    s = tantivy.SchemaBuilder()
    s.add_integer_field("chunk", indexed=True, fast=True)
    s.add_integer_field("access", indexed=True)
    for name in ("title", "text"):
        s.add_text_field(name, tokenizer_name="en_stem", index_option="freq")
    s.add_text_field("pairs", tokenizer_name="whitespace", index_option="freq")
    (folder / "words").mkdir(exist_ok=True)
    return tantivy.Index(s.build(), path=str(folder / "words"))


def stamp_of(folder: Path) -> str:
    """tantivy's own mark of its last commit."""
    file = folder / "words" / "meta.json"
    return str(json.loads(file.read_text())["opstamp"]) if file.exists() else ""


class Store:
    """The one writer of an index. `batch()` holds what is put and dropped until it ends, and then all of it counts."""

    def __init__(self, folder: Path, width: int, space: str, vectors: str = "") -> None:
        """Open or begin the index; put right what a killed writer left. An index of another `space` is begun anew.
        `vectors`: address of a PostgreSQL that is to have the vectors; "": files have them."""
        self.folder, self.width = folder, width
        held = space_of(width, space, vectors)
        if (folder / "index.db").exists():
            db = open_db(folder, writing=True)
            before, table = meta(db, "space"), meta(db, "vectors")
            db.close()
            if before not in ("", held):
                if vectors and before.endswith(IN_POSTGRES):
                    drop_table(vectors, table)
                old = folder.with_name(f".old-{folder.name}-{os.getpid()}")
                folder.rename(old)  # a reader may still have files open in it
                shutil.rmtree(old, ignore_errors=True)
        self.db = open_db(folder, writing=True)
        self.set("space", held)
        if not meta(self.db, "vectors"):  # no two indexes share a table, whatever their folders are called
            self.set("vectors", f"coterie_vectors_{uuid.uuid4().hex}")
        self.rows = int(meta(self.db, "rows") or 0)
        self._vectors = open_vectors(folder, width, vectors, meta(self.db, "vectors"), meta(self.db, "packed"))
        self._vectors.cut(self._lines, self.rows)
        self._index = open_words(folder)
        if stamp_of(folder) != meta(self.db, "stamp"):
            self._rebuild_words()
        self._words = self._index.writer(HEAP)
        self._classes: dict[tuple[str, ...], int] = {}
        self._new: list[tuple[int, int, str, str, str]] = []  # see `_words_of`: without vectors yet
        self._gone: list[int] = []  # rows of the vectors that nobody will know after this batch

    def close(self) -> None:
        self._words.wait_merging_threads()
        self._vectors.close()
        self.db.close()

    def set(self, key: str, value: str) -> None:
        self.db.execute("insert or replace into meta values(?, ?)", (key, value))

    def _lines(self) -> NDArray[np.int64]:
        """The rows of the vectors that passages have."""
        found = self.db.execute("select line from chunks where line is not null").fetchall()
        return np.array(found, np.int64).ravel()

    def pack(self) -> None:
        """Give back the rows of the vectors that no passage has, where they are over half of all and over SPARE."""
        held = self.db.execute("select id, line from chunks where line is not null order by line").fetchall()
        dead = self.rows - len(held)
        if not isinstance(self._vectors, Mapped) or dead <= max(SPARE, len(held)):
            return
        mark = f"-{int(meta(self.db, 'packed')[1:] or 0) + 1}"  # never one that a reader may have read of
        try:
            packed = self._vectors.packed(np.array([line for _, line in held], np.int64), mark)
        except OSError:  # no room for both; it goes on as it is
            log.exception("%s: its vectors could not be packed", self.folder)
            self._vectors.tidy()
            return
        self.db.execute("begin immediate")
        try:
            self.db.executemany("update chunks set line = ? where id = ?", ((n, id) for n, (id, _) in enumerate(held)))
            self.set("rows", str(len(held)))
            self.set("packed", mark)
            self.db.execute("commit")
        except BaseException:
            self.db.execute("rollback")
            raise
        self.rows, self._vectors = len(held), packed
        packed.tidy()

    def _rebuild_words(self) -> None:
        writer = self._index.writer(HEAP)
        writer.delete_all_documents()  # in one commit with what comes now: who reads meanwhile sees the old or the new
        for chunk, access, title, place, path, text in self.db.execute(
            "select c.id, d.access, d.title, c.place, d.path, c.text from chunks c "
            "join documents d on d.id = c.document where c.line is not null"
        ):
            writer.add_document(_words_of(chunk, access, f"{title} {place}".strip(), text, _named(title, path)))
        writer.commit()
        writer.wait_merging_threads()
        self.set("stamp", stamp_of(self.folder))

    def files(self) -> Iterator[File]:
        """Every file that the index knows, readable or not."""
        yield from files(self.db)

    @contextmanager
    def batch(self) -> Iterator["Store"]:
        """What is put and dropped inside holds at its end, all or nothing. `finish` must have given the vectors."""
        self.db.execute("begin immediate")
        try:
            yield self
            assert not self._new, "passages were put, and have no vectors"
            self._vectors.commit()
            self._words.commit()
            self.set("stamp", stamp_of(self.folder))
            self.set("rows", str(self.rows))
            self.db.execute("commit")
        except BaseException:
            self.db.execute("rollback")
            self._vectors.rollback()
            self._words.rollback()
            self._new, self._gone, self._classes = [], [], {}
            self.rows = int(meta(self.db, "rows") or 0)
            raise
        gone, self._gone = self._gone, []
        self._vectors.forget(gone)

    def put(self, file: File, passages: Sequence[Chunk]) -> None:
        """Index a file in place of what it said before. A passage that nearly repeats one of other files with the
        same readers is kept, but not found."""
        self.drop(file.path)
        access = self._access_class(file.groups)
        document = self.db.execute(
            "insert into documents(path, sha256, size, changed, title, access, indexed, error, series, part) "
            "values(?, ?, ?, ?, ?, ?, strftime('%Y-%m-%dT%H:%M:%SZ', 'now'), ?, ?, ?)",
            (file.path, file.sha256, file.size, file.changed, file.title, access, file.error, *series_of(file.path)),
        ).lastrowid
        named = _named(file.title, file.path)
        names = names_of([file.title, *(f"{passage.place}\n{passage.text}" for passage in passages)])
        self.db.executemany("insert into names values(?, ?)", [(document, name) for name in names])
        for passage in passages:
            normal = normalise(f"{passage.place} {passage.text}")
            hashes = bands(normal, access)
            same = self._same(normal, hashes)
            line = self.rows + len(self._new) if same is None else None
            chunk = self.db.execute(
                "insert into chunks(document, place, text, line, repeats) values(?, ?, ?, ?, ?)",
                (document, passage.place, passage.text, line, same),
            ).lastrowid
            assert chunk is not None
            if same is None:
                self.db.executemany("insert or ignore into bands values(?, ?)", [(h, chunk) for h in hashes])
                title = f"{file.title} {passage.place}".strip()
                self._new.append((chunk, access, title, passage.text, named))

    def note(self, file: File) -> None:
        """What is known of a file itself; the passages that it has stay."""
        known = self.db.execute(
            "update documents set sha256 = ?, size = ?, changed = ?, error = ? where path = ?",
            (file.sha256, file.size, file.changed, file.error, file.path),
        ).rowcount
        if not known:
            self.put(file, ())

    def _access_class(self, groups: tuple[str, ...]) -> int:
        """The number of a set of groups, made where it is new."""
        if groups not in self._classes:
            key = json.dumps(sorted(set(groups)))
            self.db.execute("insert or ignore into access(groups) values(?)", (key,))
            (self._classes[groups],) = self.db.execute("select id from access where groups = ?", (key,)).fetchone()
        return self._classes[groups]

    def _same(self, normal: str, hashes: list[int]) -> int | None:
        """The passage of the same readers that this one nearly repeats."""
        each = " union all ".join(["select chunk from bands where hash = ?"] * len(hashes))  # half of what IN takes
        found = self.db.execute(
            f"select c.id, c.place, c.text from ({each}) b join chunks c on c.id = b.chunk limit 64", hashes
        )
        for chunk, place, text in found:
            if repeats(normal, normalise(f"{place} {text}")):
                return int(chunk)
        return None

    def drop(self, path: str) -> None:
        """Forget a file. Files that repeated one of its passages are to be indexed again: their hash is forgotten."""
        row = self.db.execute("select id, access from documents where path = ?", (path,)).fetchone()
        if row is None:
            return
        document, access = row
        found = self.db.execute("select id, line, place, text from chunks where document = ?", (document,)).fetchall()
        for chunk, line, place, text in found:
            self._gone += [line] if line is not None else []
            self.db.execute(
                "update documents set sha256 = '', changed = 0 where id in "
                "(select document from chunks where repeats = ?)", (chunk,),
            )  # fmt: skip
            hashes = bands(normalise(f"{place} {text}"), access)
            self.db.executemany("delete from bands where hash = ? and chunk = ?", [(h, chunk) for h in hashes])
            self._words.delete_documents_by_term("chunk", chunk)
        self.db.execute("delete from chunks where document = ?", (document,))
        self.db.execute("delete from names where document = ?", (document,))
        self.db.execute("delete from documents where id = ?", (document,))

    def pending(self) -> list[str]:
        """The texts of passages put since `finish`: what their vectors are made of."""
        return [f"{title}\n{text}" for _, _, title, text, _ in self._new]

    def finish(self, vectors: Floats) -> None:
        """Vectors (pending, width) of length 1 of the pending passages."""
        if self._new:
            self._vectors.append(self.rows, vectors, [access for _, access, *_ in self._new])
        for one in self._new:  # all at once: one by one between SQLite's statements, tantivy takes twice as long
            self._words.add_document(_words_of(*one))
        self.rows += len(self._new)
        self._new = []


def _words_of(chunk: int, access: int, title: str, text: str, named: str) -> tantivy.Document:
    """A passage as tantivy holds it. named: see `_named`."""
    return tantivy.Document(chunk=chunk, access=access, title=title, text=text, pairs=named)


def _named(title: str, path: str) -> str:
    """The pairs of words in the title and the path of a file."""
    return " ".join(pairs(f"{title} {path}"))


def files(db: sqlite3.Connection) -> Iterator[File]:
    """Every file of an index, by path."""
    for path, sha256, size, changed, title, groups, error, indexed, passages in db.execute(
        "select d.path, d.sha256, d.size, d.changed, d.title, a.groups, d.error, d.indexed, "
        "(select count(*) from chunks c where c.document = d.id) "
        "from documents d join access a on a.id = d.access order by d.path"
    ):
        yield File(path, sha256, size, changed, title, tuple(json.loads(groups)), error, indexed, passages)


def allowed(db: sqlite3.Connection, groups: Iterable[str]) -> list[int]:
    """The access classes that one of `groups` may read."""
    held = set(groups)
    return [int(i) for i, of in db.execute("select id, groups from access") if held & set(json.loads(of))]
