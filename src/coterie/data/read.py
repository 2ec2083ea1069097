"""Read examples from JSONL, CSV and Parquet, one at a time, so that a file may be larger than memory."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from coterie.errors import DataError

Message = dict[str, str]
Row = dict[str, Any]
Refuse = Callable[[DataError], None]
ROLES = ("system", "user", "assistant")
FIELDS = ("prompt", "completion", "messages", "system")
FACTS = {"source": "source", "licence": "licence", "license": "licence", "synthetic": "synthetic"}  # column, fact


@dataclass(frozen=True)
class Example:
    """A conversation whose assistant turns are to be learned, and the file and line it came from."""

    messages: tuple[Message, ...]
    where: str
    facts: Mapping[str, Any] = field(default_factory=dict)  # source, licence, synthetic, where the row gives them

    @property
    def prompt(self) -> list[Message]:
        """Everything before the last answer."""
        return list(self.messages[:-1])

    @property
    def completion(self) -> str:
        """The last answer."""
        return self.messages[-1]["content"]


def question(example: Example) -> str:
    """The text that decides the answer: the last thing asked."""
    return example.messages[-2]["content"] if len(example.messages) > 1 else ""


@dataclass(frozen=True)
class Source:
    """Data files that are read one after another, and how: see `read`."""

    paths: tuple[Path, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    system: str = ""

    def rows(self, refuse: Refuse | None = None) -> Iterator[tuple[Example, Row]]:
        """Each example with its row as the file has it. With `refuse`, a row that cannot be used goes there."""
        for path in self.paths:
            yield from read_rows(path, self.columns, self.system, refuse)

    def examples(self) -> Iterator[Example]:
        """The examples alone. Raises DataError, naming file and line, at the first row that cannot be used."""
        return (example for example, _ in self.rows())


def read(path: Path, columns: Mapping[str, str] | None = None, system: str = "") -> Iterator[Example]:
    """The examples of one file.

    A row has `messages` (a list of role and content, the last from the assistant), or `prompt` and `completion`;
    `columns` says which column of the file holds each. `system` goes before rows that bring no system message.
    Raises DataError, naming file and line, at the first row that cannot be used.
    """
    return (example for example, _ in read_rows(path, columns or {}, system))


def read_rows(
    path: Path, columns: Mapping[str, str], system: str, refuse: Refuse | None = None
) -> Iterator[tuple[Example, Row]]:
    """`read`, with the row as the file has it; with `refuse`, faults of single rows go there and reading goes on."""
    for name in columns:
        if name not in FIELDS:
            raise DataError(f"columns: {name!r} is not one of {', '.join(FIELDS)}")
    for where, row in _rows(path, refuse):
        try:
            example = _example(row, columns, where, system)
        except DataError as error:
            _refuse(error, refuse)
            continue
        yield example, row


def read_inputs(path: Path, column: str = "") -> Iterator[tuple[str, str]]:
    """Place and text of what people asked: one line of a .txt file, or one row's `column`.

    Without `column`, the last message of the user in `messages`, or `prompt`. Answers are not needed. Raises DataError.
    """
    if path.suffix == ".txt" and path.is_file():
        with path.open(encoding="utf-8", errors="replace") as f:
            yield from ((f"{path}:{n}", line.strip()) for n, line in enumerate(f, 1) if line.strip())
        return
    for where, row in _rows(path, None):
        if not column and isinstance(row.get("messages"), list):
            asked = [m for m in row["messages"] if isinstance(m, dict) and m.get("role") == "user"]
            yield where, _text(asked[-1].get("content") if asked else None, "messages", where)
            continue
        name = column or "prompt"
        if name not in row:
            raise DataError(f"{where}: no column {name!r}; the row has {', '.join(map(repr, row))}")
        yield where, _text(row[name], name, where)


def _refuse(error: DataError, refuse: Refuse | None) -> None:
    """A row's fault: raised, or handed to who collects them."""
    if refuse is None:
        raise error
    refuse(error)


def _rows(path: Path, refuse: Refuse | None) -> Iterator[tuple[str, Row]]:
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix not in readers:
        raise DataError(f"{path}: unknown kind of data file {path.suffix!r}; use .jsonl, .csv or .parquet")
    yield from readers[path.suffix](path, refuse)


def _jsonl(path: Path, refuse: Refuse | None) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # also UnicodeDecodeError
                _refuse(DataError(f"{where}: not valid JSON ({error})"), refuse)
                continue
            if not isinstance(row, dict):
                _refuse(DataError(f"{where}: a row must be an object, not {type(row).__name__}"), refuse)
                continue
            yield where, row


def _csv(path: Path, refuse: Refuse | None) -> Iterator[tuple[str, Row]]:
    with path.open(newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(f, strict=True)
        start = 1
        try:
            for row in reader:
                where = f"{path}:{start + 1}"
                start = reader.line_num
                if None in row or None in row.values():
                    found = len([v for k, v in row.items() if k is not None and v is not None])
                    found += len(row.get(None) or ())
                    head = len(reader.fieldnames or [])
                    _refuse(DataError(f"{where}: {found} columns where the header has {head}"), refuse)
                    continue
                yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{start + 1}: not readable as CSV ({error})") from error


def _parquet(path: Path, refuse: Refuse | None) -> Iterator[tuple[str, Row]]:
    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: truncated or not Parquet ({error})") from error


def _example(row: Row, columns: Mapping[str, str], where: str, system: str) -> Example:
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
    facts = {fact: row[column] for column, fact in FACTS.items() if row.get(column)}
    return Example(tuple(messages), where, facts)


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
