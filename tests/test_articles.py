"""Salesforce Knowledge as documents: fetched once, followed as they change, cited with their address."""

from pathlib import Path
from typing import Any

import pytest

from coterie.business import Business
from coterie.config import Config
from coterie.errors import CoterieError
from coterie.knowledge import articles
from coterie.knowledge.documents import Documents, Learned
from coterie.knowledge.documents_spec import DocumentsSpec
from coterie.knowledge.evidence import Reader
from coterie.sources import Knowledge, index_folder, learn
from knowledge_support import WordEmbedder
from test_crm import BUSY, LIMIT, Org, org

__all__ = ["org"]
RICH = "<p>A parcel takes <b>three</b> days.</p><h2>Abroad</h2><p>To France a parcel takes nine days.</p>"


def article(n: int, name: str, title: str, summary: str = "", answer: str = "", **more: Any) -> dict[str, Any]:
    """One version of an article."""
    return {
        "Id": f"ka0{n}", "KnowledgeArticleId": f"kA0{n}", "UrlName": name, "Title": title, "Summary": summary,
        "Answer__c": answer, "Language": "en_US", "PublishStatus": "Online", "IsVisibleInPkb": True,
        "IsVisibleInApp": True, "LastModifiedDate": "2026-01-01T00:00:00.000+0000", **more,
    }  # fmt: skip


class Shop:
    """A business whose articles are in the folder `help`."""

    def __init__(self, folder: Path, org: Org, **more: Any) -> None:
        declared = {"url": org.address, "fields": ["Summary", "Answer__c"],  # type: ignore[attr-defined]
                    "link": "https://help.shop.example/a/{name}", **more}  # fmt: skip
        source = {"kind": "documents", "path": "help", "salesforce": declared}
        self.business = Business(folder, Config.model_validate({"knowledge": {"help": source}}))
        self.org, self.folder = org, folder / "help"

    def learn(self) -> Learned:
        self.org.asked.clear()
        (done,) = learn(self.business, by=WordEmbedder())
        return done

    def files(self) -> list[str]:
        return sorted(f.name for f in self.folder.iterdir() if not f.name.startswith("."))

    def ask(self, question: str) -> list[tuple[str, str]]:
        """The places of the answers, and where they can be read."""
        spec = self.business.config.knowledge.sources["help"]
        assert isinstance(spec, DocumentsSpec)
        opened = Documents("help", spec, index_folder(self.business, "help"), WordEmbedder())
        try:
            return [(e.where, e.link) for e in opened.search(question, Reader())]
        finally:
            opened.close()


@pytest.fixture
def shop(org: Org, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.setenv("SALESFORCE_CLIENT_ID", "id")
    monkeypatch.setenv("SALESFORCE_CLIENT_SECRET", "secret")
    org.articles = [
        article(1, "Delivery-times", "Delivery times", "How long\n\na parcel takes", RICH),
        article(2, "Returns", "Returns & <refunds>", "Within 30 days, if price < 50 euros"),
        article(3, "Draft", "Draft", "Not yet", PublishStatus="Draft"),
        article(4, "Lieferung", "Lieferung", "Drei Tage", Language="de"),
        article(5, "Internal", "Internal", "For colleagues", IsVisibleInPkb=False),
    ]
    return Shop(tmp_path, org)


def test_what_is_published_is_found_and_cited_with_its_address(shop: Shop) -> None:
    done = shop.learn()
    assert (done.indexed, done.errors) == (2, ())
    assert shop.files() == ["Delivery-times.html", "Returns.html"]
    where, link = shop.ask("How long does a parcel to France take?")[0]
    assert where == "Delivery-times.html"
    assert link == "https://help.shop.example/a/Delivery-times"
    knowledge = Knowledge(shop.business, WordEmbedder())
    try:
        opened = knowledge.open("help", "Returns.html", Reader())
        assert opened
        assert "50 euros" in opened.text, "what is plain text is not taken for a tag"
        assert opened.link == "https://help.shop.example/a/Returns"
    finally:
        knowledge.close()


def test_only_what_changed_is_fetched_and_what_is_gone_is_forgotten(shop: Shop, org: Org) -> None:
    shop.learn()
    own = shop.folder / "own.md"
    own.write_text("# Ours\n\nA file of our own.")
    again = shop.learn()
    assert (again.indexed, again.dropped, len(org.asked)) == (1, 0, 1), "one list, and no article"
    org.articles[0] = article(6, "Delivery-times", "Delivery times", "Two days now", KnowledgeArticleId="kA01")
    org.articles.append(article(7, "Repairs", "Repairs", "We mend bicycles"))
    org.articles[1]["PublishStatus"] = "Archived"
    done = shop.learn()
    assert (done.indexed, done.dropped) == (2, 1)
    (fetched,) = [q for q in org.asked if "Title" in q]
    assert "IN ('ka06', 'ka07')" in fetched
    assert shop.files() == ["Delivery-times.html", "Repairs.html", "own.md"]
    assert "Two days now" in (shop.folder / "Delivery-times.html").read_text()
    org.articles[0]["UrlName"] = "Shipping"
    shop.learn()
    assert shop.files() == ["Repairs.html", "Shipping.html", "own.md"]
    org.articles.clear()
    assert shop.learn().dropped == 2
    assert shop.files() == ["own.md"], "a file that Salesforce never gave stays"


def test_another_declaration_fetches_everything_anew(shop: Shop, org: Org, tmp_path: Path) -> None:
    shop.learn()
    inside = Shop(tmp_path, org, channel="App", fields=["Summary"])
    inside.learn()
    assert inside.files() == ["Delivery-times.html", "Internal.html", "Returns.html"]
    assert "three" not in (inside.folder / "Delivery-times.html").read_text()


@pytest.mark.parametrize(
    ("plan", "says"),
    [([BUSY] * 3, "failed 3 times"), ([LIMIT], "REQUEST_LIMIT_EXCEEDED"), ([(200, b"<html>")], "no usable answer")],
)
def test_a_crm_that_fails_is_told_and_what_was_learned_stays(
    plan: list[Any], says: str, shop: Shop, org: Org, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.learn()
    opened = articles.open_org("help", shop.business.config.knowledge.sources["help"].salesforce)  # type: ignore[union-attr, arg-type]
    opened.pause = lambda _s: None
    opened.session()
    monkeypatch.setattr(articles, "open_org", lambda _name, _spec: opened)
    org.plan = list(plan)
    done = shop.learn()
    assert says in done.errors[0][1]
    assert shop.files() == ["Delivery-times.html", "Returns.html"]
    assert shop.ask("How long does a parcel to France take?")
    assert shop.learn().errors == ()


def test_a_fetch_that_breaks_off_goes_on_where_it_was(shop: Shop, org: Org, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(articles, "AT_ONCE", 1)
    ask, asked = org.query, [0]

    def third_fails(soql: str) -> dict[str, Any]:
        asked[0] += 1
        return ask(soql) if asked[0] != 3 else {}

    monkeypatch.setattr(org, "query", third_fails)
    assert shop.learn().errors
    assert shop.files() == ["Delivery-times.html"]
    assert shop.learn().errors == ()
    assert [q for q in org.asked if "Title" in q and "'ka01'" in q] == [], "it has that one"
    assert shop.files() == ["Delivery-times.html", "Returns.html"]


@pytest.mark.parametrize("name", ["../coterie", ".articles", "a/b", ""])
def test_a_name_that_is_no_files_is_refused(name: str, shop: Shop, org: Org) -> None:
    org.articles.append(article(8, name, "Bad"))
    assert "cannot be kept as a file" in shop.learn().errors[0][1]


def test_what_is_missing_or_damaged_is_named(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.learn()
    (shop.folder / articles.STATE).write_text("{")
    assert ".articles.json: damaged" in shop.learn().errors[0][1]
    monkeypatch.delenv("SALESFORCE_CLIENT_SECRET")
    assert "the environment has no SALESFORCE_CLIENT_SECRET" in shop.learn().errors[0][1]
    for wrong in ({"fields": ["Answer__c FROM User --"]}, {"language": "en' OR"}, {"link": "javascript:alert(1)"}):
        declared = {"kind": "documents", "path": "h", "salesforce": {"url": "https://x.example", **wrong}}
        with pytest.raises((CoterieError, ValueError)):
            Config.model_validate({"knowledge": {"help": declared}})
