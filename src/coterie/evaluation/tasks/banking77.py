"""BANKING77 (Casanueva et al. 2020): the intent of a bank customer's message, 77 classes. Reads train.csv, test.csv."""

from pathlib import Path

from coterie.data.read import read
from coterie.evaluation.task import Splits, Task

COLUMNS = {"prompt": "text", "completion": "category"}


def splits(path: Path) -> Splits:
    return Splits(list(read(path / "train.csv", COLUMNS)), list(read(path / "test.csv", COLUMNS)))


TASK = Task(
    "banking77", "Intent of a bank customer's message, 77 classes", splits,
    system="Classify the customer's message. Answer with the name of its intent.", choices=True, max_tokens=24,
)  # fmt: skip
