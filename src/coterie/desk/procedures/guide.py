"""One procedure on its way: what the customer said goes in, what is said and done comes out. No database, no model.

Notable: it is a function of its state and of what comes in, so that what was begun by a process that died is taken up
by another with the same result. What is done goes through `act`, once for each action; an action's arguments are fixed
before the customer is asked and the agent looks, and those are the ones that it is done with.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any, Literal

from coterie.desk.message import Message
from coterie.desk.procedures.conditions import BadExpression, expression, filled
from coterie.desk.procedures.spec import ActionSpec, Procedure, StepSpec
from coterie.desk.procedures.values import Kind, NotOne, Value, kept, kind_of, plain, read, shown, typed
from coterie.errors import CoterieError, Stopped

Phase = Literal["step", "answer", "agree", "approve"]
Status = Literal["asking", "approving", "done", "stopped", "declined", "refused", "ended", "handed_over"]
SEEN_AT_ONCE = ("order_number", "email")  # kinds that are taken from the message that began it


@dataclass
class Planned:
    """An action as it will be done: its arguments, and whose word it needs."""

    action: str
    arguments: dict[str, str | bool | None]
    kinds: dict[str, Kind]
    agreement: bool
    approval: bool


@dataclass
class State:
    """Where a run stands; all of it is kept. `asked`: how many questions were put, so that a button of an older one
    counts no more. `seen`: the customer's last message that was taken. `agreed`: the one that agreed to `planned`."""

    opening: str
    seen: int
    at: int = 0
    phase: Phase = "step"
    asked: int = 0
    tries: int = 0
    values: dict[str, str | bool | None] = field(default_factory=dict)
    planned: Planned | None = None
    agreed: int | None = None
    approved_by: str = ""
    question: str = ""
    buttons: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, kept: dict[str, Any]) -> "State":
        planned = kept.pop("planned")
        return cls(**kept, planned=Planned(**planned) if planned else None)


# Does an action: its name and declaration, arguments, and the state that has its agreement and approval.
Act = Callable[[str, ActionSpec, Mapping[str, Value], State], Mapping[str, Value]]


class Guide:
    """Takes a run on. After each call: `status`, `says` (paragraphs), and where a person must come, why."""

    def __init__(
        self, procedure: Procedure, state: State, act: Act, today: date, customer: Mapping[str, Value]
    ) -> None:
        self.procedure, self.spec, self.state, self.act = procedure, procedure.spec, state, act
        self.today, self.customer = today, customer
        self.says: list[str] = []
        self.status: Status = "asking"
        self.reason = self.detail = ""

    @property
    def values(self) -> dict[str, Value]:
        kinds = self.procedure.kinds
        mine = {name: typed(kinds[name], raw) for name, raw in self.state.values.items() if name in kinds}
        absent = {name: None for name in kinds if name not in mine}
        return {**absent, **self.customer, **mine, "today": self.today}

    def go_on(self) -> None:
        """From step to step, until somebody must answer, agree or approve, or it ends."""
        try:
            while self.status == "asking" and self.state.at < len(self.spec.steps):
                step = self.spec.steps[self.state.at]
                if (step.when and not self._holds(step.when)) or self._take_step(step):
                    self._next()
                else:
                    return
            if self.status == "asking":
                self.status = "done"
        except Stopped:
            raise
        except BadExpression as error:
            self._hand_over("procedure_failed", str(error))
        except CoterieError as error:
            self._hand_over(error.code, str(error))

    def take(self, said: list[Message]) -> None:
        """Messages of the customer, in order. A question that one of them leads to is answered by a later one only
        where that is no agreement: nobody agrees to what they have not read."""
        fresh = False
        for m in said:
            self.state.seen = m.seq
            if self.status not in ("asking", "approving"):
                return
            if self.is_stop(m.text):
                self._end("stopped", self.spec.texts.stopped)
            elif self.status == "asking" and not (fresh and self.state.phase == "agree"):
                before = self._agreement()
                self._answer(m)
                fresh = fresh or self._agreement() not in (None, before)

    def decide(self, approved_by: str) -> None:
        """Somebody at the desk has approved what is planned, or (``) refused it."""
        if approved_by:
            self.state.approved_by, self.state.phase = approved_by, "step"
            self.go_on()
        else:
            self._end("refused", self.spec.texts.refused)

    def is_stop(self, text: str) -> bool:
        return plain(text) == plain(self.spec.texts.stop)

    # Steps

    def _take_step(self, step: StepSpec) -> bool:
        """Whether it is finished; where not, somebody must speak first, or all has ended."""
        if step.ask:
            return self._ask(step.ask)
        if step.check:
            if self._holds(step.check):
                return True
            if step.hand_over:
                self._hand_over(step.hand_over, f"not so: {step.check}")
            else:
                self._end("ended", filled(step.otherwise, self.values))
            return False
        if step.do:
            return self._do(step.do)
        self.says.append(filled(step.say, self.values))
        return True

    def _ask(self, name: str) -> bool:
        slot, texts = self.spec.slots[name], self.spec.texts
        if slot.kind in SEEN_AT_ONCE:
            try:
                self.state.values[name] = kept(read(slot.kind, self.state.opening, self.today, slot.pattern))
                return True
            except NotOne:
                pass
        buttons = slot.choices or ([texts.yes, texts.no] if slot.kind == "yes_no" else [])
        self._put("answer", filled(slot.ask, self.values), buttons)
        return False

    def _do(self, name: str) -> bool:
        action, state = self.spec.actions[name], self.state
        if state.planned is None or state.planned.action != name:
            self._must(action)
            given = {k: self._value(source) for k, source in action.arguments.items()}
            state.planned = Planned(
                name, {k: kept(v) for k, v in given.items()}, {k: kind_of(v) for k, v in given.items()},
                bool(action.confirm) and self._holds(action.confirm_when),
                bool(action.approve) and self._holds(action.approve_when),
            )  # fmt: skip
            state.agreed, state.approved_by = None, ""
        if state.planned.agreement and state.agreed is None:
            self._put("agree", filled(action.confirm, self.values), [self.spec.texts.agree, self.spec.texts.decline])
            return False
        if state.planned.approval and not state.approved_by:
            self.says.append(self.spec.texts.waiting)
            self.status, state.phase, state.buttons = "approving", "approve", []
            return False
        self._must(action)
        found = self.act(name, action, self.arguments(), state)
        state.values |= {f"{name}.{k}": kept(v) for k, v in found.items()}
        state.planned = None
        return True

    def arguments(self) -> dict[str, Value]:
        """Those of the planned action, typed."""
        planned = self.state.planned
        assert planned, "an action is planned before it is done"
        return {k: typed(planned.kinds[k], raw) for k, raw in planned.arguments.items()}

    def _must(self, action: ActionSpec) -> None:
        if action.only_if and not self._holds(action.only_if):
            raise NotAllowedNow(f"not so: {action.only_if}")

    # What the customer says

    def _agreement(self) -> str | None:
        """The action whose agreement is being asked for."""
        planned = self.state.planned
        return planned.action if planned and self.state.phase == "agree" else None

    def _answer(self, m: Message) -> None:
        asked = m.data.get("asked")
        if asked is not None and asked != self.state.asked:
            self._again("")  # a button of an older question
        elif self.state.phase == "agree":
            self._agree(m)
        elif self.state.phase == "answer":
            self._fill(m.text)

    def _agree(self, m: Message) -> None:
        texts = self.spec.texts
        said = plain(m.text)
        if said in (plain(texts.agree), plain(texts.yes)):
            self.state.agreed, self.state.phase = m.seq, "step"
            self.go_on()
        elif said in (plain(texts.decline), plain(texts.no)):
            self._end("declined", texts.declined)
        else:
            self._again(texts.again)

    def _fill(self, text: str) -> None:
        name = self.spec.steps[self.state.at].ask
        slot = self.spec.slots[name]
        if slot.kind == "yes_no":
            text = {plain(self.spec.texts.yes): "yes", plain(self.spec.texts.no): "no"}.get(plain(text), "?")
        try:
            value = read(slot.kind, text, self.today, slot.pattern, slot.choices, slot.least, slot.most)
        except NotOne as error:
            self._again(slot.invalid or str(error))
            return
        self.state.values[name] = kept(value)
        self._next()
        self.go_on()

    def _again(self, why: str) -> None:
        """Ask the same again; after some unusable answers a person is called."""
        self.state.tries += bool(why)
        if self.state.tries >= self.spec.tries:
            self._hand_over("procedure_stuck", f"asked {self.state.tries} times: {self.state.question}")
        else:
            tries = self.state.tries
            question = self.state.question
            self._put(self.state.phase, question, self.state.buttons, f"{why}\n\n" if why else "")
            self.state.tries = tries

    # How it is done

    def _put(self, phase: Phase, question: str, buttons: list[str], before: str = "") -> None:
        self.state.phase, self.state.question, self.state.buttons = phase, question, list(buttons)
        self.state.asked += 1
        self.state.tries = 0
        self.says.append(before + question)

    def _next(self) -> None:
        self.state.at += 1
        self.state.phase, self.state.tries = "step", 0

    def _end(self, status: Status, text: str) -> None:
        self.status = status
        self.says.append(text)

    def _hand_over(self, reason: str, detail: str) -> None:
        self.status, self.reason = "handed_over", reason
        self.detail = f"{self.where()}: {detail}"
        self.says.append(self.spec.texts.handed)

    def where(self) -> str:
        """For people: the procedure and its step."""
        step = self.spec.steps[min(self.state.at, len(self.spec.steps) - 1)]
        what = step.ask or step.do or step.check or "say"
        return f"{self.spec.title}, step {self.state.at + 1} of {len(self.spec.steps)} ({what})"

    def known(self) -> dict[str, str]:
        """For people: every value that there is."""
        return {name: shown(typed(self.procedure.kinds[name], raw)) for name, raw in self.state.values.items()
                if name in self.procedure.kinds and raw is not None}  # fmt: skip

    def progress(self) -> tuple[int, int]:
        """How many of the customer's questions there were, and how many there may be."""
        waits = [n for n, s in enumerate(self.spec.steps) if s.ask or (s.do and self.spec.actions[s.do].confirm)]
        return sum(n < self.state.at for n in waits) + 1, len(waits)

    def _value(self, source: str) -> Value:
        found: Value = expression(source).value(self.values, self.today)
        return found

    def _holds(self, source: str) -> bool:
        return expression(source).holds(self.values, self.today)


class NotAllowedNow(CoterieError):
    """What must hold when an action is done does not."""

    code = "action_not_allowed"
