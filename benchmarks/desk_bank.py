"""The bank of tau2-bench as a business of Coterie: its documents as knowledge, its policy as procedures, and the
desk's own answer flow in front of a scripted customer (desk.py).

What is declared here and in `bank/` comes from what the bank publishes (its documents, and the policy under
`prompts`), never from gold solutions, and was tried on the development half of the tasks only. There is no expert:
the bank has no rows to train one with.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
from common import need_data, screen
from desk_actions import taken
from desk_tasks import Reply, Task, read_documents

from coterie.answer import Answer, Answerer
from coterie.business import Business
from coterie.choose import Choice
from coterie.config import Config
from coterie.data.read import Message
from coterie.desk import flow
from coterie.desk.confidence import Confidence, Signals
from coterie.desk.conversation import Conversations
from coterie.desk.flow import MOST_EVIDENCE, Parts, Result, Rules
from coterie.desk.knowing import check, ground
from coterie.desk.rights import house_of, procedures_of
from coterie.engine.engine import Engine
from coterie.engine.request import Callback, Generation, Piece, Sampling, TokenChoice
from coterie.grounding import Grounding
from coterie.knowledge.evidence import Evidence, Reader
from coterie.model.load import BaseModel
from coterie.privacy.vault import Vault
from coterie.sources import Knowledge, learn

HERE = Path.home() / ".cache" / "coterie" / "benchmarks" / "bank"  # documents and their index, made once
PERSON_WORDS = ["human agent", "real person", "speak to a human", "talk to a human", "speak to a person"]


def declared(base: str, database: Path, slots: int, context: int) -> Config:
    """The bank's coterie.toml."""
    return Config.model_validate({
        "business": {"name": "Rho-Bank", "base": base, "slots": slots, "context": context},
        "knowledge": {"bank": {"kind": "documents", "path": "documents", "description": "What the bank publishes"}},
        "desk": {
            "database": f"sqlite:///{database}", "procedures": str(Path(__file__).parent / "bank"),
            "rules": [{"reason": "asked_for_a_person", "words": PERSON_WORDS}],
        },
    })  # fmt: skip


@contextmanager
def bank(base: BaseModel, name: str, scratch: Path, slots: int, server: "Server | None" = None) -> Iterator["Front"]:
    """The desk open for customers. `name`: of the base model; `server`: that writes in its place."""
    business = Business(HERE, declared(name, scratch / "desk.db", slots, 2048), base)
    _write_documents(HERE / "documents")
    for learned in learn(business, tell=screen.print):
        if learned.indexed:
            screen.print(f"{learned.indexed} documents read, {learned.passages} passages", highlight=False)
    engine = business.engine()
    answerer = Elsewhere(business, engine, server) if server else Answerer(business, engine)
    house, knowledge = house_of(business), Knowledge(business, engine=lambda: engine)
    grounding = Grounding(answerer, knowledge)
    vault = Vault(business.detector(screen.print), house.database, house.keys)
    procedures = procedures_of(business, house, Parts().profile, lambda texts: knowledge.embedder.embed(texts))
    assert procedures, "the bank declares some"
    parts = Parts(
        mask=lambda customer, texts, _known: vault.mask(customer, texts, {}), ground=partial(ground, grounding),
        check=partial(check, grounding), procedures=procedures,
    )  # fmt: skip
    talks = Conversations(house.database, house.seal, house.unseal, beside=procedures.runs)
    try:
        yield Front(answerer, talks, parts)
    finally:
        procedures.close()
        answerer.close()
        knowledge.close()
        house.close()


def _write_documents(folder: Path) -> None:
    """As files that a source reads, title first; those that are there already stay untouched."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in read_documents(need_data("tau2_banking")).items():
        title, _, content = text.partition("\n")
        file, page = folder / f"{name}.md", f"# {title}\n\n{content}\n"
        if not file.exists() or file.read_text(encoding="utf-8") != page:
            file.write_text(page, encoding="utf-8")


class Front:
    """Takes a scripted customer's words to the answer flow, turn by turn, as the desk does it. `confidence`: None sends
    every answer that no rule keeps back."""

    def __init__(
        self, answerer: Answerer, talks: Conversations, parts: Parts, confidence: Confidence | None = None
    ) -> None:  # fmt: skip
        self.answerer, self.talks = answerer, talks
        self.rules = Rules(answerer.business.config.desk, confidence)
        self.parts, self._ground = replace(parts, ground=self._listen), parts.ground
        self._ids: dict[str, str] = {}
        self._found = threading.local()

    def reply(self, task: Task, said: Sequence[str]) -> Reply:
        """What the desk does about the customer's last words."""
        if len(said) == 1:
            self._ids[task.name] = self.talks.open(task.name).id
        id, self._found.best = self._ids[task.name], None
        self.talks.say(id, said[-1])
        turn = self.talks.claim(id)
        assert turn, "nobody else answers here"
        result = flow.answer(self.answerer, turn, self.rules, self.parts, lambda _text: None, lambda _generation: None)
        self.talks.finish(turn, result.text, result.data, result.handoff, result.keep)
        person = result.handoff
        return Reply(
            result.text, taken(task.name), person is not None, self._signals(result),
            person.reason if person else "",
        )  # fmt: skip

    def _listen(self, question: str, reader: Reader) -> list[Evidence]:
        """What the knowledge has, and how near the best of it is."""
        found = self._ground(question, reader)
        self._found.best = max((e.score for e in found[:MOST_EVIDENCE]), default=None)
        return found

    def _signals(self, result: Result) -> Signals | None:
        """Of what a model wrote; a procedure, or a rule before any answer, leaves none."""
        if "logprob" not in result.data:
            return None
        return Signals(result.data["similarity"], result.data["logprob"], self._found.best)


class Server:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = f"{url.rstrip('/')}/v1/chat/completions", name

    def ask(self, messages: Sequence[Message], most: int) -> tuple[str, list[float]]:
        """Its answer, and how likely each token was."""
        body = {"model": self.name, "messages": list(messages), "max_tokens": most, "temperature": 0, "logprobs": True}
        answer = httpx.post(self.url, json=body, timeout=300).raise_for_status()
        choice = answer.json()["choices"][0]
        tokens = (choice.get("logprobs") or {}).get("content") or []
        return choice["message"]["content"] or "", [t["logprob"] for t in tokens]


class Elsewhere(Answerer):
    """An answerer whose answers a server writes; routing stays here."""

    def __init__(self, business: Business, engine: Engine, server: Server) -> None:
        super().__init__(business, engine)
        self.server = server

    def chat(
        self, who: str | Choice, messages: list[Message], sampling: Sampling, on_piece: Callback | None = None,
        channel: str = "", preface: str = "",
    ) -> Answer:  # fmt: skip
        """As an answerer; the answer is complete when this returns."""
        last = messages[-1]["content"]
        text, logprobs = self.server.ask([*messages[:-1], {"role": "user", "content": preface + last}],
                                         sampling.max_tokens)  # fmt: skip
        generation = Generation([], sampling, None, on_piece)
        generation.emit(Piece(text, tuple(TokenChoice(0, "", p) for p in logprobs), "stop"))
        return Answer(generation, None, None, True, None)
