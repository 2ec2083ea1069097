"""What the business knows, for the desk: evidence for a customer's question, and an answer checked against it."""

from collections.abc import Sequence

from coterie.grounding import Grounded, Grounding, Writer
from coterie.knowledge.evidence import Evidence, Reader


def ground(grounding: Grounding, question: str, reader: Reader) -> list[Evidence]:
    """The best evidence first. Raises CoterieError where the sources cannot be searched at all."""
    return grounding.gather([{"role": "user", "content": question}], reader).evidence


def check(grounding: Grounding, evidence: Sequence[Evidence]) -> Writer | None:
    """What checks an answer as it is written, and cites; None where there is no evidence to check it against."""
    return grounding.writer(Grounded(list(evidence), True, [])) if evidence else None
