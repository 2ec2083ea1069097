"""The quality report: what is wrong with a data set, which rows, and what mends it.

Notable: a file is streamed, never held. For each row about 200 bytes of hashes and numbers stay in memory; texts are
looked up in a second pass, and only those that a finding names. Three parts are not streamed: the test set is held
whole, the classifier behind "label errors" sees a random sample of SAMPLE rows, and near-duplicates hold the texts
that share a hash with another (see neighbours.py).
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import process
from rapidfuzz.distance import Indel

from coterie.data import neighbours
from coterie.data.features import TfIdf
from coterie.data.insults import Insults
from coterie.data.language import is_foreign, language
from coterie.data.private import Finder, finder
from coterie.data.probe import confident_errors, fit
from coterie.data.read import Example, Source
from coterie.data.report import SHOWN, Finding, Report, Rows
from coterie.data.split import leaks, normalise
from coterie.errors import DataError

SAMPLE = 20_000  # rows that the classifier sees
LABELS_MOST = 1000  # more different completions are free text
SMALL = 10  # rows below which a class can hardly be learned
PEEK = 500  # rows that tell the language of the file
EXCERPT = 200  # characters


@dataclass(frozen=True)
class Checks:
    """What to check with, where the defaults do not fit."""

    count: Callable[[Example], int] | None = None  # tokens of an example, as the base model counts them
    context: int = 1024  # tokens that a row may have
    labels: bool | None = None  # whether completions are labels; None: see from the data
    language: str = ""  # expected language; empty: that of most rows
    private: Finder = field(default_factory=finder)
    insults: Insults = field(default_factory=Insults)


@dataclass
class _Seen:
    """What the first pass keeps: arrays with one entry for each row, and rows by fault."""

    prompts: "array[int]" = field(default_factory=lambda: array("Q"))
    labels: "array[int]" = field(default_factory=lambda: array("Q"))
    tokens: "array[int]" = field(default_factory=lambda: array("l"))
    bands: bytearray = field(default_factory=bytearray)
    label_rows: Counter[int] = field(default_factory=Counter)
    label_names: dict[int, str] = field(default_factory=dict)
    languages: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    synthetic: int = 0
    unusable: list[str] = field(default_factory=list)
    unusable_count: int = 0
    found: defaultdict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    sample: list[tuple[int, str, str]] = field(default_factory=list)  # row, question, label

    def refuse(self, error: DataError) -> None:
        self.unusable_count += 1
        if len(self.unusable) < SHOWN:
            self.unusable.append(str(error))


def check(source: Source, test: Source | None = None, how: Checks | None = None) -> Report:
    """Examine the training data `source`, against `test` where there is one. Raises DataError."""
    how = how or Checks()
    tests = list(test.examples()) if test else []
    seen = _first_pass(source, tests, how)
    if not seen.prompts:
        first = f"; the first: {seen.unusable[0]}" if seen.unusable else ""
        mend = "; name the columns with --prompt and --completion" if "no column" in first else ""
        raise DataError(f"{', '.join(map(str, source.paths))}: no usable rows{first}{mend}")
    prompts, labels = np.array(seen.prompts, np.uint64), np.array(seen.labels, np.uint64)
    classify = how.labels if how.labels is not None else _are_labels(seen)
    findings = [
        Finding("unusable", "Rows that cannot be used", True, "Mend these rows, or leave them out.", ("unusable",),
                places=[{"place": "", "text": m, "note": ""} for m in seen.unusable], count=seen.unusable_count),
        *_repeated(prompts, labels, classify),
        _near(source, prompts, labels, np.frombuffer(seen.bands, np.uint64).reshape(-1, neighbours.BANDS)),
        *_of_rows(seen, how, _common(seen.languages)),
        *(_of_labels(seen) if classify else []),
    ]  # fmt: skip
    findings = [f for f in findings if f.count or len(f.rows)]
    _name_rows(source, findings)
    names = {n: seen.label_rows[h] for h, n in seen.label_names.items()}
    return Report(
        [str(p) for p in source.paths], len(prompts), seen.unusable_count, _lengths(seen, how),
        dict(sorted(names.items(), key=lambda kv: -kv[1])) if classify else None, dict(seen.languages.most_common()),
        dict(seen.sources.most_common(50)), dict(seen.licences.most_common(50)), seen.synthetic, len(tests),
        sorted(findings, key=lambda f: not f.grave),
    )  # fmt: skip


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _first_pass(source: Source, tests: Sequence[Example], how: Checks) -> _Seen:
    seen = _Seen()
    rng = np.random.default_rng(0)
    expected = how.language or _expected(source, seen)
    asked = [t.question for t in tests]
    waiting: list[str] = []  # questions not yet compared with the test set

    def compare() -> None:
        start = len(seen.prompts) - len(waiting)
        for i in leaks(waiting, asked):
            best = process.extractOne(normalise(waiting[i]), plain, scorer=Indel.normalized_similarity)
            seen.found["leaks"][start + i] = f"repeats {tests[best[2]].where}" if best else ""
        waiting.clear()

    plain = [normalise(a) for a in asked]
    for n, (example, _) in enumerate(source.rows(seen.refuse)):
        asks, answer = example.question, example.completion
        whole = "\n".join(m["content"] for m in example.messages)
        key, label = normalise("\n".join(m["content"] for m in example.prompt)), _hash(answer)
        seen.prompts.append(_hash(key))
        seen.labels.append(label)
        seen.label_rows[label] += 1
        if len(seen.label_names) <= LABELS_MOST:
            seen.label_names.setdefault(label, answer)
        seen.bands += neighbours.bands(normalise(asks))
        seen.tokens.append(how.count(example) if how.count else -(-len(whole) // 4))
        if seen.tokens[-1] > how.context:
            seen.found["too-long"][n] = f"{seen.tokens[-1]} tokens"
        spoken = language(asks)
        seen.languages[spoken or "too short to say"] += 1
        if foreign := is_foreign(asks, expected, spoken):
            seen.found["language"][n] = foreign
        if kinds := sorted({s.kind for m in example.messages for s in how.private(m["content"])}):
            seen.found["private"][n] = ", ".join(kinds)
        if terms := how.insults.find(whole):
            seen.found["insults"][n] = ", ".join(terms[:3])
        _count_facts(example, seen)
        place = n if n < SAMPLE else int(rng.integers(0, n + 1))  # reservoir sampling (Vitter 1985)
        if n < SAMPLE:
            seen.sample.append((n, asks, answer))
        elif place < SAMPLE:
            seen.sample[place] = (n, asks, answer)
        waiting.append(asks)
        if len(waiting) >= 2000:
            compare()
    compare()
    return seen


def _count_facts(example: Example, seen: _Seen) -> None:
    for name, into in (("source", seen.sources), ("licence", seen.licences)):
        value = str(example.facts.get(name) or "")
        if value and (value in into or len(into) < LABELS_MOST):
            into[value] += 1
        elif not value:
            into["(not given)"] += 1
    seen.synthetic += bool(example.facts.get("synthetic"))


def _expected(source: Source, seen: _Seen) -> str:
    """The language of most of the first rows."""
    first: Counter[str] = Counter()
    for n, (example, _) in enumerate(source.rows(lambda _: None)):
        first[language(example.question)] += 1
        if n >= PEEK:
            break
    return _common(first)


def _common(languages: Counter[str]) -> str:
    return next((name for name, _ in languages.most_common() if len(name) in (2, 3)), "")


def _are_labels(seen: _Seen) -> bool:
    """Completions are labels where few of them come back often, and are short."""
    kinds, rows = len(seen.label_rows), len(seen.prompts)
    short = all(len(name) <= 80 for name in seen.label_names.values())
    return 1 < kinds <= min(LABELS_MOST, max(2, rows // 3)) and short


def _repeated(prompts: NDArray[np.uint64], labels: NDArray[np.uint64], classify: bool) -> list[Finding]:
    """Exact duplicates, and prompts that have several answers."""
    order = np.lexsort((np.arange(len(prompts)), prompts))
    starts = np.flatnonzero(np.r_[True, prompts[order][1:] != prompts[order][:-1], True])
    duplicates: dict[int, int] = {}
    conflicts: dict[int, int] = {}
    lost: list[int] = []  # rows in conflict whose answer is not the commonest
    for a, b in pairwise(starts):
        if b - a < 2:
            continue
        rows = order[a:b].tolist()
        first: dict[int, int] = {}
        for row in rows:
            label = int(labels[row])
            if label in first:
                duplicates[row] = first[label]
            first.setdefault(label, row)
        if len(first) > 1:
            conflicts |= {row: next(o for k, o in first.items() if k != int(labels[row])) for row in rows}
            (most, n), (_, second) = Counter(int(labels[r]) for r in rows).most_common(2)
            lost += [r for r in rows if n == second or int(labels[r]) != most]
    what = "labels" if classify else "answers"
    return [
        Finding("duplicates", "Exact duplicates", False, "They count more than once; the fix keeps the first of each.",
                ("duplicates",), _numbers(duplicates), dict.fromkeys(duplicates, "repeats"), duplicates),
        Finding("conflicts", f"The same question with different {what}", classify,
                "Decide which is right; the fix keeps what most rows say, and drops all where no answer has most.",
                ("conflicts",), _numbers(conflicts), dict.fromkeys(conflicts, "answered otherwise in"), conflicts,
                np.array(sorted(lost), np.int64)),
    ]  # fmt: skip


def _near(
    source: Source, prompts: NDArray[np.uint64], labels: NDArray[np.uint64], bands: NDArray[np.uint64]
) -> Finding:
    """Rows whose question nearly repeats an earlier one; exact repeats are counted elsewhere."""
    _, first = np.unique(prompts, return_index=True)
    first = np.sort(first)
    wanted = first[neighbours.candidates(bands[first])]
    texts = _lookup(source, wanted)
    found = neighbours.repeats((int(n), normalise(texts[int(n)].question), bands[int(n)].tobytes()) for n in wanted)
    notes = {n: "nearly repeats" if labels[n] == labels[o] else "with another answer, nearly repeats"
             for n, o in found.items()}  # fmt: skip
    return Finding("near-duplicates", "Near-duplicates", False,
                   "Nearly the same again teaches little; the fix keeps the first of each.",
                   ("near-duplicates",), _numbers(found), notes, found)  # fmt: skip


def _of_rows(seen: _Seen, how: Checks, main: str) -> list[Finding]:
    """Faults that the first pass saw in single rows."""
    about = {
        "leaks": ("Training rows that repeat test rows", True,
                  "The test would measure memory, not skill; `coterie fit` leaves them out by itself.", "leaks"),
        "too-long": (f"Longer than {how.context} tokens", True,
                     "`coterie fit` leaves them out; shorten them, or raise training.max_tokens.", "too-long"),
        "language": (f"In another language than most rows ({how.language or main})", False,
                     "Look at them: names and jargon mislead; drop them where they are not wanted.", "language"),
        "private": ("Private data", True,
                    "An expert can repeat what it was trained on; the fix puts [EMAIL], [CARD], ... in its place.",
                    "private"),
        "insults": ("Insults and threats", True,
                    "Read them: quotations and complaints are found too; drop what must not be learned.", "insults"),
    }  # fmt: skip
    return [
        Finding(name, title, grave, advice, (fix,), _numbers(seen.found[name]), seen.found[name])
        for name, (title, grave, advice, fix) in about.items()
    ]


def _of_labels(seen: _Seen) -> list[Finding]:
    """Small classes, imbalance and likely label errors."""
    rows = np.array(seen.labels, np.uint64)
    counts = {seen.label_names[h]: c for h, c in seen.label_rows.items() if h in seen.label_names}
    small = {h: c for h, c in seen.label_rows.items() if c < SMALL}
    of_small = {int(r): f"{small[int(rows[r])]} rows" for r in np.flatnonzero(np.isin(rows, list(small)))}
    title = f"Labels with fewer than {SMALL} rows ({len(small)} of {len(counts)})"
    advice = "Write more rows for them, or make some: coterie data augment."
    out = [Finding("small-classes", title, False, advice, (), _numbers(of_small), of_small)]
    most, least = max(counts.values()), min(counts.values())
    if most >= 20 * least:
        name = min(counts, key=lambda k: counts[k])
        out.append(Finding("imbalance", f"The largest label has {most // least} times the rows of the smallest", False,
                           f"{name!r} has {least} rows; look at macro-F1 beside accuracy, and add rows to the small.",
                           count=len(counts)))  # fmt: skip
    errors = label_errors([s[1] for s in seen.sample], [s[2] for s in seen.sample])
    likely = {seen.sample[i][0]: f"labelled {seen.sample[i][2]!r}; reads like {name!r}" for i, name in errors}
    scope = "" if len(rows) <= SAMPLE else f", in a sample of {SAMPLE} rows"
    out.append(Finding("label-errors", f"Likely label errors{scope}", True,
                       "Read them, the surest first: many are right as they are, so mark before you drop.",
                       ("mark-label-errors", "label-errors"), np.array(list(likely), np.int64), likely))  # fmt: skip
    return out


def label_errors(texts: Sequence[str], labels: Sequence[str]) -> list[tuple[int, str]]:
    """Likely wrong labels by confident learning over leave-one-out probabilities, the surest first: row, better label.

    Classes of one row cannot be judged and are left out.
    """
    counts = Counter(labels)
    rows = [i for i, label in enumerate(labels) if counts[label] > 1]
    if len({labels[i] for i in rows}) < 2:
        return []
    kept = [texts[i] for i in rows]
    probe, alone = fit(TfIdf.learn(kept)(kept), [labels[i] for i in rows])
    place = {c: j for j, c in enumerate(probe.classes)}
    found, likely = confident_errors(alone, np.array([place[labels[i]] for i in rows], np.int64))
    return [(rows[i], probe.classes[j]) for i, j in zip(found.tolist(), likely.tolist(), strict=True)]


def _numbers(found: Iterable[int]) -> Rows:
    return np.array(sorted(found), np.int64)


def _lengths(seen: _Seen, how: Checks) -> dict[str, Any]:
    tokens = np.array(seen.tokens, np.int64)
    edges = np.unique(np.geomspace(max(1, tokens.min()), tokens.max() + 1, 25).round().astype(int))
    counts, edges = np.histogram(tokens, edges if len(edges) > 1 else np.array([edges[0], edges[0] + 1]))
    middle, p95, p99 = (int(v) for v in np.quantile(tokens, [0.5, 0.95, 0.99]))
    return {
        "counted_by": "base model" if how.count else "estimate (4 characters a token)", "total": int(tokens.sum()),
        "mean": round(float(tokens.mean()), 1), "p50": middle, "p95": p95, "p99": p99, "longest": int(tokens.max()),
        "histogram": [[int(a), int(b) - 1, int(c)] for a, b, c in zip(edges[:-1], edges[1:], counts, strict=True)],
    }  # fmt: skip


def _lookup(source: Source, wanted: Iterable[int]) -> dict[int, Example]:
    """Examples by their number, read again from the files."""
    left = set(map(int, wanted))
    out: dict[int, Example] = {}
    if left:
        for n, (example, _) in enumerate(source.rows(lambda _: None)):
            if n in left:
                out[n] = example
                if len(out) == len(left):
                    break
    return out


def _name_rows(source: Source, findings: list[Finding]) -> None:
    """Give each finding the places and texts of its first rows, and its notes places for numbers."""
    wanted = {int(n) for f in findings for n in f.rows[:SHOWN]}
    texts = _lookup(source, wanted | {f.like[n] for f in findings for n in f.rows[:SHOWN].tolist() if n in f.like})
    for f in findings:
        f.count = f.count or len(f.rows)
        for n in f.rows[:SHOWN].tolist():
            text = texts[n].question
            text = text if len(text) <= EXCERPT else text[:EXCERPT] + "…"
            note = f"{f.notes.get(n, '')} {texts[f.like[n]].where if n in f.like else ''}".strip()
            f.places.append({"place": texts[n].where, "text": text, "note": note})
