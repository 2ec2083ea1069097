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

import numpy as np

from coterie.config import LEARNING_RATES, Config, ExpertSpec, read_config
from coterie.data.encode import encode_all
from coterie.data.read import Example, read, read_pairs
from coterie.data.split import hold_out, leaks
from coterie.engine.engine import Engine
from coterie.errors import CoterieError, DataError
from coterie.evaluation.run import evaluate
from coterie.experts import adapter, full, lora, prefix, prompt
from coterie.experts.expert import Expert
from coterie.experts.kinds import apply, save
from coterie.experts.library import ExpertFacts, Library
from coterie.model.load import BaseModel, load
from coterie.model.pull import pull
from coterie.model.save import save_model
from coterie.routing.statistics import Statistics, learn
from coterie.tuning.loop import Progress, Training, train
from coterie.tuning.objective import completions, preferences
from coterie.tuning.trunk import Trunk

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

    def place(self, where: str) -> str:
        """File and row of an example, with the file relative to the folder where it lies in it."""
        return where.removeprefix(f"{self.folder}/")

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
    for file in business.files(spec.train) + business.files(spec.test) + business.files(spec.preferences):
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

    expert = new_expert(spec, base)
    rate = how.learning_rate or LEARNING_RATES[spec.kind]
    settings = Training(how.epochs, how.batch, rate, how.warmup, how.weight_decay, seed=how.seed)
    trunk = None
    if how.first_layer:
        trunk = Trunk(base.decoder, data, how.first_layer, business.folder / ".coterie" / "trunk", tell=tell)
    outcome = train(
        base.decoder, expert, completions(base.decoder, data, trunk), data.lengths(), rows, held, settings,
        work / "checkpoint.safetensors", progress,
    )  # fmt: skip
    pairs = prefer(business, name, expert, work, tell, progress) if spec.preferences else {}

    evaluation: dict[str, Any] = {
        "held_out_rows": len(held),
        "held_out_loss_base": round(outcome.held_out[0], 4),
        "held_out_loss": round(outcome.held_out[-1], 4),
        **pairs,
    }
    facts = ExpertFacts(
        name, spec.kind, description=spec.description, system=spec.system, choices=choices,
        base=business.config.business.base, fingerprint=mark, created=datetime.now(UTC).isoformat(timespec="seconds"),
        training={
            "rows": len(rows), "left_out_as_test_rows": len(leaked), "steps": outcome.steps,
            "seconds": round(outcome.seconds), "examples_per_second": round(outcome.examples / outcome.seconds, 2),
            **how.model_dump(), "learning_rate": rate, **asdict(expert.config),
            "parameters": sum(w.numel() for w in expert.weights.values()),
        },
    )  # fmt: skip
    statistics = route_statistics(business, [examples[i] for i in rows])

    def fill(folder: Path) -> None:
        save_expert(base, expert, folder, facts.base)
        statistics.save(folder)

    facts = business.library.publish(facts, fill, evaluation)
    tell(f"{name}: version {facts.version} published; answering held-out rows")
    evaluation |= compare(business, name, [examples[i] for i in held[:ANSWERED_MOST]], "held_out")
    business.library.record(name, facts.version, evaluation)
    shutil.rmtree(work, ignore_errors=True)
    return Fitted(facts, True, evaluation)


def route_statistics(business: Business, examples: list[Example]) -> Statistics:
    """What the router learns of an expert from its training inputs; each is told apart by file and row."""
    inputs = [e.prompt[-1]["content"] for e in examples]
    where = [business.place(e.where) for e in examples]
    return learn(business.base(), inputs, where)


def new_expert(spec: ExpertSpec, base: BaseModel) -> Expert:
    """An untrained expert of the declared kind and size. Raises CoterieError where the settings do not fit the base."""
    decoder, seed, first = base.decoder, spec.training.seed, spec.training.first_layer
    if first >= decoder.config.layers:
        raise CoterieError(f"training.first_layer = {first}: the base model has {decoder.config.layers} layers")
    if first and spec.kind not in ("lora", "adapter"):
        raise CoterieError(f"training.first_layer: an expert of kind {spec.kind!r} changes all layers; leave it out")
    if spec.kind == "lora":
        s = spec.lora
        shape = lora.LoraConfig(s.rank, s.alpha, tuple(s.targets), s.rslora, s.dora, s.dropout, first)
        return lora.fresh(shape, decoder, seed)
    if spec.kind == "adapter":
        a = spec.adapter
        return adapter.fresh(adapter.BottleneckConfig(a.size, a.placement, a.activation, 1.0, first), decoder, seed)
    if spec.kind == "full":
        return full.fresh(full.FullConfig(), decoder)
    words = base.encode(spec.prompt.start or spec.system or spec.description or "Answer as well as you can.")
    if spec.kind == "prompt":
        return prompt.fresh(prompt.PromptConfig(spec.prompt.tokens), decoder, words)
    return prefix.fresh(prefix.PrefixConfig(spec.prompt.tokens), decoder, words)


def prefer(
    business: Business, name: str, expert: Expert, work: Path, tell: Tell, progress: Callable[[Progress], None]
) -> dict[str, Any]:
    """Train `expert` further on pairs of a better and a worse answer; the held-out figures before and after."""
    spec, how, base = business.spec(name), business.spec(name).preference, business.base()
    files = business.files(spec.preferences)
    examples = [e for file in files for e in read_pairs(file, spec.columns, spec.system)]
    data, long_rows = encode_all(examples, base, work / "pairs", spec.training.max_tokens, together=2)
    count = len(data) // 2
    if count < 2:
        raise DataError(f"{spec.preferences}: {count} pair(s) to learn from; at least 2 are needed")
    if long_rows:
        tell(f"{name}: {len(long_rows)} pairs over {spec.training.max_tokens} tokens were left out")
    rng = np.random.default_rng(spec.training.seed)
    order = rng.permutation(count).tolist()
    held = order[: max(1, min(HELD_OUT_MOST, round(count * spec.training.held_out)))]
    rows = order[len(held) :]
    reference = Expert(expert.config, {k: v.clone() for k, v in expert.weights.items()})
    loss = preferences(base.decoder, data, reference, how.beta)
    settings = Training(how.epochs, spec.training.batch, how.learning_rate, seed=spec.training.seed)
    sizes = data.lengths().reshape(-1, 2).sum(axis=1)
    outcome = train(
        base.decoder, expert, loss, sizes, rows, held, settings, work / "preference.safetensors", progress,
        apply(reference, base.decoder),
    )  # fmt: skip
    return {"preference_pairs": len(rows), "preference_loss_before": round(outcome.held_out[0], 4),
            "preference_loss": round(outcome.held_out[-1], 4)}  # fmt: skip


def save_expert(base: BaseModel, expert: Expert, folder: Path, name: str) -> None:
    """Write an expert's weights into the folder of its version; a `full` one as a model of its own, in model/."""
    if expert.config.kind == "full":
        decoder = full.apply(expert, base.decoder).decoder
        assert decoder is not None
        save_model(replace(base, decoder=decoder), folder / "model")
    else:
        save(expert, folder, name, base.decoder.config)


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
        for who, adapter in (("base", None), (name, (name, facts.version))):
            figures, _ = evaluate(
                engine,
                examples,
                adapter,
                facts.choices,
                longest + 8,
                lambda i, who=who: tell(who, i),  # type: ignore[misc]
            )
            out["base" if adapter is None else "expert"] = figures
    finally:
        engine.close()
    return {what: out}


def describe(business: Business) -> list[dict[str, Any]]:
    """Every expert in the library with its facts and figures, for lists on page, API and CLI."""
    library = business.library
    return [{**asdict(library.facts(n)), "evaluation": library.evaluation(n)} for n in library.names()]
