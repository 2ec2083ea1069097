"""What a citation opens over HTTP: the passage, the row, the triple, the picture; each only for whom may read it."""

import sqlite3
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from coterie import sources
from coterie.business import Business
from coterie.knowledge.evidence import Reader
from coterie.privacy.house import House, open_house
from coterie.sources import Knowledge, learn
from coterie.store.database import open_database
from coterie.web.app import create_app
from knowledge_support import WordEmbedder
from test_access import WORD, _Answerer, client

TOML = """
[knowledge.music]
kind = "graph"
base = "urn:music:"
[[knowledge.music.parts]]
files = "open.nt"
[[knowledge.music.parts]]
files = "deals.nt"
readers = ["reviewer"]
[knowledge.shop]
kind = "database"
url = "sqlite:///shop.db"
[knowledge.shop.tables.orders]
rows = { reviewer = "1 = 1", agent = "customer = 'ada'" }
"""
LABEL = "<http://www.w3.org/2000/01/rdf-schema#label>"
OPEN = f"""<urn:s> {LABEL} "Satchmo" .
<urn:a> {LABEL} "Louis Armstrong" .
<urn:s> <urn:music:singer> <urn:a> .
<urn:s> <urn:music:motto> "one; two: <three>" .
"""
DEALS = f"""<urn:d> {LABEL} "Decca" .
<urn:s> <urn:music:sold_to> <urn:d> .
"""
STAFF = Reader("r", frozenset({"reviewer"}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "embedder", lambda *_: WordEmbedder())
    (tmp_path / "open.nt").write_text(OPEN)
    (tmp_path / "deals.nt").write_text(DEALS)
    with sqlite3.connect(tmp_path / "shop.db") as db:
        db.execute("CREATE TABLE orders (id INTEGER, customer TEXT, thing TEXT)")
        db.executemany("INSERT INTO orders VALUES (?, ?, ?)", [(1, "ada", "kettle"), (2, "bob", "lamp")])
    (tmp_path / "coterie.toml").write_text(TOML)
    list(learn(Business.open(tmp_path)))
    return tmp_path


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    database = open_database(f"sqlite:///{tmp_path}/coterie.db")
    opened = open_house(tmp_path, database, {})
    for role in ("owner", "agent", "reviewer"):
        opened.accounts.add(role, role, WORD)
    yield opened
    opened.close()
    database.dispose()


@pytest.fixture
def app(folder: Path, house: House) -> FastAPI:
    answerer: Any = _Answerer(Business.open(folder))
    return create_app(answerer, None, house)


@pytest.fixture
def agent(app: FastAPI, house: House) -> TestClient:
    return client(app, house.accounts.login("agent", WORD).secret)


@pytest.fixture
def reviewer(app: FastAPI, house: House) -> TestClient:
    return client(app, house.accounts.login("reviewer", WORD).secret)


def test_evidence_of_a_graph_names_the_thing_and_its_picture_shows_what_the_reader_may_see(
    folder: Path, app: FastAPI, agent: TestClient, reviewer: TestClient
) -> None:
    knowledge = Knowledge(Business.open(folder))
    try:
        fact = knowledge.source("music").search("Who is the singer of Satchmo?", Reader())[0]
    finally:
        knowledge.close()
    assert fact.thing == "urn:s"
    asked = {"source": "music", "thing": fact.thing}
    drawn = {name: who.get("/knowledge/picture", params=asked) for name, who in (("a", agent), ("r", reviewer))}
    assert [reply.headers["content-type"] for reply in drawn.values()] == ["image/svg+xml"] * 2
    ET.fromstring(drawn["a"].text)
    assert [("Louis" in reply.text, "Decca" in reply.text) for reply in drawn.values()] == [(True, False), (True, True)]
    assert client(app).get("/knowledge/picture", params=asked).status_code == 401
    refused = agent.get("/knowledge/picture", params={"source": "music", "thing": "urn:d"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")
    assert reviewer.get("/knowledge/picture", params={"source": "music", "thing": "urn:d"}).status_code == 200
    for source, thing in (("music", "no> IRI"), ("none", "urn:s")):
        assert agent.get("/knowledge/picture", params={"source": source, "thing": thing}).status_code == 400
    assert agent.get("/knowledge/picture", params={"source": "shop", "thing": "urn:s"}).status_code == 404
