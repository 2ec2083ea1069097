"""What is private becomes a pseudonym and comes back, whole or streamed; where masking fails, nothing goes out."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coterie.data.private import Span
from coterie.errors import CoterieError
from coterie.model.load import BaseModel
from coterie.privacy import deidentify
from coterie.privacy.deidentify import IDENTIFYING, Detector, Mask, MaskingFailed
from coterie.privacy.known import KnownValues
from coterie.privacy.pseudonyms import FORM, Pseudonyms, Restorer
from coterie.privacy.sentences import sentences
from coterie.privacy.tagger import OVERLAP, WINDOW, Tagger
from coterie.privacy.teach import Sentence, teach

RULES = Detector(region="GB")
ANNA = {
    "name": ["Anna-Lena Müller"], "email": ["anna.mueller@example.org"], "phone": ["+44 20 7946 0018"],
    "address": ["12 Hill Road, Leeds LS1 4AB"], "born": ["1980-05-01"], "customer": ["C-10482"],
    "iban": ["DE89 3704 0044 0532 0130 00"],
}  # fmt: skip


def mask(values: dict[str, list[str]] | None = None) -> Mask:
    return Mask(RULES, Pseudonyms(), KnownValues(values or {}))


FOUND = [
    ("write to anna@example.org please", "write to [EMAIL_1] please"),
    ("my card 4111 1111 1111 1111 was refused", "my card [CARD_1] was refused"),
    ("pay into DE89370400440532013000", "pay into [IBAN_1]"),
    ("ring +44 20 7946 0018", "ring [PHONE_1]"),
    ("order no. 55-1234 is late", "order no. [ORDER_1] is late"),
    ("where is AB-1234567?", "where is [ORDER_1]?"),
    ("my ssn: 460-89-9847", "my ssn: [SSN_1]"),
    ("I came from 192.168.7.12", "I came from [IP_1]"),
    ("a@b.com and A@B.com, then c@d.com", "[EMAIL_1] and [EMAIL_1b], then [EMAIL_2]"),
    ("a@b.com, then a@b.com", "[EMAIL_1], then [EMAIL_1]"),
]


@pytest.mark.parametrize(("text", "masked"), FOUND)
def test_what_rules_find_becomes_a_pseudonym(text: str, masked: str) -> None:
    one = mask()
    assert one.hide(text) == masked
    assert one.restore(masked) == text


@pytest.mark.parametrize(
    "text",
    ["I paid 49.90 for 2 of 5 items", "version 1.2.3 of 12/2024", "in order to call", "Error 404", "", " \n", "]["],
)
def test_what_is_not_private_stays(text: str) -> None:
    assert mask().hide(text) == text


VARIANTS = [
    "Anna-Lena Müller", "ANNA-LENA MÜLLER", "anna lena müller", "Müller, Anna-Lena", "Anna  Lena\nMuller", "Müller",
    "anna-lena", "A\u200bnna-Le\u200bna M\u00adüller", "Mu\u0308ller", "A n n a L e n a M ü l l e r", "annalena müller",
    "Anna.Mueller@Example.org", "anna . mueller @ example . org", "anna.mueller at example dot org",
    "020 7946 0018", "+44 (0)20 7946 0018", "0044-20-7946-0018", "02079460018", "2079460018", "020.7946.0018",
    "12 hill road", "12, Hill Road", "LS1 4AB", "Leeds LS14AB", "1 May 1980", "01.05.1980", "5/1/80", "May 1st, 1980",
    "c10482", "C 10482", "10482-C is not it, but C-10482", "de89 3704 0044 0532 0130 00", "DE89-3704-0044-0532-0130-00",
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_customers_own_values_are_masked_however_they_are_written(variant: str) -> None:
    one = mask(ANNA)
    text = f"so: {variant}; thanks"
    masked = one.hide(text)
    kept = re.sub(r"[^a-z0-9]", "", FORM.sub("", masked).lower())
    assert kept in ("sothanks", "so10482cisnotitbutthanks"), masked
    assert one.restore(masked) == text


WAYS: list[Callable[[str], str]] = [
    str.upper, str.lower, str.title, lambda v: v.replace(" ", ""), lambda v: v.replace(" ", "\n"),
    lambda v: v.replace(" ", " \t "), lambda v: re.sub("[-.,]", " ", v), lambda v: "\u200b".join(v),
]  # fmt: skip


@given(
    kind=st.sampled_from(sorted(ANNA)), ways=st.lists(st.sampled_from(WAYS), max_size=3),
    before=st.text(" .,;:!?()\n", max_size=3), after=st.text(" .,;:!?()\n", max_size=3),
)  # fmt: skip
def test_no_way_of_writing_a_known_value_gets_through(
    kind: str, ways: list[Callable[[str], str]], before: str, after: str
) -> None:
    one, value = mask(ANNA), ANNA[kind][0]
    for way in ways:
        value = way(value)
    text = f"it is{before} {value} {after}indeed"
    masked = one.hide(text)
    kept = re.sub(r"[\W_]", "", FORM.sub("", masked)).lower()
    assert kept == "itisindeed", masked
    assert one.restore(masked) == text


@pytest.mark.parametrize(
    "text", ["Annual report", "in Bolton", "the number 110482", "an early mule", "12 hills", "an al fresco lunch"]
)
def test_parts_of_other_words_are_not_taken_for_a_known_value(text: str) -> None:
    known = {"name": ["Ann Bolt", "Al"], "customer": ["10482"], "address": ["12 Hill"]}
    assert KnownValues(known).find(text) == []


ALPHABET = st.text(st.sampled_from("[]NAMEname_TX123b ab@c.d4é\u200b\n"), max_size=40)


@given(text=ALPHABET | st.text(max_size=40))
@example("[NAME_1]")
@example("[[TEXT_1]a@b.cd]")
@example("[email_1] [EMAIL_1b]a@b.com")
def test_what_is_hidden_comes_back_to_the_letter(text: str) -> None:
    one = mask({"name": ["Ab Ce"]})
    one.hide("a@b.com is Ab Ce")
    masked = one.hide(text)
    assert one.restore(masked) == text


PARTS = [
    "[NAME_1]",
    "[name_1]",
    "[NAME_",
    "1",
    "]",
    "[",
    "[EMAIL_1]",
    "[EMAIL_1b]",
    "x",
    " ",
    "[NAME_9]",
    "[TEXT_1]",
    "é",
]
PIECES = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)


@given(reply=PIECES, data=st.data())
def test_any_split_of_a_stream_restores_the_same_text(reply: str, data: st.DataObject) -> None:
    pseudonyms = Pseudonyms()
    for kind, value in (("name", "Zoë [x]"), ("email", "z@e.org"), ("email", "Z@E.org"), ("text", "[NAME_1]")):
        pseudonyms.of(kind, value)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(reply)), max_size=6)))
    restorer, said, fed = Restorer(pseudonyms), "", 0
    for start, end in zip([0, *cuts], [*cuts, len(reply)], strict=True):
        said, fed = said + restorer.feed(reply[start:end]), end
        held = restorer.held
        assert not held or pseudonyms.begins(held), "only what may still become a pseudonym is held back"
        assert said + held == pseudonyms.restore(reply[: fed - len(held)]) + held
    assert said + restorer.close() == pseudonyms.restore(reply)


def test_pseudonyms_stay_the_same_when_they_are_kept_and_read_again() -> None:
    first = Pseudonyms()
    made = [first.of("name", v) for v in ("Ada", "ADA", "Ben")]
    again = Pseudonyms(first.pairs())
    assert [again.of("name", v) for v in ("Ada", "ADA", "Ben")] == made == ["[NAME_1]", "[NAME_1b]", "[NAME_2]"]
    assert [again.of("name", "ada"), again.of("name", "Cy")] == ["[NAME_1c]", "[NAME_3]"]


def test_one_customers_pseudonyms_never_give_anothers_value() -> None:
    one, other = mask(), mask()
    assert one.hide("a@b.com") == "[EMAIL_1]"
    assert other.restore("[EMAIL_1]") == "[EMAIL_1]"


def test_where_the_masker_fails_nothing_goes_out() -> None:
    def broken(text: str) -> list[Span]:
        raise ValueError(f"cannot read {text}")

    with pytest.raises(MaskingFailed) as failed:
        Mask(broken, Pseudonyms()).hide("secret@example.org")
    assert "secret" not in str(failed.value)
    assert failed.value.__cause__ is None
    assert failed.value.__suppress_context__


def learned(base: BaseModel, count: int, epochs: int) -> Tagger:
    made = sentences(count, seed=3)
    return teach(base, made[: -count // 10], made[-count // 10 :], epochs=epochs)


@pytest.fixture(scope="module")
def tagger(smol: BaseModel) -> Tagger:
    """A tagger of a few seconds' training."""
    return learned(smol, 600, 4)


def test_the_tagger_finds_names_and_addresses_that_no_rule_can(tagger: Tagger) -> None:
    """In frames and names that it has not seen: most words of names and addresses, and few others."""
    rows: list[Sentence] = [s for s in sentences(200, seed=99)]
    wanted = covered = extra = 0
    for row, spans in zip(rows, tagger.find([r.text for r in rows]), strict=True):
        gold = {i for s in row.spans if s.kind in ("name", "address") for i in range(s.start, s.end)}
        private = {i for s in row.spans for i in range(s.start, s.end)}
        got = {i for s in spans for i in range(s.start, s.end)}
        wanted, covered, extra = wanted + len(gold), covered + len(gold & got), extra + len(got - private)
    assert covered / wanted > 0.75
    assert extra / wanted < 0.35


def test_a_tagger_that_is_kept_and_read_again_is_the_same(tagger: Tagger, smol: BaseModel, tmp_path: Path) -> None:
    tagger.save(tmp_path / "tagger.safetensors")
    texts = ["My name is Ada King.", "", "x", "Ship it to 12 Hill Road, Leeds"]
    assert Tagger.load(smol, tmp_path / "tagger.safetensors").find(texts) == tagger.find(texts)
    (tmp_path / "tagger.safetensors").write_bytes(b"torn")
    with pytest.raises(CoterieError, match="is damaged"):
        Tagger.load(smol, tmp_path / "tagger.safetensors")


def test_long_texts_are_tagged_in_pieces_and_many_at_once_as_one_by_one(tagger: Tagger) -> None:
    line = "Please phone Margaret Thompson about it. "
    text = line * (4 * WINDOW // 7)
    names = [text[s.start : s.end] for s in tagger.find([text])[0] if s.kind == "name"]
    assert len(names) >= text.count("Margaret") * 0.9
    texts = [text, "I am Ada King", "no", line * OVERLAP, ""]
    assert tagger.find(texts) == [tagger.find([t])[0] for t in texts]


def test_names_are_masked_with_the_tagger_and_come_back_in_a_stream(tagger: Tagger) -> None:
    one = Mask(Detector(tagger, kinds=IDENTIFYING), Pseudonyms())
    text = "My name is Margaret Thompson, margaret@example.org"
    masked = one.hide(text)
    assert "Thompson" not in masked
    assert "[EMAIL_1]" in masked
    restoring = one.restoring()
    assert "".join(map(restoring.feed, masked)) + restoring.close() == text


def test_a_text_is_tagged_once_and_none_is_kept() -> None:
    asked, clock = list[str](), [0.0]

    class Counting:
        def find(self, texts: list[str]) -> list[list[Span]]:
            asked.extend(texts)
            return [[Span(0, 3, "name")] if text.startswith("Ada") else [] for text in texts]

    detector = Detector(Counting())
    detector._tagged.clock = lambda: clock[0]
    for _ in range(3):
        assert detector("Ada is here") == [Span(0, 3, "name")]
        assert detector("Nobody is here") == []
    assert asked == ["Ada is here", "Nobody is here"], "also where nothing was found"
    assert Mask(detector, Pseudonyms()).hide("Ada is here") == "[NAME_1] is here"
    kept = [*detector._tagged._kept]
    assert kept
    assert not any(b"Ada" in key for key in kept)
    assert set(kept).isdisjoint(_after(Detector(Counting()), "Ada is here")), "nor a digest that another could guess"
    clock[0] += deidentify.KEPT_S
    detector("Ada is here")
    assert asked.count("Ada is here") == 3, "once more for the other detector, and once what was found is old"


def _after(detector: Detector, text: str) -> list[bytes]:
    detector(text)
    return [*detector._tagged._kept]
