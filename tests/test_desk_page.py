"""The widget on somebody's site, and the agents' desk, in a real browser: as visitors and agents use them."""

import functools
import http.server
import socket
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect
from sqlalchemy import select

from coterie.config import Config
from coterie.desk.confidence import Confidence
from coterie.desk.desk import Desk
from coterie.desk.flow import Parts
from coterie.knowledge.evidence import Evidence, Reader
from coterie.privacy.access import Limit
from coterie.privacy.house import House, open_house
from coterie.privacy.tables import ConsentRow
from coterie.store.database import open_database, reading
from coterie.web import widget
from coterie.web.app import create_app
from coterie.web.door import Agent, open_door
from desk_support import Script, ScriptedAnswerer, ScriptedBusiness, open_desk, scripted
from web_support import listening

AXE = "4.14.1"
CANNED = {"Greeting": "Hello, I am looking into it."}
SURE = Confidence((0.5, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0), 3.0, 0.8, 0.02, 100, 0.9, 0.01)
HELP = "https://help.shop.example/delivery"
HTML = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
expect.set_options(timeout=20_000)  # ms, for busy machines


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, which finds what people with disabilities cannot use; from npm."""
    folder = tmp_path_factory.mktemp("axe")
    try:
        subprocess.run(["npm", "pack", f"axe-core@{AXE}"], cwd=folder, check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"axe-core cannot be fetched from npm here: {error}")
    with tarfile.open(folder / f"axe-core-{AXE}.tgz") as archive:
        source = archive.extractfile("package/axe.min.js")
        assert source
        return source.read().decode()


def violations(page: Page, axe: str) -> list[str]:
    """What axe-core finds against WCAG 2.2 A and AA, in open shadow roots too."""
    page.evaluate(axe)
    found = page.evaluate(
        "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa']})"
        ".then((found) => found.violations)"
    )
    return [f"{v['id']}: {v['nodes'][0]['html'][:120]} {v['nodes'][0]['failureSummary'][:200]}" for v in found]


class Shop:
    """A desk whose assistant follows `script`, its address, and the address of a site with the widget."""

    def __init__(self, folder: Path) -> None:
        self.script = Script("")
        site = folder / "site"
        site.mkdir()
        self.files = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site)))
        threading.Thread(target=self.files.serve_forever, daemon=True).start()
        self.site = f"http://127.0.0.1:{self.files.server_port}"
        found = [Evidence("faq", "policies.md#delivery", "Standard delivery takes three days.", 0.8, link=HELP)]

        def ground(question: str, _reader: Reader) -> list[Evidence]:
            return found if "delivery" in question else []

        parts = Parts(ground=ground, profile=lambda _c: {"tier": "gold"})
        answerer = scripted(folder, self.says, origins=[self.site], canned=CANNED)
        self.desk: Desk = self.opened(folder, answerer, parts)
        self.desk.confidence = SURE
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(create_app(answerer, self.desk), log_level="warning", timeout_graceful_shutdown=1)  # type: ignore[arg-type]
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([listener],))
        self.thread.start()
        self.door = open_door(folder, [])
        for name, html in (("index", 'lang="en"'), ("ar", 'lang="ar" dir="rtl"')):
            (site / f"{name}.html").write_text(
                f"<!doctype html><html {html}><head><meta charset='utf-8'><title>A shop</title>"
                "<link rel='icon' href='data:,'><meta name='viewport' content='width=device-width, initial-scale=1'>"
                "<style>button, p { font-size: 60px !important; color: red !important }</style></head>"
                f"<body><main><h1>A shop</h1></main><script src='{self.address}/widget.js' async></script></body>"
                "</html>"
            )

    def opened(self, folder: Path, answerer: ScriptedAnswerer, parts: Parts) -> Desk:
        return open_desk(answerer, f"sqlite:///{folder}/desk.db", parts)

    def says(self, text: str) -> Script:
        asked = text.rpartition("The question:\n")[2]
        return self.script if self.script.text else Script(f"You said {asked}.")

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.desk.close()
        self.files.shutdown()
        self.files.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def shop_(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    shop = Shop(tmp_path_factory.mktemp("desk"))
    yield shop
    shop.close()


@pytest.fixture
def shop(shop_: Shop, monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.setattr(widget, "SAYS", Limit(1000, 60))
    shop_.script = Script("")
    return shop_


@contextmanager
def tab(browser: Browser, **options: Any) -> Iterator[Page]:
    """A browser of its own, whose page must log no error."""
    context = browser.new_context(**options)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


@pytest.fixture
def site(browser: Browser, shop: Shop) -> Iterator[Page]:
    """The shop's site, with the widget open."""
    with tab(browser) as page:
        page.goto(shop.site)
        page.get_by_role("button", name="Chat with us").click()
        expect(page.get_by_text("You are talking to an AI.")).to_be_visible()
        yield page


@pytest.fixture
def office(browser: Browser, shop: Shop) -> Iterator[Page]:
    """The desk, with a supervisor named Bea."""
    with tab(browser, viewport={"width": 1440, "height": 900}) as page:
        enter(page, shop, "Bea", "supervisor")
        yield page


def enter(page: Page, shop: Shop, name: str, role: Any = "agent") -> None:
    page.goto(f"{shop.address}/desk?invite={shop.door.invite(Agent(name, role))}")
    expect(page.get_by_role("button", name="Shortcuts")).to_be_visible()


def write(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")


def call_person(page: Page, text: str) -> None:
    """A visitor's question, its answer, and a call for a person."""
    write(page, text)
    expect(page.locator(".entry.bot:not(.draft)")).to_have_count(1)
    page.get_by_role("button", name="Talk to a person").click()
    expect(page.locator(".with")).to_have_text("A person will join soon")


def open_conversation(office: Page, text: str) -> None:
    office.locator("#list button", has_text=text).first.click()
    expect(office.locator("#entries")).to_contain_text(text)


# The widget


def test_a_visitor_asks_reads_sources_and_gives_a_reason(site: Page, shop: Shop) -> None:
    shop.script = Script("It takes **three** days.\n- really")
    write(site, "How long is delivery?")
    answer = site.locator(".entry.bot:not(.draft)")
    expect(answer.locator("strong")).to_have_text("three")
    expect(site.locator(".entry.customer .words")).to_have_text("How long is delivery?")
    answer.get_by_text("Sources (1)").click()
    expect(answer.get_by_text("Standard delivery takes three days.")).to_be_visible()
    expect(answer.get_by_role("link", name="policies.md#delivery")).to_have_attribute("href", HELP)
    answer.get_by_role("button", name="Not helpful", exact=True).click()
    site.get_by_label("What was wrong?").fill("I meant Scotland")
    site.get_by_label("What was wrong?").press("Enter")
    expect(answer.get_by_text("Thank you.")).to_be_visible()
    assert shop.desk.conversations.disliked(newest(shop)) == {2: "I meant Scotland"}


def test_a_person_is_one_click_away_and_so_is_the_way_back(site: Page, shop: Shop) -> None:
    site.get_by_role("button", name="Talk to a person").click()
    expect(site.locator(".with")).to_have_text("A person will join soon")
    expect(site.locator(".event")).to_have_text("A person has been called")
    c = max(shop.desk.conversations.listed(), key=lambda c: c.changed_at)
    assert c.state == "waiting"
    shop.desk.conversations.take(c.id, "Bea")
    shop.desk.conversations.reply(c.id, "Bea", "Hello, this is Bea.")
    expect(site.locator(".with")).to_have_text("Bea")
    expect(site.get_by_text("Hello, this is Bea.").first).to_be_visible()
    write(site, "Thanks")
    expect(site.locator(".entry.customer")).to_have_count(1)
    site.get_by_role("button", name="Back to the assistant").click()
    expect(site.locator(".entry.bot:not(.draft)")).to_contain_text("You said Thanks.")


def test_an_answer_streams_and_stops(site: Page, shop: Shop) -> None:
    shop.script = Script("It is blue. Or so they say.", gate=threading.Event(), pause=4)
    write(site, "What color?")
    expect(site.locator(".draft")).to_have_text("It is blue.")
    site.get_by_role("button", name="Stop").click()
    expect(site.locator(".entry.bot:not(.draft)")).to_contain_text("Stopped")
    expect(site.locator(".entry.bot:not(.draft) .words")).to_have_text("It is blue.")
    expect(site.get_by_role("button", name="Send", exact=True)).to_be_visible()


def test_a_reload_goes_on_with_the_same_conversation(site: Page) -> None:
    write(site, "One")
    expect(site.locator(".entry.bot:not(.draft)")).to_contain_text("You said One.")
    site.reload()
    expect(site.locator(".entry.customer .words")).to_have_text("One")
    expect(site.locator(".entry.bot:not(.draft)")).to_contain_text("You said One.")
    write(site, "Two")
    expect(site.locator(".entry.bot:not(.draft)").last).to_contain_text("Two.")
    expect(site.locator(".entry.customer")).to_have_count(2)


def test_a_message_written_without_network_arrives_once_when_it_is_back(site: Page, shop: Shop) -> None:
    write(site, "Before")
    expect(site.locator(".entry.bot:not(.draft)")).to_have_count(1)
    site.context.set_offline(True)
    write(site, "Meanwhile")
    expect(site.locator(".pending")).to_contain_text("Sending")
    site.context.set_offline(False)
    expect(site.locator(".pending")).to_have_count(0)
    expect(site.locator(".entries .customer", has_text="Meanwhile")).to_have_count(1)
    expect(site.locator(".entry.bot:not(.draft)").last).to_contain_text("Meanwhile")


def test_what_is_said_is_text_and_never_runs(site: Page, shop: Shop, office: Page) -> None:
    shop.script = Script(HTML)
    write(site, HTML)
    expect(site.locator(".entry.bot:not(.draft) .words")).to_have_text(HTML)
    expect(site.locator(".entry.customer .words")).to_have_text(HTML)
    expect(site).to_have_title("A shop")
    office.get_by_role("button", name="With the assistant").click()
    office.locator("#list button", has_text="<img").first.click()
    expect(office.locator("#entries .bot .words")).to_have_text(HTML)
    expect(office).to_have_title("Desk: My business")


def test_the_sites_own_styles_do_not_reach_the_widget(site: Page) -> None:
    size = site.locator(".disclosure").evaluate("(e) => getComputedStyle(e).fontSize")
    assert size == "13px"


def test_by_keyboard_alone(browser: Browser, shop: Shop) -> None:
    with tab(browser) as page:
        page.goto(shop.site)
        expect(page.get_by_role("button", name="Chat with us")).to_be_visible()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.get_by_label("Your message")).to_be_focused()
        page.keyboard.type("One")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("Two")
        page.keyboard.press("Enter")
        expect(page.locator(".entry.customer .words")).to_have_text("One\nTwo")
        expect(page.get_by_role("status")).to_contain_text("You said One")
        page.keyboard.press("Shift+Tab")
        expect(page.get_by_role("button", name="Talk to a person")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        expect(page.get_by_role("button", name="Chat with us")).to_be_focused()


def test_on_a_phone_in_arabic_it_fills_the_screen_from_right_to_left(browser: Browser, shop: Shop) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with tab(browser, **phone) as page:
        page.goto(f"{shop.site}/ar.html")
        page.get_by_role("button", name="تحدث معنا").tap()
        panel = page.get_by_role("dialog")
        expect(panel).to_be_visible()
        expect(panel.get_by_text("أنت تتحدث مع ذكاء اصطناعي")).to_be_visible()
        assert panel.bounding_box() == {"x": 0, "y": 0, "width": 360, "height": 740}
        write_in = page.get_by_label("رسالتك")
        write_in.fill("أين طلبي؟ " + "W" * 200)
        write_in.press("Enter")
        mine = page.locator(".entry.customer article")
        expect(mine).to_be_visible()
        expect(page.locator(".entry.bot:not(.draft)")).to_have_count(1)  # until then, entries are drawn anew
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        box = mine.bounding_box()
        assert box
        assert box["x"] < 40, "the visitor's own words stand at the left"
        expect(page.get_by_role("button", name="التحدث إلى شخص")).to_be_in_viewport(ratio=1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_widget_is_clean_by_axe(scheme: Any, browser: Browser, shop: Shop, axe: str) -> None:
    with tab(browser, color_scheme=scheme) as page:
        page.goto(shop.site)
        page.get_by_role("button", name="Chat with us").click()
        call_person(page, "How long is delivery?")
        page.get_by_role("button", name="Not helpful").click()
        assert violations(page, axe) == []


# The desk


def test_an_agent_takes_a_conversation_inserts_the_suggestion_and_sends_it(
    site: Page, office: Page, shop: Shop
) -> None:
    shop.script = Script("A refund takes 5 days.", logprob=-5)
    write(site, "I want a refund for my helmet")
    expect(site.locator(".with")).to_have_text("A person will join soon")
    open_conversation(office, "refund for my helmet")
    about = office.get_by_label("Customer and sources")
    expect(about.locator("#reason")).to_contain_text("low confidence")
    expect(about).to_contain_text("gold")
    expect(about.locator("#suggested")).to_have_text("A refund takes 5 days.")
    expect(site.get_by_text("A refund takes 5 days.")).to_have_count(0)
    office.get_by_role("button", name="Take", exact=True).click()
    expect(office.locator("#standing")).to_have_text("with Bea")
    office.get_by_role("button", name="Insert").click()
    expect(office.get_by_label("Your reply")).to_have_value("A refund takes 5 days.")
    assert len(shop.desk.conversations.messages(newest(shop), kinds=("message",))) == 1, "inserted is not sent"
    office.get_by_label("Your reply").press("Control+Enter")
    expect(site.locator(".entry.agent .words")).to_have_text("A refund takes 5 days.")
    write(site, "Thank you!")
    expect(office.locator("#entries")).to_contain_text("Thank you!")
    office.get_by_role("radio", name="Private note").check()
    office.get_by_label("Your reply").fill("Nice customer.")
    office.get_by_role("button", name="Send").click()
    expect(office.locator("#entries .note")).to_contain_text("Nice customer.")
    expect(site.get_by_text("Nice customer.")).to_have_count(0)
    office.get_by_role("button", name="Resolve", exact=True).click()
    expect(office.locator("#standing")).to_have_text("resolved")
    expect(site.locator(".event").last).to_contain_text("This conversation is closed.")


def newest(shop: Shop) -> str:
    return max(shop.desk.conversations.listed(), key=lambda c: c.changed_at).id


def test_two_agents_see_each_other_and_only_one_gets_it(browser: Browser, site: Page, office: Page, shop: Shop) -> None:
    call_person(site, "Two want to help me")
    with tab(browser) as other:
        enter(other, shop, "Cem")
        open_conversation(other, "Two want to help me")
        open_conversation(office, "Two want to help me")
        other.get_by_label("Your reply").fill("I am on it")
        expect(office.locator("#collision")).to_have_text("Cem is writing.")
        other.get_by_role("button", name="Take", exact=True).click()
        expect(office.locator("#standing")).to_have_text("with Cem")
        office.get_by_label("Your reply").fill("Me too")
        office.get_by_role("button", name="Send").click()
        expect(office.get_by_role("alert")).to_contain_text("not yours: its owner is agent:Cem")
        expect(office.get_by_label("Your reply")).to_have_value("Me too")
        expect(site.get_by_text("Me too")).to_have_count(0)


def test_shortcuts_work_and_can_be_changed(site: Page, office: Page, shop: Shop) -> None:
    call_person(site, "Shortcut, please")
    expect(office.locator("#list")).to_contain_text("asked for a person")
    office.locator("#list button", has_text="You said Shortcut, please.").click()
    expect(office.locator("#entries")).to_contain_text("Shortcut, please")
    office.keyboard.press("t")
    expect(office.locator("#standing")).to_have_text("with Bea")
    expect(office.locator("#list button", has_text="You said Shortcut, please.")).to_have_count(0)
    office.keyboard.press("?")
    office.get_by_label("Resolve").last.focus()
    office.keyboard.press("x")
    expect(office.locator("#key-resolve")).to_have_value("x")
    office.get_by_role("button", name="Done").click()
    office.keyboard.press("e")
    office.keyboard.press("r")
    office.keyboard.type("xx")
    expect(office.get_by_label("Your reply")).to_have_value("xx")
    office.keyboard.press("Escape")
    office.keyboard.press("x")
    expect(office.locator("#standing")).to_have_text("resolved")
    office.reload()
    expect(office.locator("#key-resolve")).to_have_value("x")


def test_canned_replies_snooze_assign_search_and_overview(site: Page, office: Page, shop: Shop) -> None:
    shop.desk.conversations.assign(shop.desk.conversations.open("bob").id, "Cem", "Cem")
    call_person(site, "Many things at once")
    expect(office.locator("#assign option[value=Cem]")).to_have_count(1)
    office.get_by_role("searchbox").fill("many THINGS")
    expect(office.locator("#list button")).to_have_count(1)
    office.locator("#list button").click()
    office.get_by_role("button", name="Take", exact=True).click()
    expect(office.locator("#standing")).to_have_text("with Bea")
    office.get_by_label("Canned reply").select_option(label="Greeting")
    expect(office.get_by_label("Your reply")).to_have_value(CANNED["Greeting"])
    office.get_by_label("Snooze").select_option(label="1 hour")
    expect(office.locator("#standing")).to_contain_text("snoozed by Bea until")
    office.get_by_label("Assign to").select_option(label="Cem")
    expect(office.locator("#standing")).to_have_text("with Cem")
    office.get_by_role("button", name="Overview").click()
    expect(office.locator("#overview-body")).to_contain_text("% handled at 2% error")


def test_one_queue_can_be_looked_at_alone(office: Page, shop: Shop) -> None:
    c = shop.desk.conversations.open("grieving")
    shop.desk.conversations.ask_for_person(c.id, queue="care")
    queue = office.locator("#queue")
    expect(queue).to_be_visible()
    queue.select_option("care")
    expect(office.locator("#list .who")).to_have_text(["grieving"])  # a list: waits until it is the only one
    office.locator("#list button").click()
    office.get_by_role("button", name="Take", exact=True).click()
    expect(office.locator("#standing")).to_have_text("with Bea \u00b7 care")
    office.get_by_role("button", name="To the queue").click()
    expect(office.locator("#standing")).to_contain_text("waiting")
    assert shop.desk.conversations.get(c.id).queue == "care"
    shop.desk.conversations.resolve(c.id, "Bea")


def test_on_a_phone_the_desk_shows_the_list_or_the_conversation(
    browser: Browser, site: Page, shop: Shop, axe: str
) -> None:
    call_person(site, "From a small screen")
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with tab(browser, bypass_csp=True, **phone) as page:
        enter(page, shop, "Dan")
        expect(page.locator("#thread")).to_be_hidden()
        open_conversation(page, "From a small screen")
        expect(page.get_by_role("button", name="Take", exact=True)).to_be_in_viewport()
        expect(page.locator("#queues")).to_be_hidden()
        assert violations(page, axe) == []
        page.get_by_role("button", name="All conversations").click()
        expect(page.locator("#list [aria-current=true]")).to_be_focused()
        expect(page.locator("#thread")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_desk_is_clean_by_axe(scheme: Any, browser: Browser, site: Page, shop: Shop, axe: str) -> None:
    shop.script = Script("A refund takes 5 days.", logprob=-5)
    write(site, f"Axe looks at delivery and refunds, {scheme}")
    expect(site.locator(".with")).to_have_text("A person will join soon")
    with tab(browser, color_scheme=scheme, bypass_csp=True) as page:
        enter(page, shop, "Bea", "supervisor")
        open_conversation(page, f"Axe looks at delivery and refunds, {scheme}")
        page.get_by_role("button", name="Take", exact=True).click()
        expect(page.locator("#standing")).to_have_text("with Bea")
        assert violations(page, axe) == []
        page.keyboard.press("?")
        assert violations(page, axe) == []


def test_a_closed_door_says_how_to_get_in(browser: Browser, shop: Shop) -> None:
    with tab(browser) as page:
        page.goto(f"{shop.address}/desk")
        expect(page.get_by_text("coterie desk invite NAME")).to_be_visible()


def test_a_message_is_shown_once_even_before_the_server_has_said_that_it_has_it(site: Page) -> None:
    held: list[Any] = []
    site.route("**/messages", lambda route: held.append((route, route.fetch())))
    write(site, "Only once")
    expect(site.locator(".entries .customer")).to_have_text("YouOnly once")
    expect(site.locator(".customer")).to_have_count(1)
    for route, response in held:
        route.fulfill(response=response)
    expect(site.locator(".entry.bot:not(.draft)")).to_have_count(1)
    expect(site.locator(".customer")).to_have_count(1)


def test_a_visitor_ticks_what_they_agree_to_and_may_untick_it(browser: Browser, axe: str, tmp_path: Path) -> None:
    asked = "Dürfen wir aus dem, was Sie schreiben, lernen?"
    declared = {"privacy": {"consents": {"training": {"text": asked, "language": "de"}}}}
    answerer: Any = ScriptedAnswerer(
        ScriptedBusiness(tmp_path, Config.model_validate(declared)), lambda _: Script("Yes.")
    )
    house = open_house(tmp_path, open_database(f"sqlite:///{tmp_path}/desk.db"), {})
    desk = Desk(answerer, house.database, None, house.seal, house.unseal)
    desk.start()
    with listening(create_app(answerer, desk, house)) as address, tab(browser) as page:
        html = f"<!doctype html><html lang='en'><title>A shop</title><script src='{address}/widget.js'></script>"
        page.route(f"{address}/shop", lambda route: route.fulfill(body=html, content_type="text/html; charset=utf-8"))
        page.goto(f"{address}/shop")
        page.get_by_role("button", name="Chat with us").click()
        tick = page.get_by_role("checkbox", name=asked)
        expect(tick).not_to_be_checked()
        tick.check()
        expect(page.get_by_role("status")).to_have_text("Noted: you agree.")
        assert violations(page, axe) == []
        customer = _only_customer(house)
        assert house.consents.agreed(customer, "training")
        page.reload()
        expect(tick).to_be_checked()
        tick.uncheck()
        expect(page.get_by_role("status")).to_have_text("Noted: you do not agree.")
        assert not house.consents.agreed(customer, "training")
        page.route("**/widget/consents", lambda route: route.abort())
        tick.click()
        expect(page.locator(".problem")).to_have_text("Connecting again …")
        expect(tick).not_to_be_checked()
    desk.close()
    house.close()


def _only_customer(house: House) -> str:
    with reading(house.database) as session:
        return session.scalars(select(ConsentRow.customer).distinct()).one()
