"""What the business knows, for the desk: evidence for a customer's question, and an answer checked against it."""

import threading
from collections.abc import Sequence

from coterie.answer import Answerer
from coterie.desk.flow import Checked
from coterie.grounding import Grounded, Grounding
from coterie.knowledge.evidence import Evidence, Reader
from coterie.sources import Knowledge


class Knowing:
    """The declared sources, opened when the first question comes."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer, self._lock = answerer, threading.Lock()
        self._grounding: Grounding | None = None

    def _opened(self) -> Grounding:
        with self._lock:
            if self._grounding is None:
                knowledge = Knowledge(self._answerer.business, engine=lambda: self._answerer.engine)
                self._grounding = Grounding(self._answerer, knowledge)
            return self._grounding

    def ground(self, question: str, reader: Reader) -> list[Evidence]:
        """The best evidence first. Raises CoterieError where the sources cannot be searched at all."""
        return self._opened().gather([{"role": "user", "content": question}], reader).evidence

    def check(self, text: str, evidence: Sequence[Evidence]) -> Checked:
        """The answer with its citations, and the statements that no evidence supports; untouched without evidence."""
        if not evidence:
            return Checked(text)
        grounded = Grounded(list(evidence), True, [])
        writer = self._opened().writer(grounded)
        said = writer.feed(text) + writer.end()
        return Checked(said, tuple(s.text for s in grounded.sentences if s.checked and s.cites is None))

    def close(self) -> None:
        if self._grounding:
            self._grounding.knowledge.close()
