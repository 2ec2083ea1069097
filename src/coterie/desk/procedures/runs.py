"""Runs of procedures in the database: begun, taken on, approved, ended; and every action that is done in them.

Notable: an action is written down as begun, under its key, before it is done. A process that dies in between leaves
that mark: what only reads is done again; what writes is not, its outcome is unknown, and a person is called. A run's
new state, what the customer is told and the handoff are kept in one transaction with the end of the bot's turn. So a
turn that is begun anew comes to the same actions, finds those that are done, and does none of them twice.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, cast

from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coterie.desk.message import Changed, Conversation, Message, NotAllowed
from coterie.desk.procedures.actions import FOUND, ActionFailed, OutcomeUnknown, Perform
from coterie.desk.procedures.guide import Guide, Planned, State
from coterie.desk.procedures.spec import ActionSpec, Procedure
from coterie.desk.procedures.values import Value, kept, shown, typed
from coterie.desk.record import Seal, Unseal, from_the_clear, in_the_clear
from coterie.errors import Stopped
from coterie.store.conversation import ConversationRow
from coterie.store.database import reading, writing
from coterie.store.procedure import ACTIVE, ActionRow, RunRow

Told = Callable[[Session, str, str, str, Mapping[str, Any]], None]  # session, actor, action, customer, detail


def untold(_session: Session, _actor: str, _action: str, _customer: str, _detail: Mapping[str, Any]) -> None:
    """An audit log that is not there."""


@dataclass(frozen=True)
class Run:
    """One as it stood when it was read."""

    id: str
    conversation: str
    customer: str
    name: str
    version: str
    status: str
    state: State
    wants: str
    decision: str
    decided_by: str
    began_at: float


class Runs:
    """All runs of one business. `told`: writes the audit log in the transaction that it is about."""

    def __init__(
        self, database: Engine, procedures: Mapping[str, Procedure], perform: Perform, seal: Seal = in_the_clear,
        unseal: Unseal = from_the_clear, clock: Callable[[], float] = time.time, told: Told = untold,
    ) -> None:  # fmt: skip
        self.database, self.procedures, self.perform, self.clock = database, procedures, perform, clock
        self._seal, self._unseal, self._told = seal, unseal, told

    # A run

    def active(self, conversation: str) -> Run | None:
        """The run that is under way in a conversation."""
        with reading(self.database) as session:
            row = self._active(session, conversation)
            return self._run(row) if row else None

    def begin(self, c: Conversation, name: str, first: Message) -> Run:
        """A run that begins with a message of the customer; the same message begins it once."""
        id, now = f"{c.id}-{first.seq}", self.clock()
        with writing(self.database) as session:
            row = session.get(RunRow, id)
            if row is None:
                state = State(first.text, first.seq)
                row = RunRow(
                    id=id, conversation_id=c.id, customer=c.customer, name=name,
                    version=self.procedures[name].version, status="asking", state=self._kept(c.customer, state.plain()),
                    wants="", decision="", decided_by="", began_at=now, changed_at=now,
                )  # fmt: skip
                session.add(row)
                session.flush()
                self._told(session, "bot", "procedure.begin", c.customer, {"procedure": name, "run": id})
            return self._run(row)

    def keep(self, session: Session, run: Run, guide: Guide) -> None:
        """Its new state, in the transaction that ends the bot's turn. A run that has ended meanwhile stays so."""
        row = session.get(RunRow, run.id, with_for_update=True)
        if row is None or row.status not in ACTIVE:
            return
        planned = guide.state.planned
        row.state, row.status, row.changed_at = (
            self._kept(run.customer, guide.state.plain()),
            guide.status,
            self.clock(),
        )
        row.decision = row.decided_by = ""
        row.wants = self.procedures[run.name].spec.actions[planned.action].approve if (
            planned and guide.status == "approving") else ""  # fmt: skip
        if guide.status not in ACTIVE:
            detail = {"procedure": run.name, "run": run.id, "outcome": guide.status}
            self._told(session, "bot", "procedure.end", run.customer, detail)

    def left(self, session: Session, row: ConversationRow) -> str:
        """The conversation goes to a person: its run ends. What they must know of it; "" where there is none."""
        found = self._active(session, row.id)
        if found is None:
            return ""
        run = self._run(found)
        found.status, found.changed_at, found.wants = "left", self.clock(), ""
        detail = {"procedure": run.name, "run": run.id, "outcome": "left"}
        self._told(session, "bot", "procedure.end", run.customer, detail)
        return "\n".join([f"{run.name} was under way and has ended here.", *self._facts(session, run)])

    def facts(self, run: Run) -> list[str]:
        """For people: what the customer said, and what was done."""
        with reading(self.database) as session:
            return self._facts(session, run)

    def _facts(self, session: Session, run: Run) -> list[str]:
        lines = [
            f"{name}: {shown(raw) if isinstance(raw, str | bool) else '-'}" for name, raw in run.state.values.items()
        ]
        for row in session.scalars(select(ActionRow).filter_by(run_id=run.id).order_by(ActionRow.begun_at)):
            lines.append(f"{row.name}: {row.status}")
        return lines

    def recorded(self, run_id: str) -> list[ActionRow]:
        """The actions of a run, in the order in which they were begun."""
        with reading(self.database) as session:
            return list(session.scalars(select(ActionRow).filter_by(run_id=run_id).order_by(ActionRow.begun_at)))

    # Actions

    def act(
        self, run: Run, name: str, action: ActionSpec, given: Mapping[str, Value], state: State
    ) -> dict[str, Value]:
        """Do an action once. Raises ActionFailed, OutcomeUnknown, Stopped (the run ended meanwhile)."""
        key, planned = f"{run.id}-{name}", state.planned
        assert planned is not None
        assert planned.action == name, "only what is planned is done"
        if (planned.agreement and state.agreed is None) or (planned.approval and not state.approved_by):
            raise AssertionError(f"{key}: not agreed to or not approved")
        known = self._begin(run, key, name, action, planned, state)
        if known is not None:
            return known
        try:
            found = self.perform(action, given, key)
        except (ActionFailed, OutcomeUnknown) as error:
            status = "failed" if isinstance(error, ActionFailed) else "unknown"
            self._end(run, key, name, status, {"why": str(error)})
            raise
        self._end(run, key, name, "done", {k: kept(v) for k, v in found.items()})
        return found

    def _begin(
        self, run: Run, key: str, name: str, action: ActionSpec, planned: Planned, state: State
    ) -> dict[str, Value] | None:
        """Write it down as begun; what it gave, where it has been done before."""
        unknown = ""
        with writing(self.database) as session:
            parent, row = session.get(RunRow, run.id, with_for_update=True), session.get(ActionRow, key)
            if row is not None and row.status == "done":
                return self._result(run, action, row)
            if row is not None and row.status in ("failed", "unknown"):
                why = str(self._opened(run.customer, row.result).get("why", ""))
                raise ActionFailed(why) if row.status == "failed" else OutcomeUnknown(why)
            if row is not None and row.writes:
                unknown = "the server stopped while it was being done; look whether it was"
                row.status, row.ended_at = "unknown", self.clock()
                row.result = self._kept(run.customer, {"why": unknown})
                self._tell(session, run, name, key, "unknown")
            elif row is None:
                if parent is None or parent.status not in ACTIVE:
                    raise Stopped("the procedure has ended meanwhile")
                session.add(ActionRow(
                    key=key, run_id=run.id, name=name, status="begun", writes=action.writes,
                    arguments=self._kept(run.customer, planned.arguments), result=b"",
                    needs_agreement=planned.agreement, needs_approval=planned.approval, agreed_seq=state.agreed,
                    approved_by=state.approved_by, begun_at=self.clock(), ended_at=None,
                ))  # fmt: skip
                try:
                    session.flush()
                except IntegrityError as error:
                    raise Stopped("another process is at it") from error
                self._tell(session, run, name, key, "begun", state)
        if unknown:
            raise OutcomeUnknown(unknown)
        return None

    def _end(self, run: Run, key: str, name: str, status: str, result: dict[str, Any]) -> None:
        with writing(self.database) as session:
            row = session.get(ActionRow, key)
            if row is None:  # the customer was erased meanwhile
                return
            row.status, row.ended_at, row.result = status, self.clock(), self._kept(run.customer, result)
            self._tell(session, run, name, key, status)

    def _result(self, run: Run, action: ActionSpec, row: ActionRow) -> dict[str, Value]:
        raw = self._opened(run.customer, row.result)
        return {FOUND: bool(raw.get(FOUND)), **{k: typed(kind, raw.get(k)) for k, kind in action.gives.items()}}

    def _tell(self, session: Session, run: Run, name: str, key: str, status: str, state: State | None = None) -> None:
        by = {"agreed": state.agreed, "approved_by": state.approved_by} if state else {}
        detail = {"procedure": run.name, "step": name, "key": key, "outcome": status, **by}
        self._told(session, "bot", "procedure.action", run.customer, detail)

    # Approvals

    def waiting(self, conversation: str = "") -> list[dict[str, Any]]:
        """What waits for an approval, the oldest first: what will be done exactly, and for whom."""
        query = select(RunRow).where(RunRow.status == "approving", RunRow.decision == "").order_by(RunRow.changed_at)
        query = query.where(RunRow.conversation_id == conversation) if conversation else query
        with reading(self.database) as session:
            runs = [(self._run(row), row.changed_at) for row in session.scalars(query)]
            return [self._approval(session, run, since) for run, since in runs if run.name in self.procedures]

    def _approval(self, session: Session, run: Run, since: float) -> dict[str, Any]:
        planned, spec = run.state.planned, self.procedures[run.name].spec
        assert planned, "an approval is of an action"
        return {
            "conversation": run.conversation, "customer": run.customer, "procedure": spec.title,
            "action": spec.actions[planned.action].title or planned.action.replace("_", " "),
            "arguments": {k: shown(v) for k, v in planned.arguments.items()}, "agreed": run.state.agreed is not None,
            "by": run.wants, "since": since, "facts": self._facts(session, run), "run": run.id,
        }  # fmt: skip

    def decide(self, session: Session, conversation: str, agent: str, role: str, run_id: str, yes: bool) -> None:
        """Approve or refuse what waits in a conversation, in the transaction of the conversation's turn. Raises
        Changed (nothing of that run waits any more), NotAllowed (a supervisor must)."""
        row = self._active(session, conversation)
        if row is None or row.id != run_id or row.status != "approving" or row.decision:
            raise Changed("this does not wait for an approval any more")
        if row.wants == "supervisor" and role != "supervisor":
            raise NotAllowed("a supervisor must decide this")
        row.decision, row.decided_by = "approved" if yes else "refused", agent
        self._told(session, f"agent:{agent}", "procedure.decide", row.customer,
                   {"procedure": row.name, "run": row.id, "decision": row.decision})  # fmt: skip

    def decided(self, session: Session, conversation: str) -> bool:
        """Whether a decision is there that the bot has not acted on."""
        row = self._active(session, conversation)
        return row is not None and row.decision != ""

    # How it is kept

    def _active(self, session: Session, conversation: str) -> RunRow | None:
        query = select(RunRow).where(RunRow.conversation_id == conversation, RunRow.status.in_(ACTIVE))
        return session.scalars(query).first()

    def _run(self, row: RunRow) -> Run:
        state = State.of(self._opened(row.customer, row.state))
        return Run(row.id, row.conversation_id, row.customer, row.name, row.version, row.status, state, row.wants,
                   row.decision, row.decided_by, row.began_at)  # fmt: skip

    def _kept(self, customer: str, what: Mapping[str, Any]) -> bytes:
        return self._seal(customer, json.dumps(what, ensure_ascii=False))

    def _opened(self, customer: str, kept: bytes) -> dict[str, Any]:
        return cast("dict[str, Any]", json.loads(self._unseal(customer, kept)))


def day(at: float) -> date:
    """The day of a time, here."""
    return datetime.fromtimestamp(at).date()
