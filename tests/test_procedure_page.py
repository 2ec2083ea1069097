"""Procedures in a real browser: a customer's buttons in the widget, and an agent's approval at the desk."""

from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from playwright.sync_api import Browser, Page, expect

from coterie.desk.desk import Desk
from coterie.desk.flow import Parts
from coterie.privacy.access import Limit
from coterie.web import widget
from coterie.web.app import create_app
from coterie.web.door import COOKIE, Agent
from desk_support import ScriptedAnswerer
from procedure_support import Customer, Recorded, opened_desk
from test_desk_page import Shop, axe, enter, tab, violations, write  # noqa: F401, axe is a fixture

FOUND = {"status": "delivered", "total": Decimal("250.00"), "delivered": date.today()}


class GuidedShop(Shop):
    """A shop whose customers may return an order."""

    def opened(self, folder: Path, answerer: ScriptedAnswerer, parts: Parts) -> Desk:
        self.did = Recorded({"find": FOUND, "refund": {"number": "R-1"}})
        return opened_desk(folder, answerer, self.did, parts=parts)


@pytest.fixture(scope="module")
def shop_(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuidedShop]:
    shop = GuidedShop(tmp_path_factory.mktemp("guided"))
    yield shop
    shop.close()


@pytest.fixture
def shop(shop_: GuidedShop, monkeypatch: pytest.MonkeyPatch) -> GuidedShop:
    monkeypatch.setattr(widget, "SAYS", Limit(1000, 60))
    shop_.did.done.clear()
    return shop_


@pytest.fixture
def site(browser: Browser, shop: GuidedShop) -> Iterator[Page]:
    with tab(browser) as page:
        page.goto(shop.site)
        page.get_by_role("button", name="Chat with us").click()
        yield page


def lead(site: Page) -> None:
    """As far as the wait for an approval."""
    site.get_by_role("button", name="Return an order").click()
    expect(site.get_by_text("Step 1/3")).to_be_visible()
    write(site, "LW-12345")
    site.get_by_role("button", name="Broken").click()
    site.get_by_role("button", name="Yes, do it").click()
    expect(site.get_by_text("A colleague looks at this first.").last).to_be_visible()


def test_a_customer_presses_buttons_an_agent_approves_and_the_customer_is_told(
    site: Page, browser: Browser, shop: GuidedShop
) -> None:
    lead(site)
    with tab(browser, viewport={"width": 1440, "height": 900}) as office:
        enter(office, shop, "Bea")
        office.get_by_role("button", name="To approve").click()
        office.locator("#list button").first.click()
        wanted = office.get_by_role("region", name="Needs your approval")
        expect(wanted).to_contain_text("Return an order: Refund an order")
        expect(wanted).to_contain_text("250.00")
        expect(wanted).to_contain_text("The customer has agreed.")
        assert shop.did.named("refund") == []
        wanted.get_by_label("Private note").fill("Seen the photo.")
        wanted.get_by_role("button", name="Approve").click()
        expect(wanted).to_be_hidden()
        expect(office.locator("#entries .note")).to_contain_text("Seen the photo.")
    expect(site.get_by_text("Done, number R-1: 250.00 for LW-12345.").last).to_be_visible()
    assert len(shop.did.named("refund")) == 1
    expect(site.get_by_role("button", name="Stop this")).to_have_count(0)


def test_by_keyboard_after_a_reload_and_stopped_at_last(site: Page, shop: GuidedShop) -> None:
    site.get_by_role("button", name="Return an order").focus()
    site.keyboard.press("Enter")
    expect(site.get_by_text("What is your order number?").last).to_be_visible()
    site.reload()
    stop = site.get_by_role("button", name="Stop this")
    expect(stop).to_be_visible()
    stop.focus()
    site.keyboard.press("Enter")
    expect(site.get_by_text("All right, I have stopped.").last).to_be_visible()
    expect(site.get_by_label("Your message")).to_be_focused()
    expect(stop).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_buttons_and_approvals_are_clean_by_axe(scheme: Any, browser: Browser, shop: GuidedShop, axe: str) -> None:  # noqa: F811
    with tab(browser, color_scheme=scheme) as page:
        page.goto(shop.site)
        page.get_by_role("button", name="Chat with us").click()
        expect(page.get_by_role("button", name="Return an order")).to_be_visible()
        assert violations(page, axe) == []
        lead(page)
        assert violations(page, axe) == []
    with tab(browser, color_scheme=scheme, bypass_csp=True) as page:
        enter(page, shop, "Bea")
        page.get_by_role("button", name="To approve").click()
        page.locator("#list button").first.click()
        expect(page.get_by_role("region", name="Needs your approval")).to_be_visible()
        assert violations(page, axe) == []


def test_only_people_at_the_desk_see_and_decide_approvals(shop: GuidedShop) -> None:
    c = Customer(shop.desk, "mallory")
    c.begin()
    c.say("LW-99999")
    c.press("Broken")
    c.press("Yes, do it")
    app = create_app(shop.desk.answerer, shop.desk)
    client = TestClient(app, base_url="http://desk.example")
    run = next(w["run"] for w in shop.desk.procedures.runs.waiting(c.id))  # type: ignore[union-attr]
    path, body = f"/desk/api/conversations/{c.id}/approval", {"run": run, "approve": True}
    assert client.get("/desk/api/approvals").status_code == 401
    assert client.post(path, json=body).status_code == 401
    client.cookies.set(COOKIE, shop.door.invite(Agent("Bea", "agent")))
    assert client.post(path, json=body).status_code == 403, "a form on another site cannot set the header"
    ours = {"X-Coterie-Desk": "1"}
    assert run in [w["run"] for w in client.get("/desk/api/approvals").json()["approvals"]]
    assert client.post(path, json=body | {"run": "another"}, headers=ours).status_code == 409
    assert client.post(path, json=body | {"approve": False}, headers=ours).status_code == 200
    assert client.post(path, json=body, headers=ours).status_code == 409
    c.heard()
    assert [a for a in shop.did.named("refund") if a["order"] == "LW-99999"] == []
