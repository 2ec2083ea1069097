"""MultiDoGO (Peskov et al. 2019): the intent of a customer's turn in a dialogue with an agent, one domain.

Reads the folder of a domain (train.tsv, test.tsv). Turns with two intents, or with none, are left out.
"""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from coterie.data.read import Example
from coterie.errors import DataError
from coterie.evaluation.task import Splits, Task, row

FIELDS = 6  # conversationId, turnNumber, utteranceId, utterance, slot-labels, intent


def _whole_rows(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Rows with the number of their first line: a few utterances, in quotation marks, go on in the next line."""
    begun, number = "", 0
    for n, line in enumerate(lines, 1):
        number = number if begun else n
        begun += line.rstrip("\r\n")
        if begun.count("\t") >= FIELDS - 1 or n == 1 or not begun.strip():
            yield number, begun
            begun = ""
        else:
            begun += " "
    if begun:
        yield number, begun


def turns(file: Path) -> list[Example]:
    try:
        with file.open(newline="", encoding="utf-8") as f:
            numbered = list(_whole_rows(f))
        places = [n for n, _ in numbered]
        rows = csv.DictReader((text for _, text in numbered), delimiter="\t", quoting=csv.QUOTE_NONE)
        return [
            row(r["utterance"], r["intent"], f"{file}:{n}") for n, r in zip(places[1:], rows, strict=True)
            if r["utterance"].strip() and r["intent"].strip() not in ("", "intent") and "<div>" not in r["intent"]
        ]  # fmt: skip
    except (OSError, KeyError, AttributeError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: not a MultiDoGO file of turns ({type(error).__name__}: {error})") from error


def splits(path: Path) -> Splits:
    return Splits(turns(path / "train.tsv"), turns(path / "test.tsv"))


TASK = Task(
    "multidogo", "Intent of a customer's turn in a dialogue, one domain", splits,
    system="Classify the customer's turn. Answer with the name of its intent.", choices=True, max_tokens=16,
)  # fmt: skip
