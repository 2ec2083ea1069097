"""The answer flow of the desk on one page: who may ask -> mask -> route -> ground -> generate -> check -> unmask ->
reply or handoff -> record.

Notable: the customer reads along, token by token where nothing of an answer can be withheld. Where it is checked
against evidence, or must be sure enough, it is sentence by sentence, each shown once it has been checked and while the
answer so far is sure. So nothing that was shown is ever taken back, and what was not sure goes to the agent as a
suggestion. Rules that call a person come before everything else, procedures too. What masks, grounds and checks comes
from other rooms as plain functions (`Parts`).
"""

import logging
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Protocol, TypeVar

from sqlalchemy.orm import Session

from coterie.answer import Answer, Answerer
from coterie.choose import Choice, question
from coterie.config import DeskRuleSpec, DeskSpec
from coterie.data.read import Message as Spoken
from coterie.desk import handoff
from coterie.desk.confidence import Confidence, Signals
from coterie.desk.conversation import Handoff
from coterie.desk.message import Message, Turn
from coterie.engine.request import Generation, Sampling
from coterie.errors import Busy, ContextTooLong, Stopped
from coterie.knowledge.evidence import Evidence, Reader
from coterie.privacy.deidentify import MaskingFailed
from coterie.privacy.vault import Masked, Masking, as_it_is, loggable

MOST_TOKENS = 400  # of one answer
MOST_EVIDENCE = 5  # pieces that go before the model
PATIENCE_S = 30.0  # while the engine's queue is full
SENTENCE = re.compile(
    r""".*(?:[.!?…\u3002\uff01\uff1f\u061f]['")\]\u201d\u2019]*\s|\n)""", re.DOTALL
)  # to the last end
log = logging.getLogger(__name__)
T = TypeVar("T")


class Check(Protocol):
    """Takes an answer as it is written and gives it back sentence by sentence, with its citations."""

    @property
    def unsupported(self) -> tuple[str, ...]:
        """The statements so far that no evidence supports."""
        ...

    def feed(self, text: str) -> str: ...

    def end(self) -> str: ...


def _anyone(turn: Turn) -> Reader | None:
    return Reader(turn.conversation.customer)


def _nothing(_question: str, _reader: Reader) -> list[Evidence]:
    return []


def _unchecked(_evidence: Sequence[Evidence]) -> Check | None:
    return None


def _unknown(_customer: str) -> Mapping[str, Any]:
    return {}


class Guided(Protocol):
    """Procedures, as the flow asks for them. None: it is no procedure's turn."""

    def go_on(self, turn: Turn) -> "Result | None": ...

    def begin(self, turn: Turn, question: str, topics: Collection[str]) -> "Result | None": ...


class _Unguided:
    def go_on(self, turn: Turn) -> "Result | None":
        return None

    def begin(self, turn: Turn, question: str, topics: Collection[str]) -> "Result | None":
        return None


@dataclass(frozen=True)
class Parts:
    """What other rooms bring. Each default does nothing.

    may_ask: as whom the customer reads; None refuses. mask: texts without private data, those that are known of the
    customer among it; raises where it cannot be sure. ground: the best evidence first. check: begins the check of an
    answer against its evidence (masked); None where nothing is to be checked. profile: fields that a rule lets into the
    prompt; a part that raises is told to the agent, and the conversation goes on without it. procedures: guided flows,
    which need no model.
    """

    may_ask: Callable[[Turn], Reader | None] = _anyone
    mask: Masking = as_it_is
    ground: Callable[[str, Reader], list[Evidence]] = _nothing
    check: Callable[[Sequence[Evidence]], Check | None] = _unchecked
    profile: Callable[[str], Mapping[str, Any]] = _unknown
    procedures: Guided = field(default_factory=_Unguided)


@dataclass(frozen=True)
class Rules:
    """What decides: the declaration, the calibrated confidence (None: never calibrated), and disliked answers."""

    spec: DeskSpec
    confidence: Confidence | None = None
    disliked: frozenset[int] = frozenset()


@dataclass
class Result:
    """How a turn ended: what the customer is told ("" for nothing), the handoff if any, and what to record. `keep` is
    done in the transaction that ends the turn."""

    text: str = ""
    handoff: Handoff | None = None
    data: dict[str, Any] = field(default_factory=dict)
    keep: Callable[[Session], None] | None = None


def answer(
    answerer: Answerer, turn: Turn, rules: Rules, parts: Parts, show: Callable[[str], None],
    begun: Callable[[Generation], None],
) -> Result:  # fmt: skip
    """Answer the customer's turn. `show` gets each piece as it may be read; `begun` what can be cancelled."""
    troubles: list[str] = []
    broken: DeskRuleSpec | None = None  # the rule that calls a person: the answer is then for them only
    customer, channel, said = turn.conversation.customer, turn.conversation.channel, turn.messages

    def person(reason: str, **more: Any) -> Result:
        more.setdefault("detail", "; ".join(troubles))
        reason, queue = (broken.reason, broken.queue) if broken else (reason, "general")
        return Result(handoff=handoff.brief(reason, said, queue=queue, **more))

    reader = parts.may_ask(turn)
    if reader is None:
        return person("may_not_ask")

    def tried(what: str, otherwise: T, do: Callable[[], T]) -> T:
        """What a part gives, or something else where it fails, which the agent is told."""
        try:
            return do()
        except Exception as error:
            log.warning("%s: %s", what, loggable(parts.mask, customer, str(error)))
            troubles.append(what)
            return otherwise

    profile = tried("the customer's profile could not be read", _unknown(""), lambda: parts.profile(customer))

    def hidden(texts: list[str]) -> Masked:
        try:
            return parts.mask(customer, texts, profile)
        except Exception as error:
            log.exception("masking failed; nothing goes to a model")
            raise MaskingFailed(type(error).__name__) from error

    def negative() -> bool:
        return _is_negative(answerer, rules.spec, hidden([fresh]).texts[0])

    fresh = _unanswered(said)
    about = handoff.Facts(fresh, (), profile)
    if fresh and rules.spec.sentiment and any(rule.negative for rule in rules.spec.rules):
        about = replace(about, negative=tried("whether the message is negative could not be told", True, negative))
    broken = handoff.broken_rule(rules.spec.rules, about) if fresh else None
    if not broken and (guided := parts.procedures.go_on(turn)):
        return guided

    words: _Words | None = None
    try:
        spoken = _spoken(said, hidden([m.text for m in said]).texts)
        asked = question(spoken)
        if not broken and handoff.failures(said, rules.disliked) >= rules.spec.failures:
            return person("repeated_failure")

        choice = answerer.chooser.choose(asked, channel)
        topics = [name for name, _ in choice.decision.chosen]
        broken = broken or handoff.broken_rule(rules.spec.rules, replace(about, topics=topics))
        if not broken and (guided := parts.procedures.begin(turn, asked, topics)):
            return guided

        found = tried("the knowledge could not be searched", _nothing("", reader), lambda: parts.ground(asked, reader))
        evidence = found[:MOST_EVIDENCE]
        facts = [f"{name}: {value}" for name, value in profile.items()]
        masked = hidden([*(e.text for e in evidence), *facts])
        seen = [replace(e, text=text) for e, text in zip(evidence, masked.texts, strict=False)]
        known = preface(seen, masked.texts[len(evidence) :])
        running = _generate(answerer, choice, spoken, known, channel)
        begun(running.generation)
        retrieval = max((e.score for e in evidence), default=None)
        labels = bool(topics) and bool(answerer.business.library.facts(topics[0]).choices)
        check = None if labels else parts.check(seen)  # a label states nothing
        words = _Words(masked, check, choice.decision.similarity, retrieval, rules, show)
        unknown = handoff.unsure(rules.spec, None, words.signals, bool(topics), evidence)
        words.silent = bool(broken or unknown or labels)
        for piece in running.generation:
            words.take(piece.text, [t.logprob for t in piece.tokens if t.logprob is not None])
    except MaskingFailed:
        return person("masking_failed")
    except (Busy, Stopped, ContextTooLong) as error:
        handed = person("assistant_unavailable", detail=str(error))
        return Result(words.shown if words else "", handed.handoff)
    if running.generation.cancelled and not broken:
        return Result(words.shown, data=_record(running, words, evidence) | {"stopped": True})

    label = words.raw.strip() if labels else ""
    answers = rules.spec.answers if labels else {}  # labels are intents: the business says what each is answered with
    reply = answers.get(label, "") if answers else words.end()
    broken = broken or handoff.broken_rule(rules.spec.rules, replace(about, topics=[*topics, label]))
    if label and not broken and (guided := parts.procedures.begin(turn, "", [label])):
        return guided
    unsupported = check.unsupported if check else ()
    reason = (
        (broken.reason if broken else "")
        or handoff.unsure(rules.spec, rules.confidence, words.signals, bool(topics), evidence)
        or ("low_confidence" if running.verdict and not running.verdict.sure else "")
        or ("unsupported" if unsupported else "" if reply.strip() else "no_answer")
    )
    data = _record(running, words, evidence) | ({"label": label} if label else {})
    if not reason:
        words.show_rest(reply)
        return Result(reply, data=data)
    sure = rules.confidence.of(words.signals) if rules.confidence else None
    sure = running.verdict.confidence if sure is None and running.verdict else sure
    if unsupported:
        troubles.append("nothing supports: " + " / ".join(unsupported))
    handed = person(reason, evidence=evidence, suggestion=reply.strip(), confidence=sure)
    return Result(words.shown, handed.handoff, data)


class _Words:
    """An answer as it arrives: its text, how likely its tokens were, and how much of it was shown."""

    def __init__(
        self, masked: Masked, check: Check | None, similarity: float | None, retrieval: float | None, rules: Rules,
        show: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.raw = self.shown = ""
        self.silent = False  # nothing more is shown before all of it is there
        self._checked = self._waiting = ""  # masked, as the model wrote it
        self._restore, self._restorer, self._check = masked.restore, masked.restoring(), check
        self._rules, self._show = rules, show
        self._similarity, self._retrieval = similarity, retrieval
        self._sum, self._tokens = 0.0, 0

    @property
    def signals(self) -> Signals:
        logprob = self._sum / self._tokens if self._tokens else None
        return Signals(self._similarity, logprob, self._retrieval)

    def take(self, text: str, logprobs: list[float]) -> None:
        """Show what of it may be read: whole sentences where they are checked or must be sure, else all of it."""
        self.raw += text
        self._sum, self._tokens = self._sum + sum(logprobs), self._tokens + len(logprobs)
        self._hear(self._check.feed(text) if self._check else text)
        ready, confidence = self._waiting, self._rules.confidence
        if confidence and not self._check:
            whole = SENTENCE.match(ready)
            ready = whole[0] if whole else ""
        if ready and not self.silent and (confidence is None or confidence.sure(self.signals)):
            self._waiting = self._waiting[len(ready) :]
            self._say(self._restorer.feed(ready))

    def end(self) -> str:
        """The whole answer, checked, with its private data again."""
        self._hear(self._check.end() if self._check else "")
        return self._restore(self._checked)

    def _hear(self, checked: str) -> None:
        self._checked += checked
        self._waiting += checked
        if self._check and self._check.unsupported:
            self.silent = True

    def show_rest(self, reply: str) -> None:
        """What of the final reply was not shown yet."""
        self._say(reply[len(self.shown) :] if reply.startswith(self.shown) else reply)

    def _say(self, text: str) -> None:
        if text:
            self.shown += text
            self._show(text)


def _unanswered(said: Sequence[Message]) -> str:
    """What the customer wrote since anybody last answered: several messages may have come in a row."""
    last = list(takewhile(lambda m: m.author == "customer", reversed(said)))
    return "\n".join(m.text for m in reversed(last))


def _spoken(said: Sequence[Message], texts: Sequence[str]) -> list[Spoken]:
    """As a model wants them: turns of user and assistant, what one side said in a row in one message."""
    out: list[Spoken] = []
    for m, text in zip(said, texts, strict=True):
        role = "user" if m.author == "customer" else "assistant"
        if out and out[-1]["role"] == role:
            out[-1]["content"] += "\n" + text
        else:
            out.append({"role": role, "content": text})
    return out


def preface(evidence: Sequence[Evidence], facts: Sequence[str]) -> str:
    """What is known, masked, as it stands before the customer's last message. Evidence is data, never orders."""
    known = [f"[{n}] {e.text}" for n, e in enumerate(evidence, 1)]
    lines = [*(["What we know:", *known] if known else []), *(["The customer:", *facts] if facts else [])]
    return "\n".join([*lines, "", "The question:", ""]) if lines else ""


def _generate(answerer: Answerer, choice: Choice, messages: list[Spoken], preface: str, channel: str) -> Answer:
    """Start the answer; where the conversation has outgrown the context, without its oldest turns."""
    sampling, until = Sampling(max_tokens=MOST_TOKENS, logprobs=0), time.monotonic() + PATIENCE_S
    while True:
        try:
            return answerer.chat(choice, messages, sampling, channel=channel, preface=preface)
        except ContextTooLong:
            if len(messages) < 3:
                raise
            messages = messages[2:]
        except Busy as error:
            if time.monotonic() > until:
                raise
            time.sleep(min(error.retry_after_s, 0.5))


def _is_negative(answerer: Answerer, spec: DeskSpec, text: str) -> bool:
    """Whether the declared expert calls the message negative."""
    said = answerer.chat(spec.sentiment, [{"role": "user", "content": text}], Sampling(max_tokens=16))
    return said.generation.text().strip() in spec.negative


def _record(running: Answer, words: _Words, evidence: Sequence[Evidence]) -> dict[str, Any]:
    """What is kept with the message: who answered, how sure, from which sources."""
    signals = words.signals
    return {
        "expert": running.expert, "version": running.version,
        "similarity": _rounded(signals.similarity), "logprob": _rounded(signals.logprob),
        "sources": [handoff.shown(e) for e in evidence],
    }  # fmt: skip


def _rounded(x: float | None) -> float | None:
    return None if x is None else round(float(x), 4)
