"""Prompt search finds the better prompt within its budget, shows what it tried, goes on after Ctrl-C, and what it
publishes answers like any expert."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from coterie.answer import Answerer
from coterie.business import Business, compare
from coterie.cli.main import app
from coterie.engine.request import Sampling
from coterie.errors import CoterieError, DataError
from coterie.evaluation.task import METRICS
from coterie.experts.instruction import frame, posed
from coterie.experts.library import ExpertFacts
from coterie.optimise import optimise
from coterie.tuning.prompts import Candidate, Tried, candidates, cleaned, field_size, instructions, race

# The search by itself, with scores that are known


def quality(candidate: Candidate) -> float:
    return int(candidate.instruction.split()[-1]) / 100


@given(count=st.integers(1, 40), rows=st.integers(1, 200), calls=st.integers(60, 3000), seed=st.integers(0, 99))
def test_a_race_keeps_to_its_budget_and_asks_nothing_twice(count: int, rows: int, calls: int, seed: int) -> None:
    asked: list[tuple[Candidate, int]] = []

    def score(pairs: list[tuple[Candidate, int]]) -> list[float]:
        asked.extend(pairs)
        return [float((hash((c.instruction, i, seed)) % 100) < 100 * quality(c)) for c, i in pairs]

    tried = race([Candidate(f"be {i}") for i in range(count)], rows, score, calls)
    assert len(asked) == len(set(asked)) == sum(len(t.scores) for t in tried) <= calls
    assert {i for _, i in asked} <= set(range(rows))
    assert len(tried) == count
    best = tried[0]
    assert all(best.rounds >= t.rounds and len(best.scores) >= len(t.scores) for t in tried)


def test_a_race_finds_the_best_of_many_with_fewer_calls_than_measuring_all() -> None:
    field = [Candidate(f"be {q}") for q in (30, 35, 40, 45, 50, 55, 60, 90)]
    tried = race(field, 500, lambda ps: [float((i * 37) % 100 < 100 * quality(c)) for c, i in ps], 600)
    assert tried[0].candidate.instruction == "be 90"
    assert tried[0].mean == pytest.approx(0.9, abs=0.1)
    assert len(tried[0].scores) > 3 * len(tried[-1].scores)


def test_of_equals_the_one_that_shows_less_wins() -> None:
    field = [Candidate("a", (("q", "a"),)), Candidate("b"), Candidate("c")]
    assert race(field, 50, lambda ps: [1.0] * len(ps), 100)[0].candidate == Candidate("b")


@pytest.mark.parametrize("calls", [0, 20, 60, 150, 400, 5000])
def test_the_field_is_as_large_as_the_calls_let_every_candidate_have_a_fair_start(calls: int) -> None:
    size = field_size(calls)
    counts: list[int] = []
    race(
        [Candidate(f"be {i}") for i in range(size)], 10_000, lambda ps: counts.append(len(ps)) or [0.0] * len(ps), calls
    )
    assert size == 1 or counts[0] >= 8 * size
    assert size <= 64


def test_candidates_start_with_the_declared_instruction_alone_and_are_all_different() -> None:
    texts = instructions("Do it.", ["Do it well."], ["x", "y"], ["Try harder now."])
    assert texts[0] == ("Do it.", "declared")
    assert {"declared", "given", "proposed", "template"} == {origin for _, origin in texts}
    assert any("x, y" in text for text, _ in texts)
    pool = [(f"q{i}", "xy"[i % 2]) for i in range(20)]
    found = candidates(texts, pool, [("mine", "x")], 30, seed=3)
    assert found[0] == Candidate("Do it.")
    assert len(found) == len(set(found)) == 30
    assert found == candidates(texts, pool, [("mine", "x")], 30, seed=3)
    assert any(("mine", "x") in c.shots for c in found)
    assert {len(c.shots) for c in found} >= {0, 1, 2, 4, 8}


@pytest.mark.parametrize(
    ("proposal", "instruction"),
    [
        ('"Name the color of the thing."\n\nThis helps because', "Name the color of the thing."),
        ("Instruction: Answer in one word.", "Answer in one word."),
        ("ok", ""), ("x" * 500, ""), ("", ""),
    ],
)  # fmt: skip
def test_a_proposal_is_its_first_paragraph_if_it_can_be_an_instruction(proposal: str, instruction: str) -> None:
    assert cleaned(proposal) == instruction


# Served


SHOWN = ExpertFacts("x", "instruction", system="Be kind.", examples=(("hi", "hello"),))
EXAMPLE = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ASK = {"role": "user", "content": "who?"}


@pytest.mark.parametrize(
    ("facts", "messages", "wanted"),
    [
        (SHOWN, [ASK], [{"role": "system", "content": "Be kind."}, *EXAMPLE, ASK]),
        (SHOWN, [{"role": "system", "content": "Own."}, ASK], [{"role": "system", "content": "Own."}, *EXAMPLE, ASK]),
        (ExpertFacts("x"), [ASK], [ASK]),
        (ExpertFacts("x", system="S"), [ASK], [{"role": "system", "content": "S"}, ASK]),
    ],
)
def test_instruction_and_examples_come_before_the_conversation(
    facts: ExpertFacts, messages: list[dict[str, str]], wanted: list[dict[str, str]]
) -> None:
    assert frame(facts, messages) == wanted


def test_a_row_of_test_data_gets_the_experts_instruction_in_place_of_the_tasks() -> None:
    row = [{"role": "system", "content": "Task."}, ASK]
    assert posed(SHOWN, row) == [{"role": "system", "content": "Be kind."}, *EXAMPLE, ASK]
    assert posed(ExpertFacts("x", system="S"), row) == row


def test_an_instruction_expert_answers_as_the_base_does_with_its_prompt(shop: Path) -> None:
    business = Business.open(shop)
    facts = ExpertFacts("kind", "instruction", system="Name the color.", examples=(("the sea", "blue"),), base="tiny")
    business.library.publish(facts, lambda _to: None)
    assert business.library.facts("kind").examples == (("the sea", "blue"),)
    whole = [{"role": "system", "content": "Name the color."}, {"role": "user", "content": "the sea"},
             {"role": "assistant", "content": "blue"}, {"role": "user", "content": "the sun"}]  # fmt: skip
    answerer = Answerer.open(business)
    try:
        short = answerer.chat("kind", whole[-1:], Sampling(max_tokens=8))
        long = answerer.chat("base", whole, Sampling(max_tokens=8))
        assert short.generation.prompt == long.generation.prompt
        assert short.generation.text() == long.generation.text()
        assert (short.expert, short.version) == ("kind", 1)
        assert answerer.chat("auto", whole[-1:], Sampling(max_tokens=2)).expert is None  # no profile: never routed to
    finally:
        answerer.engine.close()
    rows = list(business.examples("colors", ["colors.csv"]))[:4]
    assert compare(business, business.library.facts("kind"), rows)["expert"]["rows"] == 4


# The whole search, on the tiny model


def rig(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the model answer right where it is shown examples of two classes or more: the tiny one knows nothing.

    Returns a list that holds the number of conversations that were answered.
    """
    answered = [0]
    right = {"tomato": "red", "blood": "red", "fire": "red", "straw": "red", "stop": "red", "cherry": "red"}

    def answer_each(engine: Any, conversations: Any, adapter: Any, sampling: Any) -> Any:
        for messages in conversations:
            answered[0] += 1
            shown = {m["content"] for m in messages if m["role"] == "assistant"}
            asked = messages[-1]["content"]
            yield next((c for word, c in right.items() if word in asked), "blue") if len(shown) >= 2 else "no idea"

    monkeypatch.setattr("coterie.optimise.answer_each", answer_each)
    return answered


def test_a_search_publishes_what_wins_on_rows_it_never_saw(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = rig(monkeypatch)
    found = optimise(Business.open(shop), "colors", budget=200)
    assert found.calls == answered[0] <= 200
    assert found.tried[0].mean > 0.2
    assert len({a for _, a in found.tried[0].candidate.shots}) >= 2
    assert found.final["declared"]["value"] == 0
    assert found.final["best"]["value"] > 0
    assert found.published is not None
    library = Business.open(shop).library
    facts = library.facts("colors-prompt")
    assert (facts.kind, facts.choices) == ("instruction", ("blue", "green", "red", "yellow"))
    assert facts.examples == found.tried[0].candidate.shots
    tried = json.loads((library.folder("colors-prompt") / "tried.json").read_text())
    assert len(tried) == len(found.tried)
    assert library.evaluation("colors-prompt")["rows"] == found.final["rows"]
    run = CliRunner().invoke(
        app, ["eval", str(shop), "--data", str(shop / "colors.csv"), "-e", "colors-prompt", "--json"]
    )
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)[0]["expert"]["rows"] == 24
    # rows shown, raced on and measured on are apart: no row shown is among those it was measured on
    assert found.final["rows"] + len(found.tried[0].scores) < 24


def test_a_search_races_on_a_sample_of_a_file_that_is_sorted_by_class(
    shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f"thing {c} number {i},{c}\n" for c in ("red", "green", "blue", "yellow") for i in range(40))
    (shop / "colors.csv").write_text("text,color\n" + rows)
    rig(monkeypatch)
    seen: list[str] = []
    monkeypatch.setattr("coterie.optimise.prompts.race", lambda field, _rows, score, *_: [
        (seen.extend(str(s) for s in score([(field[0], i) for i in range(12)])), Tried(field[0]))[1]
    ])  # fmt: skip
    monkeypatch.setitem(METRICS, "exact_match", lambda _answer, wanted: float(len(wanted)))
    optimise(Business.open(shop), "colors", budget=200)
    assert len(set(seen)) >= 3  # of the four lengths of the classes' names


def test_a_search_that_was_stopped_goes_on_without_asking_again(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = rig(monkeypatch)
    business = Business.open(shop)

    def stop(n: int) -> None:
        if n == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimise(business, "colors", budget=200, count=stop)
    assert answered[0] == 50
    log = shop / ".coterie" / "prompts" / "colors.jsonl"
    log.write_text(log.read_text() + '{"key": "cut sho')  # as a killed run may leave it
    found = optimise(business, "colors", budget=200)
    assert found.reused >= 50
    whole = answered[0]
    again = optimise(business, "colors", budget=200)
    assert answered[0] == whole
    assert [t.json() for t in again.tried] == [t.json() for t in found.tried]


def test_the_command_says_what_was_tried_and_publishes_nothing_where_nothing_is_gained(shop: Path) -> None:
    run = CliRunner().invoke(
        app,
        ["optimise-prompt", str(shop), "-e", "colors", "--budget", "60", "--instruction", "Color, please.", "--json"],
    )
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert found["calls"] <= 60
    assert found["tried"][0].keys() >= {"score", "rows", "instruction", "shots", "origin"}
    published = found["published"] is not None
    assert published == (found["final"]["best"]["value"] > found["final"]["declared"]["value"])
    assert Business.open(shop).library.names() == (["colors-prompt"] if published else [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": 5}, "too small"),
        ({"metric": "vibes"}, "unknown metric 'vibes'; known: exact_match"),
        ({"name": "nobody"}, "declares no expert 'nobody'"),
        ({"publish_as": "base"}, "'base' cannot name an expert"),
    ],
)
def test_a_search_that_cannot_be_done_is_refused_in_a_sentence(change: dict[str, Any], words: str, shop: Path) -> None:
    with pytest.raises(CoterieError, match=words):
        optimise(Business.open(shop), **({"name": "colors"} | change))


def test_too_few_rows_to_search_with_are_refused(shop: Path) -> None:
    (shop / "colors.csv").write_text("text,color\na,red\nb,blue\n")
    with pytest.raises(DataError, match="2 rows are too few"):
        optimise(Business.open(shop), "colors")
