"""How sure is sure enough: the threshold keeps the wished error on answers that it has not seen."""

import math
from pathlib import Path

import numpy as np
import pytest

from coterie.data.read import Example
from coterie.desk.calibrate import outcomes
from coterie.desk.confidence import Confidence, Signals, fit_confidence, load_confidence
from coterie.desk.flow import Parts
from coterie.errors import DataError, ModelError
from coterie.evaluation.calibration import threshold_for
from coterie.knowledge.evidence import Evidence
from desk_support import Checking, Script, scripted


def answers(n: int, seed: int) -> tuple[list[Signals], list[bool]]:
    """Answers that are right more often the nearer and the likelier they are; some have no similarity."""
    rng = np.random.default_rng(seed)
    near, likely = rng.uniform(0, 1, n), rng.normal(-1, 0.5, n)
    right = rng.uniform(0, 1, n) < 1 / (1 + np.exp(-(12 * near + 2 * likely)))
    some = [Signals(float(s) if i % 5 else None, float(p)) for i, (s, p) in enumerate(zip(near, likely, strict=True))]
    return some, right.tolist()


@pytest.mark.parametrize(
    ("confidence", "right", "error", "sent"),
    [
        ([0.9] * 268, [True] * 268, 0.01, 268), ([0.9] * 267, [True] * 267, 0.01, 0),
        ([0.9] * 268 + [0.5] * 50, [True] * 268 + [False] * 50, 0.01, 268),
        ([0.9] * 268 + [0.9], [True] * 268 + [False], 0.01, 0), ([0.9, 0.8], [False, True], 0.5, 0), ([], [], 0.5, 0),
    ],
)  # fmt: skip
def test_the_threshold_sends_as_much_as_the_error_allows(
    confidence: list[float], right: list[bool], error: float, sent: int
) -> None:
    at = threshold_for(confidence, right, error)
    assert sum(c >= at for c in confidence) == sent


@pytest.mark.parametrize("error", [0.01, 0.02, 0.05, 0.2])
def test_a_fit_keeps_the_wished_error_on_new_answers(error: float) -> None:
    fitted = fit_confidence(*answers(4000, 0), error)
    signals, right = answers(20_000, 1)
    sent = [r for s, r in zip(signals, right, strict=True) if fitted.sure(s)]
    assert len(sent) > 200
    assert 1 - sum(sent) / len(sent) <= 1.5 * error
    assert fitted.handled == pytest.approx(len(sent) / len(signals), abs=0.05)


def test_confidence_is_a_probability_that_comes_true() -> None:
    fitted = fit_confidence(*answers(4000, 0), 0.02)
    signals, right = answers(20_000, 1)
    p, hit = np.array([fitted.of(s) for s in signals]), np.array(right)
    for low in (0.5, 0.7, 0.9):
        within = (p >= low) & (p < low + 0.1)
        assert hit[within].mean() == pytest.approx(p[within].mean(), abs=0.05)


def test_a_fit_is_saved_and_read_and_damage_is_named(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    assert load_confidence(file) is None
    fitted = fit_confidence(*answers(200, 0), 0.05)
    fitted.save(file)
    assert load_confidence(file) == fitted
    for damage in ("{", "[]", '{"bias": 1}'):
        file.write_text(damage)
        with pytest.raises(ModelError, match="coterie desk calibrate"):
            load_confidence(file)


def test_too_few_answers_or_all_alike_are_refused() -> None:
    with pytest.raises(DataError, match="at least 50"):
        fit_confidence(*answers(49, 0), 0.05)
    signals, _ = answers(100, 0)
    with pytest.raises(DataError, match="all answers are right"):
        fit_confidence(signals, [True] * 100, 0.05)


def test_an_absent_signal_has_a_weight_of_its_own() -> None:
    weights = ((2.0, 1.0, 0.0), (-1.0, 0.0, 0.0))
    fitted = Confidence((0.5, -1.0, 0.0), (1.0, 1.0, 1.0), *weights, 0.0, 0.5, 0.02, 100, 1.0, 0.0)
    assert fitted.of(Signals()) == pytest.approx(1 / (1 + math.exp(1.0)))
    assert fitted.of(Signals(similarity=1.0)) == pytest.approx(1 / (1 + math.exp(-1.0)))


def test_answers_are_calibrated_as_the_desk_gives_them(tmp_path: Path) -> None:
    """With the evidence before the model, its score among the signals, and without what the check withholds."""

    def says(asked: str) -> Script:
        return Script("It takes 2 days." if "[1] Two days." in asked else "Who knows, 9?", "shop", 0.7)

    parts = Parts(
        ground=lambda asked, _: [Evidence("faq", "a.md", asked.removesuffix("?"), 0.8)] if "days" in asked else [],
        check=lambda evidence: Checking(lambda s: "2" in s) if evidence else None,
    )
    rows = [
        Example(({"role": "user", "content": asked}, {"role": "assistant", "content": "It takes 2 days."}), "a.csv:1")
        for asked in ("Two days.?", "What else?", "Some days?")
    ]
    counted: list[int] = []
    signals, right = outcomes(scripted(tmp_path, says), rows, counted.append, parts=parts)  # type: ignore[arg-type]
    assert [(s.similarity, s.retrieval) for s in signals] == [(0.7, 0.8), (0.7, None)]
    assert all(s.logprob == pytest.approx(-0.1) for s in signals)
    assert right == [True, False]
    assert counted == [1, 2, 3]
