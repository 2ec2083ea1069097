"""Write rows to a new data file: all of them or none, and never over a file that is there."""

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from coterie.data.read import Row
from coterie.errors import DataError, StorageError


def check_new(path: Path) -> None:
    """Refuse a name that cannot become a new data file. Raises DataError."""
    if path.suffix not in (".jsonl", ".csv"):
        raise DataError(f"{path}: a new file ends in .jsonl or .csv")
    if path.exists() or path.is_symlink():
        raise DataError(f"{path}: already there; name a new file")
    if not path.parent.is_dir():
        raise DataError(f"{path}: no such folder {path.parent}")


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Stream `rows` into the new file `path`; how many there were.

    The file appears when it is complete; where anything fails, nothing is left. Raises DataError, StorageError.
    """
    check_new(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8", newline="") as f:
            count = _csv(f, rows, path) if path.suffix == ".csv" else _jsonl(f, rows)
        check_new(path)  # it may have come up meanwhile
        os.replace(scratch, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        scratch.unlink(missing_ok=True)
    return count


def _jsonl(f: TextIO, rows: Iterable[Row]) -> int:
    count = 0
    for row in rows:
        f.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        count += 1
    return count


def _csv(f: TextIO, rows: Iterable[Row], path: Path) -> int:
    """The first row's columns are the header; lists and objects become JSON."""
    writer: csv.DictWriter[str] | None = None
    count = 0
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(f, list(row), lineterminator="\n")
            writer.writeheader()
        if set(row) != set(writer.fieldnames):
            raise DataError(f"{path}: the rows have different columns, which CSV cannot hold; name a .jsonl file")
        writer.writerow({k: json.dumps(v, ensure_ascii=False) if isinstance(v, dict | list) else v
                         for k, v in row.items()})  # fmt: skip
        count += 1
    return count
