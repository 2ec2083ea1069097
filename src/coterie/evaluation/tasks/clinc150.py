"""CLINC150 (Larson et al. 2019): 150 intents of an assistant's users, and out-of-scope as a class of its own, `oos`.

Reads data_full.json, or the folder it lies in.
"""

import json
from pathlib import Path

from coterie.data.read import Example
from coterie.errors import DataError
from coterie.evaluation.task import Splits, Task, row


def splits(path: Path) -> Splits:
    file = path / "data_full.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text())

        def part(*keys: str) -> list[Example]:
            return [row(text, label, f"{file}: {k} {i}") for k in keys for i, (text, label) in enumerate(raw[k])]

        return Splits(part("train", "oos_train"), part("test", "oos_test"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not CLINC150's data_full.json ({type(error).__name__}: {error})") from error


TASK = Task(
    "clinc150", "Intent of a request to an assistant, 150 classes and out of scope", splits,
    system="Classify the request. Answer with the name of its intent, or oos where none fits.",
    choices=True, max_tokens=24,
)  # fmt: skip
