"""Mend what a quality report found: write a new file, and leave the original as it is."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from coterie.data.private import Finder, mask
from coterie.data.read import Row, Source
from coterie.data.report import Report
from coterie.data.write import check_new, write_rows
from coterie.errors import CoterieError

FIXES = {
    "unusable": "leave out rows that cannot be read (every fix does)",
    "duplicates": "keep the first of exact duplicates",
    "near-duplicates": "keep the first of near-duplicates",
    "conflicts": "where a question has several labels, keep the rows of the commonest",
    "leaks": "leave out training rows that repeat test rows",
    "too-long": "leave out rows over the context length",
    "language": "leave out rows in another language",
    "private": "put [EMAIL], [CARD], [IBAN], [PHONE] in place of private data",
    "insults": "leave out rows with insults or threats",
    "mark-label-errors": 'add a column "suspect" that says which label a likely error reads like',
    "label-errors": "leave out likely label errors",
}


def fix(report: Report, source: Source, names: Sequence[str], out: Path, private: Finder) -> dict[str, int]:
    """Write the rows of `source`, mended by the fixes `names`, to the new file `out`: rows written, dropped, changed.

    Streams. Raises CoterieError for a fix there is not, and what `write_rows` raises.
    """
    check_fixes(names, out)
    found = {fix: f for f in report.findings for fix in f.fixes}
    dropped: set[int] = set()
    for name in names:
        if name in found and name not in ("private", "mark-label-errors"):
            f = found[name]
            dropped |= set((f.rows if f.drops is None else f.drops).tolist())
    marks = found["mark-label-errors"].notes if "mark-label-errors" in found else {}
    counts = {"written": 0, "dropped": len(dropped) + report.unusable, "changed": 0}

    def mended() -> Iterator[Row]:
        for n, (_, row) in enumerate(source.rows(lambda _: None)):
            if n in dropped:
                continue
            new = _mask(row, private) if "private" in names else row
            counts["changed"] += new != row
            yield {**new, "suspect": marks.get(n, "")} if "mark-label-errors" in names else new

    counts["written"] = write_rows(out, mended())
    return counts


def check_fixes(names: Sequence[str], out: Path) -> None:
    """Raises CoterieError for a fix there is not, and for a name that cannot become a new file."""
    for name in names:
        if name not in FIXES:
            raise CoterieError(f"--fix {name}: no such fix; there are {', '.join(FIXES)}")
    check_new(out)


def _mask(value: Any, find: Finder) -> Any:
    """Every text in a row, however deep."""
    if isinstance(value, str):
        return mask(value, find)
    if isinstance(value, dict):
        return {k: _mask(v, find) for k, v in value.items()}
    return [_mask(v, find) for v in value] if isinstance(value, list) else value
