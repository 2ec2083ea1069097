"""The quality report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from coterie.data.report import Report
from coterie.files import write_atomic

NAMED = 100  # rows of a finding that the page shows
LABELS = 40  # labels that the page shows


def write_page(path: Path, reports: Sequence[tuple[str, Report]]) -> None:
    """Write `reports`, each under its title, to `path`. Raises StorageError."""
    loader = Environment(loader=PackageLoader("coterie.data"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made = datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC")
    parts = [_part(title, report) for title, report in reports]
    write_atomic(path, loader.get_template("quality.html").render(parts=parts, made=made, named=NAMED))


def _part(title: str, report: Report) -> dict[str, Any]:
    """What the template shows of one report; charts are bars with positions in percent."""
    labels = list((report.labels or {}).items())
    most = max((n for _, n in labels), default=1)
    return {
        "title": title, "r": report, "grave": sum(f.grave for f in report.findings),
        "bars": _histogram(report.lengths["histogram"]),
        "labels": [(name, n, 100 * n / most) for name, n in labels[:LABELS]], "more_labels": len(labels) - LABELS,
        "facts": [(name, list(counts.items())[:12]) for name, counts in
                  (("Languages", report.languages), ("Sources", report.sources), ("Licences", report.licences))],
    }  # fmt: skip


def _histogram(bins: list[list[int]]) -> list[dict[str, Any]]:
    """Bars of a histogram on a canvas of 600 by 120."""
    most = max((n for _, _, n in bins), default=1) or 1
    width = 600 / max(1, len(bins))
    return [
        {
            "x": round(i * width + 1, 1), "width": round(width - 2, 1), "from": a,
            "y": round(120 - 116 * n / most, 1), "height": round(116 * n / most, 1),
            "says": f"{a} to {b} tokens: {n} rows" if b > a else f"{a} tokens: {n} rows",
        }
        for i, (a, b, n) in enumerate(bins)
    ]  # fmt: skip
