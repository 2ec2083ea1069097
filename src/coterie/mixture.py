"""Making mixtures of experts: upcycle a dense model, mix trained experts into one model, tune it, measure it.

Each step reads a model directory (or a business) and writes a new model directory, which `base` in a coterie.toml
can name and transformers can load.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from coterie.business import Business, Tell
from coterie.data.encode import encode, encode_all
from coterie.data.read import CUSTOMER, Example, read
from coterie.data.split import hold_out, normalise
from coterie.engine.engine import Engine
from coterie.errors import CoterieError, DataError
from coterie.evaluation.run import evaluate
from coterie.experts.kinds import read as read_expert
from coterie.experts.mix import mix, token_sums
from coterie.files import check_free
from coterie.model.load import BaseModel, load
from coterie.model.pull import pull
from coterie.model.save import save_model
from coterie.model.upcycle import upcycle
from coterie.tuning.moe import MoeStep, MoeTuning, tune

SAMPLE = 256  # training rows of each expert that its row of the routers is made from
HELD_OUT = (0.05, 200)  # share and most rows held out while tuning


def open_model(name: str, dtype: torch.dtype | None = None, tell: Tell = lambda _: None) -> BaseModel:
    """The model at a path, or of a hub id."""
    path = Path(name).expanduser()
    return load(path if path.exists() else pull(name, tell), dtype)


def upcycle_to(
    model: str, out: Path, experts: int, layers: str, per_token: int, seed: int, tell: Tell = lambda _: None
) -> dict[str, Any]:
    """Write the upcycled `model` to `out`."""
    check_free(out)
    base = upcycle(open_model(model, tell=tell), experts, layers, per_token, seed)
    save_model(base, out)
    return facts_of(base, out)


def mix_to(
    business: Business, out: Path, names: list[str], per_token: int, with_base: bool, tell: Tell = lambda _: None
) -> dict[str, Any]:
    """Write the mixture of a business's LoRA experts `names` (all, where empty) to `out`."""
    check_free(out)
    names = names or business.library.names()
    if len(names) + with_base < 2:
        raise CoterieError(f"{len(names)} expert(s) to mix; name 2 or more, or train them first with `coterie fit`")
    if len(set(names)) < len(names):
        raise CoterieError("an expert is named twice")
    for name in names:  # what cannot be mixed fails here, before any work
        kind = business.library.facts(name).kind
        if kind != "lora":
            raise CoterieError(f"{name} is a {kind} expert; only LoRA experts are mixed")
    base = business.base(tell)
    found, sums = [], []
    for name in names:
        found.append(read_expert(business.library, name, None, base.decoder))
        tell(f"{name}: reading its training data for the routers")
        rows = [encode(e, base)[0] for e in _spread(business, name)]
        sums.append(token_sums(base, [row[: base.decoder.config.context] for row in rows]))
    mixed = mix(base, found, sums, per_token, with_base)
    save_model(mixed, out)
    return facts_of(mixed, out) | {"mixed": names + (["base"] if with_base else [])}


def _spread(business: Business, name: str) -> list[Example]:
    """SAMPLE of the training rows, from the whole file."""
    rows = list(business.examples(name, business.spec(name).train))
    if not rows:
        raise DataError(f"{business.spec(name).train}: no rows (named in coterie.toml, expert {name!r})")
    return rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE]


def tune_to(
    model: str, out: Path, examples: list[Example], settings: MoeTuning,
    tell: Tell = lambda _: None, step: Callable[[MoeStep], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Write `model`, tuned further on `examples`, to `out`."""
    check_free(out)
    base = open_model(model, torch.float32, tell)
    if len(examples) < 2:
        raise DataError(f"{len(examples)} row(s) to tune on; at least 2 are needed, one to learn and one to measure")
    work = Path(tempfile.mkdtemp(prefix="coterie-"))
    try:
        data, long_rows = encode_all(examples, base, work, base.decoder.config.context)
        if long_rows:
            first = next(iter(long_rows.values()))
            tell(f"{len(long_rows)} rows longer than the context were left out, the first: {first}")
        asked = [normalise(e.asked) for number, e in enumerate(examples) if number not in long_rows]
        rows, held = hold_out(asked, *HELD_OUT, settings.seed)
        if not held:
            raise DataError(f"{len(set(asked))} different prompt(s) fit into the context; at least 2 are needed, one "
                            "to learn from and one to measure")  # fmt: skip
        outcome = tune(base.decoder, data, rows, held, settings, step)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    save_model(base, out)
    return facts_of(base, out) | {
        "rows": len(rows), "held_out_rows": len(held), "held_out_loss_before": round(outcome.before, 4),
        "held_out_loss": round(outcome.after, 4), "expert_shares": outcome.shares, "seconds": round(outcome.seconds),
        **asdict(settings),
    }  # fmt: skip


def tuning_data(files: list[Path], business: Business | None) -> list[Example]:
    """The rows of `files`, and of the training data of every expert that `business` declares."""
    plain = list(chain.from_iterable(read(file) for file in files))
    if business is None:
        if theirs := next((e for e in plain if e.facts.get(CUSTOMER)), None):
            raise DataError(f"{theirs.where}: a customer's row, which only a business can mask; give --business")
        return plain
    specs = business.config.experts
    return list(
        chain(map(business.masked, plain), *(business.examples(name, spec.train) for name, spec in specs.items()))
    )


def measure(model: str, business: Business, names: list[str], limit: int = 0) -> dict[str, Any]:
    """What `model`, alone, answers to the test data of a business's experts: figures by expert."""
    base = open_model(model)
    engine = Engine(base, None, slots=16, context=business.config.business.context, queue=64)
    out: dict[str, Any] = {}
    try:
        for name in names or list(business.config.experts):
            spec = business.spec(name)
            rows = list(business.examples(name, spec.test))[: limit or None]
            if not rows:
                raise DataError(f'{name}: no test rows; declare test = "..." in coterie.toml')
            choices = sorted({e.completion for e in rows}) if spec.choices else []
            if spec.choices:
                choices = sorted({e.completion for e in business.examples(name, spec.train)} | set(choices))
            out[name], _ = evaluate(engine, rows, None, choices)
    finally:
        engine.close()
    return out


def facts_of(base: BaseModel, out: Path) -> dict[str, Any]:
    """What was written, for the report."""
    c = base.decoder.config
    return {
        "path": str(out), "experts": c.experts, "experts_per_token": c.experts_per_token, "layers": list(c.sparse),
        "parameters": sum(w.numel() for w in base.decoder.weights.values()),
    }  # fmt: skip
