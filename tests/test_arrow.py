"""Experts that answer together: Arrow as peft computes it, weighted sums of updates, averages of scores."""

import itertools
from pathlib import Path

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coterie.engine.engine import Engine
from coterie.engine.request import Adapter, Blend, Sampling
from coterie.errors import CoterieError
from coterie.experts import arrow
from coterie.experts import lora as loras
from coterie.experts.expert import Expert
from coterie.experts.kinds import apply
from coterie.experts.library import ExpertFacts, Library
from coterie.experts.lora import LoraConfig, weight_name
from coterie.experts.merge import merge
from coterie.experts.mixture import lay, mixed
from coterie.model.decoder import Change
from coterie.model.load import BaseModel
from support import logits_of, random_rows

CONFIG = LoraConfig(4, 8)
NAMES = ("one", "two", "three", "four")


def expert(base: BaseModel, seed: int, config: LoraConfig = CONFIG) -> Expert:
    """An expert whose updates have one direction that clearly stands out, as trained ones do.

    Without it peft's 15 steps of power iteration do not find the top singular vector.
    """
    lora = loras.fresh(config, base.decoder, seed)
    generator = torch.Generator().manual_seed(100 + seed)
    for name, w in lora.weights.items():
        if ".lora_B." in name:
            w.copy_(torch.randn(w.shape, generator=generator) * 0.05)
            w[:, 0] *= 6
    return lora


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, tiny_base: BaseModel) -> Library:
    """Four experts on the tiny model; the fourth changes attention only."""
    shelf = Library(tmp_path_factory.mktemp("experts"))
    for seed, name in enumerate(NAMES):
        config = CONFIG if seed < 3 else LoraConfig(2, 8, ("q_proj", "v_proj"))
        made = expert(tiny_base, seed, config)
        shelf.publish(
            ExpertFacts(name), lambda folder, made=made: loras.save(made, folder, "tiny", tiny_base.decoder.config)
        )  # type: ignore[misc]
    return shelf


def of(library: Library, base: BaseModel, name: str) -> Expert:
    return loras.load(library.folder(name), base.decoder.config)


def arrow_change(base: BaseModel, experts: list[Expert], tokens: int, top_k: int) -> Change | None:
    laid = [lay(e, base.decoder) for e in experts]
    directions = [arrow.prototypes(e, base.decoder.config) for e in experts]
    shared = arrow.Arrow(directions, base.decoder.weights["final_norm"])
    allowed = torch.ones(tokens, len(experts), dtype=torch.bool)
    gates = shared.gates(torch.arange(tokens), allowed, torch.full((tokens,), top_k))
    return mixed([(one, 0, tokens, 1.0) for one in laid], base.decoder, gates)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_arrow_computes_what_peft_computes(top_k: int, tiny: Path, tiny_base: BaseModel, tmp_path: Path) -> None:
    experts = [expert(tiny_base, seed) for seed in range(3)]
    for n, lora in enumerate(experts):
        (tmp_path / str(n)).mkdir()
        loras.save(lora, tmp_path / str(n), str(tiny), tiny_base.decoder.config)
    model = transformers.LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    theirs = peft.create_arrow_model(
        model, [str(tmp_path / str(n)) for n in range(3)], peft.ArrowConfig(top_k=top_k, rng_seed=0)
    ).eval()
    (row,) = random_rows(tiny_base, [40])
    with torch.no_grad():
        wanted = theirs(torch.tensor([row])).logits[0]
    (found,) = logits_of(tiny_base, [row], arrow_change(tiny_base, experts, len(row), top_k))
    assert (found - logits_of(tiny_base, [row])[0]).abs().max() > 0.05
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_prototype_is_the_top_right_singular_vector(tiny_base: BaseModel) -> None:
    lora = expert(tiny_base, 0)
    found = arrow.prototypes(lora, tiny_base.decoder.config)
    for layer, (site, part, projection) in itertools.product(
        range(2), [("qkv", 1, "k_proj"), ("o", 0, "o_proj"), ("gate_up", 1, "up_proj"), ("down", 0, "down_proj")]
    ):
        update = (
            lora.weights[weight_name(layer, projection, "lora_B.weight")]
            @ lora.weights[weight_name(layer, projection, "lora_A.weight")]
        )
        wanted = torch.linalg.svd(update).Vh[0]
        assert abs(float(found[site, part][layer] @ wanted)) == pytest.approx(1, abs=1e-4)


def test_arrow_over_one_expert_is_that_expert(tiny_base: BaseModel) -> None:
    lora = expert(tiny_base, 0, LoraConfig(2, 8, ("k_proj", "down_proj")))
    (row,) = random_rows(tiny_base, [20])
    (found,) = logits_of(tiny_base, [row], arrow_change(tiny_base, [lora], 20, 3))
    torch.testing.assert_close(found, logits_of(tiny_base, [row], apply(lora, tiny_base.decoder).change)[0])


@given(weights=st.lists(st.floats(0.05, 2), min_size=1, max_size=4))
def test_a_merged_expert_is_the_weighted_sum_of_updates_and_so_are_shares_of_each(
    weights: list[float], tiny_base: BaseModel, library: Library
) -> None:
    experts = [of(library, tiny_base, name) for name in NAMES[: len(weights)]]
    changes = [apply(e, tiny_base.decoder).change for e in experts]

    def summed(layer: int, site: str, x: Tensor, out: Tensor) -> Tensor:
        return out + sum(w * (c(layer, site, x, out.clone()) - out) for w, c in zip(weights, changes, strict=True))

    (row,) = random_rows(tiny_base, [12])
    (wanted,) = logits_of(tiny_base, [row], summed)
    model = tiny_base.decoder.config
    (merged,) = logits_of(tiny_base, [row], apply(merge(experts, weights, model), tiny_base.decoder).change)
    torch.testing.assert_close(merged, wanted, atol=1e-4, rtol=1e-4)
    laid = [lay(e, tiny_base.decoder) for e in experts]
    groups = [(one, 0, 12, weight) for one, weight in zip(laid, weights, strict=True)]
    (shared,) = logits_of(tiny_base, [row], mixed(groups, tiny_base.decoder))
    torch.testing.assert_close(shared, wanted, atol=1e-4, rtol=1e-4)


def parts(library: Library, **weights: float) -> tuple[tuple[Adapter, float], ...]:
    return tuple(((name, library.current(name) or 0), weight) for name, weight in weights.items())


def greedy(base: BaseModel, prompt: list[int], tokens: int, score: object) -> list[int]:
    """Greedy decoding by whole forwards: `score` gives the scores (vocab) after a row of tokens."""
    row = list(prompt)
    for _ in range(tokens):
        best = int(score(row).argmax())  # type: ignore[operator]
        if best in base.eos:
            break
        row.append(best)
    return row[len(prompt) :]


@pytest.mark.parametrize("how", ["merge", "logits", "arrow"])
def test_the_engine_answers_as_whole_forwards_do_alone_and_in_a_mixed_batch(
    how: str, tiny_base: BaseModel, library: Library
) -> None:
    decoder = tiny_base.decoder
    one, two, four = (of(library, tiny_base, n) for n in ("one", "two", "four"))

    def score(row: list[int]) -> Tensor:
        if how == "merge":
            merged = merge([one, two, four], [0.5, 0.3, 0.2], decoder.config)
            return logits_of(tiny_base, [row], apply(merged, decoder).change)[0][-1]
        if how == "logits":
            each = [logits_of(tiny_base, [row], apply(e, decoder).change)[0][-1] for e in (one, two, four)]
            return 0.5 * each[0] + 0.3 * each[1] + 0.2 * each[2]
        return logits_of(tiny_base, [row], arrow_change(tiny_base, [one, two, four], len(row), 2))[0][-1]

    blend = Blend(parts(library, one=0.5, two=0.3, four=0.2), how, 2)  # type: ignore[arg-type]
    prompts = random_rows(tiny_base, [9, 14, 5], seed=3)
    wanted = [greedy(tiny_base, prompt, 8, score) for prompt in prompts]
    engine = Engine(tiny_base, library, slots=8, context=64)
    try:
        want = Sampling(max_tokens=8)
        alone = []
        for prompt in prompts:
            handle = engine.submit(prompt, want, blend)
            handle.text()
            alone.append(handle.generated)
        crowd = [engine.submit(p, want, who) for p in prompts for who in (("three", 1), blend, None, ("one", 1))]
        crowd.append(engine.submit(prompts[0], want, Blend(parts(library, one=1, three=1), "arrow", 1)))
        for handle in crowd:
            handle.text()
        assert alone == wanted
        assert [handle.generated for handle in crowd if handle.adapter == blend] == wanted
        assert engine.load_numbers() == (0, 0)
    finally:
        engine.close()


def test_a_blend_of_one_is_that_expert(tiny_base: BaseModel, library: Library) -> None:
    engine = Engine(tiny_base, library, slots=4, context=64)
    (prompt,) = random_rows(tiny_base, [10], seed=5)
    try:
        handles = [engine.submit(prompt, Sampling(max_tokens=6), ("two", 1))]
        for how in ("merge", "logits", "arrow"):
            blend = Blend(parts(library, two=1.0), how)  # type: ignore[arg-type]
            handles.append(engine.submit(prompt, Sampling(max_tokens=6), blend))
        for handle in handles:
            handle.text()
        assert len({tuple(handle.generated) for handle in handles}) == 1
    finally:
        engine.close()


def test_cancelling_experts_that_average_frees_all_their_slots(tiny_base: BaseModel, library: Library) -> None:
    engine = Engine(tiny_base, library, slots=3, context=400)
    try:
        blend = Blend(parts(library, one=1, two=1, three=1), "logits")
        (prompt,) = random_rows(tiny_base, [10], seed=5)
        first = engine.submit(prompt, Sampling(max_tokens=300), blend)
        second = engine.submit(prompt, Sampling(max_tokens=3), blend)
        next(iter(first))
        first.cancel()
        first.text()
        second.text()
        assert second.finish in ("stop", "length")
        assert engine.load_numbers() == (0, 0)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda engine, blend: Blend((), "merge"), "weights above 0"),
        (lambda engine, blend: Blend(((("one", 1), 0.0),), "merge"), "weights above 0"),
        (lambda engine, blend: engine.submit([1], Sampling(), blend), "3 experts cannot answer together in 2 slots"),
    ],
    ids=["no expert", "weight zero", "more experts than slots"],
)
def test_blends_that_cannot_be_served_say_so(make, says: str, tiny_base: BaseModel, library: Library) -> None:  # type: ignore[no-untyped-def]
    engine = Engine(tiny_base, library, slots=2, context=64)
    try:
        with pytest.raises(CoterieError, match=says):
            make(engine, Blend(parts(library, one=1, two=1, three=1), "logits"))
    finally:
        engine.close()


def test_experts_that_are_no_plain_lora_cannot_be_added_up_but_averaged(tiny_base: BaseModel, library: Library) -> None:
    made = loras.fresh(LoraConfig(2, 4, dora=True), tiny_base.decoder)
    library.publish(ExpertFacts("dora"), lambda to: loras.save(made, to, "tiny", tiny_base.decoder.config), {})
    engine = Engine(tiny_base, library, slots=2, context=64)
    try:
        for how in ("merge", "arrow"):
            with pytest.raises(CoterieError, match=r'dora is of kind lora with dora, .* set combine = "logits"'):
                engine.submit([1], Sampling(), Blend(parts(library, one=1, dora=1), how))  # type: ignore[arg-type]
        averaged = engine.submit([1, 2], Sampling(max_tokens=3), Blend(parts(library, one=1, dora=1), "logits"))
        averaged.text()
        assert averaged.finish in ("stop", "length")
    finally:
        engine.close()
        library.remove("dora")
