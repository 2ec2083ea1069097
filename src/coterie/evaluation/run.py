"""Let the base model or an expert answer examples, and measure the answers."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from coterie.data.read import Example, Message
from coterie.engine.constrain import choices as choice_constraint
from coterie.engine.engine import Engine
from coterie.engine.request import Adapter, Generation, Sampling
from coterie.evaluation.metrics import summarise


def answer_each(
    engine: Engine, prompts: Iterable[list[Message]], adapter: Adapter | None, sampling: Sampling
) -> Iterator[str]:
    """The answer to each conversation, in order; as many at once as the engine has slots."""
    under_way: deque[Generation] = deque()
    try:
        for messages in prompts:
            under_way.append(engine.submit(engine.base.encode(engine.base.chat(messages)), sampling, adapter))
            if len(under_way) >= engine.slots + engine.queue // 2:
                yield under_way.popleft().text().strip()
        while under_way:
            yield under_way.popleft().text().strip()
    finally:
        for generation in under_way:
            generation.cancel()


def answer_all(
    engine: Engine, examples: Iterable[Example], adapter: Adapter | None, sampling: Sampling,
    tell: Callable[[int], None] = lambda _: None,
) -> list[str]:  # fmt: skip
    """The answer to each example's prompt, in order."""
    answers: list[str] = []
    for answer in answer_each(engine, (e.prompt for e in examples), adapter, sampling):
        answers.append(answer)
        tell(len(answers))
    return answers


def evaluate(
    engine: Engine, examples: Sequence[Example], adapter: Adapter | None, choices: Sequence[str] = (),
    max_tokens: int = 128, tell: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Greedy answers to `examples`, restricted to `choices` where there are any: the figures, and the answers."""
    sampling = Sampling(max_tokens=max_tokens, constraint=choice_constraint(choices) if choices else None)
    answers = answer_all(engine, examples, adapter, sampling, tell)
    figures = summarise(answers, [e.completion for e in examples], bool(choices))
    return {"rows": len(answers), **figures}, answers
