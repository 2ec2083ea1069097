"""Experts that learned from a customer: rows of training data that name the customer in a column `customer`.

What an expert has learned cannot be taken out of its weights. So such experts are listed, and marked in
`.coterie/retrain.json` until their data no longer name the customer and the version that answers was made of those
data; the data are the business's own, and never changed by us: take the rows out, and `coterie fit` trains anew what
changed. The file holds customers by a keyed hash: it outlives them.
"""

import hashlib
import hmac
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from coterie.business import Business, fingerprint
from coterie.data.read import CUSTOMER, raw_rows
from coterie.errors import CoterieError
from coterie.files import write_atomic
from coterie.privacy.house import House
from coterie.privacy.rights import Room

FILE = "retrain.json"
SECRET = "coterie:trained"  # whose key hashes the customers' ids
Marks = dict[str, set[str]]  # by expert, the hashes of the customers it learned from


def room_of(business: Business, house: House) -> Room:
    """Exporting lists the rows by expert; erasing marks the experts."""
    return Room("experts", lambda c: learned_from(business, c), lambda c: _mark(business, house, c))


def learned_from(business: Business, customer: str) -> dict[str, list[str]]:
    """The rows (file:line) of each expert's training data that are of this customer. Raises DataError for a file that
    cannot be read: whom it names is not known."""
    found = {name: _rows(business, name, lambda c: c == customer) for name in business.config.experts}
    return {name: rows for name, rows in found.items() if rows}


def marked(business: Business, house: House) -> dict[str, list[str]]:
    """Experts to be trained anew, and the rows that must go first; none: only `coterie fit` is left to be run. Marks
    that are over leave the file."""
    file, hashed = business.folder / ".coterie" / FILE, _hashing(house)
    kept = _read(file, hashed)
    erased = set[str]().union(*kept.values())
    if not erased:
        return {}
    out, still = dict[str, list[str]](), Marks()
    for name in sorted(kept.keys() | business.config.experts):
        rows = _rows(business, name, lambda c: hashed(c) in erased)
        if rows or (name in kept and not _learned_anew(business, name)):
            out[name], still[name] = rows, kept.get(name, erased)
    if still != kept:
        _write(file, still)
    return out


def any_marked(business: Business) -> bool:
    """Whether an expert has ever been marked and may still be."""
    return (business.folder / ".coterie" / FILE).exists()


def _learned_anew(business: Business, name: str) -> bool:
    """Whether the version that answers was made of the data as they are; also where none answers."""
    try:
        if business.library.current(name) is None:
            return True
        return business.library.facts(name).fingerprint == fingerprint(business, name)
    except CoterieError:  # declared no more, or its data are not there: then it is what it was
        return False


def _mark(business: Business, house: House, customer: str) -> dict[str, list[str]]:
    found = learned_from(business, customer)
    if found:
        file, hashed = business.folder / ".coterie" / FILE, _hashing(house)
        kept = _read(file, hashed)
        _write(file, kept | {name: kept.get(name, set()) | {hashed(customer)} for name in found})
    return found


def _hashing(house: House) -> Callable[[str], str]:
    key = house.keys.secret(SECRET)
    return lambda customer: hmac.new(key, customer.encode(errors="replace"), hashlib.sha256).hexdigest()


def _read(file: Path, hashed: Callable[[str], str]) -> Marks:
    try:
        kept: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if isinstance(by_expert := kept.get("experts"), dict):
        return {name: set(customers) for name, customers in by_expert.items()}
    out = Marks()
    for customer, names in kept.items():  # as an older coterie wrote it: a customer's id, and the experts
        for name in names:
            out.setdefault(name, set()).add(hashed(customer))
    return out


def _write(file: Path, marks: Marks) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps({"experts": {name: sorted(marks[name]) for name in sorted(marks)}}, indent=1))


def _rows(business: Business, name: str, wanted: Callable[[str], bool]) -> list[str]:
    """Where an expert's training data have rows of a customer that is `wanted`."""
    spec = business.config.experts.get(name)
    files = business.files([*spec.train, *spec.preferences]) if spec else []
    return [business.place(where) for file in files for where, customer in _customers(file) if wanted(customer)]


def _customers(file: Path) -> Iterator[tuple[str, str]]:
    """Place and customer of each row that names one. What is no row, `fit` complains of."""
    if file.exists():
        for where, row in raw_rows(file, lambda _: None):
            if row.get(CUSTOMER) is not None:
                yield where, str(row[CUSTOMER])
