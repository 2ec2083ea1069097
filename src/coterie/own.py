"""The engines of experts that are models of their own (`full`): opened when first asked, stopped once they may go.

Notable: an engine is stopped only while nothing runs in it, so whoever answers finishes on the old version. That an
engine may stop between being found and being asked is seen in its refusal, and it is opened again.
"""

import threading
from collections.abc import Callable

from coterie.engine.engine import Engine
from coterie.engine.request import Callback, Generation, Sampling
from coterie.errors import CoterieError, Stopped
from coterie.experts.library import ExpertFacts, Library


class OwnEngines:
    """They take up to `budget` bytes of weights, the longest idle go first, the latest used stays whatever it takes."""

    def __init__(self, start: Callable[[ExpertFacts], Engine | None], library: Library, budget: int) -> None:
        self._start, self._library, self._budget = start, library, budget
        self._kept: dict[tuple[str, int], Engine] = {}  # by name and version, the latest used last
        self._lock = threading.Lock()
        self._opening = threading.Lock()  # a model is read while those that are open go on

    def submit(
        self, facts: ExpertFacts, prompt: list[int], sampling: Sampling, on_piece: Callback | None
    ) -> Generation:
        """Queue a request at the expert's own engine. Raises what `Engine.submit` does, and ModelError."""
        while True:
            engine = self._open(facts)
            try:
                return engine.submit(prompt, sampling, None, on_piece)
            except Stopped:
                with self._lock:
                    if engine in self._kept.values():  # nobody has let it go: it is over
                        raise

    def tidy(self, wanted: tuple[str, int] | None = None) -> None:
        """Stop idle engines of versions that answer no more, and the longest idle beyond the budget; not `wanted`."""
        if not self._kept:
            return
        with self._lock:
            *idle, latest = self._kept
            for key in [*idle, latest]:
                beyond = key != latest and sum(e.base.decoder.nbytes for e in self._kept.values()) > self._budget
                if key != wanted and (beyond or not self._answers(*key)) and self._kept[key].retire():
                    del self._kept[key]

    def close(self) -> None:
        """Stop them all."""
        with self._lock:
            for engine in self._kept.values():
                engine.close()

    def _answers(self, name: str, version: int) -> bool:
        try:
            return self._library.current(name) == version
        except CoterieError:  # a damaged file that says which: whoever answers goes on
            return True

    def _open(self, facts: ExpertFacts) -> Engine:
        key = facts.name, facts.version
        engine = self._latest(key)
        if engine is None:
            with self._opening:
                engine = self._latest(key)  # somebody else may have opened it meanwhile
                if engine is None:
                    engine = self._start(facts)
                    assert engine is not None, "a full expert has an engine of its own"
                    with self._lock:
                        self._kept[key] = engine
            self.tidy(key)
        return engine

    def _latest(self, key: tuple[str, int]) -> Engine | None:
        """The engine if it is open, from now on the latest used."""
        with self._lock:
            engine = self._kept.pop(key, None)
            if engine is not None:
                self._kept[key] = engine
            return engine
