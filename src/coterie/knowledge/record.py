"""What learning a source came to, kept beside its index: so a list of sources asks no source, and waits for none.

Notable: what went wrong is kept with who may know: an error names a file or a table, and that is shown to whoever may
read it. Where a source fails, what was known of it before is kept, and the failure stands beside it.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from coterie.errors import StorageError
from coterie.files import write_atomic
from coterie.knowledge.evidence import Reader

Wrong = tuple[str, Sequence[Collection[str]]]  # why, and sets of groups: who is told is in each of them


@dataclass(frozen=True)
class Record:
    """at: when it was last learned, "" for never. parts: of each file or table, when it was last taken over. columns:
    of each table. wrong: why, and the sets of groups that whoever is told is in."""

    at: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)
    wrong: list[tuple[str, list[list[str]]]] = field(default_factory=list)

    def told(self, reader: Reader) -> list[str]:
        """What went wrong, as far as it is this reader's to know."""
        return [why for why, asked in self.wrong if all(set(groups) & reader.may for groups in asked)]


def read_record(folder: Path) -> Record:
    """The record of the source whose index is in `folder`; an empty one where it was never learned."""
    try:
        return Record(**json.loads((folder / "learned.json").read_text()))
    except (OSError, ValueError, TypeError):
        return Record()


def write_record(
    folder: Path, changed: Collection[str], kept: Collection[str], wrong: Sequence[Wrong],
    columns: Mapping[str, Sequence[str]] | None = None,
) -> None:  # fmt: skip
    """A source has been learned: parts that were taken over now, and those that are as before. Raises StorageError."""
    now, before = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), read_record(folder).parts
    parts = {part: before[part] for part in kept if part in before} | dict.fromkeys(changed, now)
    _write(folder, Record(now, parts, {t: list(c) for t, c in (columns or {}).items()}, _plain(wrong)))


def write_failure(folder: Path, why: str, readers: Collection[str]) -> None:
    """A source could not be learned; what was known of it before stands. Raises StorageError."""
    before = read_record(folder)
    _write(folder, Record(before.at, before.parts, before.columns, _plain([(why, [readers])])))


def _plain(wrong: Sequence[Wrong]) -> list[tuple[str, list[list[str]]]]:
    return [(why, [sorted(groups) for groups in asked]) for why, asked in wrong]


def _write(folder: Path, record: Record) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from error
    write_atomic(folder / "learned.json", json.dumps(asdict(record)))
