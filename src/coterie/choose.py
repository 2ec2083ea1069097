"""Who answers a request for "auto": the rules of coterie.toml, then the router, kept in step with the library.

Notable: one look at a time stamp tells whether an expert came, went or changed since the last request.
"""

import logging
import threading
import time
from dataclasses import dataclass
from typing import TypeVar

from coterie.business import Business
from coterie.data.read import Message
from coterie.engine.by_torch import TorchStep
from coterie.engine.step import Step
from coterie.errors import CoterieError, ModelError
from coterie.experts.library import Library
from coterie.model.load import BaseModel
from coterie.model.threads import give_back_pool
from coterie.routing.router import Decision, Router, rank
from coterie.routing.rules import Rule, Ruling, rule
from coterie.routing.space import background, locate
from coterie.routing.statistics import Summary, load_statistics, load_summary, made_at

SHORT = 4  # a message of fewer words ("yes, please") is read together with the one before it
T = TypeVar("T", bound=Summary)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What was decided about a text, and why some experts could not be chosen."""

    text: str
    decision: Decision
    forced: bool
    refused: dict[str, str]

    def why_not(self) -> dict[str, str]:
        """For each expert that was not chosen, the reason in words."""
        chosen = dict(self.decision.chosen)
        reasons = dict(self.refused)
        for place, s in enumerate(self.decision.scored, 1):
            if s.name in chosen:
                continue
            if s.similarity < s.threshold:
                reasons[s.name] = f"not near enough: similarity {s.similarity:.2f}, it asks for {s.threshold:.2f}"
            elif s.similarity > self.decision.scored[0].similarity:  # the direct comparison of the best two said so
                best = self.decision.scored[0].name
                reasons[s.name] = f"near enough, but compared directly the text is more like {best}'s inputs"
            else:
                reasons[s.name] = f"near enough, but others are nearer: place {place}"
        return reasons


class Chooser:
    """The router of one business."""

    def __init__(self, business: Business, base: BaseModel, step: Step | TorchStep | None = None) -> None:
        self.business, self.base, self._step = business, base, step
        self._lock = threading.Lock()
        self._router: Router | None = None
        self._versions: dict[str, tuple[int, int]] = {}  # and when their statistics were made
        self._marks: dict[str, int] = {}  # of those whose current version is known for sure
        self._left_out: dict[str, str] = {}
        self._stamp: int | None = None

    def choose(self, text: str, channel: str = "") -> Choice:
        """The experts for `text` and their shares. Raises CoterieError for a rule that cannot be kept."""
        settings = self.business.config.routing
        with self._lock:
            router = self._in_step()
            ruling = self._ruling(text, channel)
            allowed = self._versions.keys() - ruling.refused.keys() if ruling.refused else None
            vector = locate(self.base, [text], self._step)[0] if len(router) else router.background.centre
            give_back_pool()
            decision = router.route(vector, settings.top_k, settings.abstain, allowed, sure=bool(ruling.use))
            if ruling.use and not decision.chosen:  # none of them has statistics; the rule counts all the same
                decision = Decision(((ruling.use[0], 1.0),), decision.scored)
            chosen = dict(decision.chosen)
            refused = {n: why for n, why in (self._left_out | router.lost | ruling.refused).items() if n not in chosen}
        return Choice(text, decision, bool(ruling.use), refused)

    def refused(self, text: str, channel: str = "") -> dict[str, str]:
        """The experts that the rules keep from answering `text`, and why. Raises CoterieError as `choose` does."""
        with self._lock:
            self._in_step()
            return self._ruling(text, channel).refused

    def _ruling(self, text: str, channel: str) -> Ruling:
        rules = self.business.config.routing.rules
        known = [Rule(r.channel, tuple(r.words), tuple(r.use), tuple(r.forbid)) for r in rules]
        return rule(known, channel, text, self._versions.keys())

    def _in_step(self) -> Router:
        """The router, after the library's changes since the last request."""
        library = self.business.library
        if self._router is None:
            self._router = Router(background(self.base, self.business.folder / ".coterie"))
        stamp = library.stamp()
        if stamp == self._stamp:
            return self._router
        self._left_out.clear()
        now: dict[str, tuple[int, int]] = {}
        marks, sure = library.marks(), time.time_ns() - 10**9  # a clock's tick may pass before a change shows
        for name, mark in marks.items():
            try:
                same = self._marks.get(name) == mark and name in self._versions
                version = self._versions[name][0] if same else library.current(name)
                if version is not None:
                    now[name] = version, made_at(f"{library.root}/{name}/{version}")
            except ModelError as error:
                self._left_out[name] = str(error)
        for name in self._versions.keys() - now.keys():
            self._drop(name)
        anew = [n for n in now if self._versions.get(n) != now[n] or n not in self._router]
        for name in sorted(anew, key=rank):  # so that who is pooled stays so
            self._drop(name)
            self._take(library, name, now[name][0])
        self._versions, self._stamp = now, stamp
        self._marks = {name: mark for name, mark in marks.items() if mark < sure}
        return self._router

    def _drop(self, name: str) -> None:
        if self._router and name in self._router:
            self._router.remove(name)

    def _take(self, library: Library, name: str, version: int) -> None:
        """Know a version of an expert, or say why not; the others go on either way."""
        assert self._router is not None
        mend = f"`coterie experts learn-route {name} --inputs FILE` gives it some"

        def there(found: T | None) -> T:
            if found is None:
                raise ModelError(f"{name}: no routing statistics; {mend}")
            return found

        try:
            library.facts(name, version)  # an expert whose facts are damaged cannot answer
            summary = there(load_summary(library.folder(name, version)))
            self._router.add(name, summary, lambda: there(load_statistics(library.folder(name, version))))
        except CoterieError as error:
            self._left_out[name] = str(error)
            log.warning("left out of routing: %s", error)


def question(messages: list[Message]) -> str:
    """The text of a conversation that is routed by: the last message of the user, with those before it while short."""
    said = [m["content"] for m in messages if m["role"] == "user"]
    text = said.pop() if said else ""
    while said and len(text.split()) < SHORT:
        text = f"{said.pop()}\n{text}"
    return text
