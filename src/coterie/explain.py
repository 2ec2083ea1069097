"""Why a question goes to whom, for people and programs: scores, thresholds, nearest training inputs, why not others."""

from dataclasses import asdict
from typing import Any

from coterie.business import Business
from coterie.choose import Choice
from coterie.data.read import read
from coterie.errors import CoterieError

SHOWN = 10  # experts, of those that scored


def explain(business: Business, choice: Choice) -> dict[str, Any]:
    """A choice as JSON, with the training inputs that were nearest, as far as they are still in the data."""
    scored = choice.decision.scored[:SHOWN]
    rows = _texts(business, {where for s in scored for where, _ in s.nearest})
    return {
        "experts": [{"name": name, "weight": share} for name, share in choice.decision.chosen],
        "forced": choice.forced,
        "scores": [
            {**asdict(s), "nearest": [{"where": w, "similarity": c, "text": rows.get(w)} for w, c in s.nearest]}
            for s in scored
        ],
        "why_not": choice.why_not(),
    }


def _texts(business: Business, wanted: set[str]) -> dict[str, str]:
    """The inputs at these places (file and row), as far as they are still in the data."""
    found: dict[str, str] = {}
    for spec in business.config.experts.values():
        columns: dict[str, str] = {field: column for field, column in spec.columns.items()}
        for file in business.files(spec.train):
            if not any(where.startswith(f"{business.place(str(file))}:") for where in wanted):
                continue
            try:
                for example in read(file, columns, spec.system):
                    where = business.place(example.where)
                    if where in wanted:
                        found[where] = example.question
            except CoterieError:  # the data has changed since: the rows read so far are shown
                continue
    return found
