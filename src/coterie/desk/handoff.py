"""When a person must take over, and what they are told: rules of coterie.toml first, then how sure the answer is.

Everything here is decided by code from facts; no phrase that a model writes, or that a customer or a document puts
in its mouth, hands a conversation over or keeps it.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rapidfuzz import fuzz

from coterie.config import DeskRuleSpec, DeskSpec
from coterie.desk.confidence import Confidence, Signals
from coterie.desk.conversation import Handoff
from coterie.desk.message import Message
from coterie.knowledge.evidence import Evidence

AGAIN = 80.0  # two messages this alike (percent of characters in common, words in any order) ask the same
SAMPLE = 160  # characters of a message that a summary shows
# An amount of money: a currency beside a number, which may have separators of thousands and decimals.
_NUMBER = r"\d{1,3}(?:[ ,.'\u00a0\u202f]\d{3})+(?:[.,]\d{1,2})?|\d+(?:[.,]\d{1,2})?"
_MONEY = r"[$€£¥₹]|\b(?:usd|eur|gbp|chf|inr|jpy|cad|aud|dollars?|euros?|pounds?|bucks)\b"
AMOUNT = re.compile(rf"(?:{_MONEY})\s*({_NUMBER})|({_NUMBER})\s*(?:{_MONEY})", re.IGNORECASE)


@dataclass(frozen=True)
class Facts:
    """What the rules look at: the customer's message, who answers, and what is known of the customer."""

    text: str
    topics: Collection[str] = ()  # experts chosen, and the label that one of them gave
    profile: Mapping[str, Any] | None = None
    negative: bool = False


def amounts(text: str) -> list[float]:
    """Every amount of money that a text names."""
    return [_number(m[1] or m[2]) for m in AMOUNT.finditer(text)]


def _number(written: str) -> float:
    """1,234.50 and 1.234,50 and 1 234: the last separator is decimal where one or two digits follow it."""
    found = re.fullmatch(r"(.*?)(?:[.,](\d{1,2}))?", written)
    assert found, "the pattern takes any text"
    return float(re.sub(r"\D", "", found[1]) + "." + (found[2] or "0"))


def broken_rule(rules: Sequence[DeskRuleSpec], facts: Facts) -> DeskRuleSpec | None:
    """The first rule that asks for a person."""
    return next((rule for rule in rules if _asks(rule, facts)), None)


def _asks(rule: DeskRuleSpec, facts: Facts) -> bool:
    profile = facts.profile or {}
    conditions = [
        *([any(_holds(facts.text, w) for w in rule.words)] if rule.words else []),
        *([bool(set(rule.topics) & set(facts.topics))] if rule.topics else []),
        *([any(a > rule.amount_above for a in amounts(facts.text))] if rule.amount_above is not None else []),
        *[profile.get(name) == value for name, value in rule.profile.items()],
        *([facts.negative] if rule.negative else []),
    ]
    return bool(conditions) and all(conditions)


def _holds(text: str, words: str) -> bool:
    """Whether the words stand in the text as whole words."""
    spelled = r"\s+".join(map(re.escape, words.casefold().split()))
    return bool(re.search(rf"(?<!\w){spelled}(?!\w)", text.casefold()))


def failures(messages: Sequence[Message], disliked: Collection[int] = ()) -> int:
    """How often in a row, up to now, the bot has not helped: the customer asked the same again, or put a thumb down."""
    count, asked = 0, list[str]()
    for m in messages:
        if m.author == "customer":
            again = any(fuzz.token_sort_ratio(m.text.casefold(), old.casefold()) >= AGAIN for old in asked)
            count = count + 1 if again else count
            asked.append(m.text)
        elif m.author == "bot":
            count = count + 1 if m.seq in disliked else count
        else:
            count, asked = 0, []  # a person has been here since
    return count


def unsure(
    spec: DeskSpec, confidence: Confidence | None, signals: Signals, known: bool, evidence: Sequence[Evidence]
) -> str:
    """Why an answer must not be sent, "" where it may. `known`: an expert was near enough to the question."""
    if not known and not evidence and spec.unknown == "hand_over":
        return "not_known"
    if confidence and not confidence.sure(signals):
        return "low_confidence"
    return ""


def summary(messages: Sequence[Message]) -> str:
    """What the customer asked, in their own words: the first message, the longest, and the last."""
    said = [m for m in messages if m.author == "customer"]
    if not said:
        return ""
    longest = max(said, key=lambda m: len(m.text))
    chosen = sorted({m.seq: m for m in (said[0], longest, said[-1])}.values(), key=lambda m: m.seq)
    return "\n".join(summary_of(m.text) for m in chosen)


def summary_of(text: str) -> str:
    """The beginning of a text, on one line of at most SAMPLE characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= SAMPLE else flat[: SAMPLE - 1].rsplit(" ", 1)[0] + "…"


def shown(e: Evidence) -> dict[str, Any]:
    """A piece of evidence as it is kept with a message."""
    kept = {"source": e.source, "where": e.where, "text": e.text[:1000]}
    return kept | ({"link": e.link} if e.link else {})


def brief(
    reason: str, messages: Sequence[Message], evidence: Sequence[Evidence] = (), suggestion: str = "",
    confidence: float | None = None, detail: str = "", queue: str = "general",
) -> Handoff:  # fmt: skip
    """What the agent gets."""
    sources = tuple(map(shown, evidence))
    return Handoff(reason, detail, summary(messages), suggestion, sources, confidence, queue)
