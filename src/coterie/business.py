"""A business: a folder with a coterie.toml, its data, and the expert library that `fit` fills.

This is the first flow of the house on one page: data -> split -> encode -> tune -> evaluate -> publish.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from coterie.config import Config, ExpertSpec, read_config
from coterie.data.encode import encode_all
from coterie.data.read import Example, read
from coterie.data.split import hold_out, leaks
from coterie.engine.engine import Engine
from coterie.errors import CoterieError, DataError
from coterie.evaluation.run import evaluate
from coterie.experts import lora as loras
from coterie.experts.instruction import posed, weights_of
from coterie.experts.library import ExpertFacts, Library
from coterie.model.load import BaseModel, load
from coterie.model.pull import pull
from coterie.routing.nearest import make_profile
from coterie.tuning.loop import Progress, Training, train

HELD_OUT_MOST = 500  # rows held out for the loss while training
ANSWERED_MOST = 100  # of them, rows that base and expert answer before publishing
CHOICES_MOST = 10_000
Tell = Callable[[str], None]


@dataclass
class Business:
    """A folder, what it declares, and its library. The base model is loaded when first asked for."""

    folder: Path
    config: Config
    _base: BaseModel | None = None

    @classmethod
    def open(cls, folder: Path) -> "Business":
        """Read the declaration in `folder`. Raises CoterieError."""
        return cls(folder, read_config(folder))

    @property
    def library(self) -> Library:
        return Library(self.folder / "experts")

    def base(self, tell: Tell = lambda _: None) -> BaseModel:
        """The base model, pulled where it is absent."""
        if self._base is None:
            name = self.config.business.base
            local = self.folder / name
            path = local if local.exists() else pull(name, tell)
            self._base = load(path, packed=True)
        return self._base

    def engine(self, tell: Tell = lambda _: None, **options: int) -> Engine:
        """An engine over base and library, as the declaration sizes it."""
        b = self.config.business
        sizes = {"slots": b.slots, "context": b.context, "queue": b.queue, **options}
        return Engine(self.base(tell), self.library, **sizes)

    def spec(self, name: str) -> ExpertSpec:
        """The declaration of one expert. Raises CoterieError."""
        if name not in self.config.experts:
            known = ", ".join(self.config.experts) or "none"
            raise CoterieError(f"{self.folder}/coterie.toml declares no expert {name!r}; declared: {known}")
        return self.config.experts[name]

    def files(self, listed: list[str] | str) -> list[Path]:
        """Data files named in the declaration, relative to the folder."""
        return [self.folder / f for f in ([listed] if isinstance(listed, str) else listed)]

    def examples(self, name: str, listed: list[str] | str) -> Iterator[Example]:
        """The examples of an expert's data files, with its instruction."""
        spec = self.spec(name)
        for file in self.files(listed):
            yield from read(file, spec.columns, spec.system)


@dataclass(frozen=True)
class Fitted:
    """What `fit` did about one expert."""

    facts: ExpertFacts
    trained: bool
    evaluation: dict[str, Any]


def fingerprint(business: Business, name: str) -> str:
    """Of everything that decides what training gives: base, data, settings. Reads the data files once."""
    spec = business.spec(name)
    settings = spec.model_dump(exclude={"description"})
    digest = hashlib.sha256(json.dumps([business.config.business.base, settings], sort_keys=True).encode())
    for file in business.files(spec.train) + business.files(spec.test):
        if not file.is_file():
            raise DataError(f"{file}: no such file (named in coterie.toml, expert {name!r})")
        with file.open("rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


def fit(
    business: Business, names: list[str] | None = None, tell: Tell = lambda _: None,
    progress: Callable[[str, Progress], None] = lambda _n, _p: None,
) -> Iterator[Fitted]:  # fmt: skip
    """Train and publish the declared experts (or those of `names`) whose base, data or settings changed."""
    if not business.config.experts:
        raise CoterieError(f"{business.folder}/coterie.toml declares no experts; see docs/coterie-toml.md")
    for name in names or list(business.config.experts):
        mark = fingerprint(business, name)
        current = business.library.current(name)
        facts = business.library.facts(name) if current else None
        if facts and facts.fingerprint == mark:
            yield Fitted(facts, False, business.library.evaluation(name))
        else:
            yield _fit_one(business, name, mark, tell, lambda p, name=name: progress(name, p))  # type: ignore[misc]


def _fit_one(business: Business, name: str, mark: str, tell: Tell, progress: Callable[[Progress], None]) -> Fitted:
    spec, how = business.spec(name), business.spec(name).training
    work = business.folder / ".coterie" / "runs" / f"{name}-{mark}"
    base = business.base(tell)
    examples = list(business.examples(name, spec.train))
    if len(examples) < 2:
        raise DataError(f"{spec.train}: {len(examples)} row(s); at least 2 are needed, one to learn and one to measure")
    tests = list(business.examples(name, spec.test))
    prompts = [e.prompt[-1]["content"] for e in examples]
    leaked = set(leaks(prompts, [e.prompt[-1]["content"] for e in tests]))
    examples = [e for i, e in enumerate(examples) if i not in leaked]
    if leaked:
        tell(f"{name}: {len(leaked)} training rows repeat test rows and were left out")
    if len(examples) < 2:
        raise DataError(f"{spec.train}: fewer than 2 rows are left once those that repeat test rows are taken out")
    choices = tuple(sorted({e.completion for e in examples})) if spec.choices else ()
    if len(choices) > CHOICES_MOST:
        raise DataError(f"{spec.train}: {len(choices)} different completions are too many for choices = true")
    longest = min(how.max_tokens, base.decoder.config.context)
    data, long_rows = encode_all(examples, base, work, longest)
    if long_rows:
        tell(f"{name}: {len(long_rows)} rows over {longest} tokens were left out, the first: {long_rows[0]}")
        dropped = {row.rsplit(" (", 1)[0] for row in long_rows}
        examples = [e for e in examples if e.where not in dropped]
    if len(data) < 2:
        raise DataError(f"{spec.train}: fewer than 2 rows fit into {longest} tokens; raise training.max_tokens")
    rows, held = hold_out([e.prompt[-1]["content"] for e in examples], how.held_out, HELD_OUT_MOST, how.seed)
    tell(f"{name}: {len(rows)} rows to learn from, {len(held)} held out")

    shape = loras.LoraConfig(spec.lora.rank, spec.lora.alpha, tuple(spec.lora.targets), spec.lora.rslora)
    expert = loras.fresh(shape, base.decoder.config, how.seed)
    settings = Training(how.epochs, how.batch, how.learning_rate, how.warmup, how.weight_decay, seed=how.seed)
    outcome = train(base.decoder, expert, data, rows, held, settings, work / "checkpoint.safetensors", progress)

    evaluation: dict[str, Any] = {
        "held_out_rows": len(held),
        "held_out_loss_base": round(outcome.held_out[0], 4),
        "held_out_loss": round(outcome.held_out[-1], 4),
    }
    facts = ExpertFacts(
        name, spec.kind, description=spec.description, system=spec.system, choices=choices,
        base=business.config.business.base, fingerprint=mark, created=datetime.now(UTC).isoformat(timespec="seconds"),
        training={
            "rows": len(rows), "left_out_as_test_rows": len(leaked), "steps": outcome.steps,
            "seconds": round(outcome.seconds), "examples_per_second": round(outcome.examples / outcome.seconds, 2),
            **how.model_dump(), **spec.lora.model_dump(exclude={"targets"}),
        },
    )  # fmt: skip
    profile = make_profile(base, [examples[i].prompt[-1]["content"] for i in rows], how.seed)

    def fill(folder: Path) -> None:
        loras.save(expert, folder, facts.base)
        profile.save(folder)
        curve = {"losses": outcome.losses, "held_out": outcome.held_out}
        (folder / "losses.json").write_text(json.dumps(curve) + "\n")

    facts = business.library.publish(facts, fill, evaluation)
    tell(f"{name}: version {facts.version} published; answering held-out rows")
    spread = held[:: -(-len(held) // ANSWERED_MOST)]  # the first rows of a file sorted by class are no sample
    evaluation |= compare(business, name, [examples[i] for i in spread], "held_out")
    business.library.record(name, facts.version, evaluation)
    shutil.rmtree(work, ignore_errors=True)
    return Fitted(facts, True, evaluation)


def compare(
    business: Business,
    name: str,
    examples: list[Example],
    what: str,
    tell: Callable[[str, int], None] = lambda _n, _i: None,
) -> dict[str, Any]:
    """Answers of the base model and of the current version to the same examples, measured alike."""
    facts = business.library.facts(name)
    longest = max(len(business.base().encode(e.completion)) for e in examples)
    engine = business.engine(slots=64, context=business.config.business.context, queue=128)
    out: dict[str, Any] = {}
    try:
        framed = [replace(e, messages=(*posed(facts, e.prompt), e.messages[-1])) for e in examples]
        for who, rows, adapter in (("base", examples, None), (name, framed, weights_of(facts))):
            figures, _ = evaluate(
                engine,
                rows,
                adapter,
                facts.choices,
                longest + 8,
                lambda i, who=who: tell(who, i),  # type: ignore[misc]
            )
            out["base" if who == "base" else "expert"] = figures
    finally:
        engine.close()
    return {what: out}


def describe(business: Business) -> list[dict[str, Any]]:
    """Every expert in the library with its facts and figures, for lists on page, API and CLI."""
    library = business.library
    return [{**asdict(library.facts(n)), "evaluation": library.evaluation(n)} for n in library.names()]
