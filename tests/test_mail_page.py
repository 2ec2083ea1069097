"""What came by e-mail, as an agent reads it at the desk, in a real browser: who wrote, what was quoted, and files."""

from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from coterie.desk.desk import Desk
from coterie.desk.flow import Parts
from coterie.desk.mail import MailDesk
from coterie.web.app import create_app
from coterie.web.door import Agent, open_door
from desk_support import Script, scripted
from mail_support import mail, mail_desk
from test_desk_page import axe, open_conversation, tab, violations
from web_support import listening

__all__ = ["axe"]
SCRIPT = "<script>document.title = 'run'</script>"
PROVEN = {"authentication_results": "mx.shop.example; dmarc=pass header.from=mail.example"}
ANSWERED = "It is late.\n\nOn Mon, 3 Jan 2026 at 10:00, Shop <support@shop.example> wrote:\n\n> Is it there?\n"


class Office:
    """A desk with e-mail, and its address."""

    def __init__(self, folder: Path) -> None:
        self.mail: MailDesk = mail_desk(folder, print, authserv="mx.shop.example")
        house, answerer = self.mail.house, scripted(folder, lambda _text: Script("Yes."))
        self.desk = Desk(answerer, house.database, Parts(), house.seal, house.unseal)  # type: ignore[arg-type]
        self.app = create_app(answerer, self.desk, house)  # type: ignore[arg-type]
        self.door, self.address = open_door(folder, []), ""

    @contextmanager
    def agent(self, browser: Browser, said: str, **options: object) -> Iterator[Page]:
        """Bea, at the conversation where this was said."""
        with tab(browser, viewport={"width": 1440, "height": 900}, **options) as page:
            page.goto(f"{self.address}/desk?invite={self.door.invite(Agent('Bea', 'agent'))}")
            page.get_by_role("button", name="With the assistant").click()
            open_conversation(page, said)
            yield page


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    office = Office(tmp_path)
    with listening(office.app) as office.address:
        yield office
    office.desk.close()


def with_files(*files: tuple[str, bytes], **headers: str) -> bytes:
    made = message_from_bytes(mail("See the files", **headers), policy=policy.default)
    for name, body in files:
        made.add_attachment(body, maintype="text", subtype="html", filename=name)  # type: ignore[attr-defined]
    return made.as_bytes()


@pytest.mark.parametrize(
    ("headers", "line"),
    [
        ({}, "Ada <ada@mail.example> (sender not verified) · An order"),
        (PROVEN, "Ada <ada@mail.example> · An order"),
        ({"sender": "ada@mail.example", "subject": ""}, "<ada@mail.example> (sender not verified) · no subject"),
        ({"subject": SCRIPT}, f"Ada <ada@mail.example> (sender not verified) · {SCRIPT}"),
    ],
)  # fmt: skip
def test_an_agent_sees_who_wrote_and_whether_that_is_proven(
    headers: dict[str, str], line: str, browser: Browser, office: Office
) -> None:
    office.mail.take(mail("Where is it?", **headers))
    with office.agent(browser, "Where is it?") as page:
        expect(page.locator(".entry.customer .aside").first).to_have_text(line)
        assert page.title() != "run"


def test_what_was_quoted_is_folded_away_below_what_is_new(browser: Browser, office: Office) -> None:
    office.mail.take(mail(ANSWERED, references="<other@shop.example>"))
    with office.agent(browser, "It is late.") as page:
        entry = page.locator(".entry.customer")
        expect(entry.locator(".words")).to_have_text("It is late.")
        quoted = entry.get_by_text("> Is it there?")
        expect(quoted).to_be_hidden()
        entry.get_by_text("Quoted", exact=True).click()
        expect(quoted).to_be_visible()


def test_of_a_large_mail_the_agent_is_told_that_only_the_beginning_was_read(browser: Browser, office: Office) -> None:
    office.mail.take(mail("The beginning"), cut=True)
    with office.agent(browser, "The beginning") as page:
        expect(page.locator(".entry.customer .aside").first).to_contain_text("only the beginning was read")


def test_files_are_listed_and_saved_and_never_opened(browser: Browser, office: Office) -> None:
    name = "ö <b>.html"
    office.mail.take(with_files((name, SCRIPT.encode()), ("large.html", b"x" * 5000)))
    with office.agent(browser, "See the files") as page:
        files = page.locator(".files li")
        expect(files).to_have_text([f"{name} 1 KiB", "large.html 5 KiB"])
        with page.expect_download() as saved:
            page.get_by_role("link", name=name).click()
        assert Path(saved.value.path()).read_bytes() == SCRIPT.encode()
        assert saved.value.suggested_filename.endswith(".html")
        page.goto(f"{office.address}/desk")
        link = page.request.get(saved.value.url)
        assert link.headers["content-disposition"].startswith("attachment")
        assert page.title() != "run"
    (c,) = office.mail.talks.listed()
    done = {line.action for line in office.mail.house.audit.lines(c.customer)}
    assert done - {"conversation.listed"} == {"conversation.read", "file.read"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_mail_is_read_by_eyes_and_by_screen_readers(scheme: str, browser: Browser, office: Office, axe: str) -> None:
    office.mail.take(with_files(("order.html", b"x"), references="<other@shop.example>"))
    office.mail.take(mail(ANSWERED, references="<other@shop.example>"))
    for said in ("See the files", "It is late."):
        with office.agent(browser, said, color_scheme=scheme) as page:
            assert violations(page, axe) == []


def test_a_list_that_comes_late_does_not_replace_the_one_that_was_asked_for_since(
    browser: Browser, office: Office
) -> None:
    office.mail.take(mail("Where is it?"))
    held: list[Route] = []
    with tab(browser) as page:
        page.route(
            "**/conversations?view=waiting&*", lambda route: held.append(route)
        )  # the first list is not answered yet
        page.goto(f"{office.address}/desk?invite={office.door.invite(Agent('Bea', 'agent'))}")
        page.get_by_role("button", name="With the assistant").click()
        expect(page.locator("#list")).to_contain_text("Where is it?")
        with page.expect_response("**/conversations?view=waiting&*"):
            held.pop().continue_()
        page.wait_for_timeout(300)  # long enough for the page to have drawn it
        expect(page.locator("#list")).to_contain_text("Where is it?")
