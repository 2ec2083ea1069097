"""An offline harness for the banking tasks of tau2-bench: a scripted customer, a state that actions change, systems.

The state of the bank is the multiset of state-changing actions, with their arguments, on top of the initial database:
two runs end in the same state exactly if they did the same things, in any order. Looking something up, or unlocking a
tool, changes nothing. The customer opens with what they want, tells a fact when the assistant asks, and acts (applies,
refers, submits) on the product that the assistant named last; nobody ever tells them the gold answer.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coterie.desk.confidence import Signals

TURNS = 6  # answers of the assistant before the customer leaves
PERSON = ("transfer_to_human_agents", "request_human_agent_transfer")
STAGE = re.compile(
    r"role|pretend|never respond|customer service|don't dump|tool|on the line|only mention|no need|"
    r"provide (?:verification|information)|to provide",
    re.I,
)
OPENS = re.compile(r'(?:opening|start naturally)\b[^"\u201c]*["\u201c]([^"\u201d]+)["\u201d]', re.I)
Action = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One customer: how they open, what they tell when asked, and what the gold solution does."""

    name: str
    opening: str
    facts: tuple[str, ...]
    gold: tuple[Action, ...]
    documents: tuple[str, ...]

    @property
    def wants_person(self) -> bool:
        return any(a["name"] in PERSON for a in self.gold)

    @property
    def state(self) -> "Counter[str]":
        return state(self.gold)


@dataclass(frozen=True)
class Reply:
    """What a system does in a turn: words, actions at the bank, or a call for a person.

    signals: what is known of the words, where a model wrote them. reason: why a person is called.
    """

    text: str = ""
    actions: tuple[Action, ...] = ()
    person: bool = False
    signals: Signals | None = None
    reason: str = ""


System = Callable[[Task, Sequence[str]], Reply]  # what was said so far, the customer first


@dataclass
class Run:
    """How a task ended. `assumed`: nobody was called, so a business would count it as resolved."""

    task: Task
    escalated: bool = False
    done: list[Action] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)

    @property
    def verified(self) -> bool:
        """The state of the bank is the gold one, and a person was called exactly where one is needed."""
        return state(self.done) == self.task.state and self.escalated == self.task.wants_person

    @property
    def assumed(self) -> bool:
        return not self.escalated

    @property
    def silent_failure(self) -> bool:
        return self.assumed and not self.verified


def state(actions: Sequence[Action]) -> "Counter[str]":
    """What the actions changed. A tool that the bank unlocks gets its arguments as JSON, however spelled."""
    return Counter(
        json.dumps([a["name"], {k: _spelled_out(v) for k, v in (a.get("arguments") or {}).items()}], sort_keys=True)
        for a in actions if _changes(a)
    )  # fmt: skip


def _spelled_out(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) and value.startswith("{") else value
    except ValueError:
        return value


def _changes(action: Action) -> bool:
    arguments = action.get("arguments") or {}
    inner = next((str(v) for k, v in arguments.items() if k.endswith("tool_name")), "")
    looks = ("get_", "unlock_", "give_", "list_", "check_", "search_")
    return not (action["name"].startswith(looks) or inner.startswith(looks) or action["name"] in PERSON)


def read_tasks(folder: Path) -> list[Task]:
    return [_task(raw) for raw in json.loads((folder / "tasks.json").read_text(encoding="utf-8"))]


def _task(raw: dict[str, Any]) -> Task:
    text = str(raw["user_scenario"]["instructions"])
    quoted = OPENS.search(text)
    text = text.replace(quoted[1], "") if quoted else text
    sentences = [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+", text)]
    said = [_first_person(s) for s in sentences if s and not STAGE.search(s)]
    wishes = [s for s in said if re.search(r"\b(want|looking|need|like|would|problem|issue|help|ask)", s, re.I)] or said
    wishes = [] if quoted else wishes[:2]
    opening = " ".join(quoted[1].split() if quoted else wishes)
    gold = tuple(raw["evaluation_criteria"]["actions"] or ())
    facts = tuple(s for s in said if s not in wishes)
    return Task(raw["id"], opening, facts, gold, tuple(raw.get("required_documents") or ()))


def _first_person(text: str) -> str:
    for old, new in (("You are", "I am"), ("You're", "I'm"), ("you are", "I am"), ("Your ", "My "), ("your ", "my "),
                     ("You ", "I "), ("you ", "I "), ("yourself", "myself")):  # fmt: skip
        text = text.replace(old, new)
    return text


def read_documents(folder: Path) -> dict[str, str]:
    """Title and text of each document, by its id."""
    found = {}
    for file in sorted((folder / "documents").glob("*.json")):
        raw = json.loads(file.read_text(encoding="utf-8"))
        found[str(raw.get("id", file.stem))] = f"{raw.get('title', '')}\n{raw.get('content', raw.get('text', ''))}"
    return found


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


class Bm25:
    """BM25 (Robertson et al. 1994; k1 1.5, b 0.75) over documents."""

    def __init__(self, documents: dict[str, str]) -> None:
        self.names = list(documents)
        self.counts = [Counter(words(t)) for t in documents.values()]
        self.lengths = [sum(c.values()) for c in self.counts]
        self.mean = sum(self.lengths) / len(self.lengths)
        seen = Counter(w for c in self.counts for w in c)
        self.idf = {w: math.log(1 + (len(self.names) - n + 0.5) / (n + 0.5)) for w, n in seen.items()}

    def search(self, query: str, most: int) -> list[tuple[float, str]]:
        asked = set(words(query)) & self.idf.keys()
        scored = []
        for name, counts, length in zip(self.names, self.counts, self.lengths, strict=True):
            norm = 1.5 * (0.25 + 0.75 * length / self.mean)
            scored.append((sum(self.idf[w] * counts[w] * 2.5 / (counts[w] + norm) for w in asked if counts[w]), name))
        return sorted(scored, reverse=True)[:most]


PRODUCT = re.compile(r"\b(?:[A-Z][a-z]+ ){1,3}(?:Card|Account)\b|\bEcoCard\b")


def products(tasks: Sequence[Task], documents: dict[str, str]) -> list[str]:
    """Names that a customer may act on, the longest first: those in titles of documents, and in gold solutions."""
    titles = {name for text in documents.values() for name in PRODUCT.findall(text.partition("\n")[0])}
    named = titles | {
        v for t in tasks for a in t.gold for v in (a.get("arguments") or {}).values() if isinstance(v, str)
    }
    return sorted(
        (n for n in named if re.search(r"\b(Card|Account|Loan)\b", n) or n == "EcoCard"), key=len, reverse=True
    )


def play(task: Task, system: System, names: Sequence[str]) -> Run:
    """The customer and the system, until a person is called or the customer leaves."""
    run, said, told = Run(task), [task.opening], set[str]()
    for _ in range(TURNS):
        reply = system(task, said)
        run.replies.append(reply)
        run.done += reply.actions
        if reply.person:
            run.escalated = True
            return run
        said.append(reply.text)
        fact = _fact(task, reply.text, told)
        if fact is None:
            run.done += _acts(task, reply.text, names)
            return run
        told.add(fact)
        said.append(fact)
    return run


def _fact(task: Task, asked: str, told: set[str]) -> str | None:
    """What the customer answers to a question; None: nothing was asked, or there is nothing to say."""
    if "?" not in asked:
        return None
    left = [f for f in task.facts if f not in told]
    return max(left, key=lambda f: len(set(words(f)) & set(words(asked)))) if left else None


def _acts(task: Task, advice: str, names: Sequence[str]) -> list[Action]:
    """The customer's own actions, on the product that was named in the advice, which may be the wrong one."""
    named = [(advice.find(n), n) for n in names if n in advice]
    if not named:
        return []
    product, done = min(named)[1], []
    for action in task.gold:
        if action.get("requestor") == "user" and action["name"] not in PERSON:
            given = dict(action.get("arguments") or {})
            done.append({**action, "arguments": {k: product if v in names else v for k, v in given.items()}})
    return done


def handed_over(run: Run, sure: Callable[[Signals], bool]) -> Run:
    """The same contact at a desk that sends only what it is sure of: at the first other reply a person is called."""
    done = list[Action]()
    for n, reply in enumerate(run.replies):
        if reply.signals and not sure(reply.signals):
            return replace(run, escalated=True, done=done, replies=run.replies[: n + 1])
        done += reply.actions
    return run


def answers(runs: Sequence[Run]) -> tuple[list[Signals], list[bool]]:
    """Of each reply that a model wrote and that was sent: its signals, and whether it was right, which is whether its
    contact ended right. What rules and checks keep back is never sent, however sure the desk is."""
    sent = [
        (reply.signals, run.verified) for run in runs for reply in run.replies if reply.signals and not reply.person
    ]
    return [signals for signals, _ in sent], [right for _, right in sent]


def oracle(task: Task, said: Sequence[str]) -> Reply:
    """Does what the gold solution does, the customer's part too."""
    return Reply("Done.", task.gold, task.wants_person)


def replay(task: Task) -> Run:
    """The gold solution, played."""
    reply = oracle(task, ())
    return Run(task, reply.person, list(reply.actions))
