"""What a citation opens over HTTP: the passage, the row, the triple, the picture; each only for whom may read it."""

import sqlite3
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from coterie import sources
from coterie.business import Business
from coterie.knowledge.evidence import Reader
from coterie.privacy.house import House
from coterie.sources import Knowledge, learn
from coterie.web.app import create_app
from knowledge_support import WordEmbedder
from test_access import WORD, _Answerer, client, staffed

TOML = """
[knowledge.music]
kind = "graph"
base = "urn:music:"
[[knowledge.music.parts]]
files = "open.nt"
[[knowledge.music.parts]]
files = "deals.nt"
readers = ["reviewer", "sales"]
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


house = pytest.fixture(staffed, name="house")


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


def test_a_citation_of_a_triple_opens_it_for_whoever_may_see_it(
    folder: Path, agent: TestClient, reviewer: TestClient
) -> None:
    knowledge = Knowledge(Business.open(folder))
    try:
        music = knowledge.source("music")
        cited = {q: music.search(f"What is the {q} of Satchmo?", STAFF)[0] for q in ("singer", "motto", "sold to")}
        count = music.search("How many singer of Satchmo?", STAFF)
    finally:
        knowledge.close()
    for asked, evidence in cited.items():
        params = {"source": "music", "where": evidence.where}
        opened = [who.get("/knowledge/passage", params=params) for who in (agent, reviewer)]
        assert [o.status_code for o in opened] == [404 if asked == "sold to" else 200, 200], opened[0].text
        assert opened[1].json()["text"] == evidence.text
    assert "one; two: <three>" in cited["motto"].text
    for e in count:
        found = reviewer.get("/knowledge/passage", params={"source": "music", "where": e.where, "query": e.query})
        assert found.status_code == 200
    gone = cited["singer"].where.replace("urn:a", "urn:b")
    assert reviewer.get("/knowledge/passage", params={"source": "music", "where": gone}).status_code == 404
    counted = "SELECT (COUNT(?o) AS ?n) { ?s <urn:music:sold_to> ?o }"
    answers = [
        w.get("/knowledge/passage", params={"source": "music", "where": "<urn:s>", "query": counted}).json()["text"]
        for w in (agent, reviewer)
    ]
    assert answers == ["0", "1"]


def test_a_citation_of_a_row_opens_the_row_and_the_statement_under_the_readers_own_rows(
    app: FastAPI, agent: TestClient, reviewer: TestClient
) -> None:
    def opened(who: TestClient, where: str, query: str) -> Any:
        return who.get("/knowledge/passage", params={"source": "shop", "where": where, "query": query})

    query = "SELECT id, thing FROM orders ORDER BY id"
    assert [opened(reviewer, f"row {n} of 2 row(s)", query).json()["text"] for n in (1, 2)] == [
        "id: 1, thing: kettle", "id: 2, thing: lamp"
    ]  # fmt: skip
    assert opened(reviewer, "row 1 of 2 row(s)", query).json()["query"] == query
    assert [opened(agent, f"row {n} of 2 row(s)", query).status_code for n in (1, 2)] == [200, 404]
    assert "lamp" not in opened(agent, "row 1 of 2 row(s)", query.replace("id,", "thing, id,")).text
    assert opened(reviewer, "row 1 of 2 row(s)", "").status_code == 404
    nothing = "SELECT id FROM orders WHERE id > 9"
    assert opened(reviewer, "0 row(s)", nothing).json()["text"] == "no rows"
    for wrong in ("DELETE FROM orders", "SELECT * FROM sqlite_master", "SELECT id FROM orders; DROP TABLE orders", "x"):
        reply = opened(reviewer, "row 1 of 1 row(s)", wrong)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "query_refused"), wrong
    assert opened(client(app), "row 1 of 2 row(s)", query).status_code == 401


def test_an_account_reads_what_its_groups_may(app: FastAPI, house: House) -> None:
    """`readers = ["sales"]` can be met over HTTP, by a session and by a token, and no longer once the group is gone."""
    house.accounts.add("sam", "agent", WORD, groups=["sales"])
    asked = {"source": "music", "thing": "urn:d"}
    sam = client(app, house.accounts.login("sam", WORD).secret)
    assert sam.get("/knowledge/picture", params=asked).status_code == 200
    bearer = {"Authorization": f"Bearer {house.accounts.token('sam', 'bot', ['ask'], 1).secret}"}
    assert client(app).get("/knowledge/picture", params=asked, headers=bearer).status_code == 200
    owner, same = client(app, house.accounts.login("owner", WORD).secret), {"Sec-Fetch-Site": "same-origin"}
    assert owner.get("/knowledge/picture", params=asked).status_code == 404, "an owner is in no group but their role"
    assert owner.patch("/v1/accounts/sam", json={"groups": []}, headers=same).status_code == 204
    assert sam.get("/knowledge/picture", params=asked).status_code == 401, "the session has ended"
    again = client(app, house.accounts.login("sam", WORD).secret)
    assert again.get("/knowledge/picture", params=asked).status_code == 404
