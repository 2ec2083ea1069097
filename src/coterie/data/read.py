"""Read examples from JSONL, CSV and Parquet, one at a time, so that a file may be larger than memory."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from coterie.errors import DataError

Message = dict[str, str]
Row = dict[str, Any]  # cells by column
Refuse = Callable[[DataError], None]
ROLES = ("system", "user", "assistant")
FIELDS = ("prompt", "completion", "messages", "system", "chosen", "rejected")
CUSTOMER = "customer"  # the column that says whose conversation a row is from
FACTS = {  # column, fact
    "source": "source", "licence": "licence", "license": "licence", "synthetic": "synthetic", CUSTOMER: CUSTOMER,
}  # fmt: skip
LARGEST_CELL = 64 << 20  # characters of a CSV cell; Python's own limit of 131,072 is less than a long document


@dataclass(frozen=True)
class Example:
    """A conversation whose assistant turns are to be learned, and the file and line it came from."""

    messages: tuple[Message, ...]
    where: str
    facts: Mapping[str, Any] = field(default_factory=dict)  # of FACTS, those that the row gives

    @property
    def prompt(self) -> list[Message]:
        """Everything before the last answer."""
        return list(self.messages[:-1])

    @property
    def question(self) -> str:
        """What the user said last, before the last answer: what a router sees."""
        return last_said(self.messages)

    @property
    def asked(self) -> str:
        """All that was said before the last answer, without the instruction: what makes two examples the same."""
        return "\n".join(m["content"] for m in self.messages[:-1] if m["role"] != "system")

    @property
    def completion(self) -> str:
        """The last answer."""
        return self.messages[-1]["content"]


def last_said(messages: Sequence[Message]) -> str:
    """What the user said last; "" where they said nothing."""
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")


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
        """Each example. Raises DataError at the first row that cannot be used."""
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
    if "messages" in columns and ("prompt" in columns or "completion" in columns):
        raise DataError("columns: name either messages, or prompt and completion")
    for where, row in raw_rows(path, refuse):
        try:
            example = _example(row, columns, where, system)
        except DataError as error:
            _refuse(error, refuse)
            continue
        yield example, row


def names_customers(path: Path) -> bool:
    """Whether rows of this file may name their customer, without making rows of all of it."""
    try:
        if path.suffix.lower() == ".parquet":
            return CUSTOMER in pq.read_schema(path).names
        with path.open("rb") as opened:
            if path.suffix.lower() == ".csv":
                return CUSTOMER in next(csv.reader([opened.readline(1 << 20).decode("utf-8-sig", "replace")]), [])
            return any(f'"{CUSTOMER}"'.encode() in line for line in opened)
    except (pa.ArrowException, OSError, csv.Error):
        return False  # whoever reads it says what is wrong


def read_inputs(path: Path, column: str = "") -> Iterator[tuple[str, str]]:
    """Place and text of what people asked: one line of a .txt file, or one row's `column`.

    Without `column`, the last message of the user in `messages`, or `prompt`. Answers are not needed. Raises DataError.
    """
    if path.suffix == ".txt" and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error})") from error
        yield from ((f"{path}:{n}", line.strip()) for n, line in enumerate(lines, 1) if line.strip())
        return
    for where, row in raw_rows(path):
        if not column and isinstance(row.get("messages"), list):
            asked = [m for m in row["messages"] if isinstance(m, dict) and m.get("role") == "user"]
            yield where, _text(asked[-1].get("content") if asked else None, "messages", where)
            continue
        name = column or "prompt"
        if name not in row:
            raise DataError(f"{where}: no column {name!r}; the row has {', '.join(map(repr, row))}")
        yield where, _text(row[name], repr(name), where)


def read_pairs(path: Path, columns: Mapping[str, str] | None = None, system: str = "") -> Iterator[Example]:
    """The preferences of one file, each as two examples: the better answer, then the worse one.

    A row has `prompt` (text, or a list of messages), `chosen` and `rejected` (text, or messages that end in the
    answer, as TRL writes them). Raises DataError, naming file and line.
    """
    columns = dict(columns or {})
    for where, row in raw_rows(path):
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


def read_objects(path: Path, /, **needed: type) -> Iterator[tuple[str, Row]]:
    """Place and row of each line of a file of JSON objects, one a line. `needed`: what each must have, `str` or `list`.
    Raises DataError, naming file, line and field."""
    try:
        for where, row in _jsonl(path, None):
            for field, kind in needed.items():
                if not isinstance(row.get(field), kind):
                    what = "a list" if kind is list else "a text"
                    raise DataError(f"{where}: needs {field!r}, {what}, not {row.get(field)!r}")
            yield where, row
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def check_file(path: Path) -> None:
    """Raises DataError where `path` is no file of a known kind."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if path.is_dir():
        raise DataError(f"{path}: a folder; name a data file (.jsonl, .csv or .parquet)")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix.lower() not in (".jsonl", ".csv", ".parquet"):
        raise DataError(f"{path}: unknown kind of data file {path.suffix!r}; use .jsonl, .csv or .parquet")


def _refuse(error: DataError, refuse: Refuse | None) -> None:
    """A row's fault: raised, or handed to who collects them."""
    if refuse is None:
        raise error
    refuse(error)


def raw_rows(path: Path, refuse: Refuse | None = None) -> Iterator[tuple[str, Row]]:
    """Place and cells of each row, whatever they are. Raises DataError, for a row's fault unless `refuse` takes it."""
    check_file(path)
    try:
        yield from {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[path.suffix.lower()](path, refuse)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _jsonl(path: Path, refuse: Refuse | None) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                _refuse(DataError(f"{where}: not valid JSON ({error})"), refuse)
                continue
            if not isinstance(row, dict):
                _refuse(DataError(f"{where}: a row must be an object, not {type(row).__name__}"), refuse)
                continue
            yield where, row


def _csv(path: Path, refuse: Refuse | None) -> Iterator[tuple[str, Row]]:
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
                    _refuse(DataError(f"{where}: {len(cells)} columns where the header has {len(header)}"), refuse)
                else:
                    yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{line}: not readable as CSV ({error})") from error


def _parquet(path: Path, _refuse: Refuse | None) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: truncated or not Parquet, after row {number} ({error})") from error


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
            {"role": role, "content": _text(cell(field), repr(columns.get(field, field)), where)}
            for role, field in (("user", "prompt"), ("assistant", "completion"))
        ]
    instruction = cell("system", required=False) or system
    if instruction and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(instruction, "'system'", where)})
    facts = {fact: row[column] for column, fact in FACTS.items() if row.get(column)}
    return Example(tuple(messages), where, facts)


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
