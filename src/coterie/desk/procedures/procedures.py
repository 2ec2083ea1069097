"""Procedures at the desk: which one a customer wants, and a turn of the bot while one is under way."""

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.desk import handoff
from coterie.desk.conversation import Conversations
from coterie.desk.flow import Result
from coterie.desk.message import Message, Turn
from coterie.desk.procedures.guide import Guide
from coterie.desk.procedures.runs import Run, Runs, day
from coterie.desk.procedures.spec import Procedure
from coterie.desk.procedures.values import Value, plain

Embed = Callable[[Sequence[str]], NDArray[np.float32]]  # texts -> (texts, width), each of length 1
log = logging.getLogger(__name__)


class Procedures:
    """What the answer flow asks: `go_on` with the one under way, `begin` one that the customer wants."""

    def __init__(
        self, runs: Runs, embed: Embed | None = None, profile: Callable[[str], Mapping[str, Any]] = lambda _: {}
    ) -> None:
        self.runs, self.procedures, self._embed, self._profile = runs, runs.procedures, embed, profile
        self._triggers: list[tuple[str, float]] = []  # of each row of the matrix: whose, and how near
        self._matrix: NDArray[np.float32] | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let go of what the actions hold open."""
        self.runs.perform.close()

    def offers(self) -> list[dict[str, str]]:
        """The buttons before anything was written."""
        return [{"name": n, "title": p.spec.title} for n, p in self.procedures.items() if p.spec.offer]

    def go_on(self, turn: Turn) -> Result | None:
        """The turn of a procedure under way, or of one that the customer chose by its button; None: of no procedure."""
        run = self.runs.active(turn.conversation.id)
        if run is None:
            last = turn.messages[-1]
            chosen = last.data.get("start", "") if last.author == "customer" else ""
            return self._begin(turn, chosen) if chosen in self.procedures else None
        procedure = self.procedures.get(run.name)
        if procedure is None or procedure.version != run.version:
            return self._changed(run, turn)
        guide, fresh = self._guide(procedure, run, turn), self._unread(turn, run.state.seen)
        if run.status == "approving":
            guide.status = "approving"
            if run.decision:
                guide.status = "asking"
                guide.state.seen = max([guide.state.seen, *(m.seq for m in fresh)])  # said before what comes now
                guide.decide(run.decided_by if run.decision == "approved" else "")
            elif any(guide.is_stop(m.text) for m in fresh):
                guide.take(fresh)
            else:
                return None
        else:
            if run.state.phase == "step":
                guide.go_on()
            guide.take(fresh)
        return self._result(run, guide, turn)

    def begin(self, turn: Turn, question: str, topics: Collection[str]) -> Result | None:
        """A procedure that the question (masked) asks for, or that one of the topics begins."""
        if self.runs.active(turn.conversation.id):
            return None  # one waits for an approval
        by_topic = next((n for n, p in self.procedures.items() if set(p.spec.topics) & set(topics)), "")
        name = by_topic or self._nearest(question)
        return self._begin(turn, name) if name else None

    def decide(
        self, talks: Conversations, conversation: str, agent: str, role: str, run: str, yes: bool, note: str = ""
    ) -> None:
        """Somebody at the desk approves or refuses what waits. Raises Changed, NotAllowed."""
        talks.decide(conversation, agent, lambda s: self.runs.decide(s, conversation, agent, role, run, yes), note)

    def _begin(self, turn: Turn, name: str) -> Result:
        first = turn.messages[-1]
        run = self.runs.begin(turn.conversation, name, first)
        guide = self._guide(self.procedures[name], run, turn)
        guide.go_on()
        return self._result(run, guide, turn)

    def _guide(self, procedure: Procedure, run: Run, turn: Turn) -> Guide:
        customer: dict[str, Value] = {"customer.id": run.customer}
        if any(name.startswith("customer.") for name in procedure.kinds if name != "customer.id"):
            try:
                customer |= {f"customer.{k}": str(v) for k, v in self._profile(run.customer).items()}
            except Exception as error:  # conditions on what is not there do not hold, and a person is called
                log.warning("the customer's profile could not be read: %s", type(error).__name__)  # it may quote them
        last = max(m.at for m in turn.messages)
        return Guide(procedure, run.state, partial(self.runs.act, run), day(last), customer)

    def _unread(self, turn: Turn, seen: int) -> list[Message]:
        return [m for m in turn.messages if m.author == "customer" and m.seq > seen]

    def _result(self, run: Run, guide: Guide, turn: Turn) -> Result:
        done, of = guide.progress()
        asking = guide.status == "asking"
        shown: dict[str, Any] = {
            "name": run.name, "title": guide.spec.title, "status": guide.status,
            "step": done, "of": of, "asked": guide.state.asked,
            "buttons": guide.state.buttons if asking else [],
            "stop": guide.spec.texts.stop if guide.status in ("asking", "approving") else "",
        }  # fmt: skip
        result = Result("\n\n".join(guide.says), data={"procedure": shown})
        result.keep = lambda session: self.runs.keep(session, run, guide)
        if guide.status == "handed_over":
            detail = "\n".join([guide.detail, *self.runs.facts(run)])
            result.handoff = handoff.brief(guide.reason, turn.messages, detail=detail)
        return result

    def _changed(self, run: Run, turn: Turn) -> Result:
        """Its file was changed or taken away while a customer was in it."""
        detail = "\n".join([f"{run.name}: the procedure's file was changed meanwhile", *self.runs.facts(run)])
        return Result(handoff=handoff.brief("procedure_changed", turn.messages, detail=detail))

    def _nearest(self, question: str) -> str:
        """The procedure with a trigger that is near enough to the question, "" for none."""
        if self._embed is None or not any(p.spec.triggers for p in self.procedures.values()) or not plain(question):
            return ""
        with self._lock:
            if self._matrix is None:
                pairs = [(name, p.spec.near, t) for name, p in self.procedures.items() for t in p.spec.triggers]
                self._triggers = [(name, near) for name, near, _ in pairs]
                self._matrix = self._embed([t for *_, t in pairs])
        near = self._matrix @ self._embed([question])[0]
        best = int(near.argmax())
        name, enough = self._triggers[best]
        return name if near[best] >= enough else ""
