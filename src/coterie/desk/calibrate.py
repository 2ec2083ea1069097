"""Answers to rows whose right answer is known: the signals of each, and whether it was right."""

import re
from collections import deque
from collections.abc import Callable, Sequence

from coterie.answer import Answer, Answerer
from coterie.data.read import Example
from coterie.desk.confidence import Signals
from coterie.engine.request import Sampling
from coterie.evaluation.metrics import token_f1

AGREES = 0.5  # token F1 from which on a free answer says the same as the right one
Right = Callable[[Answer, str, Example], bool]


def agrees(_answer: Answer, said: str, example: Example) -> bool:
    """The same label; or, of a sentence, enough of the same words."""
    said, wanted = said.strip(), example.completion.strip()
    if said == wanted:
        return True
    return len(re.findall(r"\w+", wanted)) > 2 and token_f1(said, wanted) >= AGREES


def outcomes(
    answerer: Answerer, rows: Sequence[Example], count: Callable[[int], None] = lambda _: None, right: Right = agrees
) -> tuple[list[Signals], list[bool]]:
    """Ask "auto" every row, several at once."""
    signals, good, at_once = list[Signals](), list[bool](), answerer.business.config.business.slots
    running: deque[tuple[Answer, Example]] = deque()

    def take() -> None:
        answer, example = running.popleft()
        said, logprobs = "", list[float]()
        for piece in answer.generation:
            said += piece.text
            logprobs += [t.logprob for t in piece.tokens if t.logprob is not None]
        mean = sum(logprobs) / len(logprobs) if logprobs else None
        signals.append(Signals(answer.similarity, mean))
        good.append(right(answer, said, example))
        count(len(good))

    for example in rows:
        prompt = [m for m in example.prompt if m["role"] != "system"]  # customers bring no instruction
        longest = max(16, len(answerer.engine.base.encode(example.completion)) + 8)
        running.append((answerer.chat("auto", prompt, Sampling(max_tokens=longest, logprobs=0)), example))
        if len(running) >= at_once:
            take()
    while running:
        take()
    return signals, good
