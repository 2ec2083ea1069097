"""Answers to rows whose right answer is known: the signals of each, and whether it was right.

Notable: they are asked as a stranger at the desk asks, with the same evidence before the model and the same check. A
row whose answer the check withholds is left out: nobody is ever sent such an answer, however sure it is.
"""

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coterie.answer import Answer, Answerer
from coterie.choose import question
from coterie.data.read import Example
from coterie.desk.confidence import Signals
from coterie.desk.flow import MOST_EVIDENCE, Parts, preface
from coterie.engine.request import Sampling
from coterie.evaluation.metrics import token_f1
from coterie.knowledge.evidence import Evidence, Reader

AGREES = 0.5  # token F1 from which on a free answer says the same as the right one
Right = Callable[[Answer, str, Example], bool]


def agrees(_answer: Answer, said: str, example: Example) -> bool:
    """The same label; or, of a sentence, enough of the same words."""
    said, wanted = said.strip(), example.completion.strip()
    if said == wanted:
        return True
    return len(re.findall(r"\w+", wanted)) > 2 and token_f1(said, wanted) >= AGREES


@dataclass(frozen=True)
class _Asked:
    answer: Answer
    example: Example
    evidence: Sequence[Evidence]


def outcomes(
    answerer: Answerer, rows: Sequence[Example], count: Callable[[int], None] = lambda _: None, right: Right = agrees,
    parts: Parts | None = None,
) -> tuple[list[Signals], list[bool]]:  # fmt: skip
    """Ask "auto" every row, several at once. `parts`: what grounds and checks the desk's answers."""
    parts = parts or Parts()
    signals, good, at_once = list[Signals](), list[bool](), answerer.business.config.business.slots
    running, done = deque[_Asked](), 0

    def take() -> None:
        nonlocal done
        asked, done = running.popleft(), done + 1
        said, logprobs = "", list[float]()
        for piece in asked.answer.generation:
            said += piece.text
            logprobs += [t.logprob for t in piece.tokens if t.logprob is not None]
        count(done)
        name = asked.answer.expert
        check = None if name and answerer.business.library.facts(name).choices else parts.check(asked.evidence)
        if check:
            check.feed(said)
            check.end()
            if check.unsupported:
                return
        mean = sum(logprobs) / len(logprobs) if logprobs else None
        best = max((e.score for e in asked.evidence), default=None)
        signals.append(Signals(asked.answer.similarity, mean, best))
        good.append(right(asked.answer, said, asked.example))

    for example in rows:
        prompt = [m for m in example.prompt if m["role"] != "system"]  # customers bring no instruction
        evidence = parts.ground(question(prompt), Reader())[:MOST_EVIDENCE]
        longest = max(16, len(answerer.engine.base.encode(example.completion)) + 8)
        sampling = Sampling(max_tokens=longest, logprobs=0)
        answer = answerer.chat("auto", prompt, sampling, preface=preface(evidence, ()))
        running.append(_Asked(answer, example, evidence))
        if len(running) >= at_once:
            take()
    while running:
        take()
    return signals, good
