"""The Nottingham collection of British folk tunes in ABC: go on with a tune. Reads the folder of .abc files.

A model sees the header and the first half of the lines and writes the rest. Scored: is the whole tune valid ABC
(evaluation/tunes.py), and the perplexity of the true rest. Split by tune, at random with a fixed seed.
"""

import re
from pathlib import Path

from coterie.data.read import Example
from coterie.data.split import hold_out
from coterie.errors import DataError
from coterie.evaluation.task import Score, Splits, Task, row
from coterie.evaluation.tunes import parse

FEWEST_NOTES = 4  # that an answer adds: an empty one would leave a valid tune
LEADS = "Continue this tune in ABC notation.\n"


def tunes(file: Path) -> list[Example]:
    out = []
    for n, text in enumerate(re.split(r"(?m)^(?=X:)", file.read_text(encoding="latin-1"))[1:], 1):
        lines = [line.rstrip() for line in text.strip().splitlines() if line.strip() and not line.startswith("%")]
        body = next((i + 1 for i, line in enumerate(lines) if line.startswith("K:")), len(lines))
        half = body + (len(lines) - body) // 2
        if body < half < len(lines):
            out.append(row(LEADS + "\n".join(lines[:half]), "\n".join(lines[half:]), f"{file}: tune {n}"))
    return out


def splits(path: Path) -> Splits:
    files = sorted(path.glob("*.abc"))
    if not files:
        raise DataError(f"{path}: no .abc files here")
    rows = [tune for file in files for tune in tunes(file)]
    # A tune and its variants begin alike: split on the notes, without title and number.
    notes = [re.sub(r"(?m)^[A-Z]:.*$", "", e.question) for e in rows]
    train, test = hold_out(notes, 0.2, 200, seed=0)
    return Splits([rows[i] for i in train], [rows[i] for i in test])


def scorer(_path: Path) -> Score:
    def score(answer: str, example: Example) -> float:
        begun = example.question.removeprefix(LEADS)
        whole = parse(f"{begun}\n{answer}")
        return float(whole.valid and whole.notes >= parse(begun).notes + FEWEST_NOTES)

    return score


TASK = Task(
    "nottingham", "Continue a folk tune in ABC: valid tunes, perplexity", splits,
    metric="valid_tune", scorer=scorer, max_tokens=300, perplexity=True,
)  # fmt: skip
