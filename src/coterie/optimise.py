"""Find a better prompt for an expert's task without touching weights, and publish it as an expert of its own.

On one page: data -> proposals -> race (tuning/prompts.py) -> measure on rows the race never saw -> publish.
Everything the model answered is kept in .coterie/prompts/, so that a stopped run goes on where it was.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from coterie.business import Business, Tell, route_statistics
from coterie.data.read import Example, Message
from coterie.data.split import hold_out, leaks
from coterie.engine.engine import Engine
from coterie.engine.request import Sampling
from coterie.errors import CoterieError, DataError
from coterie.evaluation.metrics import bootstrap
from coterie.evaluation.run import answer_each
from coterie.evaluation.significance import compare_scores
from coterie.evaluation.task import METRICS
from coterie.experts.instruction import KIND, posed
from coterie.experts.library import ExpertFacts, check_name
from coterie.model.constrain import choices as choice_constraint
from coterie.tuning import prompts
from coterie.tuning.prompts import Candidate, Tried

LEAST_BUDGET = 60  # model calls: below, luck decides
PROPOSALS, OWN, FINAL = 0.05, 0.1, 0.25  # shares of the budget: instructions proposed, own answers, the last measuring


@dataclass
class Optimised:
    """What came of a search: everything tried, the best first; the last measuring; the expert, if it was better."""

    tried: list[Tried]
    calls: int
    reused: int
    final: dict[str, Any] = field(default_factory=dict)
    published: ExpertFacts | None = None

    def json(self) -> dict[str, Any]:
        expert = {"expert": self.published.name, "version": self.published.version} if self.published else None
        return {"calls": self.calls, "calls_reused": self.reused, "final": self.final, "published": expert,
                "tried": [t.json() for t in self.tried]}  # fmt: skip


@dataclass
class _Data:
    """Rows apart: to show as examples, to race on, and to measure on at the end."""

    show: list[Example]
    race: list[Example]
    final: list[Example]


class _Answers:
    """The model's answers, each asked once: kept in a file that a later run reads first."""

    def __init__(self, engine: Engine, file: Path, mark: str, count: Callable[[int], None]) -> None:
        self.engine, self.file, self.mark, self.count = engine, file, mark, count
        self.calls = self.reused = 0
        self.known: dict[str, str] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        kept_before = file.read_text() if file.exists() else ""
        if kept_before and not kept_before.endswith("\n"):
            file.write_text(kept_before + "\n")
        for line in kept_before.splitlines():
            try:
                kept = json.loads(line)
                self.known[kept["key"]] = kept["answer"]
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short when the run was killed: asked again

    def ask(self, conversations: Sequence[list[Message]], sampling: Sampling) -> list[str]:
        """The answer to each conversation, from the file or the model."""
        keys = [self._key(c, sampling) for c in conversations]
        fresh = {k: c for k, c in zip(keys, conversations, strict=True) if k not in self.known}
        self.reused += len(keys) - len(fresh)
        with self.file.open("a") as kept:
            for key, answer in zip(fresh, answer_each(self.engine, fresh.values(), None, sampling), strict=True):
                answer = answer or ""  # does not fit into the context
                kept.write(json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n")
                kept.flush()
                self.known[key] = answer
                self.calls += 1
                self.count(self.calls + self.reused)
        return [self.known[k] for k in keys]

    def _key(self, conversation: list[Message], sampling: Sampling) -> str:
        return hashlib.sha256(json.dumps([self.mark, conversation, repr(sampling)]).encode()).hexdigest()[:24]


def optimise(
    business: Business, name: str, budget: int = 400, given: Sequence[str] = (), metric: str = "",
    publish_as: str = "", seed: int = 0, tell: Tell = lambda _: None,
    show: Callable[[list[Tried]], None] = lambda _: None, count: Callable[[int], None] = lambda _: None,
) -> Optimised:  # fmt: skip
    """Search for a better prompt for the task of the declared expert `name`, with `budget` calls of the base model.

    The winner is published where it beats the declared instruction on rows that the search never saw. `show` gets the
    standing after each round. Raises CoterieError (budget, metric, no such expert), DataError (too few rows).
    """
    spec = business.spec(name)
    if budget < LEAST_BUDGET:
        raise CoterieError(f"a budget of {budget} model calls is too small to tell prompts apart; give {LEAST_BUDGET}")
    metric = metric or ("exact_match" if spec.choices else "token_f1")
    if metric not in METRICS:
        raise CoterieError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
    publish_as = check_name(publish_as or f"{name}-prompt")
    data = _split(business, name, int(budget * FINAL / 2), seed)
    choices = tuple(sorted({e.completion for e in data.show + data.race})) if spec.choices else ()
    engine = business.engine(tell)
    try:
        longest = max(len(engine.base.encode(e.completion)) for e in data.show + data.race) + 8
        most = min(longest, engine.context // 4)
        sampling = Sampling(max_tokens=most, constraint=choice_constraint(choices) if choices else None)
        mark = f"{business.config.business.base} {engine.base.decoder.config}"
        answers = _Answers(engine, business.folder / ".coterie" / "prompts" / f"{name}.jsonl", mark, count)

        def score(pairs: list[tuple[Candidate, Example]]) -> list[float]:
            said = answers.ask([_framed(c, e) for c, e in pairs], sampling)
            return [METRICS[metric](a, e.completion) for a, (_, e) in zip(said, pairs, strict=True)]

        declared = Candidate(spec.system)
        proposed = list(_proposals(answers, data, spec.system, budget, seed))
        texts = prompts.instructions(spec.system, given, choices, proposed)
        own = _own_answers(answers, data, declared, sampling, METRICS[metric], int(budget * OWN), seed)
        pool = [(e.question, e.completion) for e in data.show]
        calls = budget - answers.calls - answers.reused - 2 * len(data.final)
        field_ = prompts.candidates(texts, pool, own, 4 * prompts.field_size(calls), seed)
        fits = [c for c in field_ if _fits(engine, c, data, most)][: prompts.field_size(calls)]
        if not fits:
            raise DataError(f"{name}: the longest row does not fit into {engine.context} tokens with any instruction")
        tell(f"{name}: {len(fits)} candidates race on up to {len(data.race)} rows, {calls} calls")
        tried = prompts.race(fits, len(data.race), lambda ps: score([(c, data.race[i]) for c, i in ps]), calls, show)
        outcome = Optimised(tried, 0, 0)
        best = tried[0].candidate
        before, after = (score([(c, e) for e in data.final]) for c in (declared, best))
        outcome.calls, outcome.reused = answers.calls, answers.reused
        outcome.final = {"metric": metric, "declared": bootstrap(before).json(),
                         "best": bootstrap(after).json(), **compare_scores(before, after)}  # fmt: skip
        if sum(after) > sum(before):
            outcome.published = _publish(business, name, publish_as, best, choices, data, outcome, budget, seed)
        return outcome
    finally:
        engine.close()


def _split(business: Business, name: str, most_final: int, seed: int) -> _Data:
    spec = business.spec(name)
    examples, tests = list(business.examples(name, spec.train)), list(business.examples(name, spec.test))
    asked = [e.question for e in examples]
    repeated = set(leaks(asked, [e.question for e in tests]))
    examples = [e for i, e in enumerate(examples) if i not in repeated]
    parts: list[list[Example]] = []
    for share, most in ((0.4, 400), *([] if tests else [(0.3, most_final)])):
        if len(examples) < 4:
            raise DataError(
                f"{name}: {len(asked)} rows are too few: to show, to race on and to measure on need their own"
            )
        kept, held = hold_out([e.question for e in examples], share, most, seed)
        parts.append([examples[i] for i in held])
        examples = [examples[i] for i in kept]
    rng = np.random.default_rng(seed)  # files are often sorted by class, and every use takes the first rows

    def shuffled(rows: list[Example]) -> list[Example]:
        return [rows[i] for i in rng.permutation(len(rows))]

    return _Data(shuffled(examples), shuffled(parts[0]), shuffled(tests or parts[1])[:most_final])


def _framed(candidate: Candidate, example: Example) -> list[Message]:
    facts = ExpertFacts("candidate", KIND, system=candidate.instruction, examples=candidate.shots)
    return posed(facts, example.prompt)


def _fits(engine: Engine, candidate: Candidate, data: _Data, answer_tokens: int) -> bool:
    longest = max(data.race + data.final, key=lambda e: sum(len(m["content"]) for m in e.prompt))
    return len(engine.base.encode(engine.base.chat(_framed(candidate, longest)))) + answer_tokens < engine.context


def _proposals(answers: _Answers, data: _Data, declared: str, budget: int, seed: int) -> Iterator[str]:
    """Instructions that the model itself proposes."""
    asked = prompts.proposal_prompts(data.show, declared, max(1, int(budget * PROPOSALS)), seed)
    for i, text in enumerate(asked):
        message = [{"role": "user", "content": text}]
        room = answers.engine.context - len(answers.engine.base.encode(answers.engine.base.chat(message)))
        if room > 32:
            sampling = Sampling(max_tokens=min(80, room - 1), temperature=0.8, seed=seed + i)
            proposed = prompts.cleaned(answers.ask([message], sampling)[0])
            if proposed:
                yield proposed


def _own_answers(
    answers: _Answers, data: _Data, declared: Candidate, sampling: Sampling, metric: Callable[[str, str], float],
    calls: int, seed: int,
) -> list[prompts.Shot]:  # fmt: skip
    """Training rows that the model answers well as it is, with its own words: DSPy's bootstrapped examples."""
    rows = [e for e in data.show if _fits(answers.engine, declared, _Data([], [e], []), sampling.max_tokens)][:calls]
    said = answers.ask([_framed(declared, e) for e in rows], sampling)
    return [(e.question, a) for e, a in zip(rows, said, strict=True) if a and metric(a, e.completion) >= 0.8]


def _publish(
    business: Business, task: str, name: str, best: Candidate, choices: tuple[str, ...], data: _Data,
    outcome: Optimised, budget: int, seed: int,
) -> ExpertFacts:  # fmt: skip
    facts = ExpertFacts(
        name, KIND, description=business.spec(task).description, system=best.instruction, choices=choices,
        examples=best.shots, base=business.config.business.base,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        training={"task": task, "budget": budget, "candidates": len(outcome.tried), "origin": best.origin,
                  "seed": seed},
    )  # fmt: skip
    statistics = route_statistics(business, data.show + data.race, seed)

    def fill(folder: Path) -> None:
        (folder / "tried.json").write_text(json.dumps([t.json() for t in outcome.tried], indent=2, ensure_ascii=False))
        statistics.save(folder)

    return business.library.publish(facts, fill, outcome.final)
