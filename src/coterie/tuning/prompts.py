"""Prompt search: which instruction and which worked examples make a frozen model answer best, within a budget.

Candidates pair an instruction (declared, given, from a template, or proposed by the model) with few-shot examples
drawn from the training rows or from the model's own right answers, as DSPy's bootstrap few-shot with random search
(Khattab et al. 2023). They race by successive halving (Jamieson & Talwalkar 2016): all answer a few rows, the better
half answers more. Knows no engine: `score` is given, so the search is the same for any model and metric.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from coterie.data.read import Example

Shot = tuple[str, str]  # what was asked, what was answered
SHOTS = (0, 1, 2, 4, 8)  # how many examples a candidate may show
FEWEST_ROWS = 8  # that a candidate answers before it may be dropped
MOST_CANDIDATES = 64
LISTED = 60  # choices that a template names; more would fill the context

TEMPLATES = (
    "Answer in the same form as the examples.",
    "Answer as briefly and exactly as you can.",
    "You are a careful expert. Read the message and give only the answer.",
)
CHOICE_TEMPLATES = (
    "Answer with exactly one of these: {choices}.",
    "Classify the message. The classes are: {choices}. Answer with the name of the class only.",
    "Which of these fits the message best: {choices}?",
)


@dataclass(frozen=True)
class Candidate:
    """An instruction with the examples shown after it, and where the instruction and the examples come from."""

    instruction: str
    shots: tuple[Shot, ...] = ()
    origin: str = field(default="declared", compare=False)


@dataclass
class Tried:
    """A candidate and its scores on the first rows of the search's data, in the order of those rows."""

    candidate: Candidate
    scores: list[float] = field(default_factory=list)
    rounds: int = 0

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores) if self.scores else 0.0

    def json(self) -> dict[str, Any]:
        return {"score": round(self.mean, 4), "rows": len(self.scores), "rounds": self.rounds,
                **asdict(self.candidate)}  # fmt: skip


Score = Callable[[list[tuple[Candidate, int]]], list[float]]  # the score of each candidate on each row


def instructions(
    declared: str, given: Sequence[str], choices: Sequence[str], proposed: Sequence[str]
) -> list[tuple[str, str]]:
    """Every different instruction to try with its origin, the declared one first."""
    found = [(declared, "declared"), *((g, "given") for g in given), *((p, "proposed") for p in proposed)]
    if choices and len(choices) <= LISTED:
        listed = ", ".join(choices)
        found += [(" ".join(filter(None, (declared, t.format(choices=listed)))), "template") for t in CHOICE_TEMPLATES]
    found += [(" ".join(filter(None, (declared, t))), "template") for t in TEMPLATES]
    seen: dict[str, str] = {}
    for text, origin in found:
        seen.setdefault(text.strip(), origin)
    return list(seen.items())


def proposal_prompts(pool: Sequence[Example], declared: str, count: int, seed: int) -> list[str]:
    """`count` requests to the model for an instruction, each with other examples of the task."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        rows = [pool[j] for j in rng.permutation(len(pool))[:4]]
        shown = "\n\n".join(f"Message: {e.question[:300]}\nAnswer: {e.completion[:300]}" for e in rows)
        if i % 2 and declared:
            out.append(f"Rewrite this instruction so that it is clearer. Give only the instruction.\n\n{declared}")
        else:
            out.append(
                f"Someone answered these messages:\n\n{shown}\n\nWrite one short instruction that tells how to answer "
                "such messages. Give only the instruction."
            )
    return out


def cleaned(proposal: str) -> str:
    """The first paragraph of what the model proposed, without quotes; empty where it is no use as an instruction."""
    first = proposal.strip().split("\n\n")[0].strip().strip("\"'*`").strip()
    first = first.removeprefix("Instruction:").strip()
    return first if 10 <= len(first) <= 400 else ""


def candidates(
    texts: Sequence[tuple[str, str]], pool: Sequence[Shot], own: Sequence[Shot], count: int, seed: int
) -> list[Candidate]:
    """`count` different candidates or fewer, the first the declared instruction alone, the others drawn at random.

    `pool` holds examples from the training rows, `own` the model's own right answers. Half of the sets of examples
    from the pool are spread over the answers, so that no class is shown twice before all are shown once.
    """
    rng = np.random.default_rng(seed)
    found = {Candidate(texts[0][0], (), texts[0][1]): None}
    for _ in range(50 * count):
        if len(found) >= count:
            break
        text, origin = texts[int(rng.integers(len(texts)))]
        size = SHOTS[int(rng.integers(len(SHOTS)))]
        source, mark = (own, "own answers") if len(own) >= size and rng.random() < 0.3 else (pool, "rows")
        order = [source[int(i)] for i in rng.permutation(len(source))]
        shots = tuple((_spread(order) if rng.random() < 0.5 else order)[:size])
        found.setdefault(Candidate(text, shots, f"{origin}, {len(shots)} {mark}" if shots else origin))
    return list(found)


def _spread(shots: Sequence[Shot]) -> list[Shot]:
    """The same examples, ordered so that answers repeat as late as they can."""
    turns: dict[str, int] = {}
    ranked = []
    for place, (asked, answer) in enumerate(shots):
        ranked.append((turns.get(answer, 0), place, (asked, answer)))
        turns[answer] = turns.get(answer, 0) + 1
    return [shot for _, _, shot in sorted(ranked)]


def field_size(calls: int) -> int:
    """How many candidates `calls` model calls can race: each answers FEWEST_ROWS in each round of halving."""
    sizes = (2**k for k in range(int(math.log2(MOST_CANDIDATES)), 0, -1))
    return next((n for n in sizes if n * int(math.log2(n)) * FEWEST_ROWS <= calls), 1)


def race(
    field_: Sequence[Candidate], rows: int, score: Score, calls: int,
    tell: Callable[[list[Tried]], None] = lambda _: None,
) -> list[Tried]:  # fmt: skip
    """Successive halving over at most `rows` rows and `calls` calls of the model: what was tried, the best first.

    Every round shares the calls equally among those still in it; scores of earlier rounds count on, and all answer
    the same rows. Ties go to the candidate that shows fewer examples, then to the earlier one.
    """
    tried = [Tried(c) for c in field_]
    alive, left = list(tried), calls
    rounds = max(1, math.ceil(math.log2(len(tried))))
    for number in range(rounds):
        share = left // (rounds - number) // len(alive)
        start = len(alive[0].scores)
        new = range(start, min(start + share, rows))
        if new:
            scores = iter(score([(t.candidate, i) for t in alive for i in new]))
            for t in alive:
                t.scores += [next(scores) for _ in new]
            left -= len(alive) * len(new)
        for t in alive:
            t.rounds = number + 1
        order = {id(t): i for i, t in enumerate(tried)}
        alive.sort(key=lambda t: (-t.mean, len(t.candidate.shots), order[id(t)]))
        tell(alive)
        alive = alive[: max(1, math.ceil(len(alive) / 2))]
    order = {id(t): i for i, t in enumerate(tried)}
    return sorted(tried, key=lambda t: (-t.rounds, -t.mean, len(t.candidate.shots), order[id(t)]))
