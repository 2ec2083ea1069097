"""Where the vectors of an index lie: in memory-mapped files beside it, or in PostgreSQL (pgvector).

A row of the vectors is a line number that SQLite gives, and gives again only once the files are packed: then those that
are known are copied into other files and numbered anew. Both keep what is appended apart until
`commit`, which comes before SQLite's own; lines that SQLite does not know are cut off by the next writer. Readers name
the access classes they may see, and these are part of the search in both: a mask before the choice, or a condition of
the SQL. In PostgreSQL a table belongs to one index; deleted lines leave it once SQLite has forgotten them.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from coterie.errors import CoterieError, StorageError, first_line

if TYPE_CHECKING:
    import psycopg

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
BLOCK = 1 << 16  # rows scored at once
SPARE = 2  # times as many rows as wanted are scored again with the question vector as it is
CONNECT_S = 10
NEAREST = (
    "SELECT line, 1 - (v <=> %(asked)s) FROM {table} WHERE access = ANY(%(classes)s) AND line < %(rows)s "
    "ORDER BY v <=> %(asked)s LIMIT %(limit)s"
)


class Vectors(Protocol):
    """The vectors of an index, each of length 1."""

    def cut(self, known: Callable[[], Ints], rows: int) -> None:
        """Forget all lines but `known`, of the first `rows`. Raises StorageError where some of these are missing."""
        ...

    def append(self, start: int, vectors: Floats, access: Sequence[int]) -> None:
        """Add lines from `start` on, (lines, width), with the access class of each."""
        ...

    def commit(self) -> None: ...
    def rollback(self) -> None: ...
    def forget(self, lines: Sequence[int]) -> None:
        """Delete lines, once nobody knows them."""
        ...

    def open(self, rows: int, mark: str) -> None:
        """See the first `rows`, as of now, for reading. `mark`: of the files. Raises FileNotFoundError where a writer
        has put others in their place."""
        ...

    def nearest(self, asked: Floats, may: Mask, classes: Sequence[int], limit: int) -> list[tuple[Ints, Floats]]:
        """For each question vector, the best lines of `may` (rows), which are of `classes`, and their cosines."""
        ...

    def of(self, lines: Ints) -> Floats:
        """The vectors of some lines, (lines, width)."""
        ...

    def close(self) -> None: ...


class Mapped:
    """Bytes and a scale for each row, in two files, whose names say `mark`; exact search over all of them."""

    def __init__(self, folder: Path, width: int, mark: str = "") -> None:
        self.folder, self.width, self.mark = folder, width, mark

    def _files(self) -> tuple[tuple[Path, int], ...]:
        return (self.folder / f"vectors{self.mark}.i8", self.width), (self.folder / f"scales{self.mark}.f32", 4)

    def packed(self, lines: Ints, mark: str) -> "Mapped":
        """A copy of some lines, in their order, in other files."""
        out = Mapped(self.folder, self.width, mark)
        for (file, size), (to, _) in zip(self._files(), out._files(), strict=True):
            rows = np.memmap(file, np.uint8, "r").reshape(-1, size)
            with to.open("wb") as f:
                for start in range(0, len(lines), BLOCK):
                    f.write(rows[lines[start : start + BLOCK]].tobytes())
        out.commit()
        return out

    def tidy(self) -> None:
        """Delete the files of other marks: what they were packed from, or what a killed writer left. Readers that have
        them open go on."""
        own = {file for file, _ in self._files()}
        for file in {*self.folder.glob("vectors*.i8"), *self.folder.glob("scales*.f32")} - own:
            file.unlink(missing_ok=True)

    def cut(self, known: Callable[[], Ints], rows: int) -> None:
        self.tidy()
        for file, size in self._files():
            file.touch()
            if file.stat().st_size < rows * size:
                raise StorageError(f"{file}: is cut short; delete {self.folder} and run `coterie learn`")
            os.truncate(file, rows * size)

    def append(self, start: int, vectors: Floats, access: Sequence[int]) -> None:
        scales = (np.maximum(np.abs(vectors).max(axis=1, initial=0), 1e-9) / 127).astype(np.float32)
        numbers = np.round(vectors / scales[:, None]).astype(np.int8)
        for (file, size), part in zip(self._files(), (numbers, scales), strict=True):
            with file.open("r+b") as f:
                f.truncate(start * size)
                f.seek(start * size)
                f.write(part.tobytes())

    def commit(self) -> None:
        for file, _ in self._files():
            with file.open("rb") as f:
                os.fsync(f.fileno())

    def rollback(self) -> None:
        pass  # lines that SQLite does not know are written over

    def forget(self, lines: Sequence[int]) -> None:
        pass  # nobody's: the mask leaves them out, until they are packed

    def open(self, rows: int, mark: str) -> None:
        self.rows, self.mark = rows, mark
        (vectors, _), (scales, _) = self._files()
        if rows:  # mode "c", as torch wants memory that could be written to; nothing is
            mapped = np.memmap(vectors, np.int8, "c", shape=(rows, self.width))
            self._vectors, self._scales = torch.from_numpy(mapped), np.fromfile(scales, np.float32, rows)

    def nearest(self, asked: Floats, may: Mask, classes: Sequence[int], limit: int) -> list[tuple[Ints, Floats]]:
        scores = self._scan(asked)
        out = []
        rows = np.flatnonzero(may)
        count, everything = min(limit, len(rows)), len(rows) == len(may)
        for vector, of_rows in zip(asked, scores, strict=True):
            near = of_rows if everything else of_rows[rows]
            some = min(count * SPARE, len(rows))
            best = np.argpartition(near, -some)[-some:] if some < len(rows) else np.arange(len(rows))
            best = rows[best]
            exact = (self.of(best) @ vector[None].T)[:, 0]
            order = np.argsort(-exact, kind="stable")[:count]
            out.append((best[order], exact[order]))
        return out

    def _scan(self, vectors: Floats) -> Floats:
        """Cosines, nearly, (questions, rows): bytes by bytes, in the rows' scale."""
        scale = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), 1e-9) / 127
        columns = max(8, len(vectors))  # oneDNN's kernel wants a few
        asked = np.zeros((columns, vectors.shape[1]), np.int8)
        asked[: len(vectors)] = np.round(vectors / scale)
        by = torch.from_numpy(asked).t().contiguous()
        out = np.empty((len(vectors), self.rows), np.float32)
        for start in range(0, self.rows, BLOCK):
            block = torch._int_mm(self._vectors[start : start + BLOCK], by)[:, : len(vectors)]
            out[:, start : start + BLOCK] = block.t().numpy()
        return out * self._scales

    def of(self, lines: Ints) -> Floats:
        whole: Floats = self._vectors[torch.from_numpy(lines)].numpy() * self._scales[lines, None]
        return whole

    def close(self) -> None:
        pass


class Postgres:
    """A table of half-precision vectors in PostgreSQL with pgvector; the search is one SQL statement.

    Exact as it is. At many millions of rows an HNSW index on `v halfvec_cosine_ops` makes it approximate and fast; it
    goes on until enough rows that the reader may see are found (`hnsw.iterative_scan`).
    """

    def __init__(self, url: str, table: str, width: int) -> None:
        """Raises CoterieError where the server cannot be used."""
        self.table, self.width = table, width
        self.rows = 0
        try:
            address = make_url(url)
        except ArgumentError as error:
            raise CoterieError("knowledge.vectors: not an address; write postgresql://user@host/database") from error
        self.shown = address.render_as_string(hide_password=True)
        self._address = address.set(drivername="postgresql").render_as_string(hide_password=False)
        try:
            import pgvector.psycopg  # noqa: F401
            import psycopg
        except ImportError as error:
            raise CoterieError("knowledge.vectors: run pip install 'coterie[postgres]'") from error
        self._held: psycopg.Connection[Any] | None = None
        self._do(
            f"CREATE TABLE IF NOT EXISTS {table} (line bigint PRIMARY KEY, access integer NOT NULL, "
            f"v halfvec({width}) NOT NULL)"
        )
        self._do(f"CREATE INDEX IF NOT EXISTS {table}_access ON {table} (access)")
        self.commit()

    def _connection(self) -> "psycopg.Connection[Any]":
        import psycopg
        from pgvector.psycopg import register_vector

        if self._held is None or self._held.closed:
            held = psycopg.connect(self._address, connect_timeout=CONNECT_S)
            try:
                held.execute("CREATE EXTENSION IF NOT EXISTS vector")
                held.execute("SET hnsw.iterative_scan = strict_order")
                held.commit()
                register_vector(held)
            except BaseException:
                held.close()
                raise
            self._held = held
        return self._held

    def _do(self, sql: str, values: Any = None) -> list[Any]:
        """What a statement gives, within the transaction. Raises StorageError."""
        import psycopg

        try:
            cursor = self._connection().cursor(binary=True)
            cursor.execute(sql, values)
            return cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            with suppress(psycopg.Error):
                self.rollback()
            raise StorageError(f"{self.shown}: {first_line(error)}") from error

    def _read(self, sql: str, values: Any) -> list[Any]:
        """The same for reading, once more where the server was restarted meanwhile."""
        try:
            found = self._do(sql, values)
        except StorageError:
            if self._held is None or not self._held.closed:
                raise
            found = self._do(sql, values)
        self.commit()  # no transaction is left open between questions
        return found

    def cut(self, known: Callable[[], Ints], rows: int) -> None:
        own, held = known(), np.array([line for (line,) in self._do(f"SELECT line FROM {self.table}")], np.int64)
        if len(np.setdiff1d(own, held)):
            raise StorageError(
                f"{self.shown}: {self.table} lacks vectors of this index; delete the index and run `coterie learn`"
            )
        self.forget(np.setdiff1d(held, own).tolist())

    def append(self, start: int, vectors: Floats, access: Sequence[int]) -> None:
        import psycopg
        from pgvector import HalfVector

        try:
            cursor = self._connection().cursor()
            cursor.execute(f"DELETE FROM {self.table} WHERE line >= %s", (start,))
            with cursor.copy(f"COPY {self.table} (line, access, v) FROM STDIN WITH (FORMAT BINARY)") as copy:
                copy.set_types(["int8", "int4", "halfvec"])
                for line, (vector, of) in enumerate(zip(vectors, access, strict=True), start):
                    copy.write_row((line, of, HalfVector(vector)))
        except psycopg.Error as error:
            self.rollback()
            raise StorageError(f"{self.shown}: {first_line(error)}") from error

    def commit(self) -> None:
        import psycopg

        try:
            self._connection().commit()
        except psycopg.Error as error:
            raise StorageError(f"{self.shown}: {first_line(error)}") from error

    def rollback(self) -> None:
        if self._held and not self._held.closed:
            self._held.rollback()

    def forget(self, lines: Sequence[int]) -> None:
        if lines:
            self._do(f"DELETE FROM {self.table} WHERE line = ANY(%s)", (list(lines),))
        self.commit()

    def open(self, rows: int, mark: str) -> None:
        self.rows = rows

    def nearest(self, asked: Floats, may: Mask, classes: Sequence[int], limit: int) -> list[tuple[Ints, Floats]]:
        from pgvector import HalfVector

        out = []
        for vector in asked:
            values = {"asked": HalfVector(vector), "classes": list(classes), "rows": self.rows, "limit": limit}
            found = np.array(self._read(NEAREST.format(table=self.table), values), np.float64).reshape(-1, 2)
            lines = found[:, 0].astype(np.int64)
            kept = may[lines]  # a line that was dropped and not deleted yet is nobody's
            out.append((lines[kept], found[kept, 1].astype(np.float32)))
        return out

    def of(self, lines: Ints) -> Floats:
        out = np.zeros((len(lines), self.width), np.float32)
        distinct, at = np.unique(lines, return_inverse=True)
        sql = f"SELECT line, v FROM {self.table} WHERE line = ANY(%s) ORDER BY line"
        found = self._read(sql, (distinct.tolist(),))
        if found:
            places = np.searchsorted(distinct, [line for line, _ in found])
            whole = np.zeros((len(distinct), self.width), np.float32)
            whole[places] = np.stack([v.to_numpy() for _, v in found]).astype(np.float32)
            out = whole[at]
        return out

    def close(self) -> None:
        if self._held:
            self._held.close()


def drop_table(url: str, table: str) -> None:
    """Delete the table of an index that is begun anew."""
    old = Postgres(url, table, 1)
    try:
        old._do(f"DROP TABLE IF EXISTS {table}")
        old.commit()
    finally:
        old.close()


def open_vectors(folder: Path, width: int, url: str, table: str, mark: str = "") -> Vectors:
    """The vectors of the index in `folder`: in files that `mark` names, or with `url` in PostgreSQL."""
    return Postgres(url, table, width) if url else Mapped(folder, width, mark)
