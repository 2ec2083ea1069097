"""The example shop is whole, and its test rows are not in its training rows."""

from collections import Counter
from pathlib import Path

import pytest

from coterie.business import Business
from coterie.data.read import Example
from coterie.data.split import leaks, normalise
from coterie.init import EXAMPLE
from coterie.learn import classify
from coterie.model.load import BaseModel
from coterie.model.pull import DEFAULT

SHOP = Business.open(EXAMPLE)


def rows(name: str, which: str) -> list[Example]:
    return list(SHOP.examples(name, getattr(SHOP.spec(name), which)))


def test_the_shop_is_declared_on_the_base_model_that_is_always_here() -> None:
    assert SHOP.config.business.base == DEFAULT
    assert set(SHOP.config.experts) == {"support", "triage", "mood"}
    assert SHOP.config.business.suggestions
    for file in ("policies.md", "products.csv"):
        assert (EXAMPLE / file).read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("name", SHOP.config.experts)
def test_its_rows_can_be_read_and_its_test_rows_are_new(name: str) -> None:
    train, test = rows(name, "train"), rows(name, "test")
    assert len(train) >= 100
    assert len(test) >= 30
    assert leaks([e.asked for e in train], [e.asked for e in test]) == []
    if SHOP.spec(name).system:
        assert {e.messages[0]["content"] for e in train + test} == {SHOP.spec(name).system}
    for part in (train, test):
        asked = Counter(normalise(e.asked) for e in part)
        assert asked.most_common(1)[0][1] == 1, f"asked twice: {asked.most_common(1)[0][0]}"


def test_triage_is_tested_on_the_teams_it_has_learned() -> None:
    train, test = ({e.completion for e in rows("triage", which)} for which in ("train", "test"))
    assert test == train == {"Orders", "Returns", "Workshop", "Billing", "Complaints"}


def test_mood_tells_negative_messages_as_the_desk_asks_it(smol: BaseModel) -> None:
    """Learned as `coterie fit` learns it. On its 40 test rows, which say things in other words."""
    desk = SHOP.config.desk
    assert (desk.sentiment, [rule.negative for rule in desk.rules]) == ("mood", [True])
    spec, test = SHOP.spec("mood"), rows("mood", "test")
    found, _ = classify(spec, smol, SHOP.config.business.name, rows("mood", "train"))
    said = [verdict.label for verdict in found.judge(smol, [e.question for e in test])]
    assert set(desk.negative) < set(found.names)
    right = [label == e.completion for label, e in zip(said, test, strict=True)]
    assert sum(right) >= 36


def test_support_is_tested_on_answers_it_has_learned() -> None:
    learned = {e.completion for e in rows("support", "train")}
    assert [e.completion for e in rows("support", "test") if e.completion not in learned] == []


def test_init_copies_all_of_it(tmp_path: Path) -> None:
    from coterie.init import create

    copied = {p.relative_to(tmp_path / "shop") for p in create(tmp_path / "shop", example=True)}
    wanted = {p.relative_to(EXAMPLE) for p in EXAMPLE.rglob("*") if p.is_file()}
    assert copied == wanted
    for file in wanted:
        assert (tmp_path / "shop" / file).read_bytes() == (EXAMPLE / file).read_bytes()


def test_the_banking_example_is_valid() -> None:
    folder = Path(__file__).parents[1] / "examples" / "banking77"
    assert Business.open(folder).spec("banking").choices
