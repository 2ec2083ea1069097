"""The desk's answers: what is sent, what is handed over and why, and what nobody may see."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from coterie.answer import Answerer
from coterie.business import Business
from coterie.desk.confidence import Confidence
from coterie.desk.desk import Desk, database_of
from coterie.desk.flow import Parts
from coterie.desk.message import Message
from coterie.engine.request import Piece
from coterie.knowledge.evidence import Evidence, Reader
from coterie.privacy.deidentify import Detector
from coterie.privacy.house import open_house
from coterie.privacy.pseudonyms import Pair, Pseudonyms, Restorer
from coterie.privacy.vault import Masked, Vault
from coterie.store.database import open_database
from desk_support import Checking, Script, ask, open_desk, scripted, settled

ALL = ("message", "note", "suggestion", "event")
SURE = Confidence((0.5, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0), 3.0, 0.8, 0.02, 100, 0.9, 0.01)
Open = Callable[..., Desk]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens desks whose assistant says "All is well." or what is given, and closes them at the end."""
    desks: list[Desk] = []

    def make(says: Any = "All is well.", parts: Parts | None = None, start: bool = True, **desk: Any) -> Desk:
        by = says if callable(says) else lambda _text: says if isinstance(says, Script) else Script(says)
        choices = desk.pop("choices", ())
        made = open_desk(scripted(tmp_path, by, choices, **desk), f"sqlite:///{tmp_path}/desk.db", parts, start)
        desks.append(made)
        return made

    yield make
    for desk in desks:
        desk.close()


def kept(desk: Desk, id: str, kind: str = "message") -> list[str]:
    return [m.text for m in desk.conversations.messages(id, kinds=(kind,))]


def briefing(desk: Desk, id: str) -> dict[str, Any]:
    notes = [m for m in desk.conversations.messages(id, kinds=("note",)) if m.author == "bot"]
    return {**notes[-1].data, "summary": notes[-1].text}


def test_a_sure_answer_is_sent_with_who_gave_it_and_how_sure(opened: Open) -> None:
    desk = opened()
    c = ask(desk, "Is all well?")
    sent = desk.conversations.messages(c.id)[-1]
    assert (c.state, sent.author, sent.text) == ("bot", "bot", "All is well.")
    assert (sent.data["expert"], sent.data["version"], sent.data["logprob"]) == ("shop", 1, -0.1)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (Script("Hm.", logprob=-4.0), "low_confidence"), (Script("Hm.", expert=None), "not_known"),
        (Script(" "), "no_answer"),
    ],
    ids=str,
)  # fmt: skip
def test_an_unsure_answer_goes_to_a_person_as_a_suggestion_and_not_to_the_customer(
    script: Script, reason: str, opened: Open
) -> None:
    desk = opened(script)
    desk.confidence = SURE
    c = ask(desk, "What is the meaning of it all?")
    assert (c.state, c.owner, c.reason) == ("waiting", "queue", reason)
    assert kept(desk, c.id) == ["What is the meaning of it all?"]
    assert kept(desk, c.id, "suggestion") == ([script.text] if script.text.strip() else [])
    brief = briefing(desk, c.id)
    assert brief["reason"] == reason
    assert brief["summary"] == "What is the meaning of it all?"


def test_what_the_customer_read_is_never_taken_back_when_the_end_is_unsure(opened: Open) -> None:
    desk = opened(Script("It is blue. Or so they say.", pause=4, later=-5.0))
    desk.confidence = SURE
    shown: list[str] = []
    desk.live.write = lambda _id, text: shown.append(text)  # type: ignore[method-assign]
    c = ask(desk, "What color?")
    assert (shown, c.reason) == (["It is blue. "], "low_confidence")
    assert kept(desk, c.id) == ["What color?", "It is blue. "]
    assert kept(desk, c.id, "suggestion") == ["It is blue. Or so they say."]


RULES = [
    {"reason": "vulnerable_customer", "words": ["bereaved", "passed away"], "queue": "care"},
    {"reason": "large_amount", "amount_above": 500},
    {"reason": "fraud", "topics": ["fraud", "card_stolen"], "queue": "fraud"},
    {"reason": "vip", "profile": {"tier": "gold"}, "words": ["complaint"]},
    {"reason": "angry", "negative": True},
]


@pytest.mark.parametrize(
    ("text", "reason", "queue"),
    [
        ("My husband PASSED  away last week", "vulnerable_customer", "care"),
        ("The bereavedness of it", "", "general"),
        ("Please refund $1,249.50", "large_amount", "general"),
        ("Please refund 1.249,50 EUR", "large_amount", "general"),
        ("Please refund €500", "", "general"), ("I ordered 900 screws", "", "general"),
        ("Please refund 12 500 pounds", "large_amount", "general"),
        ("fraud!", "fraud", "fraud"), ("stolen", "fraud", "fraud"),
        ("I have a complaint", "vip", "general"), ("You are useless", "angry", "general"), ("Thanks", "", "general"),
    ],
)  # fmt: skip
def test_rules_of_the_business_call_a_person(text: str, reason: str, queue: str, opened: Open) -> None:
    def says(message: str) -> Script:
        if message.startswith("mood: "):
            return Script("negative" if "useless" in message else "other")
        return Script("card_stolen" if "stolen" in message else "Fine.", "fraud" if "fraud" in message else "shop")

    parts = Parts(profile=lambda _customer: {"tier": "gold"})
    desk = opened(says, parts, rules=RULES, sentiment="mood", choices=("card_stolen", "Fine."))
    c = ask(desk, text)
    assert (c.state, c.reason if reason else "", c.queue) == ("waiting" if reason else "bot", reason, queue)
    if reason:
        assert kept(desk, c.id) == [text], "the customer gets a person and no answer"
        assert kept(desk, c.id, "suggestion"), "the agent gets one"


MANY = [
    (("My husband passed away.", "How do I close his account?"), "vulnerable_customer", "care"),
    (("I want 900 EUR back.", "Quickly!", "Hello?"), "large_amount", "general"),
    (("You are useless.", "Where is my order?"), "angry", "general"),
]


@pytest.mark.parametrize(("texts", "reason", "queue"), MANY)
def test_a_rule_looks_at_every_message_since_the_last_answer(
    texts: tuple[str, ...], reason: str, queue: str, opened: Open
) -> None:
    desk = opened(
        lambda t: Script("negative" if "mood: " in t and "useless" in t else "Fine."), rules=RULES, sentiment="mood"
    )
    c = desk.conversations.open("ada")
    for text in texts:
        desk.conversations.say(c.id, text)
    desk.wake(c.id)
    c = settled(desk, c.id)
    assert (c.state, c.reason, c.queue) == ("waiting", reason, queue)


def test_a_rule_that_fired_once_does_not_fire_on_what_comes_after_the_answer(opened: Open) -> None:
    desk = opened(rules=RULES)
    c = ask(desk, "My husband passed away.")
    desk.conversations.take(c.id, "bea")
    desk.conversations.reply(c.id, "bea", "I am so sorry.")
    desk.conversations.back_to_bot(c.id)
    desk.conversations.say(c.id, "When do you open?")
    desk.wake(c.id)
    assert settled(desk, c.id).state == "bot"


def test_a_rule_calls_its_queue_though_the_assistant_is_out_of_order(opened: Open) -> None:
    desk = opened(parts=Parts(mask=fail), rules=RULES)
    c = ask(desk, "My husband passed away.")
    assert (c.reason, c.queue) == ("vulnerable_customer", "care")


def test_stopping_the_answer_keeps_no_person_from_being_called(opened: Open) -> None:
    gate = threading.Event()
    desk = opened(Script("It is blue.", gate=gate), rules=RULES)
    c = desk.conversations.open("ada")
    desk.conversations.say(c.id, "My husband passed away.")
    desk.wake(c.id)
    begun(desk, c.id)
    desk.stop(c.id)
    assert settled(desk, c.id).reason == "vulnerable_customer"


def test_where_the_mood_cannot_be_told_a_person_looks(opened: Open) -> None:
    desk = opened(lambda t: fail() if "mood: " in t else Script("Fine."), rules=RULES, sentiment="mood")
    c = ask(desk, "Hello.")
    assert c.reason == "angry"
    assert briefing(desk, c.id)["detail"] == "whether the message is negative could not be told"


def test_the_same_question_again_and_again_calls_a_person(opened: Open) -> None:
    desk = opened(failures=2)
    c = ask(desk, "Where is my order?")
    for again in ("Where is my order??", "where IS my order"):
        desk.conversations.say(c.id, again)
        desk.wake(c.id)
        c = settled(desk, c.id)
    assert c.reason == "repeated_failure"


def test_a_thumb_down_counts_as_a_failure(opened: Open) -> None:
    desk = opened(failures=1)
    c = ask(desk, "Where is my order?")
    desk.conversations.rate(c.id, 2, good=False, reason="no")
    desk.conversations.say(c.id, "And what of the invoice, then?")
    desk.wake(c.id)
    assert settled(desk, c.id).reason == "repeated_failure"


@pytest.mark.parametrize(
    "text",
    ["HANDOFF", "[handoff: person]", "Transfer me now. <action>hand_over</action>", "I'll pass you to a person."],
)  # fmt: skip
def test_no_phrase_hands_over(text: str, opened: Open) -> None:
    c = ask(opened(text), text)
    assert c.state == "bot"


def test_labels_of_an_intent_expert_are_answered_as_the_business_says(opened: Open) -> None:
    says = {"Where?": "order_status", "Why?": "why_status"}
    desk = opened(lambda t: Script(says[t]), answers={"order_status": "It is on its way."}, choices=("a", "b"))
    assert kept(desk, ask(desk, "Where?").id) == ["Where?", "It is on its way."]
    c = ask(desk, "Why?")
    assert (c.reason, kept(desk, c.id)) == ("no_answer", ["Why?"]), "a label is not a sentence"


# Private data, sources, and parts that fail


def hide(_customer: str, texts: list[str], _known: Mapping[str, Any]) -> Masked:
    pseudonyms = Pseudonyms([Pair("[PERSON_1]", "Ada")])
    return Masked([t.replace("Ada", "[PERSON_1]") for t in texts], pseudonyms.restore, lambda: Restorer(pseudonyms))


def test_the_model_sees_masked_text_only_and_the_customer_sees_their_name(opened: Open) -> None:
    parts = Parts(mask=hide, profile=lambda _c: {"name": "Ada"})
    desk = opened("Hello [PERSON_1]. Good day.", parts)
    c = ask(desk, "I am Ada.")
    assert kept(desk, c.id)[-1] == "Hello Ada. Good day."
    assert "Ada" not in str(desk.answerer.asked)  # type: ignore[attr-defined]
    assert "[PERSON_1]" in str(desk.answerer.asked)  # type: ignore[attr-defined]


def test_the_customer_is_looked_up_once_and_the_question_routed_once(opened: Open) -> None:
    looked, routed = list[str](), list[str]()
    parts = Parts(mask=hide, profile=lambda c: looked.append(c) or {"name": "Ada"})  # type: ignore[func-returns-value]
    desk = opened("Hello [PERSON_1].", parts)
    choose = desk.answerer.choose  # type: ignore[attr-defined]
    desk.answerer.choose = lambda text, channel: routed.append(text) or choose(text, channel)  # type: ignore[attr-defined]
    c = ask(desk, "I am Ada.")
    assert (c.state, looked, routed) == ("bot", ["ada"], ["I am [PERSON_1]."])


PRIVATE = {
    "ada": {"name": "Margarethe Oldenburg", "email": "m.old@example.org"},
    "bob": {"phone": "+44 20 7946 0958", "email": "bob@example.net", "card": "4111 1111 1111 1111"},
}


def test_what_any_source_says_of_customers_reaches_no_model_unmasked_and_citations_show_it(
    opened: Open, tmp_path: Path
) -> None:
    house = open_house(tmp_path, open_database(f"sqlite:///{tmp_path}/house.db"), {})
    vault = Vault(Detector(), house.database, house.keys)
    rows = [Evidence("crm", f"customers {c}", ", ".join(known.values()), 0.9) for c, known in PRIVATE.items()]

    def check(evidence: Sequence[Evidence]) -> Checking:
        return Checking(lambda _: any("[EMAIL_1]" in e.text for e in evidence))

    parts = Parts(
        mask=lambda c, texts, known: vault.mask(c, texts, {k: [str(v)] for k, v in known.items()}),
        ground=lambda _q, _r: rows, check=check, profile=lambda c: PRIVATE[c],
    )  # fmt: skip
    desk = opened("You are [NAME_1], at [EMAIL_1].", parts)
    try:
        c = ask(desk, "I, Margarethe Oldenburg, ask: what is my e-mail address?")
        sent = desk.conversations.messages(c.id)[-1]
        assert sent.text == "You are Margarethe Oldenburg, at m.old@example.org."
        assert [s["text"] for s in sent.data["sources"]] == [e.text for e in rows]
        asked = str(desk.answerer.asked)  # type: ignore[attr-defined]
        assert "[NAME_1]" in asked
        assert [v for known in PRIVATE.values() for v in known.values() if v in asked] == []
    finally:
        house.close()


def fail(*_args: Any) -> Any:
    raise RuntimeError("out of order")


def test_when_the_masker_fails_nothing_goes_out(opened: Open) -> None:
    desk = opened(parts=Parts(mask=fail))
    c = ask(desk, "I am Ada.")
    assert c.reason == "masking_failed"
    assert desk.answerer.asked == []  # type: ignore[attr-defined]


def test_a_profile_or_a_source_that_fails_is_told_to_the_agent_and_stops_nothing(opened: Open) -> None:
    desk = opened(parts=Parts(profile=fail))
    assert kept(desk, ask(desk, "Hi").id)[-1] == "All is well."
    desk = opened(Script("Hm.", expert=None), Parts(profile=fail, ground=fail))
    c = ask(desk, "Hi")
    assert c.reason == "not_known"
    assert briefing(desk, c.id)["detail"] == (
        "the customer's profile could not be read; the knowledge could not be searched"
    )


def test_answers_come_with_their_sources_and_what_nothing_supports_is_not_sent(opened: Open) -> None:
    found = [Evidence("faq", "faq.md#delivery", "Delivery takes 2 days.", 0.8)]

    parts = Parts(ground=lambda _q, _r: found, check=lambda _: Checking(lambda s: "2 days" in s))
    desk = opened(lambda t: Script("It takes 2 days." if "long" in t else "It takes 9 days.", expert=None), parts)
    sent = desk.conversations.messages(ask(desk, "How long?").id)[-1]
    assert sent.text == "It takes 2 days."
    assert sent.data["sources"] == [{"source": "faq", "where": "faq.md#delivery", "text": "Delivery takes 2 days."}]
    assert "[1] Delivery takes 2 days." in desk.answerer.asked[0][-1]["content"]  # type: ignore[attr-defined]
    c = ask(desk, "How many?")
    assert c.reason == "unsupported"
    assert briefing(desk, c.id)["evidence"][0]["where"] == "faq.md#delivery"


@pytest.mark.parametrize("calibrated", [False, True])
def test_each_sentence_is_read_once_it_is_checked_and_nothing_after_one_that_nothing_supports(
    calibrated: bool, opened: Open
) -> None:
    parts = Parts(check=lambda _: Checking(lambda s: "9" not in s))
    desk = opened("It is red. It takes 2 days. It takes 9 days. Bye.", parts)
    desk.confidence = SURE if calibrated else None
    shown: list[str] = []
    desk.live.write = lambda _id, text: shown.append(text)  # type: ignore[method-assign]
    c = ask(desk, "How long?")
    assert (shown, c.reason) == (["It is red. ", "It takes 2 days. "], "unsupported")
    assert kept(desk, c.id) == ["How long?", "It is red. It takes 2 days. "]
    assert kept(desk, c.id, "suggestion") == ["It is red. It takes 2 days. It takes 9 days. Bye."]


def test_a_name_that_comes_in_pieces_is_read_whole(opened: Open) -> None:
    desk = opened("Hello [PERSON_1]. It is [PERSON_1] and [PERSON_9].", Parts(mask=hide))

    def letters(generation: Any, script: Script) -> None:
        for letter in script.text:
            generation.emit(Piece(letter, ()))
        generation.emit(Piece("", (), "stop"))

    desk.answerer._speak = letters  # type: ignore[attr-defined]
    shown: list[str] = []
    desk.live.write = lambda _id, text: shown.append(text)  # type: ignore[method-assign]
    c = ask(desk, "I am Ada.")
    assert "".join(shown) == kept(desk, c.id)[-1] == "Hello Ada. It is Ada and [PERSON_9]."
    assert "Ada" in shown
    assert len(shown) > 20, "letter by letter, but for the name"


def test_who_may_not_ask_gets_a_person_and_no_model(opened: Open) -> None:
    desk = opened(parts=Parts(may_ask=lambda turn: None if turn.conversation.customer == "eve" else Reader("x")))
    assert ask(desk, "Hi", "eve").reason == "may_not_ask"
    assert ask(desk, "Hi", "ada").state == "bot"


def test_a_fault_of_ours_calls_a_person(opened: Open) -> None:
    desk = opened(fail)
    assert ask(desk, "Hi").reason == "assistant_failed"


# What happens while an answer is being written


def begun(desk: Desk, id: str) -> None:
    while not (desk._at_work.get(id) and desk._at_work[id].generation):
        threading.Event().wait(0.01)


def test_a_take_over_while_the_bot_writes_silences_it_and_keeps_its_words(opened: Open) -> None:
    gate = threading.Event()
    desk = opened(Script("One. Two. Three.", gate=gate, pause=0))
    shown: list[str] = []
    desk.live.write = lambda id, text: shown.append(text)  # type: ignore[method-assign]
    c = desk.conversations.open("ada")
    desk.conversations.say(c.id, "Hi")
    desk.wake(c.id)
    begun(desk, c.id)
    desk.conversations.take(c.id, "bea")
    gate.set()
    settled(desk, c.id)
    assert shown == []
    assert (kept(desk, c.id), kept(desk, c.id, "suggestion")) == (["Hi"], ["One. Two. Three."])


def test_stop_ends_the_answer_with_what_was_read(opened: Open) -> None:
    desk = opened(Script("It is blue. Or so they say.", gate=threading.Event(), pause=5))
    read, shown = threading.Event(), list[str]()

    def write(_id: str, text: str) -> None:
        shown.append(text)
        if text == " so":
            read.set()

    desk.live.write = write  # type: ignore[method-assign]
    c = desk.conversations.open("ada")
    desk.conversations.say(c.id, "What color?")
    desk.wake(c.id)
    assert read.wait(20)
    desk.stop(c.id)
    assert settled(desk, c.id).state == "bot"
    sent = desk.conversations.messages(c.id)[-1]
    assert (sent.text, sent.data["stopped"]) == ("It is blue. Or so", True)
    assert shown == ["It", " is", " blue.", " Or", " so"], "word by word: nothing of it could be withheld"


def test_another_message_while_the_bot_writes_gets_one_answer_to_both(opened: Open) -> None:
    first = Script("Old news.", gate=threading.Event())
    desk = opened(lambda t: Script(f"To {t!r}") if "\n" in t else first)
    c = desk.conversations.open("ada")
    desk.conversations.say(c.id, "One long question of mine")
    desk.wake(c.id)
    begun(desk, c.id)
    desk.conversations.say(c.id, "Two")
    desk.wake(c.id)
    settled(desk, c.id)
    assert kept(desk, c.id) == ["One long question of mine", "Two", "To 'One long question of mine\\nTwo'"]


def test_an_answer_under_way_at_the_end_is_given_after_the_restart(opened: Open) -> None:
    desk = opened(Script("One. Two.", gate=threading.Event()))
    c = desk.conversations.open("ada")
    desk.conversations.say(c.id, "Hi")
    desk.wake(c.id)
    begun(desk, c.id)
    desk.close()
    desk = opened("Here again.")
    settled(desk, c.id)
    assert kept(desk, c.id) == ["Hi", "Here again."]


def test_a_conversation_that_waits_for_a_worker_is_queued_once(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under load each look finds again what still waits; queued each time, it would keep the workers from answering."""
    gate = threading.Event()
    desk = opened(lambda t: Script("Yes.", gate=gate, pause=0) if "first" in t else Script("No."), workers=1)
    looked, claim = list[str](), desk.conversations.claim
    monkeypatch.setattr(desk.conversations, "claim", lambda id: looked.append(id) or claim(id))
    first, second = (desk.conversations.open(name) for name in ("ada", "ben"))
    desk.conversations.say(first.id, "I am first")
    desk.wake(first.id)
    begun(desk, first.id)
    desk.conversations.say(second.id, "I am second")
    for _ in range(50):
        desk.wake(second.id)
    gate.set()
    settled(desk, second.id)
    assert kept(desk, second.id) == ["I am second", "No."]
    assert 1 <= looked.count(second.id) <= 4, "once with an answer to give, once without, and by a look meanwhile"


def test_two_hundred_conversations_at_once_are_all_answered(opened: Open) -> None:
    desk = opened(lambda t: Script(f"You said {t}"), workers=32)
    ids = {}
    for n in range(200):
        c = desk.conversations.open(f"customer {n}")
        desk.conversations.say(c.id, f"message {n}")
        desk.wake(c.id)
        ids[n] = c.id
    for n, id in ids.items():
        settled(desk, id, within_s=60)
        assert kept(desk, id) == [f"message {n}", f"You said message {n}"]


def test_the_real_engine_answers_a_customer(fitted_shop: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "shop"
    shutil.copytree(fitted_shop, folder)
    answerer = Answerer.open(Business.open(folder))
    desk = Desk(answerer, database_of(answerer.business))
    desk.start()
    try:
        c = ask(desk, "Which color has the grass?")
        said: list[Message] = desk.conversations.messages(c.id)
        assert (c.state, said[-1].data["expert"]) == ("bot", "colors")
        assert said[-1].text in ("red", "green", "blue", "yellow")
        assert said[-1].data["logprob"] <= 0
        assert (folder / ".coterie" / "desk.db").exists()
    finally:
        desk.close()
        answerer.close()
