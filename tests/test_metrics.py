"""Metrics agree with hand-worked values and with published tables, and their intervals cover what they should."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.evaluation.metrics import bootstrap, macro_f1, summarise, token_f1, wilson

LABELS = st.sampled_from(["tea", "cake", "jam"])
PAIRS = st.lists(st.tuples(LABELS, LABELS), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_newcombes_table(hits: int, total: int, low: float, high: float) -> None:
    found = wilson(hits, total)
    assert found.value == hits / total
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_proportion_and_is_the_same_mirrored(case: tuple[int, int]) -> None:
    hits, total = case
    found, mirrored = wilson(hits, total), wilson(total - hits, total)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert (found.low, found.high) == (pytest.approx(1 - mirrored.high), pytest.approx(1 - mirrored.low))
    wider = wilson(hits * 4, total * 4)
    assert wider.high - wider.low < found.high - found.low


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 5))
def test_bootstrap_holds_the_mean_and_is_repeated_by_its_seed(scores: list[float], seed: int) -> None:
    found = bootstrap(scores, seed, rounds=200)
    assert found.value == pytest.approx(np.mean(scores))
    assert min(scores) - 1e-9 <= found.low <= found.high <= max(scores) + 1e-9
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9
    assert found == bootstrap(scores, seed, rounds=200)
    if len(set(scores)) == 1:
        assert found.high - found.low < 1e-9


def test_bootstrap_covers_the_true_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    intervals = [bootstrap(rng.beta(2, 1, 40).tolist(), seed, rounds=400) for seed in range(200)]
    covered = np.mean([i.low <= 2 / 3 <= i.high for i in intervals])
    assert 0.90 <= covered <= 0.98


@pytest.mark.parametrize("measure", [lambda: wilson(0, 0), lambda: bootstrap([])])
def test_nothing_cannot_be_measured(measure: Any) -> None:
    with pytest.raises(ValueError, match="no rows"):
        measure()


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [("The cat sat", "the cat sat", 1), ("The cat sat!", "cat", 0.5), ("a b c d", "c d e f", 0.5), ("x", "y", 0),
     ("b b b", "b b", 0.8), ("", "", 1), ("...", "?", 1), ("", "a", 0), ("a", "", 0), ("ÜBER uns", "über uns", 1),
     ("3 to 5 days", "3-5 days", 6 / 7)],
)  # fmt: skip
def test_token_f1_by_hand(answer: str, wanted: str, score: float) -> None:
    assert token_f1(answer, wanted) == pytest.approx(score)


@given(st.text(max_size=30), st.text(max_size=30))
def test_token_f1_is_the_same_both_ways_and_1_for_itself(a: str, b: str) -> None:
    assert token_f1(a, a) == 1
    assert 0 <= token_f1(a, b) == token_f1(b, a) <= 1


def test_macro_f1_by_hand() -> None:
    wanted = ["a", "a", "a", "b", "c"]
    answers = ["a", "a", "b", "b", "x"]
    # a: precision 2/2, recall 2/3 -> 0.8; b: precision 1/2, recall 1/1 -> 2/3; c: 0
    assert macro_f1(answers, wanted) == pytest.approx((0.8 + 2 / 3 + 0) / 3)


@given(PAIRS)
def test_macro_f1_is_the_mean_of_each_labels_harmonic_mean(pairs: list[tuple[str, str]]) -> None:
    answers, wanted = [a for a, _ in pairs], [w for _, w in pairs]
    scores = []
    for label in set(wanted):
        right = sum(a == w == label for a, w in pairs)
        precision = right / answers.count(label) if label in answers else 0
        recall = right / wanted.count(label)
        scores.append(2 * precision * recall / (precision + recall) if right else 0)
    assert macro_f1(answers, wanted) == pytest.approx(np.mean(scores))
    assert macro_f1(wanted, wanted) == 1


@given(PAIRS, st.booleans())
def test_the_summary_has_what_fits_the_kind_of_answer(pairs: list[tuple[str, str]], choices: bool) -> None:
    answers, wanted = [a + " " for a, _ in pairs], [w for _, w in pairs]
    right = sum(a == w for a, w in pairs)
    figures = summarise([a.strip() for a in answers] if choices else answers, wanted, choices)
    assert set(figures) == ({"accuracy", "macro_f1"} if choices else {"token_f1", "exact_match"})
    assert figures["accuracy" if choices else "exact_match"] == wilson(right, len(pairs)).json()


def test_answers_and_rows_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        summarise(["a"], ["a", "b"], choices=True)


def test_an_interval_is_shown_in_percent() -> None:
    assert str(wilson(81, 263)) == "30.8% (25.5% to 36.6%)"
