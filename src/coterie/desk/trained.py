"""Experts that learned from a customer: rows of training data that name the customer in a column `customer`.

What an expert has learned cannot be taken out of its weights. So such experts are listed, and marked in
`.coterie/retrain.json` until their data no longer name the customer; the data are the business's own, and never changed
by us: take the rows out, and `coterie fit` trains anew what changed.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coterie.business import Business
from coterie.files import write_atomic
from coterie.privacy.rights import Room

COLUMN = "customer"
FILE = "retrain.json"


def room_of(business: Business) -> Room:
    """Exporting lists the rows by expert; erasing marks the experts."""
    return Room("experts", lambda c: learned_from(business, c), lambda c: _mark(business, c))


def learned_from(business: Business, customer: str) -> dict[str, list[str]]:
    """The rows (file:line) of each expert's training data that are of this customer."""
    out: dict[str, list[str]] = {}
    for name, spec in business.config.experts.items():
        rows = [f"{business.place(str(file))}:{line}" for file in business.files(spec.train)
                for line in _rows(file, customer)]  # fmt: skip
        if rows:
            out[name] = rows
    return out


def marked(business: Business) -> dict[str, list[str]]:
    """Experts to be trained anew, and the rows that must go first; those that are gone already count no more."""
    try:
        kept: dict[str, Any] = json.loads((business.folder / ".coterie" / FILE).read_text())
    except (OSError, ValueError):
        return {}
    out: dict[str, list[str]] = {}
    for customer in kept:
        for name, rows in learned_from(business, customer).items():
            out.setdefault(name, []).extend(rows)
    return out


def _mark(business: Business, customer: str) -> dict[str, list[str]]:
    found = learned_from(business, customer)
    if found:
        file = business.folder / ".coterie" / FILE
        try:
            kept = json.loads(file.read_text())
        except (OSError, ValueError):
            kept = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({**kept, customer: sorted(found)}, indent=1))
    return found


def _rows(file: Path, customer: str) -> Iterator[int]:
    """Line numbers, the first is 1. What is no row, `fit` complains of."""
    if not file.exists():
        return
    with file.open(encoding="utf-8", errors="replace", newline="") as opened:
        if file.suffix == ".csv":
            reader = csv.DictReader(opened)
            for row in reader:
                if row.get(COLUMN) == customer:
                    yield reader.line_num
        elif file.suffix == ".jsonl":
            for number, line in enumerate(opened, 1):
                if f'"{COLUMN}"' in line:
                    try:
                        row = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(row, dict) and row.get(COLUMN) == customer:
                        yield number
