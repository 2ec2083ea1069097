"""Metrics give what is worked out by hand, significance and calibration tell luck from skill, scoring agrees with
transformers, tasks read their published files into disjoint splits, and charts are drawn."""

import math
import sqlite3
from collections.abc import Callable
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import DataError
from coterie.evaluation.calibration import calibration, reliability
from coterie.evaluation.likelihood import choice_log_likelihoods, choose, perplexity
from coterie.evaluation.metrics import (
    Perplexity,
    bootstrap,
    exact_match,
    final_number,
    macro_f1,
    numeric_match,
    pass_at_k,
    rouge_l,
    token_f1,
    wilson,
)
from coterie.evaluation.significance import compare_scores, mcnemar, paired_bootstrap
from coterie.evaluation.sql import QueryFailed, execution_match, rows_of, same_query
from coterie.evaluation.tunes import parse
from coterie.experts import adapter, full, lora, prefix, prompt
from coterie.experts.expert import Applied
from coterie.experts.kinds import KINDS, apply
from coterie.model.load import BaseModel
from coterie.tuning.forward import hidden_states
from support import logits_of, random_rows, reference_model

# Metrics against values worked out by hand


@pytest.mark.parametrize(
    ("metric", "answer", "wanted", "value"),
    [
        (exact_match, " blue\n", "blue", 1.0),
        (exact_match, "Blue", "blue", 0.0),
        (token_f1, "the cat sat", "the cat", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        (token_f1, "a a b", "a b b", 2 / 3),
        (token_f1, "dog", "cat", 0.0),
        (token_f1, "", "", 1.0),
        (rouge_l, "the cat was on the mat", "the cat sat on the mat", 5 / 6),
        (rouge_l, "police killed the gunman", "police kill the gunman", 3 / 4),  # Lin 2004, section 3
        (rouge_l, "the gunman kill police", "police kill the gunman", 2 / 4),
        (rouge_l, "a b", "a b c d", 2 * 1 * 0.5 / 1.5),
        (rouge_l, "", "x", 0.0),
        (rouge_l, "", "", 1.0),
        (numeric_match, "so 6 * 7 = <<6*7=42>>42 in all\n#### 42", "#### 42", 1.0),
        (numeric_match, "The answer is $1,042.00.", "#### 1042", 1.0),
        (numeric_match, "#### 5 apples out of 9", "5", 1.0),
        (numeric_match, "first 42, then 43", "42", 0.0),
        (numeric_match, "it is -3", "#### 3", 0.0),
        (numeric_match, "no number", "#### 3", 0.0),
        (numeric_match, "3*4=<<3*4=12>>", "12", 0.0),  # the mark is the data's, no answer
    ],
)
def test_a_metric_gives_the_value_worked_out_by_hand(
    metric: Callable[[str, str], float], answer: str, wanted: str, value: float
) -> None:
    assert metric(answer, wanted) == pytest.approx(value)


@given(st.text("ab c", max_size=12), st.text("ab c", max_size=12))
def test_overlap_metrics_are_symmetric_within_0_and_1_and_full_only_where_the_words_are_the_same(
    a: str, b: str
) -> None:
    for metric in (token_f1, rouge_l):
        assert metric(a, b) == pytest.approx(metric(b, a))
        assert 0 <= metric(a, b) <= 1
    assert (rouge_l(a, b) == 1) == (a.split() == b.split())
    assert rouge_l(a, b) <= token_f1(a, b) + 1e-9


def test_macro_f1_weighs_labels_alike() -> None:
    # x: precision 2/3, recall 1, F1 0.8; y: precision 1, recall 1/2, F1 2/3; z is said but never wanted
    assert macro_f1(["x", "x", "x", "y", "z"], ["x", "x", "y", "y", "x"]) == pytest.approx(
        (2 * 2 / (3 + 3) + 2 * 1 / (1 + 2)) / 2
    )


def test_the_final_number_is_exact() -> None:
    assert final_number("0.1 + 0.2 = 0.30") == Decimal("0.3")
    assert final_number("none") is None


@pytest.mark.parametrize(
    ("samples", "passed", "k", "value"),
    [
        (5, 0, 1, 0.0), (5, 5, 5, 1.0), (10, 3, 1, 0.3), (4, 1, 2, 0.5),
        (5, 2, 3, 1 - math.comb(3, 3) / math.comb(5, 3)), (200, 20, 100, 1 - math.comb(180, 100) / math.comb(200, 100)),
    ],
)  # fmt: skip
def test_pass_at_k_is_the_unbiased_estimate(samples: int, passed: int, k: int, value: float) -> None:
    assert pass_at_k(samples, passed, k) == pytest.approx(value)


@pytest.mark.parametrize("counts", [(5, 6, 1), (5, -1, 1), (5, 1, 6), (5, 1, 0)])
def test_pass_at_k_of_impossible_counts_is_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(*counts)


def test_intervals_are_those_of_the_textbook() -> None:
    interval = wilson(8, 10)  # Agresti & Coull 1998: 0.49 to 0.94
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.4902, 0.9433)
    scores = [0.0, 1.0] * 200
    spread = bootstrap(scores)
    half = 1.96 * math.sqrt(0.25 / 400)  # the normal approximation, which must be near
    assert spread.value == 0.5
    assert spread.low == pytest.approx(0.5 - half, abs=0.01)
    assert spread.high == pytest.approx(0.5 + half, abs=0.01)


# Significance and calibration


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1.0), (1, 5, 2 * (1 + 6) / 64), (5, 1, 2 * 7 / 64), (0, 10, 2 / 1024), (3, 3, 1.0)],
)
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int, p: float) -> None:
    a = [True] * only_a + [False] * only_b + [True, False, True]
    b = [False] * only_a + [True] * only_b + [True, False, True]
    assert mcnemar(a, b) == pytest.approx(p)


def test_paired_bootstrap_sees_a_small_steady_gain_that_unpaired_intervals_would_miss() -> None:
    rng = np.random.default_rng(1)
    a = rng.random(200)
    b = a + 0.02 + rng.normal(0, 0.02, 200)
    found = paired_bootstrap(a.tolist(), b.tolist())
    assert found.value == pytest.approx(float((b - a).mean()))
    half = 1.96 * float((b - a).std()) / math.sqrt(200)
    assert found.low == pytest.approx(found.value - half, abs=0.001)
    assert found.high == pytest.approx(found.value + half, abs=0.001)
    assert found.p < 0.001
    assert bootstrap(a.tolist()).high > bootstrap(b.tolist()).low


def test_paired_bootstrap_finds_nothing_where_there_is_nothing() -> None:
    """Of 200 pairs of equal experts, about 5% may look different at the 5% level."""
    rng = np.random.default_rng(0)
    alarms = 0
    for i in range(200):
        a, b = rng.random(60), rng.random(60)
        alarms += paired_bootstrap(a.tolist(), b.tolist(), seed=i, rounds=500).p < 0.05
    assert 2 <= alarms <= 22


def test_comparing_accuracies_also_gives_mcnemars_p_and_comparing_other_scores_does_not() -> None:
    figures = compare_scores([1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0])
    assert (figures["only_a_right"], figures["only_b_right"], figures["mcnemar_p"]) == (1, 2, 1.0)
    assert figures["difference"]["value"] == 0.25
    assert "mcnemar_p" not in compare_scores([0.5, 0.2], [0.1, 0.9])


def test_equal_experts_do_not_differ() -> None:
    assert compare_scores([1.0, 0.0], [1.0, 0.0])["difference"] == {"value": 0, "low": 0, "high": 0, "p": 1}


def test_calibration_error_is_the_weighted_gap_of_equal_mass_bins() -> None:
    confidences, right = [0.9, 0.6, 0.8, 0.7], [True, False, True, True]
    # bins: (0.6, 0.7) half right, (0.8, 0.9) all right
    assert calibration(confidences, right, 2)["ece"] == pytest.approx((abs(0.65 - 0.5) + abs(0.85 - 1)) / 2)
    assert [b.rows for b in reliability(confidences * 3, right * 3, 5)] == [3, 3, 2, 2, 2]


@given(st.integers(1, 400), st.integers(1, 12), st.integers(0, 99))
def test_bins_hold_every_row_once_and_equal_mass(rows: int, bins: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.random(rows)
    table = reliability(p.tolist(), (rng.random(rows) < p).tolist(), bins)
    sizes = [b.rows for b in table]
    assert sum(sizes) == rows
    assert max(sizes) - min(sizes) <= 1
    assert all(x.high <= y.low for x, y in pairwise(table))


def test_a_calibrated_model_has_little_calibration_error_and_a_boaster_much() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    right = (rng.random(20_000) < p).tolist()
    assert calibration(p.tolist(), right)["ece"] < 0.02
    assert calibration([1.0] * 20_000, right)["ece"] == pytest.approx(0.5, abs=0.02)


# Likelihood


def disturbed(kind: str, base: BaseModel) -> Applied:
    """An expert of this kind that changes what the model says."""
    words = base.encode("Answer in one word.")
    fresh = {
        "lora": lambda: lora.fresh(lora.LoraConfig(4, 16), base.decoder),
        "adapter": lambda: adapter.fresh(adapter.BottleneckConfig(4), base.decoder),
        "prompt": lambda: prompt.fresh(prompt.PromptConfig(5), base.decoder, words),
        "prefix": lambda: prefix.fresh(prefix.PrefixConfig(5), base.decoder, words),
        "full": lambda: full.fresh(full.FullConfig(), base.decoder),
    }  # fmt: skip
    expert = fresh[kind]()
    noise = torch.Generator().manual_seed(1)
    for w in expert.weights.values():
        w += torch.randn(w.shape, generator=noise) * 0.1
    return apply(expert, base.decoder)


@pytest.mark.parametrize("kind", ["base", *KINDS])
def test_choices_scored_in_one_forward_score_as_they_do_one_by_one(tiny_base: BaseModel, kind: str) -> None:
    applied = Applied() if kind == "base" else disturbed(kind, tiny_base)
    asked, *choices = random_rows(tiny_base, [12, 1, 5, 3, 5])
    found = choice_log_likelihoods(tiny_base, asked, choices, applied)
    decoder = applied.decoder or tiny_base.decoder
    for choice, score in zip(choices, found, strict=True):
        hidden = hidden_states(tiny_base.decoder, applied, [torch.tensor(asked + choice[:-1])])
        scores = torch.log_softmax(decoder.logits(hidden.detach()), -1)[len(asked) - 1 :]
        wanted = scores.gather(1, torch.tensor(choice)[:, None]).sum()
        assert score == pytest.approx(float(wanted), abs=1e-3)
    if kind != "base":
        plain = choice_log_likelihoods(tiny_base, asked, choices)
        assert max(abs(a - b) for a, b in zip(found, plain, strict=True)) > 0.01, "the expert counts"


def test_many_choices_are_scored_in_several_forwards_alike(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, *choices = random_rows(tiny_base, [6, 4, 4, 4, 9, 2])
    whole = choice_log_likelihoods(tiny_base, prompt, choices)
    monkeypatch.setattr("coterie.evaluation.likelihood.BRANCH_TOKENS", 8)
    assert choice_log_likelihoods(tiny_base, prompt, choices) == pytest.approx(whole, abs=1e-3)


def test_probabilities_of_choices_add_up_and_the_norms_differ_where_lengths_do(tiny_base: BaseModel) -> None:
    prompt = tiny_base.encode("The sky is")
    options = ["blue", "a long way up above the house", "red"]
    found = {norm: choose(tiny_base, prompt, options, norm=norm) for norm in ("sum", "token", "byte")}
    for verdict in found.values():
        assert sum(verdict.probabilities.values()) == pytest.approx(1)
        assert verdict.confidence == max(verdict.probabilities.values())
    assert found["sum"].probabilities[options[1]] < found["token"].probabilities[options[1]]


def test_a_choice_that_does_not_fit_the_context_is_refused(tiny_base: BaseModel) -> None:
    with pytest.raises(ValueError, match="context holds 512"):
        choice_log_likelihoods(tiny_base, [1] * 510, [[1, 2, 3, 4]])


def test_perplexity_is_that_of_transformers(tiny: Path, tiny_base: BaseModel) -> None:
    texts = ["The quick brown fox jumps over the lazy dog.", "Hello, I am Ada."]
    found = perplexity(tiny_base, texts)
    nats, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([[tiny_base.tokenizer.token_to_id(tiny_base.bos_token), *tiny_base.encode(text)]])
        with torch.no_grad():
            nats += float(reference_model(tiny)(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert found.tokens == tokens
    assert found.bytes == sum(map(len, texts))
    assert found.per_token == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found.per_byte == pytest.approx(math.exp(nats / found.bytes), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(math.log2(found.per_byte))


def test_a_long_text_is_read_in_windows_that_predict_every_token_once(tiny_base: BaseModel) -> None:
    text = "The grass is green and the lemon is yellow. " * 20
    whole = [tiny_base.tokenizer.token_to_id(tiny_base.bos_token), *tiny_base.encode(text)]
    nats, done = 0.0, 1
    for start in (0, 32, 64, 96, 128, 160):  # windows of 64 that overlap by half
        part = whole[start : start + 64]
        (scores,) = logits_of(tiny_base, [part])
        for i in range(max(1, done - start), len(part)):
            nats -= float(torch.log_softmax(scores[i - 1], -1)[part[i]])
        done = max(done, start + len(part))
    found = perplexity(tiny_base, [text], window=64)
    assert done == len(whole)
    assert (found.tokens, found.bytes) == (len(whole) - 1, len(text))
    assert found.nats == pytest.approx(nats, rel=1e-4)
    with pytest.raises(ValueError, match="no text"):
        perplexity(tiny_base, [""])
    with pytest.raises(ValueError, match="no text"):
        Perplexity(1.0, 0, 0)


# SQL and tunes


@pytest.fixture
def shop_db(tmp_path: Path) -> Path:
    file = tmp_path / "shop.sqlite"
    with sqlite3.connect(file) as db:
        db.execute("CREATE TABLE thing (name TEXT, price REAL, stock INTEGER)")
        db.executemany("INSERT INTO thing VALUES (?, ?, ?)", [("cup", 2.5, 3), ("pot", 9.0, 1), ("pan", 12.0, 1)])
    return file


@pytest.mark.parametrize(
    ("query", "wanted", "value"),
    [
        ("select name from thing where price > 5;", "SELECT T.name FROM thing AS T WHERE T.price >= 9", 1.0),
        ("select name from thing order by price desc", "select name from thing", 1.0),  # a bag: any order
        ("select name from thing order by price desc", "select name from thing order by price", 0.0),
        ("select sum(stock) from thing", "select 5.0", 1.0),
        ("select stock from thing", "select distinct stock from thing", 0.0),
        ("select nothing from thing", "select name from thing", 0.0),
        ("hello", "select 1", 0.0),
        ("", "select 1", 0.0),
        ("", "select name from thing where price > 100", 0.0),
        ("-- nothing", "select name from thing where price > 100", 0.0),
        ("select 1 where 0", "select name from thing where price > 100", 1.0),
        ("select 1; select 1", "select 1", 0.0),
        ("drop table thing", "select 1", 0.0),
        ("insert into thing values ('x', 1, 1) returning 1", "select 1", 0.0),
        ("attach database 'other.db' as o", "select 1", 0.0),
        ("pragma writable_schema = 1", "select 1", 0.0),
        ("select load_extension('x')", "select 1", 0.0),
        ("with recursive n(i) as (select 1 union all select i + 1 from n where i < 3) select sum(i) from n", "select 6",
         1.0),
        ("with recursive n(i) as (select 1 union all select i + 1 from n) select sum(i) from n", "select 1", 0.0),
    ],
)  # fmt: skip
def test_queries_match_where_they_give_the_same_rows_and_can_do_no_harm(
    query: str, wanted: str, value: float, shop_db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shop_db.parent)
    before = shop_db.read_bytes()
    assert execution_match(shop_db, query, wanted) == value
    assert shop_db.read_bytes() == before
    assert [p.name for p in shop_db.parent.iterdir()] == ["shop.sqlite"]


def test_a_broken_gold_query_or_database_is_the_datas_fault(shop_db: Path) -> None:
    with pytest.raises(DataError, match="wanted query"):
        execution_match(shop_db, "select 1", "select oops")
    with pytest.raises(DataError, match="no such database"):
        rows_of(shop_db.with_name("none"), "select 1")
    (shop_db.parent / "text.sqlite").write_text("not a database at all" * 100)
    with pytest.raises(DataError, match="not a SQLite database"):
        rows_of(shop_db.parent / "text.sqlite", "select 1")
    with pytest.raises(QueryFailed, match="more than"):
        rows_of(shop_db, "with recursive n(i) as (select 1 union all select i + 1 from n) select i from n")


@pytest.mark.parametrize(
    ("query", "wanted", "value"),
    [
        ('SELECT a FROM t WHERE b="x" ;', "select a from t where b = 'x'", 1.0),
        ("SELECT a FROM t WHERE b >= 3", "select a from t where b>=3", 1.0),
        ("SELECT a FROM t", "SELECT b FROM t", 0.0),
    ],
)
def test_queries_without_contents_match_by_their_words(query: str, wanted: str, value: float) -> None:
    assert same_query(query, wanted) == value


TUNE = "X:1\nT:A jig\nM:6/8\nK:D\n"


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('A|"D"def fed|"G"g2g e3|(3ABc d2 z|[1 d3-d2:|[2 d6|]', ""),  # upbeat, chords, triplet, endings
        ("ABc def|[Ace]3 z3|", ""),
        ("A2>B2 c2|^F=G_A B,c'd|", ""),
        ("hello world", "is not ABC"),
        ("qq|", "is not ABC"),
        ("", "no notes"),
        ("A|AB|ABc|ABcd|", "4 of 4 bars"),
    ],
)
def test_a_tune_is_valid_where_every_symbol_is_abc_and_the_bars_add_up(body: str, fault: str) -> None:
    tune = parse(TUNE + body)
    assert tune.valid == (fault == "")
    assert fault in " ".join(tune.faults)


def test_bars_have_the_lengths_that_the_notes_say() -> None:
    tune = parse("X:1\nM:4/4\nL:1/4\nK:C\nC D E F|C2 E//F/ (3CDE z//|")
    assert [float(b) for b in tune.bars] == [1.0, (2 + 0.25 + 0.5 + 2 + 0.25) / 4]
    assert parse("M:4/4\nK:C\nCDEF|").faults == ["no X: field"]
    assert parse("X:1\nM:4/4\nCDEF|").faults == ["line 3: music before the key (K:)"]


def test_the_tunes_of_the_nottingham_collection_are_valid(public_data: Callable[[str], Path]) -> None:
    text = public_data("nottingham/waltzes.abc").read_text(encoding="latin-1")
    tunes = ["X:" + t for t in text.split("X:")[1:]]
    assert len(tunes) == 52
    assert [t[:30] for t in tunes if not parse(t).valid] == []
