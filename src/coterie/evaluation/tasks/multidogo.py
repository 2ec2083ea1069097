"""MultiDoGO (Peskov et al. 2019): the intent of a customer's turn in a dialogue with an agent, one domain.

Reads the folder of a domain (train.tsv, test.tsv). Turns with two intents are left out.
"""

import csv
from pathlib import Path

from coterie.data.read import Example
from coterie.errors import DataError
from coterie.evaluation.task import Splits, Task, row


def turns(file: Path) -> list[Example]:
    try:
        with file.open(newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [
            row(r["utterance"], r["intent"], f"{file}:{n}") for n, r in enumerate(rows, 2)
            if r["utterance"].strip() and "<div>" not in r["intent"] and r["intent"] != "intent"
        ]  # fmt: skip
    except (OSError, KeyError, AttributeError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: not a MultiDoGO file of turns ({type(error).__name__}: {error})") from error


def splits(path: Path) -> Splits:
    return Splits(turns(path / "train.tsv"), turns(path / "test.tsv"))


TASK = Task(
    "multidogo", "Intent of a customer's turn in a dialogue, one domain", splits,
    system="Classify the customer's turn. Answer with the name of its intent.", choices=True, max_tokens=16,
)  # fmt: skip
