"""What the business knows, for the desk: evidence for a customer's question, and an answer checked against it."""

from collections.abc import Sequence

from coterie.desk.flow import Checked
from coterie.grounding import Grounded, Grounding
from coterie.knowledge.evidence import Evidence, Reader


def ground(grounding: Grounding, question: str, reader: Reader) -> list[Evidence]:
    """The best evidence first. Raises CoterieError where the sources cannot be searched at all."""
    return grounding.gather([{"role": "user", "content": question}], reader).evidence


def check(grounding: Grounding, text: str, evidence: Sequence[Evidence]) -> Checked:
    """The answer with its citations, and the statements that no evidence supports; untouched without evidence."""
    if not evidence:
        return Checked(text)
    grounded = Grounded(list(evidence), True, [])
    writer = grounding.writer(grounded)
    said = writer.feed(text) + writer.end()
    return Checked(said, tuple(s.text for s in grounded.sentences if s.checked and s.cites is None))
