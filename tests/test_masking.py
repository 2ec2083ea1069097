"""Nothing private goes to a model: requests of the API, texts to a remote model, customers' rows in training."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from coterie import sources
from coterie.answer import Answerer
from coterie.business import Business, fingerprint
from coterie.cli.main import main
from coterie.config import Config
from coterie.data.private import Span
from coterie.grounding import Grounded, Sentence, preface
from coterie.knowledge.evidence import Evidence
from coterie.mixture import tuning_data
from coterie.privacy.deidentify import Detector, MaskingFailed
from coterie.privacy.house import open_house
from coterie.privacy.once import mask_once
from coterie.store.database import open_database
from coterie.web.app import create_app
from desk_support import Script, ScriptedAnswerer, ScriptedBusiness

CARD, EMAIL = "4111 1111 1111 1111", "ada@shop.example"
ASK = {"messages": [{"role": "system", "content": f"You work for {EMAIL}"},
                    {"role": "user", "content": f"Card {CARD}, mail {EMAIL}"}]}  # fmt: skip


class Tagger:
    """Finds one name."""

    def find(self, texts: list[str]) -> list[list[Span]]:
        return [[Span(i, i + 3, "name")] if (i := text.find("Ada")) >= 0 else [] for text in texts]


def api(folder: Path, rule: str, answer: str = "Sent to [EMAIL_1], [CARD_1], [NAME_1].") -> TestClient:
    business = ScriptedBusiness(folder, Config.model_validate({"privacy": {"mask": rule}}))
    answerer: Any = ScriptedAnswerer(business, lambda text: Script(answer))
    app = create_app(answerer, mask=lambda texts: mask_once(Detector(), texts))
    app.state.asked = answerer.asked
    return TestClient(app, base_url="http://localhost", client=("127.0.0.1", 5), raise_server_exceptions=False)


def streamed(client: TestClient, body: dict[str, Any]) -> str:
    lines = client.post("/v1/chat/completions", json=body | {"stream": True}).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)


def test_a_request_of_the_api_reaches_the_model_masked_and_its_answer_is_put_back(tmp_path: Path) -> None:
    client = api(tmp_path, "always")
    whole = client.post("/v1/chat/completions", json=ASK | {"model": "auto"}).json()
    assert whole["choices"][0]["message"]["content"] == f"Sent to {EMAIL}, {CARD}, [NAME_1]."
    assert streamed(client, ASK | {"model": "auto"}) == f"Sent to {EMAIL}, {CARD}, [NAME_1]."
    for asked in client.app.state.asked:  # type: ignore[attr-defined]
        said = json.dumps(asked)
        assert "4111" not in said
        assert EMAIL not in said
        assert said.count("[EMAIL_1]") == 2, "one person has one pseudonym in all of a request"


def test_without_accounts_a_request_goes_as_it_is_and_with_the_first_it_is_masked(tmp_path: Path) -> None:
    client = api(tmp_path, "accounts")
    client.post("/v1/chat/completions", json=ASK | {"model": "auto"})
    assert CARD in json.dumps(client.app.state.asked)  # type: ignore[attr-defined]
    database = open_database(f"sqlite:///{tmp_path}/.coterie/desk.db")
    house = open_house(tmp_path, database, {})
    business = ScriptedBusiness(tmp_path, Config())
    answerer: Any = ScriptedAnswerer(business, lambda text: Script("Fine."))
    served = create_app(answerer, house=house, mask=lambda texts: mask_once(Detector(), texts))
    house.accounts.add("anna", "owner", "correct horse battery")
    token = house.accounts.token("anna", "x", ["ask"], 1).secret
    inside = TestClient(served, headers={"Authorization": f"Bearer {token}"})
    assert inside.post("/v1/chat/completions", json=ASK | {"model": "auto"}).status_code == 200
    assert "4111" not in json.dumps(answerer.asked)
    house.close()


def test_where_the_masker_fails_nothing_reaches_a_model(tmp_path: Path) -> None:
    def broken(text: str) -> list[Span]:
        raise ValueError(text)

    business = ScriptedBusiness(tmp_path, Config.model_validate({"privacy": {"mask": "always"}}))
    answerer: Any = ScriptedAnswerer(business, lambda text: Script("Fine."))
    app = create_app(answerer, mask=lambda texts: mask_once(broken, texts))
    reply = TestClient(app, base_url="http://localhost").post("/v1/chat/completions", json=ASK | {"model": "auto"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "masking_failed")
    assert CARD not in reply.text
    assert answerer.asked == []


def test_tokens_cannot_be_masked_and_are_refused(tmp_path: Path) -> None:
    reply = api(tmp_path, "always").post("/v1/completions", json={"model": "base", "prompt": [1, 2]})
    assert (reply.status_code, "send text" in reply.text) == (400, True)


@contextmanager
def remote() -> Iterator[tuple[str, list[str]]]:
    """An embeddings server, and the texts that it was sent."""
    seen = list[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
            seen.extend(texts)
            body = json.dumps({"data": [{"index": i, "embedding": [1.0, 2.0]} for i in range(len(texts))]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def declared(folder: Path, toml: str, finds: Callable[[str], list[Span]] | None = None) -> Business:
    (folder / "coterie.toml").write_text(toml)
    business = Business.open(folder)
    business._detector = finds or Detector(Tagger())  # type: ignore[assignment]
    return business


def test_a_remote_embedding_model_only_ever_sees_masked_text(tmp_path: Path) -> None:
    with remote() as (url, seen):
        business = declared(tmp_path, f'[knowledge]\nembeddings = "{url}"\nembeddings_model = "m"\n')
        by = sources.embedder(business)
        by.embed([f"Ada wrote from {EMAIL}", f"card {CARD}"])
        assert seen == ["width", "[NAME_1] wrote from [EMAIL_1]", "card [CARD_1]"]
        assert by.name.endswith("#masked"), "an index of unmasked texts is made anew"


def test_a_remote_model_is_sent_nothing_where_the_masker_fails(tmp_path: Path) -> None:
    def broken(text: str) -> list[Span]:
        if text == "width":
            return []
        raise ValueError(text)

    with remote() as (url, seen):
        by = sources.embedder(declared(tmp_path, f'[knowledge]\nembeddings = "{url}"\n', broken))
        with pytest.raises(MaskingFailed) as failed:
            by.embed(["harmless", f"card {CARD}"])
        assert CARD not in str(failed.value)
        assert seen == ["width"]


# Who speaks HTTP: a model on another machine would be asked from here, and what it is sent must be masked. Whoever adds
# a file to this list says why its texts may leave.
SPEAKS = {
    "desk/procedures/actions.py",  # actions that the business declares
    "desk/webhook.py",  # the business's own systems; texts only where it says so
    "knowledge/embed.py",  # a remote model: masked
    "knowledge/endpoint.py",  # a SPARQL endpoint of the business
    "model/pull.py",  # weights that are fetched
    "privacy/oidc.py",  # the identity provider
    "salesforce.py",  # the business's own CRM
}


def test_no_other_room_sends_anything_anywhere() -> None:
    root = Path(sources.__file__).parent
    speakers = {
        str(file.relative_to(root)) for file in root.rglob("*.py")
        if any(f"import {lib}" in (text := file.read_text()) or f"from {lib}" in text
               for lib in ("httpx", "requests", "urllib.request", "http.client", "aiohttp", "openai"))
    }  # fmt: skip
    assert speakers <= SPEAKS


def test_customers_rows_are_masked_before_an_expert_learns_from_them(tmp_path: Path) -> None:
    rows = [{"prompt": f"Ada, card {CARD}", "completion": "Ada, thank you.", "customer": "c1"},
            {"prompt": f"Call {EMAIL}", "completion": "It is ours."}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "b.csv").write_text(f'prompt,completion,customer\n"Ada: {EMAIL}",AB-12345,c2\n')
    business = declared(tmp_path, '[experts.say]\ntrain = "a.jsonl"\n[experts.sort]\ntrain = "b.csv"\nchoices = true\n')
    said = [[m["content"] for m in e.messages] for e in business.examples("say", ["a.jsonl"])]
    assert said == [["[NAME_1], card [CARD_1]", "[NAME_1], thank you."], [f"Call {EMAIL}", "It is ours."]]
    (label,) = business.examples("sort", ["b.csv"])
    assert [m["content"] for m in label.messages] == ["[NAME_1]: [EMAIL_1]", "AB-12345"], "labels stay"
    assert "Ada" not in json.dumps([e.messages for e in tuning_data([tmp_path / "a.jsonl"], business)])
    with pytest.raises(Exception, match="a customer's row"):
        tuning_data([tmp_path / "a.jsonl"], None)


def test_an_expert_that_learned_from_unmasked_rows_is_no_longer_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c", "customer": "c1"}\n')
    business = declared(tmp_path, '[experts.say]\ntrain = "a.jsonl"\n')
    now = fingerprint(business, "say")
    monkeypatch.setattr("coterie.business.names_customers", lambda _: False)
    assert fingerprint(business, "say") != now


def test_a_file_is_masked_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": [{"role": "user", "content": f"Card {CARD}"}], "customer": "c-10422", "n": 3},
            {"prompt": f"{EMAIL} and {CARD}", "completion": EMAIL}]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    ask = ["privacy", "mask-file", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--rules-only"]
    with pytest.raises(SystemExit, match="0"):
        main(ask)
    masked = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert masked == [
        {"messages": [{"role": "user", "content": "Card [CARD_1]"}], "customer": "c-10422", "n": 3},
        {"prompt": "[EMAIL_1] and [CARD_1]", "completion": "[EMAIL_1]"},
    ]
    with pytest.raises(SystemExit, match="2"):
        main(ask)
    assert "already there" in capsys.readouterr().err


class _Writer:
    """Says what it is fed; one sentence."""

    def __init__(self, grounded: Grounded) -> None:
        self.grounded, self.said, self.held = grounded, True, ""

    def feed(self, text: str) -> str:
        self.held += text
        return ""

    def end(self) -> str:
        self.grounded.sentences.append(Sentence(self.held, 1, True, 1.0))
        return self.held


def test_a_grounded_answer_is_looked_for_in_plain_words_and_written_from_masked_ones(tmp_path: Path) -> None:
    sought, client = list[str](), api(tmp_path, "always")
    evidence = Evidence("crm", "row of ada@shop.example", f"{EMAIL} pays with {CARD}", 0.9)

    class Knowing:
        spec = SimpleNamespace(sources={"crm": 1}, missing="say", unknown="?")

        def gather(self, messages: list[Any], reader: Any) -> Grounded:
            sought.append(messages[-1]["content"])
            return Grounded([evidence], True, [])

        def writer(self, grounded: Grounded, asked: str) -> _Writer:
            return _Writer(grounded)

        def ask(self, who: str, messages: list[Any], grounded: Grounded, *rest: Any) -> Any:
            return answerer.chat(who, messages, *rest, preface=preface(grounded.evidence))

    answerer: Any = ScriptedAnswerer(
        ScriptedBusiness(tmp_path, Config.model_validate({"privacy": {"mask": "always"}})),
        lambda text: Script("[EMAIL_1] pays with [CARD_1]."),
    )
    grounding: Any = Knowing()
    app = create_app(answerer, grounding=grounding, mask=lambda texts: mask_once(Detector(), texts))
    client = TestClient(app, base_url="http://localhost")
    body = {"model": "auto", "knowledge": True, "messages": [{"role": "user", "content": f"What of {EMAIL}?"}]}
    reply = client.post("/v1/chat/completions", json=body).json()
    assert sought == [f"What of {EMAIL}?"]
    assert EMAIL not in json.dumps(answerer.asked)
    assert "4111" not in json.dumps(answerer.asked)
    said = f"{EMAIL} pays with {CARD}."
    assert reply["choices"][0]["message"]["content"] == said
    assert reply["coterie"]["sentences"][0]["text"] == said
    assert reply["coterie"]["sources"][0]["text"] == evidence.text


def test_the_command_line_masks_where_always_is_declared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "coterie.toml").write_text('[privacy]\nmask = "always"\n')
    business = ScriptedBusiness(tmp_path, Config())
    answerer: Any = ScriptedAnswerer(business, lambda text: Script("Sent to [EMAIL_1], [CARD_1]."))
    answerer.close = lambda: None
    monkeypatch.setattr(Answerer, "open", lambda _business, _tell: answerer)
    monkeypatch.setattr(Business, "detector", lambda _self, _tell: Detector())
    with pytest.raises(SystemExit, match="0"):
        main(["generate", f"Card {CARD}, mail {EMAIL}", "--folder", str(tmp_path)])
    typed = io.BytesIO(f"Card {CARD}\nand mail {EMAIL}\n".encode())
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=typed, isatty=lambda: False))
    with pytest.raises(SystemExit, match="0"):
        main(["chat", str(tmp_path)])
    sent = f"Sent to {EMAIL}, {CARD}."
    assert [line.rpartition("> ")[2] for line in capsys.readouterr().out.splitlines()] == [
        sent, f"Sent to [EMAIL_1], {CARD}.", sent,
    ]  # fmt: skip
    said = json.dumps(answerer.asked)
    assert "4111" not in said
    assert EMAIL not in said
    assert len(answerer.asked[-1]) == 3, "the conversation, with what was answered"
