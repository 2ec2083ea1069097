"""A desk whose assistant says what a test scripts, behind the interface of the real one."""

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from coterie.answer import Answer
from coterie.business import Business
from coterie.choose import Choice
from coterie.config import Config
from coterie.data.read import Message
from coterie.desk.desk import Desk
from coterie.desk.flow import Parts
from coterie.desk.message import Conversation
from coterie.engine.request import Callback, Generation, Piece, Sampling, TokenChoice
from coterie.experts.library import ExpertFacts
from coterie.routing.router import Decision, Scored
from coterie.store.database import open_database


@dataclass
class Script:
    """What is said to one message: words, and how sure. `gate`: what the word number `pause` waits for.

    `later`: log-probability of the words from `pause` on, where it is another.
    """

    text: str
    expert: str | None = "shop"
    similarity: float = 0.9
    logprob: float = -0.1
    gate: threading.Event | None = None
    pause: int = 1
    later: float | None = None


@dataclass
class ScriptedAnswerer:
    """Answers by `says(last message)`. `asked`: every conversation that it was sent."""

    business: Business
    says: Callable[[str], Script]
    asked: list[list[Message]] = field(default_factory=list)

    @property
    def engine(self) -> Any:
        """As much of an engine as the pages look at."""
        return SimpleNamespace(
            alive=True,
            load_numbers=lambda: (0, 0),
            base=SimpleNamespace(name="scripted", encode=str.split),
            stats=None,
            close=lambda: None,
        )

    @property
    def chooser(self) -> "ScriptedAnswerer":
        return self

    def choose(self, text: str, channel: str = "") -> Choice:
        script = self.says(text)
        name = script.expert or "shop"
        chosen = ((name, 1.0),) if script.expert else ()
        return Choice(text, Decision(chosen, (Scored(name, script.similarity, 0.5, 1.0, 1.0, ()),)), False, {})

    def chat(
        self, who: str | Choice, messages: list[Message], sampling: Sampling, on_piece: Callback | None = None,
        channel: str = "", preface: str = "",
    ) -> Answer:  # fmt: skip
        last = preface + messages[-1]["content"]
        self.asked.append([*({**m} for m in messages[:-1]), {**messages[-1], "content": last}])
        script = self.says(f"{who}: {last}" if isinstance(who, str) else last)
        generation = Generation([], sampling, None, on_piece)
        threading.Thread(target=self._speak, args=(generation, script), daemon=True).start()
        return Answer(generation, script.expert, 1 if script.expert else None, True, script.similarity)

    def _speak(self, generation: Generation, script: Script) -> None:
        for n, word in enumerate(script.text.split(" ")):
            if n == script.pause and script.gate:
                while not script.gate.wait(0.01) and not generation.cancelled:
                    pass
            if generation.cancelled:
                generation.emit(Piece("", (), "cancelled"))
                return
            text = f" {word}" if n else word
            unsure = script.later is not None and n >= script.pause
            generation.emit(Piece(text, (TokenChoice(1, text, script.later if unsure else script.logprob),)))
        generation.emit(Piece("", (), "stop"))


@dataclass
class Checking:
    """A check by which a sentence is supported where `by` says so."""

    by: Callable[[str], bool]
    unsupported: tuple[str, ...] = ()
    held: str = ""

    def feed(self, text: str) -> str:
        self.held += text
        *whole, self.held = re.split(r"(?<=\. )", self.held)
        self.unsupported += tuple(s for s in whole if not self.by(s))
        return "".join(whole)

    def end(self) -> str:
        return self.feed(". ")[:-2]


class ScriptedBusiness(Business):
    """Its library holds one expert of any name."""

    choices: tuple[str, ...] = ()

    @property
    def library(self) -> Any:
        class Shelf:
            def shelf(_self) -> list[ExpertFacts]:
                return []

            def facts(_self, name: str) -> ExpertFacts:
                return ExpertFacts(name, "lora", version=1, choices=self.choices)

        return Shelf()


def scripted(
    folder: Path, says: Callable[[str], Script], choices: tuple[str, ...] = (), **desk: Any
) -> ScriptedAnswerer:
    """An answerer by script, for a business with this [desk]."""
    business = ScriptedBusiness(folder, Config.model_validate({"desk": desk}))
    business.choices = choices
    return ScriptedAnswerer(business, says)


def open_desk(answerer: ScriptedAnswerer, url: str, parts: Parts | None = None, start: bool = True) -> Desk:
    desk = Desk(answerer, open_database(url), parts)  # type: ignore[arg-type]
    if start:
        desk.start()
    return desk


def ask(desk: Desk, text: str, customer: str = "ada") -> Conversation:
    """A new conversation, and the assistant's answer to one message."""
    c = desk.conversations.open(customer)
    desk.conversations.say(c.id, text)
    desk.wake(c.id)
    return settled(desk, c.id)


def settled(desk: Desk, id: str, within_s: float = 30) -> Conversation:
    """The conversation once nothing is owed in it."""
    until = time.monotonic() + within_s
    while (now := desk.conversations.get(id)).answering is not None or id in desk._at_work:
        assert time.monotonic() < until, "the answer never came"
        time.sleep(0.01)
    return now
