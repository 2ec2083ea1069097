"""The chat page, used as visitors use it: in a real browser (headless Chromium), against the real server and engine."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from coterie.answer import Answer, Answerer
from coterie.business import Business
from coterie.data.read import Message
from coterie.engine.engine import Engine
from coterie.engine.request import Callback, Piece, Sampling
from coterie.errors import Busy
from coterie.web.app import create_app
from web_support import listening

expect.set_options(timeout=20_000)  # ms, for busy machines; what is expected comes much sooner
ALL = 1 << 30
QUESTION = "Which color has the grass?"
SUGGESTIONS = ["Which color has a lemon?", "Hello, I am Ada."]
WELCOME = "Ask us about colors."


class HeldAnswerer(Answerer):
    """Lets `free` pieces with visible text out at once, and the rest of an answer when the test calls `release`."""

    def __init__(self, business: Business, engine: Engine) -> None:
        super().__init__(business, engine)
        self.free = ALL
        self.answers: list[Answer] = []
        self.released = threading.Event()

    def chat(
        self, who: str, messages: list[Message], sampling: Sampling, on_piece: Callback | None = None,
        channel: str = "",
    ) -> Answer:  # fmt: skip
        shown = 0

        def held(piece: Piece) -> None:
            nonlocal shown
            if shown >= self.free:
                assert self.released.wait(60), "the test never released the answer"
            shown += bool(piece.text.strip())
            if on_piece:
                on_piece(piece)

        self.answers.append(super().chat(who, messages, sampling, held, channel))
        return self.answers[-1]

    def hold(self, after: int) -> None:
        self.released.clear()
        self.free = after

    def release(self) -> None:
        self.free = ALL
        self.released.set()

    def idle(self) -> bool:
        return self.engine.load_numbers() == (0, 0)


@contextmanager
def served(answerer: Answerer) -> Iterator[str]:
    """The address of a server for `answerer`."""
    with closing(answerer.engine), listening(create_app(answerer)) as address:
        yield address


@pytest.fixture(scope="module")
def shop_with_words(fitted_shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fitted shop, with a welcome and suggestions."""
    folder = tmp_path_factory.mktemp("page") / "shop"
    shutil.copytree(fitted_shop, folder)
    toml = folder / "coterie.toml"
    words = f'[business]\nwelcome = "{WELCOME}"\nsuggestions = {SUGGESTIONS}\n'
    toml.write_text(toml.read_text().replace("[business]\n", words))
    return folder


@pytest.fixture(scope="module")
def held_shop(shop_with_words: Path) -> Iterator[tuple[HeldAnswerer, str]]:
    answerer = HeldAnswerer.open(Business.open(shop_with_words))
    assert isinstance(answerer, HeldAnswerer)
    with served(answerer) as address:
        yield answerer, address
        answerer.release()


@pytest.fixture
def address(held_shop: tuple[HeldAnswerer, str]) -> str:
    return held_shop[1]


@pytest.fixture
def answerer(held_shop: tuple[HeldAnswerer, str]) -> Iterator[HeldAnswerer]:
    answerer = held_shop[0]
    answerer.release()
    yield answerer
    answerer.release()


@contextmanager
def visitor(browser: Browser, address: str, **options: Any) -> Iterator[Page]:
    """A page in a browser of its own, which must talk to no other origin and log no error of the page's."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    context.set_default_timeout(20_000)
    page, errors = context.new_page(), list[str]()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("request", lambda r: errors.append(f"asked for {r.url}") if not r.url.startswith(address) else None)
    page.goto(address)
    yield page
    context.close()
    # The browser's own note on a refused or lost request; the page shows those, which is tested.
    assert [e for e in errors if not e.startswith("Failed to load resource")] == []


@pytest.fixture
def page(browser: Browser, address: str, answerer: HeldAnswerer) -> Iterator[Page]:
    with visitor(browser, address) as page:
        yield page


def choose(page: Page, who: str) -> None:
    page.locator(".choice", has=page.locator(f"input[value={who}]")).click()


def send(page: Page, text: str = QUESTION) -> Locator:
    """Write and send a message; its turn."""
    page.get_by_label("Your message").fill(text)
    page.get_by_role("button", name="Send").click()
    return page.locator(".turn").last


def words(turn: Locator) -> Locator:
    return turn.locator(".answer .words")


def finished(turn: Locator) -> Locator:
    expect(turn.locator(".answer")).to_have_attribute("aria-busy", "false")
    return turn


def answer_with(page: Page, *texts: str, end: str = "stop") -> None:
    """Let the API answer with `texts`, whatever a model would have said."""
    by = {"expert": "greet", "version": 1, "routed": False, "similarity": None}

    def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], "coterie": by}

    def event(data: dict[str, Any]) -> str:
        return f"data: {httpx.Response(200, json=data).text}\n\n"

    body = "".join(event(chunk(text)) for text in texts)
    if end == "stop":
        body += event(chunk("", "stop")) + "data: [DONE]\n\n"
    elif end == "error":
        body += event({"error": {"code": "engine", "message": "out of memory"}})

    def fulfill(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", fulfill)


def test_visitors_see_the_business_and_everyone_who_may_answer(page: Page) -> None:
    expect(page).to_have_title("The Shop")
    expect(page.get_by_role("heading", level=1)).to_have_text("The Shop")
    expect(page.get_by_text(WELCOME)).to_be_visible()
    choices = page.get_by_role("group", name="Who answers").get_by_role("radio")
    assert [c.get_attribute("value") for c in choices.all()] == ["auto", "colors", "greet", "base"]
    expect(choices.first).to_be_checked()
    greet = page.locator(".choice", has_text="Greets people by name")
    expect(greet).to_contain_text("version 1")
    expect(page.get_by_text("generated by a language model and may be wrong")).to_be_in_viewport()


def test_an_answer_streams_in(page: Page, answerer: HeldAnswerer) -> None:
    choose(page, "base")
    answerer.hold(after=3)
    turn = send(page)
    expect(words(turn)).not_to_be_empty()
    begun = words(turn).inner_text()
    expect(turn.locator(".question")).to_contain_text(QUESTION)
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_hidden()
    answerer.release()
    finished(turn)
    assert words(turn).inner_text().startswith(begun)
    assert len(words(turn).inner_text()) > len(begun)
    expect(page.get_by_role("button", name="Send")).to_be_visible()


@pytest.mark.parametrize("who", ["colors", "greet", "base", "auto"])
def test_each_answer_says_who_gave_it(who: str, page: Page, address: str) -> None:
    asked = {"model": who, "messages": [{"role": "user", "content": QUESTION}]}
    api = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=60).json()
    choose(page, who)
    turn = finished(send(page))
    byline = turn.locator(".byline")
    by = api["coterie"]
    expect(byline.locator(".name")).to_have_text(by["expert"] or "base")
    expect(byline.locator(".version")).to_have_text("version 1" if by["expert"] else "")
    if who == "auto":
        assert by["expert"] == "colors", "a question like those it was trained on"
        expect(byline.locator(".chosen")).to_have_text(f"chosen by auto, similarity {by['similarity']:.2f}")
    else:
        expect(byline.locator(".chosen")).to_be_empty()
    said = api["choices"][0]["message"]["content"]
    assert "".join(words(turn).inner_text().split()) == "".join(said.split())


def test_auto_says_so_when_no_expert_is_near(page: Page) -> None:
    turn = finished(send(page, "1234567890 " * 8))
    expect(turn.locator(".byline")).to_contain_text("no expert is near enough")


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_a_stopped_answer_keeps_its_text_and_frees_the_engine(how: str, page: Page, answerer: HeldAnswerer) -> None:
    choose(page, "base")
    answerer.hold(after=3)
    turn = send(page)
    expect(words(turn)).not_to_be_empty()
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press(how)
    finished(turn)
    kept = words(turn).inner_text()
    assert kept
    expect(turn).to_contain_text("Stopped before the end.")
    expect(page.get_by_label("Your message")).to_be_focused()
    page.wait_for_function("fetch('healthz').then(r => r.ok)")
    answerer.release()
    wait_until(page, answerer.idle)
    assert answerer.answers[-1].generation.finish == "cancelled"
    assert words(turn).inner_text() == kept


def wait_until(page: Page, condition: Any) -> None:
    for _ in range(200):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{condition} never came")


def test_a_suggestion_is_asked_with_one_click(page: Page) -> None:
    page.get_by_role("button", name=SUGGESTIONS[1]).click()
    turn = finished(page.locator(".turn"))
    expect(turn.locator(".question .words")).to_have_text(SUGGESTIONS[1])
    expect(page.get_by_text(WELCOME)).to_be_hidden()


def test_a_conversation_goes_on_with_what_was_said_and_outlives_a_reload(page: Page) -> None:
    choose(page, "colors")
    first = finished(send(page))
    said = words(first).inner_text()
    page.reload()
    expect(page.locator("input[value=colors]")).to_be_checked()
    expect(words(page.locator(".turn"))).to_have_text(said)
    expect(page.locator(".turn .byline .name")).to_have_text("colors")
    with page.expect_request("**/v1/chat/completions") as request:
        finished(send(page, "And a lemon?"))
    assert request.value.post_data_json == {
        "model": "colors", "stream": True,
        "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": said},
                     {"role": "user", "content": "And a lemon?"}],
    }  # fmt: skip
    page.get_by_role("button", name="New conversation").click()
    page.reload()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_text(WELCOME)).to_be_visible()


def test_an_answer_cut_by_a_reload_keeps_what_had_arrived(page: Page, answerer: HeldAnswerer) -> None:
    choose(page, "base")
    answerer.hold(after=3)
    turn = send(page)
    expect(words(turn)).not_to_be_empty()
    arrived = words(turn).inner_text()
    page.reload()
    assert words(page.locator(".turn")).inner_text().startswith(arrived)
    expect(page.locator(".turn")).to_contain_text("Stopped before the end.")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_damaged_storage_begins_a_new_conversation(page: Page) -> None:
    page.add_init_script("sessionStorage.setItem('coterie.conversation', '{')")
    page.reload()
    expect(page.get_by_text(WELCOME)).to_be_visible()
    finished(send(page))


def test_a_full_queue_asks_to_wait_and_then_answers(page: Page, answerer: HeldAnswerer) -> None:
    stands = threading.Event()

    def block(_piece: Piece) -> None:
        stands.set()
        answerer.released.wait(60)

    def ask(times: int) -> None:
        for _ in range(times):
            Answerer.chat(answerer, "base", [{"role": "user", "content": "Hi"}], Sampling(max_tokens=2), block)

    answerer.hold(after=0)
    ask(1)
    assert stands.wait(20), "the engine stands still from here on"
    with pytest.raises(Busy):
        ask(answerer.engine.queue + 1)
    turn = send(page)
    expect(turn.get_by_role("button", name="Try again in")).to_be_disabled()
    expect(turn).to_contain_text("Please wait a moment")
    answerer.release()
    turn.get_by_role("button", name="Try again", exact=True).click()
    finished(turn)
    expect(words(turn)).not_to_be_empty()
    expect(turn.locator(".problem")).to_be_hidden()
    expect(page.locator(".turn")).to_have_count(1)


def test_without_network_the_message_is_kept_and_can_be_sent_again(page: Page) -> None:
    page.context.set_offline(True)
    turn = send(page)
    expect(turn).to_contain_text("The connection failed.")
    page.context.set_offline(False)
    turn.get_by_role("button", name="Try again").click()
    expect(words(finished(turn))).not_to_be_empty()


@pytest.mark.parametrize(
    ("end", "says"), [("nothing", "The answer broke off."), ("error", "Out of memory.")], ids=["cut", "engine"]
)
def test_an_answer_that_breaks_off_keeps_its_beginning(end: str, says: str, page: Page) -> None:
    answer_with(page, "It is ", "gre", end=end)
    turn = finished(send(page))
    expect(words(turn)).to_have_text("It is gre")
    expect(turn.locator(".problem")).to_contain_text(says)
    page.unroute("**/v1/chat/completions")
    turn.get_by_role("button", name="Try again").click()
    finished(turn)
    expect(turn.locator(".problem")).to_be_hidden()
    assert not words(turn).inner_text().startswith("It is gre")


def test_a_message_longer_than_the_context_comes_back_to_be_edited(page: Page) -> None:
    long = "Where is it? " * 300
    turn = finished(send(page, long))
    expect(turn).to_contain_text("This message is too long.")
    expect(turn).to_contain_text("the context holds 256")
    turn.get_by_role("button", name="Edit the message").click()
    expect(page.get_by_label("Your message")).to_have_value(long.strip())
    expect(page.locator(".turn")).to_have_count(0)


def test_a_conversation_longer_than_the_context_goes_on_in_a_new_one(page: Page) -> None:
    answer_with(page, "A lemon is yellow. " * 60)
    finished(send(page))
    page.unroute("**/v1/chat/completions")
    turn = finished(send(page, "And the sea?"))
    expect(turn).to_contain_text("This conversation has grown too long.")
    turn.get_by_role("button", name="Ask in a new conversation").click()
    expect(page.locator(".turn")).to_have_count(1)
    turn = finished(page.locator(".turn"))
    expect(turn.locator(".question .words")).to_have_text("And the sea?")
    expect(words(turn)).not_to_be_empty()


def test_html_is_shown_and_never_run(page: Page) -> None:
    html = "<img src=/none onerror=\"document.title='run'\"><script>document.title='run'</script><b>bold</b>"
    answer_with(page, html, f"\n\n- {html}\n\n```\n{html}\n```")
    turn = finished(send(page, html))
    expect(turn.locator(".question .words")).to_have_text(html)
    expect(words(turn).locator("p")).to_have_text(html)
    expect(words(turn).locator("li")).to_have_text(html)
    expect(words(turn).locator("pre")).to_have_text(html)
    assert turn.locator("img, script, b").count() == 0
    expect(page).to_have_title("The Shop")


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("One.\nTwo.\n\nThree.", "<p>One.\nTwo.</p><p>Three.</p>"),
        ("- a\n- b", "<ul><li>a</li><li>b</li></ul>"),
        ("Take:\n1. a\n\n2. b\n   more", "<p>Take:</p><ol><li>a</li><li>b\nmore</li></ol>"),
        ("3) c\n4) d", '<ol start="3"><li>c</li><li>d</li></ol>'),
        ("- a\n\nThen", "<ul><li>a</li></ul><p>Then</p>"),
        ("## Delivery\nfree", "<p><strong>Delivery</strong></p><p>free</p>"),
        ("a **b `c`** `**d**`", "<p>a <strong>b <code>c</code></strong> <code>**d**</code></p>"),
        ("2 ** 3 and **open", "<p>2 ** 3 and **open</p>"),
        ("```py\na = 1\n\n# b\n```\nend", "<pre><code>a = 1\n\n# b</code></pre><p>end</p>"),
        ("```\nstill arriving", "<pre><code>still arriving</code></pre>"),
        ("-5 degrees, 1.5 km, #1", "<p>-5 degrees, 1.5 km, #1</p>"),
        ("", ""),
    ],
)
def test_marks_of_markdown_become_elements(text: str, html: str, page: Page) -> None:
    script = """async (text) => {
        const { render } = await import('/static/render.js');
        return render(text).map((block) => block.outerHTML).join('');
    }"""
    assert page.evaluate(script, text) == html


@pytest.mark.parametrize("secure", [True, False], ids=["https", "http"])
def test_an_answer_is_copied_as_it_was_written(secure: bool, page: Page) -> None:
    if not secure:  # browsers then have no clipboard API
        page.add_init_script("delete Navigator.prototype.clipboard")
        page.reload()
    answer_with(page, "It is **green**.\n\n- really", f"\n- {secure}")
    turn = finished(send(page))
    turn.get_by_role("button", name="Copy").click()
    expect(turn.get_by_role("button", name="Copied")).to_be_visible()
    page.get_by_label("Your message").focus()
    page.keyboard.press("Control+V")
    expect(page.get_by_label("Your message")).to_have_value(f"It is **green**.\n\n- really\n- {secure}")


def test_screen_readers_hear_an_answer_once_and_whole(page: Page, answerer: HeldAnswerer) -> None:
    choose(page, "base")
    answerer.hold(after=3)
    turn = send(page)
    expect(words(turn)).not_to_be_empty()
    expect(page.get_by_role("status")).to_have_text("The answer is being written.")
    expect(turn.locator("article")).to_have_attribute("aria-busy", "true")
    answerer.release()
    said = words(finished(turn)).inner_text()
    assert "".join(said.split()) in "".join(page.get_by_role("status").inner_text().split())


def test_everything_can_be_done_with_the_keyboard(page: Page, answerer: HeldAnswerer) -> None:
    def focused() -> str:
        script = "((e) => e === document.body ? '' : e.value || e.textContent)(document.activeElement).trim()"
        return str(page.evaluate(script))

    page.get_by_label("Your message").focus()
    stations = []
    for _ in range(8):
        page.keyboard.press("Tab")
        stations.append(focused())
    in_order = ["Skip to your message", "New conversation", "auto", "How good the experts are", *SUGGESTIONS]
    assert [s for s in stations if s] == in_order, "and Send, the address bar and the message itself, which say nothing"

    page.locator("input[value=auto]").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("input[value=colors]")).to_be_checked()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    expect(page.locator("input[value=base]")).to_be_checked()

    page.get_by_label("Your message").focus()
    page.keyboard.type("One")
    height = page.get_by_label("Your message").bounding_box()
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    expect(page.get_by_label("Your message")).to_have_value("One\nTwo")
    grown = page.get_by_label("Your message").bounding_box()
    assert height
    assert grown
    assert grown["height"] > height["height"]
    answerer.hold(after=3)
    page.keyboard.press("Enter")
    turn = page.locator(".turn")
    expect(turn.locator(".question .words")).to_have_text("One\nTwo")
    expect(words(turn)).not_to_be_empty()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    page.keyboard.press("Enter")
    finished(turn)
    expect(page.get_by_label("Your message")).to_be_focused()


def test_enter_sends_nothing_when_empty_and_waits_while_an_answer_is_under_way(
    page: Page, answerer: HeldAnswerer
) -> None:
    message = page.get_by_label("Your message")
    message.press("Enter")
    message.fill("  \n ")
    message.press("Enter")
    expect(page.locator(".turn")).to_have_count(0)
    answerer.hold(after=0)
    turn = send(page)
    message.fill("Next")
    message.press("Enter")
    expect(page.locator(".turn")).to_have_count(1)
    expect(message).to_have_value("Next")
    answerer.release()
    finished(turn)


def test_on_a_phone_all_fits_and_the_choice_opens_over_the_conversation(
    browser: Browser, address: str, answerer: HeldAnswerer
) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with visitor(browser, address, **phone) as page:
        greet = page.locator(".choice", has_text="Greets people by name")
        expect(greet).to_be_hidden()
        page.get_by_role("button", name="Who answers: auto").tap()
        greet.tap()
        expect(greet).to_be_hidden()
        expect(page.get_by_role("button", name="Who answers: greet")).to_be_visible()
        answer_with(page, "W" * 200 + "\n\n```\n" + "code " * 60 + "\n```\n1. " + "long" * 50)
        finished(send(page, "m" * 200))
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("document.querySelector('#scroller').scrollWidth") == 360
        expect(page.get_by_text("generated by a language model and may be wrong")).to_be_in_viewport(ratio=1)
        expect(page.get_by_role("button", name="Send")).to_be_in_viewport(ratio=1)
        page.get_by_role("button", name="Who answers").tap()
        page.keyboard.press("Escape")
        expect(greet).to_be_hidden()


def test_the_end_stays_in_sight_unless_the_visitor_reads_above(page: Page, answerer: HeldAnswerer) -> None:
    page.set_viewport_size({"width": 1280, "height": 400})
    answer_with(page, "A.\n\n" * 16)
    expect(words(finished(send(page))).locator("p").last).to_be_in_viewport()
    page.unroute("**/v1/chat/completions")
    choose(page, "base")
    answerer.hold(after=3)
    turn = send(page)
    expect(words(turn)).not_to_be_empty()
    expect(turn).to_be_in_viewport()
    page.locator("#scroller").evaluate("s => s.scrollTo(0, 0)")
    answerer.release()
    finished(turn)
    expect(page.locator(".question").first).to_be_in_viewport(ratio=1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_aa_asks_for(
    scheme: Any, browser: Browser, address: str, answerer: HeldAnswerer
) -> None:
    with visitor(browser, address, color_scheme=scheme) as page:
        low = list(page.evaluate(LOW_CONTRAST))
        for who in ("colors", "greet", "base"):
            choose(page, who)
            finished(send(page, f"{QUESTION} `code`"))
            low += page.evaluate(LOW_CONTRAST)
        page.context.set_offline(True)
        expect(send(page)).to_contain_text("The connection failed.")
        low += page.evaluate(LOW_CONTRAST)
        for hue in range(7):
            page.evaluate("hue => document.querySelectorAll('[data-hue]').forEach((e) => e.dataset.hue = hue)", hue)
            low += page.evaluate(LOW_CONTRAST)
        assert low == []


# Every visible text, and its contrast with the ground under it (WCAG 2.2, relative luminance), where below 4.5.
LOW_CONTRAST = """() => {
    const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
    const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const luminance = (color) => {
        const [r, g, b] = rgb(color).map((c) => linear(c / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (e) => {
        const color = getComputedStyle(e).backgroundColor;
        return (rgb(color)[3] ?? 1) ? color : ground(e.parentElement);
    };
    const low = [];
    for (const e of document.querySelectorAll('body *')) {
        const text = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        if (!text || !e.checkVisibility() || e.closest('script, template')) continue;
        const [a, b] = [luminance(getComputedStyle(e).color), luminance(ground(e))].sort((x, y) => y - x);
        const contrast = (a + 0.05) / (b + 0.05);
        if (contrast < 4.5) low.push(`${e.className || e.tagName}: ${contrast.toFixed(2)}`);
    }
    return low;
}"""


def test_nothing_moves_for_people_who_ask_for_that(browser: Browser, address: str, answerer: HeldAnswerer) -> None:
    moving = "document.getAnimations().filter((a) => a.playState === 'running').length"
    with visitor(browser, address) as page:
        answerer.hold(after=0)
        send(page)
        expect(page.locator("[data-state=waiting]")).to_be_visible()
        assert page.evaluate(moving) > 0
        page.emulate_media(reduced_motion="reduce")
        assert page.evaluate(moving) == 0
        answerer.release()


def test_a_business_without_experts_offers_its_base_model_and_its_name_is_only_text(
    browser: Browser, shop: Path
) -> None:
    toml = shop / "coterie.toml"
    toml.write_text(toml.read_text().replace('name = "The Shop"', "name = 'Tom & <b>\"Ada\"</b>'"))
    with served(Answerer.open(Business.open(shop))) as address, visitor(browser, address) as page:
        expect(page.get_by_role("heading", level=1)).to_have_text('Tom & <b>"Ada"</b>')
        expect(page.get_by_role("radio")).to_have_count(1)
        expect(page.get_by_role("radio")).to_be_checked()
        expect(page.locator("#empty")).to_contain_text("What would you like to know?")
        finished(send(page))
        expect(page.locator(".byline .name")).to_have_text("base")
