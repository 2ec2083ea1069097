"""GSM8K (Cobbe et al. 2021): word problems of primary school, worked out in steps. Reads train.jsonl, test.jsonl.

The calculator marks (<<3*4=12>>) are taken out of what is learned: no calculator answers them here.
"""

from dataclasses import replace
from pathlib import Path

from coterie.data.read import Example, read
from coterie.evaluation.metrics import CALCULATOR
from coterie.evaluation.task import Splits, Task

COLUMNS = {"prompt": "question", "completion": "answer"}


def plain(example: Example) -> Example:
    answer = {"role": "assistant", "content": CALCULATOR.sub("", example.completion)}
    return replace(example, messages=(*example.messages[:-1], answer))


def splits(path: Path) -> Splits:
    train, test = ([plain(e) for e in read(path / f"{name}.jsonl", COLUMNS)] for name in ("train", "test"))
    return Splits(train, test)


TASK = Task(
    "gsm8k", "Word problems of primary school: the final number", splits,
    system="Solve the problem step by step. End with a line of #### and the number.",
    metric="numeric_match", max_tokens=256,
)  # fmt: skip
