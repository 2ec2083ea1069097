"""The page of one's account, and of everybody's, in a real browser: by mouse, keyboard and screen reader."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pyotp
import pytest
from playwright.sync_api import Browser, Page, expect

from coterie.privacy.access import NotSignedIn
from coterie.privacy.house import House
from test_access import WORD, application, house
from test_desk_page import axe, tab, violations
from web_support import listening

__all__ = ["axe", "house"]
LABEL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def address(house: House, tmp_path: Path) -> Iterator[str]:
    """A business with an owner, an admin, and an agent."""
    for name, role in (("anna", "owner"), ("bea", "admin"), ("cem", "agent")):
        house.accounts.add(name, role, WORD)
    with listening(application(house, tmp_path)) as address:
        yield address


def sign_in(page: Page, address: str, name: str, code: str = "") -> None:
    page.goto(f"{address}/login")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(WORD)
    page.get_by_label("Code").fill(code)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(lambda url: not url.endswith("/login"))


@contextmanager
def account(browser: Browser, address: str, name: str, **options: object) -> Iterator[Page]:
    """The page, as somebody sees it; questions are answered with yes."""
    with tab(browser, **options) as page:
        page.on("dialog", lambda dialog: dialog.accept())
        sign_in(page, address, name)
        page.goto(f"{address}/account")
        expect(page.locator("#factor")).not_to_be_empty()
        yield page


def may_sign_in(house: House, name: str, code: str = "") -> bool:
    try:
        house.accounts.login(name, WORD, code)
    except NotSignedIn:
        return False
    return True


def test_the_pages_lead_those_who_are_signed_in_there(browser: Browser, address: str) -> None:
    with tab(browser) as page:
        page.goto(f"{address}/account")
        expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")
        sign_in(page, address, "cem")
        expect(page).to_have_title("Desk: Shop")
        page.get_by_role("link", name="Account").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Account")
        expect(page.get_by_text("Signed in as cem, agent.")).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_url(f"{address}/login")


def test_an_owner_makes_changes_and_disables_accounts(browser: Browser, address: str, house: House) -> None:
    with account(browser, address, "anna") as page:
        accounts = page.get_by_role("region", name="All accounts")
        form = page.locator("#new-account")
        form.get_by_label("Name").fill("dora")
        form.get_by_label("Role").select_option("viewer")
        form.get_by_label("Password").fill(WORD)
        form.get_by_role("button").click()
        expect(page.get_by_role("status")).to_have_text("dora can sign in now.")
        dora = accounts.get_by_role("row", name="dora")
        expect(dora).to_contain_text("active")
        assert may_sign_in(house, "dora")

        expect(dora.get_by_role("button", name="Change role: dora")).to_be_hidden()
        dora.get_by_label("Role of dora").select_option("reviewer")
        dora.get_by_role("button", name="Change role: dora").click()
        expect(page.get_by_role("status")).to_have_text("dora has another role now.")
        expect(dora.get_by_label("Role of dora")).to_have_value("reviewer")

        dora.get_by_label("Groups of dora").fill("hr, Human Resources")
        dora.get_by_role("button", name="Change groups: dora").click()
        expect(page.get_by_role("status")).to_have_text("dora has other groups now.")
        expect(dora.get_by_label("Groups of dora")).to_have_value("Human Resources, hr")

        dora.get_by_role("button", name="Disable: dora").click()
        expect(dora).to_contain_text("disabled")
        assert not may_sign_in(house, "dora")
        dora.get_by_role("button", name="Enable: dora").click()
        expect(dora).to_contain_text("active")
        assert may_sign_in(house, "dora")

        done = [line.action for line in house.audit.lines("dora", "anna")]
        assert done == ["account.change"] * 4 + ["account.add"]
        expect(page.locator("#audit tr").first).to_contain_text("dora")


def test_what_the_server_refuses_is_said(browser: Browser, address: str) -> None:
    with account(browser, address, "anna") as page:
        form = page.locator("#new-account")
        form.get_by_label("Name").fill("cem")
        form.get_by_role("button").click()
        expect(page.get_by_role("alert")).to_contain_text("there is an account 'cem' already")
        page.get_by_label("Role of anna").select_option("viewer")
        page.get_by_role("button", name="Change role: anna").click()
        expect(page.get_by_role("alert")).to_contain_text("the last owner")


def test_an_admin_cannot_touch_an_owner_and_an_agent_sees_only_their_own(browser: Browser, address: str) -> None:
    with account(browser, address, "bea") as page:
        owner = page.get_by_role("region", name="All accounts").get_by_role("row", name="anna")
        expect(owner).to_contain_text("owner")
        expect(owner.get_by_role("button")).to_have_count(0)
        expect(page.locator("#new-account").get_by_role("option", name="owner")).to_have_count(0)
    with account(browser, address, "cem") as page:
        expect(page.get_by_role("heading", level=2)).to_have_text(["Second factor", "API tokens"])


def test_a_token_is_shown_once_and_ends_when_it_is_revoked(browser: Browser, address: str) -> None:
    with account(browser, address, "bea") as page:
        form = page.locator("#new-token")
        form.get_by_role("button").click()
        expect(page.get_by_role("alert")).to_contain_text("Choose at least one thing")
        form.get_by_label("What it is for").fill(LABEL)
        form.get_by_label("audit").check()
        form.get_by_role("button").click()
        expect(page.locator("#token")).to_be_focused()
        token = page.locator("#token").inner_text()
        asked = {"Authorization": f"Bearer {token}"}
        assert httpx.get(f"{address}/v1/audit", headers=asked).status_code == 200
        assert httpx.get(f"{address}/v1/accounts", headers=asked).status_code == 403
        page.reload()
        tokens = page.get_by_role("region", name="Your tokens")
        expect(tokens.get_by_role("row", name=LABEL)).to_contain_text("audit")
        assert token not in page.content()
        tokens.get_by_role("button", name="Revoke").click()
        expect(tokens).to_contain_text("You have no tokens.")
        expect(page.get_by_role("heading", name="API tokens")).to_be_focused()
        assert httpx.get(f"{address}/v1/audit", headers=asked).status_code == 401


def test_a_second_factor_is_set_up_and_reset(browser: Browser, address: str, house: House) -> None:
    with account(browser, address, "cem") as page:
        expect(page.locator("#factor")).to_have_text("Only your password is asked for.")
        page.get_by_role("button", name="Set up").click()
        expect(page.locator("#secret")).not_to_be_empty()
        secret = page.locator("#secret").inner_text().replace(" ", "")
        assert f"secret={secret}" in (page.locator("#address").get_attribute("href") or "")
        code, password = page.get_by_label("Code", exact=True), page.get_by_label("Your password")
        for given, word, wrong in (
            ("000000", WORD, "the code does not fit"), (pyotp.TOTP(secret).now(), "not it", "password or code is wrong")
        ):  # fmt: skip
            code.fill(given)
            password.fill(word)
            page.get_by_role("button", name="Turn on").click()
            expect(page.get_by_role("alert")).to_contain_text(wrong)
        expect(page.get_by_label("Code of the former device")).to_be_hidden()
        code.fill(pyotp.TOTP(secret).now())
        password.fill(WORD)
        page.get_by_role("button", name="Turn on").click()
        expect(page.locator("#factor")).to_have_text("A code is asked for when you sign in.")
        expect(page.get_by_role("button", name="Set up another device")).to_be_focused()
        assert secret not in page.content()
        page.get_by_role("button", name="Set up another device").click()
        expect(page.get_by_label("Code of the former device")).to_be_visible()
    assert not may_sign_in(house, "cem")
    with account(browser, address, "anna") as page:
        cem = page.get_by_role("region", name="All accounts").get_by_role("row", name="cem")
        cem.get_by_role("button", name="Reset second factor: cem").click()
        expect(cem).to_contain_text("off")
    assert may_sign_in(house, "cem")


def test_the_keyboard_stays_where_it_is(browser: Browser, address: str) -> None:
    with account(browser, address, "anna") as page:
        page.get_by_role("button", name="Disable: cem").focus()
        page.keyboard.press("Enter")
        enable = page.get_by_role("button", name="Enable: cem")
        expect(enable).to_be_focused()
        page.keyboard.press("Space")
        expect(page.get_by_role("button", name="Disable: cem")).to_be_focused()


def test_at_the_machine_the_first_account_closes_the_door(browser: Browser, house: House, tmp_path: Path) -> None:
    with listening(application(house, tmp_path)) as address, tab(browser) as page:
        page.goto(f"{address}/account")
        expect(page.get_by_text("There are no accounts yet")).to_be_visible()
        expect(page.get_by_role("heading", level=2)).to_have_text(["Accounts", "What was done last"])
        form = page.locator("#new-account")
        form.get_by_label("Name").fill("anna")
        form.get_by_label("Password").fill(WORD)
        form.get_by_role("button").click()
        page.wait_for_url(f"{address}/login")
        sign_in(page, address, "anna")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_is_read_by_eyes_and_by_screen_readers(
    scheme: str, width: int, browser: Browser, address: str, house: House, axe: str
) -> None:
    house.accounts.token("anna", "nightly report", ["see", "audit"], 30)
    house.accounts.change("bea", disabled=True)
    size = {"width": width, "height": 800}
    with account(browser, address, "anna", color_scheme=scheme, viewport=size) as page:
        expect(page.get_by_role("row", name="nightly report").first).to_be_visible()  # the audit log has it too
        page.get_by_role("button", name="Set up").click()
        expect(page.locator("#secret")).not_to_be_empty()
        page.locator("#new-token").get_by_role("button").click()
        expect(page.get_by_role("alert")).not_to_be_empty()
        page.get_by_label("Role of cem").select_option("viewer")
        assert violations(page, axe) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
