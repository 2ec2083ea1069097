"""A task: what a small file says of a data set, so that every model is asked and measured alike.

Built-in tasks are the modules of evaluation/tasks/, each with one TASK; a user's own is a .toml file:

    about = "Which team should read a mail"
    train = "train.csv"          # beside the path given on the command line
    test = "test.csv"
    columns = { prompt = "mail", completion = "team" }
    system = "Name the team."    # the instruction
    prompt = "Mail: {prompt}"    # how a row is put to the model
    choices = true               # answers are those seen in training
    metric = "exact_match"       # or token_f1, rouge_l, numeric_match
    max_tokens = 16
"""

import importlib
import pkgutil
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coterie.data.read import Example, Message, read
from coterie.data.split import leaks, normalise
from coterie.errors import CoterieError, DataError
from coterie.evaluation.metrics import exact_match, numeric_match, rouge_l, token_f1

METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match, "token_f1": token_f1, "rouge_l": rouge_l, "numeric_match": numeric_match,
}  # fmt: skip
Score = Callable[[str, Example], float]  # of an answer to a row, 0 to 1


class Splits(NamedTuple):
    """Rows to learn from and rows to measure on."""

    train: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Task:
    """`read` gives the splits of the data at a path as published; `scorer`, where set, the metric for that data."""

    name: str
    about: str
    read: Callable[[Path], Splits]
    system: str = ""
    metric: str = "exact_match"
    scorer: Callable[[Path], Score] | None = None
    choices: bool = False
    max_tokens: int = 32
    perplexity: bool = False  # also of the wanted answers
    train_most: int = 20_000
    test_most: int = 1_000

    def score(self, path: Path) -> Score:
        """How an answer is scored."""
        if self.scorer:
            return self.scorer(path)
        metric = METRICS[self.metric]
        return lambda answer, example: metric(answer, example.completion)

    def splits(self, path: Path, seed: int = 0) -> Splits:
        """Disjoint rows: a fixed draw of at most `test_most` to measure on, in an order in which the first few are a
        fair sample too, and training rows that do not (nearly) repeat any of them. Rows to measure on that repeat one
        another count once. Raises DataError."""
        if not path.exists():
            raise DataError(f"{path}: no such file or folder (data of the task {self.name})")
        train, test = self.read(path)
        once = list({(normalise(e.question), e.completion): e for e in test}.values())
        if not train or not once:
            raise DataError(
                f"{path}: no rows to {'learn from' if not train else 'measure on'} for the task {self.name}"
            )
        test, train = _draw(once, self.test_most, seed), _draw(train, self.train_most, seed)
        repeated = set(leaks([e.question for e in train], [e.question for e in test]))
        return Splits([e for i, e in enumerate(train) if i not in repeated], test)

    def options(self, splits: Splits) -> tuple[str, ...]:
        """The answers of a task of choices, as training shows them; empty for free text."""
        return tuple(sorted({e.completion for e in splits.train})) if self.choices else ()


def row(question: str, answer: str, where: str, system: str = "") -> Example:
    """A row of one question and one answer, with an instruction of its own or none. Raises DataError where empty."""
    if not question.strip() or not answer.strip():
        raise DataError(f"{where}: question and answer must be text that is not empty")
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    said = ({"role": "user", "content": question.strip()}, {"role": "assistant", "content": answer.strip()})
    return Example((*first, *said), where)


def names() -> list[str]:
    """The built-in tasks."""
    from coterie.evaluation import tasks

    return sorted(m.name for m in pkgutil.iter_modules(tasks.__path__))


def find(name: str) -> Task:
    """A built-in task by name, or a user's own by the path of its .toml. Raises CoterieError."""
    if name.endswith(".toml"):
        return _from_toml(Path(name))
    if name not in names():
        raise CoterieError(f"unknown task {name!r}; known: {', '.join(names())}, or the path of a .toml file")
    task: Task = importlib.import_module(f"coterie.evaluation.tasks.{name}").TASK
    return task


def _draw(rows: list[Example], most: int, seed: int) -> list[Example]:
    """At most `most` rows, shuffled: published files are often sorted by class."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:most]]


def _from_toml(file: Path) -> Task:
    try:
        facts: dict[str, Any] = tomllib.loads(file.read_text())
    except OSError as error:
        raise CoterieError(f"{file}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CoterieError(f"{file}: not valid TOML: {error}") from error
    train, test = facts.pop("train", None), facts.pop("test", None)
    columns, template = facts.pop("columns", {}), facts.pop("prompt", "{prompt}")
    settable = {f.name: type(f.default) for f in fields(Task) if f.default is not MISSING} | {"about": str}
    del settable["scorer"]
    for field, value in (("train", train), ("test", test), ("prompt", template)):
        if not isinstance(value, str):
            raise CoterieError(f"{file}: {field}: must be a text, not {value!r}")
    if "{prompt}" not in template:
        raise CoterieError(f"{file}: prompt: must contain {{prompt}}, where the row's question goes")
    for field, value in facts.items():
        if field not in settable:
            raise CoterieError(f"{file}: unknown field {field!r}; known: train, test, columns, prompt, "
                               f"{', '.join(sorted(settable))}")  # fmt: skip
        if type(value) is not settable[field]:
            raise CoterieError(f"{file}: {field}: must be of type {settable[field].__name__}, not {value!r}")
    if facts.get("metric", "exact_match") not in METRICS:
        raise CoterieError(f"{file}: metric: unknown {facts['metric']!r}; known: {', '.join(METRICS)}")

    def put(example: Example) -> Example:
        *before, last, answer = example.messages
        question: Message = {"role": "user", "content": template.replace("{prompt}", last["content"])}
        return replace(example, messages=(*before, question, answer))

    def read_files(path: Path) -> Splits:
        beside = path if path.is_dir() else path.parent
        return Splits(*([put(e) for e in read(beside / name, columns)] for name in (train, test)))

    return Task(name=file.stem, read=read_files, **({"about": ""} | facts))
