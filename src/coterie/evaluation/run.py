"""Let the base model or an expert answer examples, and measure the answers."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from coterie.data.read import Example, Message, last_said
from coterie.engine.engine import Engine
from coterie.engine.request import Adapter, Generation, Sampling
from coterie.errors import ContextTooLong, DataError
from coterie.evaluation.metrics import summarise
from coterie.experts.classifier import TOGETHER
from coterie.experts.kinds import Labeller
from coterie.model.constrain import choices as choice_constraint

ROOM = 8  # tokens


def answer_each(
    engine: Engine, prompts: Iterable[list[Message]], adapter: Adapter | Labeller | None, sampling: Sampling
) -> Iterator[str | None]:
    """The answer to each conversation, in order; None where it does not fit into the context.

    As many are under way at once as the engine has slots. A classifier labels them TOGETHER at a time, without it.
    """
    if isinstance(adapter, Labeller):
        rest = map(last_said, prompts)
        while part := list(islice(rest, TOGETHER)):
            yield from (v.label for v in adapter.judge(part))
        return
    under_way: deque[Generation | None] = deque()

    def collect() -> str | None:
        generation = under_way.popleft()
        return generation.text().strip() if generation else None

    try:
        for messages in prompts:
            prompt = engine.base.encode(engine.base.chat(messages))
            try:
                under_way.append(engine.submit(prompt, sampling, adapter))
            except ContextTooLong:
                under_way.append(None)
            if len(under_way) >= engine.slots + engine.queue // 2:
                yield collect()
        while under_way:
            yield collect()
    finally:
        for generation in under_way:
            if generation:
                generation.cancel()


def answer_all(
    engine: Engine, examples: Iterable[Example], adapter: Adapter | Labeller | None, sampling: Sampling,
    tell: Callable[[int], None] = lambda _: None,
) -> list[str | None]:  # fmt: skip
    """The answer to each example's prompt, in order; None where the prompt does not fit into the context."""
    answers: list[str | None] = []
    for answer in answer_each(engine, (e.prompt for e in examples), adapter, sampling):
        answers.append(answer)
        tell(len(answers))
    return answers


def evaluate(
    engine: Engine, examples: Sequence[Example], adapter: Adapter | Labeller | None, choices: Sequence[str] = (),
    tell: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Any], list[str | None]]:  # fmt: skip
    """Greedy answers to `examples`, restricted to `choices` where there are any: the figures, and the answers.

    An answer may be ROOM tokens longer than the longest that is wanted.
    Prompts that do not fit into the context count as wrong answers; `too_long` says how many. Raises DataError where
    there are no examples.
    """
    if not examples:
        raise DataError("no rows to measure")
    longest = max(len(engine.base.encode(e.completion)) for e in examples)
    sampling = Sampling(longest + ROOM, constraint=choice_constraint(choices) if choices else None)
    answers = answer_all(engine, examples, adapter, sampling, tell)
    figures = summarise([a or "" for a in answers], [e.completion for e in examples], bool(choices))
    return {"rows": len(answers), "too_long": answers.count(None), **figures}, answers
