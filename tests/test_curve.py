"""Learning curves lead where they should, and training data is set beside production honestly."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.business import Business
from coterie.curation import embedder, expert_measure, token_counter
from coterie.data.compare import compare
from coterie.data.curve import Curve, fit_curve, fit_power_law, learning_curve, probe_measure, sizes, subsets
from coterie.data.effect import effect
from coterie.data.features import TfIdf
from coterie.data.probe import fit, softmax
from coterie.data.read import read, read_inputs
from coterie.data.split import draw, normalise
from coterie.errors import DataError

BANKING = {"prompt": "text", "completion": "category"}


def banking(public_data: Callable[[str], Path], file: str, intents: int) -> tuple[list[str], list[str]]:
    """Texts and labels of the first intents, in a fixed random order."""
    rows = [(e.prompt[-1]["content"], e.completion) for e in read(public_data(f"banking77/{file}.csv"), BANKING)]
    names = sorted({label for _, label in rows})[:intents]
    kept = [row for row in rows if row[1] in names]
    order = np.random.default_rng(0).permutation(len(kept))
    return [kept[i][0] for i in order], [kept[i][1] for i in order]


# The probe


def test_leave_one_out_is_what_leaving_each_row_out_gives() -> None:
    """The closed form against the definition: a fit without the row, asked about the row."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(14, 5)).astype(np.float32)
    labels = ["a", "b", "c", "a", "b", "c", "a"] * 2
    probe, alone = fit(x, labels)
    for i in range(len(x)):
        kept = [j for j in range(len(x)) if j != i]
        without, _ = fit(x[kept], [labels[j] for j in kept])
        wide = np.append(x[i], 1).astype(np.float32)
        np.testing.assert_allclose(alone[i], softmax(wide @ without.weights * probe.sharpness), atol=2e-3)


def test_the_probe_learns_banking77(public_data: Callable[[str], Path]) -> None:
    texts, labels = banking(public_data, "train", 10)
    tests, wanted = banking(public_data, "test", 10)
    tfidf = TfIdf.learn(texts)
    probe, alone = fit(tfidf(texts), labels)
    accuracy = np.mean([a == b for a, b in zip(probe.predict(tfidf(tests)), wanted, strict=True)])
    unseen = np.mean([probe.classes[i] == y for i, y in zip(alone.argmax(axis=1), labels, strict=True)])
    assert accuracy > 0.9
    assert abs(accuracy - unseen) < 0.06  # leave-one-out foretells the accuracy on new rows


# Curves


@given(rows=st.integers(20, 100_000), steps=st.integers(3, 12))
def test_sizes_grow_to_all_rows(rows: int, steps: int) -> None:
    found = sizes(rows, steps)
    assert found == sorted(set(found))
    assert found[-1] == rows
    assert found[0] >= 1
    assert len(found) <= steps


@given(labels=st.lists(st.sampled_from("abc"), min_size=3, max_size=60), repeat=st.integers(0, 3), data=st.data())
def test_subsets_are_nested_and_keep_the_shares_of_labels(labels: list[str], repeat: int, data: Any) -> None:
    small = data.draw(st.integers(1, len(labels)))
    large = data.draw(st.integers(small, len(labels)))
    a, b = (subsets(labels, n, repeat) for n in (small, large))
    assert (len(a), len(b)) == (small, large)
    assert set(a.tolist()) <= set(b.tolist())
    total, got = Counter(labels), Counter(labels[i] for i in a)
    assert all(abs(got[k] - small * n / len(labels)) < 3 for k, n in total.items())


@given(a=st.floats(0.6, 1.0), b=st.floats(0.3, 3.0), c=st.floats(0.2, 1.2))
def test_the_law_that_made_the_points_is_found_again(a: float, b: float, c: float) -> None:
    ns = np.geomspace(50, 5000, 7)
    law = fit_power_law(ns, a - b * ns**-c)
    for n in (50, 700, 5000, 20_000):
        assert law(n) == pytest.approx(a - b * n**-c, abs=0.01)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=8))
def test_a_forecast_never_falls_and_its_interval_holds_it(scores: list[float]) -> None:
    points = {50 * 2**i: np.full((2, 10), s) for i, s in enumerate(scores)}
    curve = fit_curve(points)
    for f in curve.forecasts:
        assert f.gain >= 0
        assert f.low <= f.gain <= f.high
        assert f.score <= 1


def noisy(slope: float, tests: int, seed: int) -> Curve:
    """A curve of 0/1 scores drawn from 0.9 - slope * n^-0.5."""
    rng = np.random.default_rng(seed)
    return fit_curve(
        {n: (rng.random((3, tests)) < 0.9 - slope * n**-0.5).astype(float) for n in (50, 100, 200, 400, 800)}
    )


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    curves = [noisy(4, 300, seed) for seed in range(20)]
    truth = 4 * (800**-0.5 - 1600**-0.5)
    held = sum(c.forecasts[0].low <= truth <= c.forecasts[0].high for c in curves)
    assert held >= 16
    wide, narrow = (
        np.mean([f.high - f.low for f in (noisy(4, n, s).forecasts[0] for s in range(3))]) for n in (100, 3000)
    )
    assert narrow < wide / 2


def test_what_twice_the_data_brings_is_foretold_on_banking77(public_data: Callable[[str], Path]) -> None:
    """The curve sees half of the rows; the other half says whether it was right."""
    texts, labels = banking(public_data, "train", 20)
    tests, wanted = banking(public_data, "test", 20)
    measure = probe_measure(texts, labels, tests, wanted)
    half = subsets(labels, len(labels) // 2, 0)
    curve = learning_curve(lambda rows: measure(half[rows]), [labels[i] for i in half], steps=4, repeats=2)
    real = np.mean(measure(np.arange(len(labels)))) - curve.points[-1].score
    assert abs(curve.forecasts[0].gain - real) < 0.03


# The expert itself


def test_the_expert_is_trained_on_parts_and_nothing_is_published(shop: Path) -> None:
    business = Business.open(shop)
    examples = list(business.examples("colors", ["colors.csv"]))
    measure = expert_measure(business, "colors", examples, examples[:6])
    scores = measure(np.arange(12))
    assert len(scores) == 6
    assert set(scores) <= {0.0, 1.0}
    assert business.library.names() == []
    assert {p.name for p in shop.iterdir()} <= {"colors.csv", "greet.jsonl", "coterie.toml", "experts"}
    free = expert_measure(business, "greet", list(business.examples("greet", ["greet.jsonl"])), examples[:2])
    assert all(0 <= s <= 1 for s in free(np.arange(10)))


def test_the_base_model_counts_tokens_and_makes_vectors(shop: Path) -> None:
    business = Business.open(shop)
    example = next(business.examples("colors", ["colors.csv"]))
    assert token_counter(business)(example) > len(example.completion.split())
    vectors = embedder(business)
    both = vectors(["a frog", "the deep blue sea", "a frog"])
    assert both.shape == (3, 64)
    np.testing.assert_allclose(both[0], both[2])
    np.testing.assert_allclose(vectors(["the deep blue sea"])[0], both[1], atol=1e-5)


# Production


def test_production_like_the_training_data_is_covered_and_does_not_drift(public_data: Callable[[str], Path]) -> None:
    texts, _ = banking(public_data, "train", 77)
    asked, _ = banking(public_data, "test", 77)
    like = compare(texts[:800], [(f"log:{i}", t) for i, t in enumerate(asked[:400])])
    assert like.coverage.value > 0.9
    assert like.drift.low < 0.55
    assert "looks like production" in like.verdict


def test_what_training_lacks_is_shown_in_groups_the_most_frequent_first(public_data: Callable[[str], Path]) -> None:
    texts, _ = banking(public_data, "train", 77)
    asked, _ = banking(public_data, "test", 77)
    boats = [
        f"when does the ferry to {town} leave the harbour" for town in ("Cork", "Oban", "Mull", "Skye", "Bute") * 6
    ]
    cakes = [f"is the {kind} cake baked with butter" for kind in ("plum", "carrot", "cheese") * 4]
    found = compare(texts[:800], [(f"log:{i}", t) for i, t in enumerate([*cakes, *asked[:200], *boats])])
    assert found.coverage.value < 0.9
    assert [m.count for m in found.missing] == sorted((m.count for m in found.missing), reverse=True)
    assert found.missing[0].count == len(boats)
    assert "ferry" in found.missing[0].examples[0]["text"]
    assert "cake" in found.missing[1].examples[0]["text"]
    assert found.missing[1].examples[0]["place"].startswith("log:")
    json.dumps(found.json())


def test_another_subject_is_told_apart() -> None:
    train = [f"my {x} card number {i} was declined" for i, x in enumerate(["red", "blue", "old"] * 20)]
    other = [("x", f"bake the {x} bread for {i} minutes") for i, x in enumerate(["rye", "white", "sour"] * 20)]
    found = compare(train, other)
    assert found.drift.low > 0.9
    assert found.coverage.value == 0
    assert "nothing like it" in found.verdict


@given(st.lists(st.text(max_size=12), min_size=12, max_size=40))
def test_any_texts_can_be_compared(texts: list[str]) -> None:
    if len({normalise(t) for t in texts}) < 10:
        with pytest.raises(DataError, match="at least 10"):
            compare(texts, [("x", t) for t in texts])
        return
    found = compare(texts, [("x", t) for t in texts])
    assert 0 <= found.drift.low <= found.drift.value <= found.drift.high <= 1
    assert found.coverage.value == 1  # every text is there


def test_inputs_are_read_from_text_and_from_rows_without_answers(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("where is it\n\n where was it \n")
    (tmp_path / "log.csv").write_text("asked,when\nwhere is it,now\n")
    talk = {"messages": [{"role": "user", "content": "hi"}, {"role": "user", "content": "where is it"}]}
    (tmp_path / "log.jsonl").write_text(json.dumps(talk) + "\n" + json.dumps({"prompt": "where was it"}) + "\n")
    assert [t for _, t in read_inputs(tmp_path / "log.txt")] == ["where is it", "where was it"]
    assert list(read_inputs(tmp_path / "log.csv", "asked")) == [(f"{tmp_path}/log.csv:2", "where is it")]
    assert [t for _, t in read_inputs(tmp_path / "log.jsonl")] == ["where is it", "where was it"]
    for name, column, says in (("log.csv", "", "no column 'prompt'"), ("absent.txt", "", "no such file")):
        with pytest.raises(DataError, match=says):
            list(read_inputs(tmp_path / name, column))


# Effects


@given(st.lists(st.booleans(), min_size=5, max_size=200))
def test_rows_that_change_nothing_have_no_effect(scores: list[bool]) -> None:
    found = effect(100, 10, scores, scores)
    assert (found.gain, found.low, found.high) == (0, 0, 0)
    assert "no difference" in str(found)


@pytest.mark.parametrize(("better", "says"), [(30, "they help"), (-30, "they harm"), (1, "no difference")])
def test_an_effect_is_said_only_where_the_test_can_see_it(better: int, says: str) -> None:
    without, having = [0.5] * 200, [0.5 + (0.5 if i < better else 0) - (0.5 if i < -better else 0) for i in range(200)]
    assert says in str(effect(100, 50, without, having))


@given(items=st.lists(st.integers(), max_size=50), most=st.integers(1, 60))
def test_rows_drawn_are_of_the_stream_and_in_its_order(items: list[int], most: int) -> None:
    drawn = draw(iter(list(enumerate(items))), most)
    assert len(drawn) == min(most, len(items))
    assert drawn == sorted(drawn)
    assert set(drawn) <= set(enumerate(items))
    assert draw(iter(items), 0) == items
