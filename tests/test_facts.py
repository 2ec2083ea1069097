"""Facts from documents, as a business declares it: proposed, decided by a person or a rule, gone with what they stood
in, and read by whoever may read the document."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from coterie import facts, sources
from coterie.business import Business
from coterie.cli.main import app as cli
from coterie.config import read_config
from coterie.errors import CoterieError
from coterie.knowledge import extract
from coterie.knowledge.evidence import Reader
from coterie.knowledge.proposals import Proposal, read_proposals
from coterie.privacy.house import House
from coterie.sources import Knowledge, learn, overview
from coterie.web.app import create_app
from knowledge_support import WordEmbedder
from test_access import WORD, _Answerer, client, staffed

TOML = """
[knowledge.things]
kind = "graph"
base = "urn:"
[knowledge.things.extract]
documents = "rules"
relations = ["made by", "located in"]
{accept}
[knowledge.rules]
kind = "documents"
path = "docs"
permissions = [{{ files = "hr/*", readers = ["reviewer"] }}]
"""
OPEN = "The Blue Boiler is made by Acme Works."
CLOSED = "The Red Boiler is made by Bolt Limited."
EVERYONE, STAFF = Reader(), Reader("r", frozenset({"reviewer"}))


def reads(_engine: Any, passages: Iterable[tuple[str, str]], relations: Sequence[str], _adapter: Any = None) -> Any:
    """What a good model would read here."""
    for where, text in passages:
        for name in ("Blue Boiler", "Red Boiler"):
            maker = "Acme Works" if name == "Blue Boiler" else "Bolt Limited"
            written = json.dumps([{"subject": name, "relation": "made by", "object": maker}])
            yield from read_proposals(written, where, text, relations)


@pytest.fixture
def business(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Business]:
    monkeypatch.setattr(sources, "embedder", lambda *_: WordEmbedder())
    monkeypatch.setattr(extract, "propose", reads)
    (tmp_path / "docs" / "hr").mkdir(parents=True)
    (tmp_path / "docs" / "open.md").write_text(f"# Boilers\n\n{OPEN}\n")
    (tmp_path / "docs" / "hr" / "closed.md").write_text(f"# Plans\n\n{CLOSED}\n")

    def made(accept: str = "") -> Business:
        (tmp_path / "coterie.toml").write_text(f'[business]\nbase = "{tiny}"\n{TOML.format(accept=accept)}')
        opened = Business.open(tmp_path)
        assert not [e for done in learn(opened) for e in done.errors]
        return opened

    return made


def made_by(business: Business, thing: str, reader: Reader) -> list[str]:
    """What the graph answers."""
    knowledge = Knowledge(business)
    try:
        return [e.text for e in knowledge.source("things").search(f"Who is the {thing} made by?", reader)]
    finally:
        knowledge.close()


def in_graph(business: Business) -> list[str]:
    return [f["path"] for s in overview(business, STAFF) if s["name"] == "things" for f in s["files"]]


def test_what_a_model_reads_waits_is_accepted_and_answers_whoever_may_read_the_document(
    business: Callable[..., Business],
) -> None:
    shop = business()
    assert dict(facts.propose(shop)) == {"things": 2}
    assert dict(facts.propose(shop)) == {"things": 0}
    assert [p.subject for _, p in facts.listed(shop, EVERYONE)] == ["Blue Boiler"]
    assert made_by(shop, "Blue Boiler", STAFF) == []
    ids = [p.id for _, p in facts.listed(shop, STAFF)]
    assert facts.decide(shop, ids, True, "ada", EVERYONE) == 1, "nobody decides what they may not read"
    assert facts.decide(shop, ids, True, "ada", STAFF) == 1
    assert made_by(shop, "Blue Boiler", EVERYONE) == ["Blue Boiler, made by: Acme Works"]
    assert made_by(shop, "Red Boiler", STAFF) == ["Red Boiler, made by: Bolt Limited"]
    assert "Bolt" not in str(made_by(shop, "Red Boiler", EVERYONE))
    assert facts.decide(shop, ids[:1], False, "ada", STAFF) == 1, "a person may change their mind"
    assert len(in_graph(shop)) == 1


def test_a_fact_goes_with_its_document_or_its_passage_and_follows_its_readers(
    business: Callable[..., Business], tmp_path: Path
) -> None:
    shop = business('accept = "made by"')
    list(facts.propose(shop))
    assert in_graph(shop) == ["extracted from hr/closed.md", "extracted from open.md"]
    list(learn(shop))
    assert len(in_graph(shop)) == 2, "learning again keeps what was accepted"
    toml = tmp_path / "coterie.toml"
    toml.write_text(toml.read_text().replace("hr/*", "*"))
    shop = Business.open(tmp_path)
    with pytest.raises(CoterieError, match="readers of rules, which it read, have changed"):
        made_by(shop, "Blue Boiler", EVERYONE)
    list(learn(shop, ["rules"]))
    assert made_by(shop, "Blue Boiler", EVERYONE) == []
    assert made_by(shop, "Blue Boiler", STAFF) == ["Blue Boiler, made by: Acme Works"]
    (tmp_path / "docs" / "open.md").write_text("# Boilers\n\nThe Blue Boiler is sold out.\n")
    (tmp_path / "docs" / "hr" / "closed.md").unlink()
    list(learn(shop, ["rules"]))
    assert in_graph(shop) == []
    assert "Boiler is made by" not in (tmp_path / ".coterie/knowledge/things/proposals.jsonl").read_text()
    (tmp_path / "docs" / "open.md").write_text(f"# Boilers\n\n{OPEN}\n")
    list(learn(shop, ["rules"]))
    assert dict(facts.propose(shop)) == {"things": 1}, "what comes back is read again"


def test_without_the_declaration_nothing_of_it_is_left(business: Callable[..., Business], tmp_path: Path) -> None:
    list(facts.propose(business('accept = "made by"')))
    toml = (tmp_path / "coterie.toml").read_text()
    start, end = toml.index("[knowledge.things.extract]"), toml.index("[knowledge.rules]")
    (tmp_path / "empty.nt").write_text("")
    part = '[[knowledge.things.parts]]\nfiles = "empty.nt"\n'
    (tmp_path / "coterie.toml").write_text(toml[:start] + part + toml[end:])
    shop = Business.open(tmp_path)
    list(learn(shop))
    assert in_graph(shop) == ["empty.nt"]
    assert not (tmp_path / ".coterie/knowledge/things/proposals.jsonl").exists()
    with pytest.raises(CoterieError, match=r"declares no \[knowledge.NAME.extract\]"):
        list(facts.propose(shop))


BAD = {
    "no such source": ("[knowledge.g.extract]\ndocuments = 'x'\nrelations = ['a']", "g.extract.documents: 'x' is no"),
    "no relations": ("[knowledge.g.extract]\ndocuments = 'x'\nrelations = []", "extract.relations"),
    "accepts another": ("[knowledge.g.extract]\ndocuments = 'x'\nrelations = 'a'\naccept = 'b'", "accept: 'b' is not"),
    "endpoint": ("endpoint = 'http://x'\n[knowledge.g.extract]\ndocuments = 'x'\nrelations = 'a'", "`extract`"),
}


@pytest.mark.parametrize(("toml", "said"), BAD.values(), ids=BAD)
def test_a_declaration_that_cannot_be_is_refused(tmp_path: Path, toml: str, said: str) -> None:
    (tmp_path / "coterie.toml").write_text(f'[knowledge.g]\nkind = "graph"\n{toml}\n')
    with pytest.raises(CoterieError, match=said):
        read_config(tmp_path)


def test_the_command_line_proposes_lists_and_decides(business: Callable[..., Business], tmp_path: Path) -> None:
    shop, run = business(), CliRunner()
    assert json.loads(run.invoke(cli, ["facts", "propose", str(tmp_path), "--json"]).stdout) == {"things": 2}
    listed = json.loads(run.invoke(cli, ["facts", "list", str(tmp_path), "--json"]).stdout)
    assert [(f["graph"], f["where"], f["subject"]) for f in listed] == [("things", "open.md", "Blue Boiler")]
    done = run.invoke(cli, ["facts", "accept", listed[0]["id"], "-f", str(tmp_path), "--as", "ada", "--json"])
    assert json.loads(done.stdout) == {"changed": 1}
    assert facts.listed(shop, EVERYONE, "accepted")[0][1].by == "ada"
    assert made_by(shop, "Blue Boiler", EVERYONE)
    unknown = run.invoke(cli, ["facts", "reject", "nothing", "-f", str(tmp_path)])
    assert "there is no proposal 'nothing'" in str(unknown.exception)


house = pytest.fixture(staffed, name="house")


def test_over_http_reviewers_decide_what_they_may_read_and_it_is_in_the_audit_log(
    business: Callable[..., Business], house: House
) -> None:
    shop = business()
    list(facts.propose(shop))
    answerer: Any = _Answerer(shop)
    app = create_app(answerer, None, house)
    who: dict[str, TestClient] = {
        name: client(app, house.accounts.login(name, WORD).secret) for name in ("owner", "agent", "reviewer")
    }
    same = {"Sec-Fetch-Site": "same-origin"}
    listed = who["reviewer"].get("/knowledge/facts").json()["data"]
    assert [f["subject"] for f in listed] == ["Red Boiler", "Blue Boiler"]
    assert [f["subject"] for f in who["owner"].get("/knowledge/facts").json()["data"]] == ["Blue Boiler"]
    assert ["Red Boiler" in who[n].get("/knowledge").text for n in who] == [False, False, True]
    body = {"ids": [f["id"] for f in listed], "accept": True}
    assert who["agent"].get("/knowledge/facts").status_code == 403
    assert who["agent"].post("/knowledge/facts", json=body, headers=same).status_code == 403
    assert who["reviewer"].post("/knowledge/facts", json=body).status_code == 403, "not from a page of ours"
    assert who["owner"].post("/knowledge/facts", json=body, headers=same).json() == {"changed": 1}
    assert who["reviewer"].post("/knowledge/facts", json=body, headers=same).json() == {"changed": 1}
    assert [(a.actor, a.action) for a in house.audit.lines("knowledge")][:2] == [
        ("reviewer", "facts.accept"), ("owner", "facts.accept")
    ]  # fmt: skip
    assert who["reviewer"].get("/knowledge/facts").json()["data"] == []
    assert made_by(shop, "Red Boiler", STAFF)


def test_a_graph_that_is_being_changed_keeps_the_decision(
    business: Callable[..., Business], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = business()
    list(facts.propose(shop))
    (graph, proposal) = facts.listed(shop, EVERYONE)[0]
    busy = extract.Graph(sources.index_folder(shop, graph))
    with busy.writing(), pytest.raises(CoterieError, match="decision is kept"):
        facts.decide(shop, [proposal.id], True, "ada", EVERYONE)
    list(learn(shop))
    assert made_by(shop, proposal.subject, EVERYONE)


def test_that_a_graph_could_not_follow_its_documents_stands_on_the_page_until_it_can(
    business: Callable[..., Business],
) -> None:
    shop = business('accept = "made by"')
    list(facts.propose(shop))
    with extract.Graph(sources.index_folder(shop, "things")).writing():
        (done,) = learn(shop, ["rules"])
    assert "things: what it read in rules could not follow" in done.errors[0][1]
    assert [e for s in overview(shop, STAFF) for e in s["errors"]] == [done.errors[0][1]]
    list(learn(shop, ["rules"]))
    assert [e for s in overview(shop, STAFF) for e in s["errors"]] == []


def test_a_real_model_reads_within_the_declared_relations(
    business: Callable[..., Business], monkeypatch: pytest.MonkeyPatch
) -> None:
    from coterie.knowledge.proposals import propose

    monkeypatch.setattr(extract, "propose", propose)
    shop = business()
    ((name, _),) = facts.propose(shop)
    assert name == "things"
    found: list[tuple[str, Proposal]] = facts.listed(shop, STAFF)
    assert all(p.relation in ("made by", "located in") for _, p in found)
