"""Read examples from JSONL, CSV and Parquet, one at a time, so that a file may be larger than memory."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from coterie.errors import DataError

Message = dict[str, str]
Row = tuple[str, dict[str, Any]]  # where it stands, and its cells by column
ROLES = ("system", "user", "assistant")
FIELDS = ("prompt", "completion", "messages", "system", "chosen", "rejected")
LARGEST_CELL = 64 << 20  # characters of a CSV cell; Python's own limit of 131,072 is less than a long document


@dataclass(frozen=True)
class Example:
    """A conversation whose assistant turns are to be learned, and the file and line it came from."""

    messages: tuple[Message, ...]
    where: str

    @property
    def prompt(self) -> list[Message]:
        """Everything before the last answer."""
        return list(self.messages[:-1])

    @property
    def question(self) -> str:
        """What the user said last, before the last answer: what a router sees."""
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")

    @property
    def asked(self) -> str:
        """All that was said before the last answer, without the instruction: what makes two examples the same."""
        return "\n".join(m["content"] for m in self.messages[:-1] if m["role"] != "system")

    @property
    def completion(self) -> str:
        """The last answer."""
        return self.messages[-1]["content"]


def read(path: Path, columns: Mapping[str, str] | None = None, system: str = "") -> Iterator[Example]:
    """The examples of one file.

    A row has `messages` (a list of role and content, the last from the assistant), or `prompt` and `completion`;
    `columns` says which column of the file holds each. `system` goes before rows that bring no system message.
    Raises DataError, naming file and line, at the first row that cannot be used.
    """
    columns = dict(columns or {})
    for field in columns:
        if field not in FIELDS:
            raise DataError(f"columns: {field!r} is not one of {', '.join(FIELDS)}")
    if "messages" in columns and ("prompt" in columns or "completion" in columns):
        raise DataError("columns: name either messages, or prompt and completion")
    for where, row in _rows(path):
        yield _example(row, columns, where, system)


def inputs_of(path: Path, column: str = "prompt") -> Iterator[tuple[str, str]]:
    """Place and text of each input in a file: a .txt with one a line, or a column of the other kinds.

    Raises DataError, naming file and line, at the first row that cannot be used.
    """
    if path.suffix != ".txt":
        for where, row in _rows(path):
            if column not in row:
                raise DataError(f"{where}: no column {column!r}; the row has {', '.join(map(repr, row))}")
            yield where, _text(row[column], column, where)
        return
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                yield f"{path}:{number}", line.strip()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from error


def read_pairs(path: Path, columns: Mapping[str, str] | None = None, system: str = "") -> Iterator[Example]:
    """The preferences of one file, each as two examples: the better answer, then the worse one.

    A row has `prompt` (text, or a list of messages), `chosen` and `rejected` (text, or messages that end in the
    answer, as TRL writes them). Raises DataError, naming file and line.
    """
    columns = dict(columns or {})
    for where, row in _rows(path):
        ask = row.get(columns.get("prompt", "prompt"))
        for answer in ("chosen", "rejected"):
            column = columns.get(answer, answer)
            if column not in row:
                raise DataError(f"{where}: no column {column!r}; the row has {', '.join(map(repr, row))}")
            said = row[column]
            if isinstance(said, list) and said and isinstance(said[-1], dict):
                said = said[-1].get("content")
            if isinstance(ask, list):
                yield _example({"messages": [*ask, {"role": "assistant", "content": said}]}, {}, where, system)
            else:
                yield _example({"prompt": ask, "completion": said}, {}, where, system)


def check_file(path: Path) -> None:
    """Raises DataError where `path` is no file of a known kind."""
    if path.is_dir():
        raise DataError(f"{path}: a folder; name a data file (.jsonl, .csv or .parquet)")
    if path.suffix.lower() not in (".jsonl", ".csv", ".parquet"):
        raise DataError(f"{path}: unknown kind of data file {path.suffix!r}; use .jsonl, .csv or .parquet")
    if not path.is_file():
        raise DataError(f"{path}: no such file")


def _rows(path: Path) -> Iterator[Row]:
    check_file(path)
    try:
        yield from {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                raise DataError(f"{where}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: a row must be an object, not {type(row).__name__}")
            yield where, row


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_CELL)
    # What is not UTF-8 becomes lone surrogates here, so that the row that has them can be named.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as f:
        reader = csv.reader(f, strict=True)
        header: list[str] = []
        line = 1
        try:
            for cells in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                if not cells:
                    continue
                if not header:
                    header = [_clean(c, "the header", where) for c in cells]
                    twice = next((c for c in header if header.count(c) > 1), None)
                    if twice is not None:
                        raise DataError(f"{where}: the header names {twice!r} twice")
                elif len(cells) != len(header):
                    raise DataError(f"{where}: {len(cells)} columns where the header has {len(header)}")
                else:
                    yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{line}: not readable as CSV ({error})") from error


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: truncated or not Parquet, after row {number} ({error})") from error


def _example(row: dict[str, Any], columns: Mapping[str, str], where: str, system: str) -> Example:
    def cell(field: str, required: bool = True) -> Any:
        column = columns.get(field, field)
        if column in row:
            return row[column]
        if required or field in columns:
            raise DataError(f"{where}: no column {column!r}; the row has {', '.join(map(repr, row))}")
        return None

    if "messages" in columns or ("messages" in row and "prompt" not in columns):
        messages = _messages(cell("messages"), where)
    else:
        messages = [
            {"role": role, "content": _text(cell(field), repr(columns.get(field, field)), where)}
            for role, field in (("user", "prompt"), ("assistant", "completion"))
        ]
    instruction = cell("system", required=False) or system
    if instruction and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(instruction, "'system'", where)})
    return Example(tuple(messages), where)


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {what} must be text that is not empty")
    return _clean(value, what, where).strip()


def _clean(text: str, what: str, where: str) -> str:
    """`text`, if it is whole characters. NUL is how UTF-16 looks to a reader of UTF-8."""
    if "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
        raise DataError(f"{where}: {what} has bytes that are not UTF-8 text, or NUL; save the file as UTF-8")
    return text


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'messages' must be a list of role and content that is not empty")
    out: list[Message] = []
    for n, message in enumerate(value, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(f"{where}: message {n} needs a role, one of {', '.join(ROLES)}")
        out.append(
            {"role": message["role"], "content": _text(message.get("content"), f"content of message {n}", where)}
        )
    if out[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message must be the assistant's, the answer to learn")
    if all(m["role"] != "user" for m in out):
        raise DataError(f"{where}: no message of the user before the answer")
    return out
