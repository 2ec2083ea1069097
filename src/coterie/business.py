"""A business: a folder with a coterie.toml, its data, and the expert library that `fit` fills.

This is the first flow of the house on one page: data -> split -> encode -> tune -> evaluate -> publish.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from coterie.config import Config, ExpertSpec, read_config
from coterie.data.prepare import prepare
from coterie.data.read import CUSTOMER, Example, check_file, names_customers, read
from coterie.data.split import hold_out, mark_leaks
from coterie.engine.engine import Engine
from coterie.errors import CoterieError, DataError, ModelError, TrainingError
from coterie.evaluation.run import evaluate
from coterie.experts import classifier, kinds
from coterie.experts.expert import CONFIG
from coterie.experts.instruction import posed
from coterie.experts.library import ExpertFacts, Library
from coterie.files import alone
from coterie.learn import HELD_OUT_MOST, classify, learning_rate, new_expert, prefer, save_expert, tune
from coterie.model.load import BaseModel, load
from coterie.model.pull import pull
from coterie.privacy.deidentify import Detector
from coterie.privacy.once import detector_of, mask_once
from coterie.routing.statistics import MOST, Statistics, learn, up_to_date
from coterie.tuning.loop import Progress

ANSWERED_MOST = 100  # of them, rows that base and expert answer before publishing
Tell = Callable[[str], None]
Count = Callable[[str, int, int], None]  # what, done, of how many


@dataclass
class Business:
    """A folder, what it declares, and its library. The base model is loaded when first asked for."""

    folder: Path
    config: Config
    _base: BaseModel | None = None
    _detector: Detector | None = None

    @classmethod
    def open(cls, folder: Path) -> "Business":
        """Read the declaration in `folder`. Raises CoterieError."""
        return cls(folder, read_config(folder))

    @property
    def library(self) -> Library:
        return Library(self.folder / "experts")

    def base_path(self, tell: Tell = lambda _: None) -> Path:
        """Where the base model lies, pulled where it is absent. Raises ModelError."""
        local = self.folder / self.config.business.base
        return local if local.exists() else pull(self.config.business.base, tell)

    def base(self, tell: Tell = lambda _: None) -> BaseModel:
        """The base model, loaded when it is first asked for. Raises ModelError."""
        if self._base is None:
            self._base = load(self.base_path(tell), packed=True)
        return self._base

    def detector(self, tell: Tell = lambda _: None) -> Detector:
        """What finds private data in texts, by the base model's tagging expert. Raises ModelError."""
        if self._detector is None:
            self._detector = detector_of(self.base(tell), tell)
        return self._detector

    def engine(self, tell: Tell = lambda _: None, library: Library | None = None, **options: int) -> Engine:
        """An engine over base and library, as the declaration sizes it."""
        b = self.config.business
        sizes: dict[str, Any] = {
            "slots": b.slots, "context": b.context, "queue": b.queue, "expert_memory": b.expert_memory << 20,
            "pinned": frozenset(b.pinned), "cache_memory": b.cache_memory << 20, "weights": b.weights, **options,
        }  # fmt: skip
        return Engine(self.base(tell), library or self.library, **sizes)

    def own_engine(self, facts: ExpertFacts, library: Library | None = None, **options: int) -> Engine | None:
        """The engine of an expert that is a model of its own (`full`); None for all others."""
        if facts.kind != "full":
            return None
        b, folder = self.config.business, (library or self.library).folder(facts.name, facts.version)
        sizes: dict[str, Any] = {
            "slots": b.slots, "context": b.context, "queue": b.queue, "weights": b.weights, **options
        }  # fmt: skip
        return Engine(load(folder / "model", packed=True), None, **sizes)

    def spec(self, name: str) -> ExpertSpec:
        """The declaration of one expert. Raises CoterieError."""
        if name not in self.config.experts:
            known = ", ".join(self.config.experts) or "none"
            raise CoterieError(f"{self.folder}/coterie.toml declares no expert {name!r}; declared: {known}")
        return self.config.experts[name]

    def files(self, listed: list[str]) -> list[Path]:
        """Data files named in the declaration, relative to the folder."""
        return [self.folder / f for f in listed]

    def place(self, where: str) -> str:
        """File and row of an example, with the file relative to the folder where it lies in it."""
        return where.removeprefix(f"{self.folder}/")

    def examples(self, name: str, listed: list[str]) -> Iterator[Example]:
        """The examples of an expert's data files, with its instruction; customers' rows are masked."""
        spec = self.config.experts.get(name)
        columns: dict[str, str] = {field: column for field, column in spec.columns.items()} if spec else {}
        system = spec.system if spec else self.library.facts(name).system
        for file in self.files(listed):
            for example in read(file, columns, system):
                yield self.masked(example, bool(spec and spec.choices))

    def masked(self, example: Example, labelled: bool = False) -> Example:
        """A row that names its customer, as the desk's models see what customers write: with pseudonyms. Any other row,
        and the answer where it is a label (`labelled`), as it is. Raises MaskingFailed."""
        if not example.facts.get(CUSTOMER):
            return example
        hidden = mask_once(self.detector(), [m["content"] for m in example.messages]).texts
        messages = [{**m, "content": text} for m, text in zip(example.messages, hidden, strict=True)]
        return replace(example, messages=(*messages[:-1], example.messages[-1] if labelled else messages[-1]))

    def alone(self) -> AbstractContextManager[None]:
        """Nobody else trains in this folder meanwhile."""
        busy = f"{self.folder}: another `coterie fit` is at work here; let it end or stop it"
        return alone(self.folder / ".coterie" / "lock", busy)


@dataclass(frozen=True)
class Fitted:
    """What `fit` did about one expert."""

    facts: ExpertFacts
    trained: bool
    evaluation: dict[str, Any]


def fingerprint(business: Business, name: str) -> str:
    """Of everything that decides what training gives: base, data, settings. Reads the data files once."""
    spec = business.spec(name)
    settings = spec.model_dump(exclude={"description"} if spec.kind == classifier.KIND else {"description", "error"})
    digest = hashlib.sha256(json.dumps([business.config.business.base, settings], sort_keys=True).encode())
    for file in business.files([*spec.train, *spec.test, *spec.preferences]):
        check_file(file)
        with file.open("rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
        if names_customers(file):  # trained before such rows were masked, an expert is trained anew
            digest.update(b"masked")
    return digest.hexdigest()[:16]


def fit(
    business: Business, names: list[str] | None = None, tell: Tell = lambda _: None,
    progress: Callable[[str, Progress], None] = lambda _n, _p: None, count: Count = lambda _w, _d, _t: None,
) -> Iterator[Fitted]:  # fmt: skip
    """Train and publish the declared experts (or those of `names`) whose base, data or settings changed."""
    if not business.config.experts:
        raise CoterieError(f"{business.folder}/coterie.toml declares no experts; see docs/coterie-toml.md")
    wanted = list(dict.fromkeys(names or business.config.experts))
    with business.alone():
        for name, mark in [(name, fingerprint(business, name)) for name in wanted]:
            runs = business.folder / ".coterie" / "runs" / name
            facts = _published(business, name, mark, runs / mark)
            if facts:
                tell(f"{name}: version {facts.version} is up to date")
                _renew_route(business, facts, tell)
                fitted = Fitted(facts, False, business.library.evaluation(name, facts.version))
            else:
                fitted = (
                    _fit_classifier(business, name, mark, tell, count) if business.spec(name).kind == classifier.KIND
                    else _fit_one(business, name, mark, runs / mark, tell, progress, count)
                )  # fmt: skip
            shutil.rmtree(runs, ignore_errors=True)
            yield fitted


def _published(business: Business, name: str, mark: str, work: Path) -> ExpertFacts | None:
    """The version made of the same base, data and settings, if there is one that can be read."""
    library, versions = business.library, business.library.versions(name)
    for version in reversed(versions):
        try:
            facts = library.facts(name, version)
        except ModelError:
            continue
        if facts.fingerprint != mark:
            continue
        # The newest may have been rolled back on purpose, unless a run was killed just before it let it answer.
        if version != library.current(name) and (version != versions[-1] or work.exists()):
            library.promote(name, version)
        if facts.description != business.spec(name).description:
            facts = library.describe(name, version, business.spec(name).description)
        return facts
    return None


def _fit_one(
    business: Business, name: str, mark: str, work: Path, tell: Tell, progress: Callable[[str, Progress], None],
    count: Count,
) -> Fitted:  # fmt: skip
    spec, how, base = business.spec(name), business.spec(name).training, business.base(tell)
    files = ", ".join(map(str, business.files(spec.train)))
    longest = min(how.max_tokens, base.decoder.config.context)
    expert, trunks = new_expert(spec, base), business.folder / ".coterie" / "trunk"
    tests = [e.asked for e in business.examples(name, spec.test)]
    data = prepare(business.examples(name, spec.train), tests, base, work, longest, spec.choices)
    if data.leaked:
        tell(f"{name}: {data.leaked} training rows repeat test rows and were left out")
    if data.too_long:
        tell(f"{name}: {len(data.too_long)} rows over {longest} tokens were left out, the first: {data.too_long[0]}")
    rows, held = hold_out(data.keys, how.held_out, HELD_OUT_MOST, how.seed)
    if not held:
        raise DataError(
            f"{files}: {data.read} row(s), of which {data.leaked} repeat test rows and {len(data.too_long)} are over "
            f"{longest} tokens; {len(set(data.keys))} different prompt(s) are left, and at least 2 are needed: one to "
            "learn from and one to measure"
        )
    tell(f"{name}: {len(rows)} rows to learn from, {len(held)} held out")

    def say(text: str) -> None:
        tell(f"{name}: {text}")

    try:
        outcome = tune(
            spec, base, expert, data.tokens, rows, held, data.choices, work, trunks, partial(progress, name), say
        )
    except TrainingError as error:  # of numbers of rows, which say nothing to people
        batch = _pick(business.examples(name, spec.train), {data.numbers[i] for i in error.rows})
        first = min(batch) if batch else None
        told = f". The batch: {len(batch)} row(s), the first {batch[first].where}" if first is not None else ""
        raise TrainingError(f"{name}: {error}{told}") from error
    pairs = business.files(spec.preferences)
    preferred = (
        prefer(spec, base, expert, pairs, work, partial(progress, f"{name}, preferences"), say, business.masked)
        if pairs
        else {}
    )

    facts = ExpertFacts(
        name, spec.kind, description=spec.description, system=spec.system, choices=data.choices,
        base=business.config.business.base, base_mark=base.decoder.mark, fingerprint=mark,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        training={
            "rows": len(rows), "left_out_as_test_rows": data.leaked, "left_out_as_too_long": len(data.too_long),
            "steps": outcome.steps, "seconds": round(outcome.seconds),
            "examples_per_second": round(outcome.examples / outcome.seconds, 2),
            **how.model_dump(), "learning_rate": learning_rate(spec), **asdict(expert.config),
            "parameters": sum(w.numel() for w in expert.weights.values()),
        },
    )  # fmt: skip
    measured, sampled = held[:ANSWERED_MOST], _sample(rows, MOST, how.seed)
    found = _pick(business.examples(name, spec.train), {data.numbers[i] for i in measured + sampled})
    statistics = route_statistics(business, [found[data.numbers[i]] for i in sampled])

    def fill(folder: Path) -> None:
        save_expert(base, expert, folder, facts.base)
        statistics.save(folder)
        curve = {"losses": outcome.losses, "held_out": outcome.held_out}
        (folder / "losses.json").write_text(json.dumps(curve) + "\n")

    trial = Library(work / "trial")
    shutil.rmtree(trial.root, ignore_errors=True)
    tried, asked = trial.publish(facts, fill), [found[data.numbers[i]] for i in measured]
    evaluation = {
        "held_out_rows": len(held), "held_out_loss_base": round(outcome.held_out[0], 4),
        "held_out_loss": round(outcome.held_out[-1], 4), **preferred,
        "held_out": compare(business, tried, asked, count, trial),
    }  # fmt: skip
    facts = business.library.publish(facts, lambda folder: _move(trial.folder(name), folder), evaluation)
    tell(f"{name}: version {facts.version} is published")
    return Fitted(facts, True, evaluation)


def _fit_classifier(business: Business, name: str, mark: str, tell: Tell, count: Count) -> Fitted:
    """In closed form: there is nothing to go on with after a stop, and no row need be held out to measure on."""
    spec, base, began = business.spec(name), business.base(tell), time.monotonic()
    tests = [e.asked for e in business.examples(name, spec.test)]
    rows, leaked = list[Example](), 0
    for example, repeats in mark_leaks(business.examples(name, spec.train), tests):
        leaked += repeats
        if not repeats:
            rows.append(replace(example, where=business.place(example.where)))
    files = ", ".join(map(str, business.files(spec.train)))
    if leaked:
        tell(f"{name}: {leaked} training rows repeat test rows and were left out")
    tell(f"{name}: {len(rows)} rows to learn from")
    try:
        found, figures = classify(spec, base, business.config.business.name, rows, partial(count, f"reading {name}"))
    except DataError as error:
        raise DataError(f"{files}: {error}") from error
    if not figures["handled"]:
        tell(f"{name}: too few rows, or too many wrong, to be sure of any label at error = {spec.error:g}")
    facts = ExpertFacts(
        name, spec.kind, description=spec.description, system=spec.system, choices=found.names,
        base=business.config.business.base, base_mark=base.decoder.mark, fingerprint=mark,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        training={"rows": len(found.where), "left_out_as_test_rows": leaked, "seed": spec.training.seed,
                  "seconds": round(time.monotonic() - began, 1), "error": spec.error,
                  "threshold": round(found.threshold, 5)},
    )  # fmt: skip
    statistics = route_statistics(business, [rows[i] for i in _sample(range(len(rows)), MOST, spec.training.seed)])

    def fill(folder: Path) -> None:
        found.save(folder)
        statistics.save(folder)

    evaluation = {"held_out": {"expert": figures}}
    facts = business.library.publish(facts, fill, evaluation)
    tell(f"{name}: version {facts.version} is published")
    return Fitted(facts, True, evaluation)


def route_statistics(business: Business, examples: list[Example], seed: int = 0) -> Statistics:
    """What the router learns of an expert from its training inputs; each is told apart by file and row."""
    where = [business.place(e.where) for e in examples]
    return learn(business.base(), [e.question for e in examples], where, seed)


def _renew_route(business: Business, facts: ExpertFacts, tell: Tell) -> None:
    """Where the router read otherwise when it was taught a version, teach it again by the rows that this is made of."""
    spec, folder = business.spec(facts.name), business.library.folder(facts.name, facts.version)
    if up_to_date(folder):
        return
    tests = [e.asked for e in business.examples(facts.name, spec.test)]
    marked = mark_leaks(business.examples(facts.name, spec.train), tests)
    numbers = [n for n, (_, repeats) in enumerate(marked) if not repeats]
    chosen = set(_sample(numbers, MOST, spec.training.seed))
    tell(f"{facts.name}: the router reads otherwise now; it is taught again by {len(chosen)} rows")
    rows = _pick(business.examples(facts.name, spec.train), chosen)
    route_statistics(business, list(rows.values()), spec.training.seed).save(folder)
    business.library.touch()


def learn_route(business: Business, name: str, inputs: Sequence[tuple[str, str]]) -> int:
    """Let the router know the current version of an expert by inputs, each with where it came from: the version.

    Raises UnknownExpert, DataError for none.
    """
    version, target = business.library.current(name), business.library.folder(name)
    learn(business.base(), [text for _, text in inputs], [where for where, _ in inputs]).save(target)
    business.library.touch()
    return version or 0


def _sample(rows: Sequence[int], most: int, seed: int) -> list[int]:
    """At most `most` of the rows, at random."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:most]]


def _move(source: Path, target: Path) -> None:
    """What is in one folder, into another on the same disk."""
    for file in source.iterdir():
        file.rename(target / file.name)


def _pick(examples: Iterator[Example], wanted: set[int]) -> dict[int, Example]:
    """The examples of these numbers."""
    return {number: example for number, example in enumerate(examples) if number in wanted}


def compare(
    business: Business, facts: ExpertFacts, examples: list[Example], count: Count = lambda _w, _d, _t: None,
    library: Library | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Answers of the base model and of one version to the same examples, measured alike. Raises DataError for none."""
    base = business.base()
    engine = business.engine(library=library, slots=64, queue=128)
    own = business.own_engine(facts, library, slots=64, queue=128)
    shelf = library or business.library
    out: dict[str, Any] = {}
    try:
        framed = [replace(e, messages=(*posed(facts, e.prompt), e.messages[-1])) for e in examples]
        asked = (
            ("base", examples, engine, None),
            ("expert", framed, own or engine, None if own else kinds.answering(shelf, facts, base)),
        )
        for who, rows, served, adapter in asked:
            label = f"{facts.name if who == 'expert' else 'base model'} answers"
            out[who], _ = evaluate(
                served, rows, adapter, facts.choices,
                lambda done, label=label: count(label, done, len(examples)),  # type: ignore[misc]
            )  # fmt: skip
    finally:
        engine.close()
        if own:
            own.close()
    return out


def measure(
    business: Business, names: list[str] | None = None, data: Path | None = None, limit: int = 0,
    tell: Tell = lambda _: None, count: Count = lambda _w, _d, _t: None,
) -> Iterator[tuple[ExpertFacts, dict[str, Any]]]:  # fmt: skip
    """Measure base and experts on their test rows, or the first `limit` of them, or on the file `data`.

    The figures of all declared test rows are kept with the version.
    """
    library = business.library
    if not names and not library.names():
        raise CoterieError(f"{business.folder}: no experts in the library yet; `coterie fit` trains them")
    for name in names or library.names():
        facts = library.facts(name)
        task = str(facts.training.get("task", name))  # a searched prompt is measured on its task's data
        spec = business.config.experts.get(task)
        listed = [str(data.resolve())] if data else spec.test if spec else []
        examples = list(islice(business.examples(task, listed), limit or None))
        if not examples:
            if data or names:
                raise DataError(f'{data or name}: no test rows; declare test = "..." in coterie.toml, or give --data')
            tell(f"{name}: declares no test data; skipped")
            continue
        figures = compare(business, facts, examples, count)
        if not data and not limit:
            library.record(name, facts.version, {"test": figures})
        yield facts, figures


def adopt(business: Business, name: str, source: Path, description: str = "", system: str = "") -> ExpertFacts:
    """Put an expert in PEFT's or AdapterHub's format on the shelf.

    Raises ModelError where it cannot be used, or says that it was made for another model of the hub.
    """
    base, name_of_base = business.base(), business.config.business.base
    expert = kinds.load(source, base.decoder.config)
    made_for = kinds.made_for(source)
    if made_for and kinds.HUB.fullmatch(name_of_base) and made_for.lower() != name_of_base.lower():
        raise ModelError(
            f"{source / CONFIG}: made for {made_for}, and the base model of this business is {name_of_base}; "
            "if these are the same weights by another name, change the name in that file"
        )
    facts = ExpertFacts(
        name, expert.config.kind, description=description, system=system, base=name_of_base,
        base_mark=base.decoder.mark,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        training={"imported_from": str(source), **asdict(expert.config)},
    )  # fmt: skip
    return business.library.publish(facts, lambda folder: save_expert(base, expert, folder, name_of_base))


def describe(business: Business) -> list[dict[str, Any]]:
    """Every expert in the library with its facts and figures, for lists on page, API and CLI."""
    library = business.library
    return [{**asdict(library.facts(n)), "evaluation": library.evaluation(n)} for n in library.names()]
