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
ROLES = ("system", "user", "assistant")
FIELDS = ("prompt", "completion", "messages", "system", "chosen", "rejected")


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

    A row has `prompt` (text, or a list of messages), `chosen` and `rejected`. Raises DataError.
    """
    columns = dict(columns or {})
    for where, row in _rows(path):
        ask = row.get(columns.get("prompt", "prompt"))
        for answer in ("chosen", "rejected"):
            said = row.get(columns.get(answer, answer))
            if isinstance(said, list) and said and isinstance(said[-1], dict):  # TRL also writes whole messages
                said = said[-1].get("content")
            if isinstance(ask, list):
                one = {"messages": [*ask, {"role": "assistant", "content": said}]}
                yield _example(one, {}, where, system)
            else:
                yield _example({"prompt": ask, "completion": said}, {}, where, system)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: unknown kind of data file {path.suffix!r}; use .jsonl, .csv or .parquet")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    yield from readers[path.suffix](path)


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # also UnicodeDecodeError
                raise DataError(f"{where}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: a row must be an object, not {type(row).__name__}")
            yield where, row


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(f, strict=True)
        start = 1
        try:
            for row in reader:
                where = f"{path}:{start + 1}"
                start = reader.line_num
                if None in row or None in row.values():
                    found = len([v for v in row.values() if v is not None])
                    raise DataError(f"{where}: {found} columns where the header has {len(reader.fieldnames or [])}")
                yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{start + 1}: not readable as CSV ({error})") from error


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: truncated or not Parquet ({error})") from error


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
            {"role": role, "content": _text(cell(field), columns.get(field, field), where)}
            for role, field in (("user", "prompt"), ("assistant", "completion"))
        ]
    instruction = cell("system", required=False) or system
    if instruction and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(instruction, "system", where)})
    return Example(tuple(messages), where)


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {column!r} must be text that is not empty")
    return value.strip()


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'messages' must be a list of role and content that is not empty")
    out: list[Message] = []
    for n, message in enumerate(value, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(f"{where}: message {n} needs a role, one of {', '.join(ROLES)}")
        content = _text(message.get("content"), f"content of message {n}", where)
        out.append({"role": message["role"], "content": content})
    if out[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message must be the assistant's, the answer to learn")
    return out
