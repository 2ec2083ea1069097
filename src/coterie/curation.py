"""What data/ asks of a model, and may not load itself: vectors, trainings on parts of the data, paraphrases."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.business import Business, Tell, fit
from coterie.data.augment import Paraphrase
from coterie.data.curve import Measure, PowerLaw
from coterie.data.encode import encode
from coterie.data.features import Embed
from coterie.data.read import Example
from coterie.data.write import write_rows
from coterie.engine.engine import Engine
from coterie.engine.request import Sampling
from coterie.errors import StorageError
from coterie.evaluation import charts
from coterie.evaluation.metrics import token_f1
from coterie.evaluation.run import evaluate
from coterie.experts.kinds import answering
from coterie.files import write_atomic
from coterie.routing.space import embed


def token_counter(business: Business, tell: Tell = lambda _: None) -> Callable[[Example], int]:
    """How many tokens an example has for the base model, chat template included."""
    base = business.base(tell)
    return lambda example: len(encode(example, base)[0])


def embedder(business: Business, tell: Tell = lambda _: None) -> Embed:
    """Vectors by the base model's lower layers; each text is computed once."""
    base = business.base(tell)
    known: dict[str, NDArray[np.float32]] = {}

    def vectors(texts: Sequence[str]) -> NDArray[np.float32]:
        new = sorted({t for t in texts if t not in known}, key=len)  # like lengths share a batch
        for start in range(0, len(new), 256):
            part = new[start : start + 256]
            known.update(zip(part, embed(base, part), strict=True))
            if len(new) > 512:
                tell(f"vectors of {min(start + 256, len(new))} of {len(new)} texts")
        return np.stack([known[t] for t in texts])

    return vectors


def _curve_file(business: Business, name: str) -> Path:
    return business.folder / ".coterie" / "curves" / f"{name}.json"


def keep_curve(business: Business, name: str, facts: dict[str, Any]) -> None:
    """Keep the learning curve of a declared expert's data, to be shown with the expert."""
    file = _curve_file(business, name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{file.parent}: cannot be written ({error.strerror})") from error
    write_atomic(file, json.dumps(facts, indent=2) + "\n")


def kept_curve(business: Business, name: str) -> dict[str, Any] | None:
    """What `coterie data curve` last found of an expert's data; None where nothing is kept, or it is damaged."""
    try:
        facts = json.loads(_curve_file(business, name).read_text())
        curve_chart(facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(facts)


def curve_chart(facts: dict[str, Any]) -> charts.Chart:
    """The picture of a learning curve, from what `Curve.json` and a title say."""
    points = facts["points"]
    scores = [charts.Bar(p["score"], p["low"], p["high"]) for p in points]
    return charts.learning(f"{facts['title']}: is it enough?", [p["rows"] for p in points], scores,
                           PowerLaw(**facts["law"]))  # fmt: skip


def expert_measure(
    business: Business, name: str, examples: Sequence[Example], tests: Sequence[Example], tell: Tell = lambda _: None
) -> Measure:
    """Trains the declared expert on some of `examples`, in a folder that is thrown away, and scores each test row.

    The score is 1 or 0 for choices, token-F1 for free text. Nothing is published in the business's own library.
    """

    def measure(rows: NDArray[np.int64]) -> list[float]:
        with TemporaryDirectory(prefix="coterie-") as scratch:
            folder = Path(scratch)
            write_rows(folder / "train.jsonl", ({"messages": list(examples[int(i)].messages)} for i in rows))
            spec = business.spec(name).model_copy(
                update={"train": ["train.jsonl"], "test": [], "preferences": [], "columns": {}}
            )
            config = business.config.model_copy(update={"experts": {name: spec}})
            trial = Business(folder, config, business.base(tell))
            (fitted,) = fit(trial, [name], tell)
            engine = trial.engine(slots=64, queue=128)
            try:
                adapter = answering(trial.library, fitted.facts, engine.base)
                _, answers = evaluate(engine, tests, adapter, fitted.facts.choices)
            finally:
                engine.close()
        pairs = [((a or "").strip(), e.completion) for a, e in zip(answers, tests, strict=True)]
        return [float(a == w) if spec.choices else token_f1(a, w) for a, w in pairs]

    return measure


def paraphraser(engine: Engine, seed: int = 0) -> Paraphrase:
    """Asks the base model to go on with a list of wordings of one question."""
    asked = 0

    def ask(alike: Sequence[str], wanted: int) -> list[str]:
        nonlocal asked
        shown = "".join(f"- {' '.join(t.split())}\n" for t in [*alike[1:], alike[0]])
        prompt = engine.base.encode(
            f"Different customers ask for the same thing in their own words:\n{engine.base.unmarked(shown)}-"
        )
        room = engine.context - len(prompt) - 1
        if room < 8:
            return []
        under_way = []
        for i in range(wanted):
            how = Sampling(min(64, room), 0.8, 0.95, seed=seed + asked + i, stop=("\n",))
            under_way.append(engine.submit(prompt, how))
        asked += wanted
        said = [g.text().strip().strip('"').strip() for g in under_way]
        return list(dict.fromkeys(t for t, g in zip(said, under_way, strict=True) if t and g.finish == "stop"))

    return ask
