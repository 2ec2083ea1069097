"""Sources under an answer, and the page of sources, in a real browser."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from coterie import sources
from coterie.answer import Answer, Answerer
from coterie.business import Business
from coterie.data.read import Message
from coterie.engine.request import Sampling
from coterie.knowledge import extract
from coterie.knowledge.evidence import Reader
from coterie.knowledge.proposals import Proposal
from coterie.knowledge.store import open_db
from coterie.model.constrain import choices
from coterie.sources import index_folder, learn
from knowledge_support import WordEmbedder
from test_grounding import DELIVERY, KNOWS, POLICY
from test_page import finished, send, served, visitor, words

EVIL = "<img src=x onerror=\"document.title='broken in'\"> Delivery is <b>free</b>."


class SayingAnswerer(Answerer):
    """Says `says`, whatever the model would, and notes what it was asked."""

    says = f"{DELIVERY} Lions eat grass in Africa."
    asked: list[Message]

    def chat(self, who: str, messages: list[Message], sampling: Sampling, *more: Any) -> Answer:
        self.asked = messages
        return super().chat(who, messages, replace(sampling, constraint=choices([self.says])), *more)


GRAPH = """
[knowledge.things]
kind = "graph"
base = "urn:"
parts = [{ files = "things.nt" }]
extract = { documents = "rules", relations = ["sold with"] }
"""
LABEL = "<http://www.w3.org/2000/01/rdf-schema#label>"
THINGS = f'<urn:s> {LABEL} "Satchmo" .\n<urn:a> {LABEL} "Louis Armstrong" .\n<urn:s> <urn:singer> <urn:a> .\n'


@pytest.fixture
def knowing(shop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SayingAnswerer, str]]:
    monkeypatch.setattr(sources, "embedder", lambda *_: WordEmbedder())
    toml = (shop / "coterie.toml").read_text().replace("context = 256", "context = 512")
    (shop / "coterie.toml").write_text(toml + KNOWS.format(settings="") + GRAPH)
    (shop / "things.nt").write_text(THINGS)
    (shop / "rules").mkdir()
    (shop / "rules" / "policy.md").write_text(POLICY)
    (shop / "rules" / "evil.md").write_text(f"# Wheels\n{EVIL}\n")
    (shop / "rules" / "broken.pdf").write_bytes(b"no PDF")
    list(learn(Business.open(shop)))
    answerer = SayingAnswerer.open(Business.open(shop))
    assert isinstance(answerer, SayingAnswerer)
    with served(answerer) as address:
        yield answerer, address


def test_an_answer_shows_its_sources_and_opens_the_passage(
    browser: Browser, knowing: tuple[SayingAnswerer, str]
) -> None:
    answerer, address = knowing
    with visitor(browser, address) as page:
        turn = finished(send(page, "Standard delivery takes how many days, and costs how many pounds?"))
        expect(words(turn)).to_have_text(f"{DELIVERY} [1] Lions eat grass in Africa. [?]")
        listed = turn.get_by_role("list", name="Sources").get_by_role("listitem")
        expect(listed).to_have_count(2)
        expect(listed.nth(1)).to_have_text("[?] No source says this.")
        passage = listed.first.locator("blockquote")
        expect(passage).to_be_hidden()
        listed.first.locator("summary").click()
        expect(passage).to_contain_text(DELIVERY)
        page.reload()
        expect(page.locator(".turn .sources summary")).to_contain_text("rules: policy.md")
        finished(send(page, "And standard delivery on Sundays?"))
        assert "[1]" not in answerer.asked[1]["content"]  # marks are not part of what was said


def test_sources_that_could_not_be_asked_are_named_under_the_answer(
    browser: Browser, knowing: tuple[SayingAnswerer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = sources.Knowledge.gather

    def fails(self: sources.Knowledge, question: str, reader: Reader, *more: Any) -> Any:
        more[1]("far: <b>gives no answer</b>")
        return gather(self, question, reader, *more)

    monkeypatch.setattr(sources.Knowledge, "gather", fails)
    with visitor(browser, knowing[1]) as page:
        turn = finished(send(page, "Standard delivery takes how many days, and costs how many pounds?"))
        expect(turn.get_by_role("list", name="Sources")).to_contain_text("far: <b>gives no answer</b>")


def test_nothing_that_a_document_says_runs(browser: Browser, knowing: tuple[SayingAnswerer, str]) -> None:
    answerer, address = knowing
    answerer.says = "Delivery is free."
    with visitor(browser, address) as page:
        turn = finished(send(page, "Is delivery of wheels free img src?"))
        for summary in turn.locator(".sources summary").all():
            summary.click()
        assert page.locator(".sources img, .sources b").count() == 0
        assert page.title() != "broken in"


def test_the_page_of_sources_shows_freshness_and_errors(browser: Browser, knowing: tuple[SayingAnswerer, str]) -> None:
    with visitor(browser, knowing[1]) as page:
        page.get_by_role("link", name="What we know, and from where").click()
        expect(page.get_by_role("heading", name="rules")).to_be_visible()
        expect(page.locator(".errors")).to_contain_text("broken.pdf: broken, or no PDF")
        expect(page.get_by_role("row", name="policy.md")).to_contain_text("House rules")
        expect(page.locator("time")).to_have_count(2)
        page.get_by_role("link", name="Chat").click()
        expect(page.get_by_label("Your message")).to_be_visible()


def test_an_answer_from_the_graph_shows_the_neighbourhood_as_a_picture(
    browser: Browser, knowing: tuple[SayingAnswerer, str]
) -> None:
    answerer, address = knowing
    answerer.says = "The singer of Satchmo is Louis Armstrong."
    with visitor(browser, address) as page:
        turn = finished(send(page, "Who is the singer of Satchmo?"))
        shown = turn.get_by_role("list", name="Sources").get_by_role("listitem").first
        shown.locator("summary").click()
        picture = shown.get_by_role("img", name="The neighbourhood in things")
        expect(picture).to_be_visible()
        page.wait_for_function("document.querySelector('.sources img').naturalWidth > 0")
        expect(shown.locator("pre")).to_contain_text("SELECT")


def test_a_person_accepts_and_rejects_facts_on_the_page(
    browser: Browser, knowing: tuple[SayingAnswerer, str], shop: Path
) -> None:
    folder = index_folder(Business.open(shop), "things")
    passage = next(p for p in passages(shop) if "Standard delivery" in p)
    made = [Proposal(name, "sold with", "Standard delivery", "policy.md", passage) for name in ("Unused items", "Days")]
    extract.pending(folder).add(made)
    with visitor(browser, knowing[1]) as page:
        page.get_by_role("link", name="What we know, and from where").click()
        facts = page.locator("#facts li")
        expect(facts).to_have_count(2)
        facts.first.get_by_role("button", name="Accept").click()
        expect(facts).to_have_count(1)
        expect(facts.first.get_by_role("button", name="Accept")).to_be_focused()
        facts.first.get_by_role("button", name="Reject").click()
        expect(facts).to_have_count(0)
        page.reload()
        expect(page.get_by_role("heading", name="Facts to decide")).to_have_count(0)
        expect(page.get_by_role("row", name="extracted from policy.md")).to_be_visible()
    assert [p.state for p in extract.pending(folder).read()] == ["accepted", "rejected"]


def passages(shop: Path) -> list[str]:
    with closing(open_db(index_folder(Business.open(shop), "rules"), writing=False)) as db:
        return [text for (text,) in db.execute("select text from chunks")]
