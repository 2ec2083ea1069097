"""More rows from the rows there are: edits, carrier phrases, counterfactual swaps, and paraphrases by a model.

Every made row is marked (`synthetic`: method and the row it came from), and none repeats a test row, a training row
or another made row. The training rows and the test prompts are held in memory; made rows are streamed.

Methods: `edit` moves, drops or mistypes words (Wei & Zou 2019, EDA, without its synonyms); `carrier` puts another of
the data's own opening phrases ("can you tell me") before what is asked, where the data has seen the two together;
`swap` exchanges names and gendered words (counterfactual data augmentation, Lu et al. 2018); `model` asks a model for
paraphrases (self-instruct, Wang et al. 2022). What carriers and models make is kept only where it still says the same
as far as rules and a probe on the data can tell.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from coterie.data.features import TfIdf
from coterie.data.probe import Probe, fit
from coterie.data.read import Example, Row
from coterie.data.reword import Carriers, Swaps, edit
from coterie.data.split import leaks, normalise
from coterie.errors import CoterieError

METHODS = ("edit", "carrier", "swap", "model")
TRIES = 4  # attempts for each row wanted
AGREES = 0.5  # the row's label must be at least this likely to the probe, against the likeliest label
EVERYBODYS = 0.1  # share of the rows from which a word says nothing of what a row is about
CHUNK = 256  # made rows that are compared with the test set at once

# Given questions of one label (the one to say differently first), other wordings of the first.
Paraphrase = Callable[[Sequence[str], int], list[str]]


@dataclass
class Made:
    """How many rows were tried and why some were thrown away."""

    rows: int = 0
    repeats: int = 0  # of a training row or of another made row
    leaks: int = 0  # of a test row
    off_label: int = 0  # they no longer say the same: see Agreement
    methods: Counter[str] = field(default_factory=Counter)


def augment(
    rows: Sequence[tuple[Example, Row]], columns: Mapping[str, str], tests: Sequence[Example], methods: Sequence[str],
    per_row: int, made: Made, seed: int = 0, paraphrase: Paraphrase | None = None, only: Collection[int] | None = None,
) -> Iterator[Row]:  # fmt: skip
    """Up to `per_row` new rows by each method for each of `rows`; counts go to `made`. Raises CoterieError.

    A made row has the columns of the row it came from, so that it is read in the same way; made rows are not reworded
    again. `rows` and `columns` are those of a Source; `only`: the numbers of the rows to reword, where not all.
    """
    for method in methods:
        if method not in METHODS:
            raise CoterieError(f"--method {method}: no such method; there are {', '.join(METHODS)}")
    if "model" in methods and paraphrase is None:
        raise CoterieError("--method model needs a base model: name the folder of a business instead of a file")
    asked = [t.question for t in tests]
    taken = {normalise(e.question) for e, _ in rows}
    waiting: list[tuple[str, Row, str]] = []  # question, row, method

    def flush() -> Iterator[Row]:
        bad = set(leaks([text for text, _, _ in waiting], asked))
        for i, (_, row, method) in enumerate(waiting):
            if i in bad:
                made.leaks += 1
                continue
            made.rows += 1
            made.methods[method] += 1
            yield row
        waiting.clear()

    for method, i, text, answer in _candidates(
        [e for e, _ in rows], methods, per_row, seed, paraphrase, range(len(rows)) if only is None else only, made
    ):
        key = normalise(text)
        if key in taken or not key:
            made.repeats += 1
            continue
        taken.add(key)
        waiting.append((text, _row(rows[i], columns, text, answer, method), method))
        if len(waiting) >= CHUNK:
            yield from flush()
    yield from flush()


def _row(source: tuple[Example, Row], columns: Mapping[str, str], text: str, answer: str, method: str) -> Row:
    """The row with another question and answer in their columns, marked."""
    example, row = source
    new = {**row, "synthetic": {"method": method, "from": example.where}}
    talk = columns.get("messages", "messages")
    if "messages" in columns or (talk in row and "prompt" not in columns):
        *before, user, assistant = row[talk]
        return {**new, talk: [*before, {**user, "content": text}, {**assistant, "content": answer}]}
    return {**new, columns.get("prompt", "prompt"): text, columns.get("completion", "completion"): answer}


def _candidates(
    examples: Sequence[Example], methods: Sequence[str], per_row: int, seed: int,
    paraphrase: Paraphrase | None, only: Collection[int], made: Made,
) -> Iterator[tuple[str, int, str, str]]:  # fmt: skip
    """Method, number of the source row, question and answer of every row that keeps its label."""
    rng = np.random.default_rng(seed)
    texts, labels = [e.question for e in examples], [e.completion for e in examples]
    carriers, fellows, swaps = Carriers.learn(texts, labels), Fellows(examples), Swaps()
    agrees = Agreement(texts, labels) if {"carrier", "model"} & set(methods) else None
    for i, (example, text, answer) in enumerate(zip(examples, texts, labels, strict=True)):
        turns = [m["role"] for m in example.messages]
        if i not in only or example.facts.get("synthetic") or turns[-2:] != ["user", "assistant"]:
            continue
        if "edit" in methods:
            for new in _several(lambda t=text: edit(t, rng), per_row):  # type: ignore[misc]
                yield "edit", i, new, answer
        if "swap" in methods and turns.count("user") == 1 and (both := swaps.swap(text, answer)):
            yield "swap", i, *both
        reworded = [("carrier", n) for n in carriers.others(text, per_row, rng)] if "carrier" in methods else []
        if "model" in methods and paraphrase:
            said = paraphrase(fellows.of(text, answer, rng), per_row * 2)
            reworded += [("model", n) for n in said]
        counts: Counter[str] = Counter()
        for method, new in reworded:
            if counts[method] == per_row:
                continue
            if agrees and agrees(new, text, answer):
                counts[method] += 1
                yield method, i, new, answer
            else:
                made.off_label += 1


def _several(make: Callable[[], str], wanted: int) -> list[str]:
    out: dict[str, None] = {}
    for _ in range(wanted * TRIES):
        if len(out) == wanted:
            break
        out[make()] = None
    return list(out)


class Agreement:
    """Whether a new wording still says the same, as far as rules can tell.

    It is of like length, shares a word with its source that is not everybody's word, and a probe on the data gives it
    its row's label (where there are labels).
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        counts = Counter(word for text in texts for word in set(normalise(text).split()))
        self._everybodys = {w for w, n in counts.items() if n > max(1, EVERYBODYS * len(texts))}
        self._probe: Probe | None = None
        if 1 < len(set(labels)) <= len(labels) // 3:
            self._vectors = TfIdf.learn(texts)
            self._probe, _ = fit(self._vectors(texts), labels)

    def __call__(self, new: str, text: str, label: str) -> bool:
        shared = set(normalise(new).split()) & set(normalise(text).split()) - self._everybodys
        if not shared or not 0.4 < len(new) / len(text) < 2.5:
            return False
        if self._probe is None:
            return True
        p = self._probe.probabilities(self._vectors([new]))[0]
        return float(p[self._probe.classes.index(label)]) >= AGREES * float(p.max())


class Fellows:
    """Questions that have the same answer, to show a model what the data's own wordings look like."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._alike: defaultdict[str, list[str]] = defaultdict(list)
        for e in examples:
            self._alike[e.completion].append(e.question)

    def of(self, text: str, answer: str, rng: np.random.Generator) -> list[str]:
        """`text` and up to 4 others, by chance."""
        alike = [t for t in self._alike[answer] if t != text]
        return [text, *(alike[i] for i in rng.permutation(len(alike))[:4])]
