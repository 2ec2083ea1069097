"""Tokens are drawn as temperature, top-k, top-p and seed say, and settings out of range are refused."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.engine.request import Sampling
from coterie.engine.sampling import COLDEST, SHORTLIST, sample
from coterie.errors import CoterieError

SCORES = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=60)
CHILD = np.random.default_rng


@given(
    scores=SCORES, masked=st.sets(st.integers(0, 59)), temperature=st.sampled_from([1e-40, 1e-9, 0.01, 0.7, 1, 2]),
    top_k=st.integers(0, 70), top_p=st.floats(0.01, 1), seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=300)
def test_no_token_outside_the_nucleus_is_ever_chosen(
    scores: list[float], masked: set[int], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    row = torch.tensor([-math.inf if i in masked and i else s for i, s in enumerate(scores)])
    exact = (row.double() - row.max()) / max(temperature, COLDEST)
    probs = (exact.exp() / exact.exp().sum()).numpy()
    order = np.argsort(-probs, kind="stable")
    ranked = probs[order]
    if top_k:
        ranked = ranked[:top_k] / ranked[:top_k].sum()
    before = np.cumsum(ranked) - ranked
    least = ranked[before < top_p + 1e-5].min()  # rounding may let one more in
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    chosen = sample(row, sampling, CHILD(seed))
    assert probs[chosen] > 0
    assert probs[chosen] >= least * probs[order][: top_k or None].sum() * (1 - 1e-3)
    assert chosen == sample(row, sampling, CHILD(seed))


@pytest.mark.parametrize(
    "how",
    [
        {}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.8}, {"top_p": 0.999},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.7},
    ],
    ids=str,
)  # fmt: skip
def test_tokens_are_drawn_in_proportion_to_their_probability(how: dict[str, Any]) -> None:
    scores = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0])
    sampling, draws, rng = Sampling(**{"temperature": 1.0, **how}), 4000, CHILD(0)
    probs = torch.softmax(scores.double() / sampling.temperature, 0).numpy()
    if sampling.top_k:
        probs[sampling.top_k :] = 0
        probs /= probs.sum()
    probs[np.cumsum(probs) - probs >= sampling.top_p] = 0  # the scores stand in order
    probs /= probs.sum()
    drawn = Counter(sample(scores, sampling, rng) for _ in range(draws))
    found = np.array([drawn[i] for i in range(len(probs))]) / draws
    assert abs(found - probs).max() < 4 * math.sqrt(0.25 / draws)
    assert set(drawn) <= set(np.flatnonzero(probs))


def test_a_nucleus_wider_than_the_shortlist_is_sampled_whole() -> None:
    wide = 4 * SHORTLIST
    rng = CHILD(1)
    drawn = {sample(torch.zeros(wide), Sampling(temperature=1, top_p=0.9), rng) for _ in range(5000)}
    assert 0.85 * wide < len(drawn) <= 0.9 * wide + 1


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"), ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"), ({"temperature": math.nan}, "temperature"), ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"), ({"top_p": math.nan}, "top_p"), ({"top_k": -1}, "top_k"),
        ({"logprobs": -1}, "logprobs"), ({"logprobs": 21}, "logprobs"), ({"stop": ("a", "")}, "stop"),
        ({"stop": ("a",) * 17}, "stop"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(CoterieError, match=f"^{field} must be"):
        Sampling(**wrong)
