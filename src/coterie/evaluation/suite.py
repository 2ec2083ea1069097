"""Run tasks: let the base model and experts answer the same rows, and measure them alike."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from coterie.data.read import Example, Message
from coterie.engine.engine import Engine
from coterie.engine.request import Sampling
from coterie.errors import CoterieError
from coterie.evaluation import charts
from coterie.evaluation.calibration import calibration
from coterie.evaluation.likelihood import choice_log_likelihoods, choose
from coterie.evaluation.metrics import Perplexity, bootstrap, macro_f1, wilson
from coterie.evaluation.run import answer_each
from coterie.evaluation.significance import compare_scores
from coterie.evaluation.task import Score, Splits, Task
from coterie.experts import classifier, kinds
from coterie.experts.expert import Applied
from coterie.experts.instruction import KIND, posed, weights_of
from coterie.experts.library import ExpertFacts, Library
from coterie.model.constrain import choices as choice_constraint
from coterie.model.decoder import Decoder

Tell = Callable[[int], None]


@dataclass
class Measured:
    """What one model made of one task: figures to show, the score of each row (to compare in pairs), its answers."""

    task: str
    who: str
    figures: dict[str, Any]
    scores: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        return {"task": self.task, "who": self.who, **self.figures}


def applied_of(library: Library | None, facts: ExpertFacts | None, decoder: Decoder) -> Applied:
    """What an expert brings to a forward pass: nothing for the base model, for experts without weights, and for one
    that is a model of its own, which `decoder` is then."""
    found = weights_of(facts) if facts else None
    if library is None or facts is None or found is None or facts.kind == "full":
        return Applied()
    return kinds.apply(kinds.read(library, *found, decoder), decoder)


def prompt_of(task: Task, facts: ExpertFacts | None, example: Example) -> list[Message]:
    """A row as a model gets it: with the row's own instruction, else the expert's, else the task's."""
    messages = example.prompt
    own = bool(facts and (facts.system or facts.kind == KIND))
    if task.system and not own and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": task.system}, *messages]
    return posed(facts, messages) if facts else messages


def measure(
    engine: Engine, task: Task, splits: Splits, score: Score, facts: ExpertFacts | None = None, limit: int = 0,
    likelihood: bool = False, tell: Tell = lambda _: None,
) -> Measured:  # fmt: skip
    """Let the base model (or an expert) answer the first `limit` rows to measure on (0: all), and score them.

    `likelihood` scores choices by their probability instead of generating, which also gives calibration. Rows that do
    not fit the context count as wrong, and their number is among the figures.
    """
    rows = splits.test[:limit] if limit else splits.test
    options = task.options(splits)
    base, who = engine.base, facts.name if facts else "base"
    prompts = [prompt_of(task, facts, e) for e in rows]
    fits = [len(base.encode(base.chat(p))) + task.max_tokens < engine.context for p in prompts]
    kept = [i for i, good in enumerate(fits) if good]
    figures: dict[str, Any] = {"rows": len(rows), "metric": task.metric}
    if len(kept) < len(rows):
        figures["rows_too_long"] = len(rows) - len(kept)
    answers = [""] * len(rows)
    if likelihood and facts and facts.kind == classifier.KIND:
        raise CoterieError(f"{who} is a classifier: it gives no likelihood of tokens; leave --likelihood out")
    applied = applied_of(engine.library, facts, base.decoder) if likelihood or task.perplexity else Applied()
    if likelihood:
        if not options:
            raise CoterieError(f"the task {task.name} has no choices, so their likelihood cannot be scored")
        confidences, right = [], []
        for done, i in enumerate(kept, 1):
            verdict = choose(base, base.encode(base.chat(prompts[i])), options, applied, end=base.eos_token)
            answers[i] = verdict.choice
            confidences.append(min(verdict.confidence, 1.0))
            right.append(verdict.choice == rows[i].completion)
            tell(done)
        if kept:
            figures["calibration"] = calibration(confidences, right)
    else:
        sampling = Sampling(task.max_tokens, constraint=choice_constraint(options) if options else None)
        library = engine.library  # without one: a model of its own
        adapter = kinds.answering(library, facts, base) if facts and library else None
        said = answer_each(engine, (prompts[i] for i in kept), adapter, sampling)
        for done, (i, answer) in enumerate(zip(kept, said, strict=True), 1):
            answers[i] = answer or ""
            tell(done)
    scores = [score(a, e) if good else 0.0 for a, e, good in zip(answers, rows, fits, strict=True)]
    whole = set(scores) <= {0.0, 1.0}
    main = wilson(round(sum(scores)), len(scores)) if whole else bootstrap(scores)
    figures["accuracy" if options else task.metric] = main.json()
    if options:
        figures["metric"] = "accuracy"
        figures["macro_f1"] = round(macro_f1(answers, [e.completion for e in rows]), 5)
    if task.perplexity:
        figures["perplexity"] = _perplexity(engine, [(prompts[i], rows[i].completion) for i in kept], applied)
    return Measured(task.name, who, figures, scores, answers)


def _perplexity(engine: Engine, pairs: Sequence[tuple[list[Message], str]], applied: Applied) -> dict[str, float]:
    """Of the wanted answers after their prompts, end mark left out."""
    base, nats, tokens, size = engine.base, 0.0, 0, 0
    with torch.inference_mode():
        for messages, wanted in pairs:
            prompt, ids = base.encode(base.chat(messages)), base.encode(wanted)
            room = base.decoder.config.context - len(prompt)
            if not 0 < len(ids) <= room:
                continue
            nats -= choice_log_likelihoods(base, prompt, [ids], applied)[0]
            tokens, size = tokens + len(ids), size + len(wanted.encode())
    if not tokens:
        return {}
    found = Perplexity(nats, tokens, size)
    return {"per_token": round(found.per_token, 4), "per_byte": round(found.per_byte, 4),
            "bits_per_byte": round(found.bits_per_byte, 4), "tokens": tokens}  # fmt: skip


def headline(figures: dict[str, Any]) -> dict[str, float]:
    """The main figure's value, low and high."""
    found: dict[str, float] = figures[figures["metric"]]
    return found


def gains(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Each expert against the base model on the same task, row by row."""
    base = {m.task: m for m in measured if m.who == "base"}
    return [
        {"task": m.task, "who": m.who, **compare_scores(base[m.task].scores, m.scores)}
        for m in measured if m.who != "base" and m.task in base
    ]  # fmt: skip


def chart(measured: Sequence[Measured]) -> charts.Chart:
    """The main figure of every task, model by model."""
    groups: dict[str, dict[str, charts.Bar]] = {}
    for m in measured:
        value = headline(m.figures)
        groups.setdefault(m.task, {})[m.who] = charts.Bar(value["value"], value["low"], value["high"])
    kinds = {m.figures["metric"] for m in measured}
    return charts.bars("Tasks", kinds.pop().replace("_", " ") if len(kinds) == 1 else "score", groups)


def loss_chart(library: Library, name: str, version: int | None = None) -> charts.Chart:
    """How an expert's loss fell in training. Raises UnknownExpert, CoterieError where no losses are kept of it."""
    facts = library.facts(name, version)
    file = library.folder(name, version) / "losses.json"
    try:
        kept = json.loads(file.read_text())
        return charts.losses(f"{name}, version {facts.version}", kept["losses"], kept["held_out"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CoterieError(
            f"{name}, version {facts.version}: no losses are kept of it; was it trained elsewhere?"
        ) from error


def parse_task(text: str) -> tuple[str, Path]:
    """NAME=PATH as given on the command line. Raises CoterieError."""
    name, mark, path = text.partition("=")
    if not mark or not name or not path:
        raise CoterieError(f"--task {text}: write NAME=PATH, the task and where its data lies")
    return name, Path(path)
