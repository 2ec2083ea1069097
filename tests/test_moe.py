"""Mixtures of experts: the grouped layer equals a loop over tokens, and whole models equal transformers' own."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coterie.engine.engine import Engine
from coterie.engine.request import Sampling
from coterie.errors import CoterieError, ModelError
from coterie.model import grouped, moe
from coterie.model.decoder import packs_bfloat16
from coterie.model.load import BaseModel, load
from coterie.model.save import save_model
from coterie.model.upcycle import layers_named, upcycle
from support import logits_of, random_rows, reference_model
from test_model import random_model


def layer_weights(experts: int, width: int, ffn: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.5

    return draw(experts, width), draw(experts, 2 * ffn, width), draw(experts, width, ffn)


def naive(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, k: int, normed: bool, factor: float) -> Tensor:
    """The layer one token at a time, first choices before second ones, as the papers describe it."""
    n, count = logits.shape
    most = math.ceil(factor * n * k / count) if factor else n * k
    probs = logits.softmax(-1)
    best = probs.topk(k)
    taken = [0] * count
    rows = [torch.zeros_like(x[0]) for _ in range(n)]
    for choice in range(k):
        for token in range(n):
            expert = int(best.indices[token, choice])
            if taken[expert] == most:
                continue
            taken[expert] += 1
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            weight = best.values[token, choice] / (best.values[token].sum() if normed else 1)
            rows[token] = rows[token] + weight * (down[expert] @ (F.silu(gate) * up))
    return torch.stack(rows)


LAYERS = st.fixed_dictionaries(
    {
        "n": st.integers(1, 60), "experts": st.integers(2, 6), "k": st.integers(1, 2), "normed": st.booleans(),
        "factor": st.sampled_from([0.0, 0.5, 1.0, 1.25]), "seed": st.integers(0, 999),
        "sizes": st.sampled_from([(8, 12), (34, 50), (7, 5)]),
    }
)  # fmt: skip
KERNELS = pytest.mark.parametrize("native", [False, True], ids=["PyTorch", "C"])


@contextmanager
def computed_by(native: bool) -> Iterator[None]:
    """The experts by grouped.c or by PyTorch."""
    if native and grouped._library() is None:
        pytest.skip("needs a processor with AVX2 and a C compiler")
    with nullcontext() if native else patch.object(grouped, "takes", return_value=False):
        yield


@KERNELS
@given(shape=LAYERS)
def test_the_grouped_layer_equals_a_loop_over_tokens_and_so_do_its_gradients(
    native: bool, shape: dict[str, Any]
) -> None:
    width, ffn = shape["sizes"]
    router, gate_up, down = layer_weights(shape["experts"], width, ffn, shape["seed"])
    x = torch.randn(shape["n"], width, generator=torch.Generator().manual_seed(shape["seed"] + 1))
    found: list[list[Tensor]] = []
    for layer in (moe.feed_forward, naive):
        leaves = [t.clone().requires_grad_() for t in (x, router, gate_up, down)]
        with computed_by(native):
            out = layer(leaves[0], moe.score(leaves[0], leaves[1]), *leaves[2:], shape["k"], shape["normed"],
                        shape["factor"])  # fmt: skip
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append([out.detach(), *(t.grad if t.grad is not None else torch.zeros_like(t) for t in leaves)])
    for ours, wanted, what in zip(*found, ("output", "x", "router", "gate_up", "down"), strict=True):
        size = float(wanted.abs().max())
        torch.testing.assert_close(ours, wanted, atol=1e-4 * max(1, size), rtol=1e-4, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("factor", [0.0, 0.75])
@pytest.mark.parametrize(("k", "normed"), [(1, False), (2, True)])
def test_gradients_are_those_of_small_changes(k: int, normed: bool, factor: float) -> None:
    router, gate_up, down = (w.double().requires_grad_() for w in layer_weights(3, 6, 4, 5))
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64).requires_grad_()

    def layer(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return moe.feed_forward(x, x @ router.T, gate_up, down, k, normed, factor)

    assert torch.autograd.gradcheck(layer, (x, router, gate_up, down))


@given(shape=LAYERS, relu=st.booleans())
def test_in_bfloat16_the_layer_is_as_near_to_float32_as_rounding_lets_it(shape: dict[str, Any], relu: bool) -> None:
    """Outputs and gradients by grouped.c: each within a few of bfloat16's 1/256 of the largest."""
    width, ffn = shape["sizes"]
    router, gate_up, down = layer_weights(shape["experts"], width, ffn, shape["seed"])
    weights = (gate_up[:, :ffn].contiguous() if relu else gate_up, down)
    x = torch.randn(shape["n"], width, generator=torch.Generator().manual_seed(shape["seed"] + 1)).bfloat16()
    logits, activate = moe.score(x, router), F.relu if relu else moe.swiglu
    found: list[list[Tensor]] = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [t.bfloat16().to(dtype, copy=True).requires_grad_() for t in (x, *weights)]
        scores = logits.clone().requires_grad_()
        out = moe.feed_forward(leaves[0], scores, *leaves[1:], shape["k"], shape["normed"], shape["factor"], activate)
        assert out.dtype == dtype
        slope = torch.linspace(-1, 1, out.numel()).view_as(out).bfloat16().to(dtype)
        out.backward(slope)
        found.append([out.detach(), *(t.grad for t in (*leaves, scores))])
    for ours, wanted in zip(*found, strict=True):
        assert (ours.float() - wanted).abs().max() <= 0.04 * wanted.abs().max() + 1e-5


def test_the_kernel_gives_the_same_bits_on_any_number_of_threads_and_no_gradient_to_what_is_frozen() -> None:
    router, gate_up, down = layer_weights(4, 64, 96, 1)
    x = torch.randn(150, 64, generator=torch.Generator().manual_seed(2))
    before, found = torch.get_num_threads(), []
    with computed_by(True):
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                given = x.clone().requires_grad_()
                out = moe.feed_forward(given, moe.score(given, router), gate_up, down, 2, True)
                out.square().sum().backward()
                found.append((out.detach(), given.grad))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert gate_up.grad is None
    assert down.grad is None


@given(
    n=st.integers(1, 60), experts=st.integers(2, 8), k=st.integers(1, 2), factor=st.sampled_from([0.5, 1.0, 2.0]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_no_expert_takes_more_than_its_capacity_and_the_first_come_stay(
    n: int, experts: int, k: int, factor: float, seed: int
) -> None:
    logits = torch.randn(n, experts, generator=torch.Generator().manual_seed(seed)) * 3
    chosen, _ = moe.choose(logits, k, True)
    most = moe.capacity(n, experts, k, factor)
    places, rows = moe.sort_by_expert(chosen, experts, most)
    wanted = torch.bincount(chosen.reshape(-1), minlength=experts)
    assert rows.tolist() == wanted.clamp(max=most).tolist()
    assert len(set(places.tolist())) == len(places) == int(rows.sum())
    for expert, kept in enumerate(places.split(rows.tolist())):
        assert (chosen.reshape(-1)[kept] == expert).all()
        first = [(c, t) for c in range(k) for t in range(n) if int(chosen[t, c]) == expert][:most]
        assert [(int(p) % k, int(p) // k) for p in kept] == first


def test_a_token_without_a_place_passes_on_the_residual_stream_alone(tiny: Path) -> None:
    base = trained_switch(tiny, capacity=0.25)
    router = base.decoder.weights["1.router"]
    router.zero_()
    router[2] = 1.0  # with positive inputs, everyone wants expert 2
    x = torch.rand(8, 64)
    out = base.decoder._experts(1, x, None)
    assert moe.capacity(8, 4, 1, 0.25) == 1
    assert out[0].abs().sum() > 0
    assert torch.equal(out[1:], torch.zeros_like(out[1:]))


def trained_switch(tiny: Path, **changes: Any) -> BaseModel:
    """The tiny model upcycled to 4 experts in layer 1, each expert made different."""
    from dataclasses import replace

    from coterie.model.decoder import Decoder

    base = upcycle(load(tiny, torch.float32), 4, "every-other", 1)
    weights = {k: v.clone() for k, v in base.decoder.weights.items()}
    generator = torch.Generator().manual_seed(3)
    for name in ("1.experts.gate_up", "1.experts.down", "1.router"):
        weights[name] += torch.randn(weights[name].shape, generator=generator) * 0.1
    return replace(base, decoder=Decoder(replace(base.decoder.config, **changes), weights))


def test_losses_are_those_worked_by_hand() -> None:
    """Two tokens for expert 0 and one for expert 1 of 2: shares 2/3 and 1/3."""
    probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    by_hand = 2 * (2 / 3 * (0.9 + 0.6 + 0.3) / 3 + 1 / 3 * (0.1 + 0.4 + 0.7) / 3)
    assert moe.balance_loss(probs.log()).item() == pytest.approx(by_hand)
    assert moe.balance_loss(torch.zeros(4, 8)).item() == pytest.approx(1)  # even probabilities: 1 whoever is chosen
    assert moe.balance_loss(probs.log(), 2).item() == pytest.approx(1)  # all of them chosen by everyone
    logits = torch.tensor([[0.0, math.log(3)], [math.log(7), 0.0]])
    assert moe.z_loss(logits).item() == pytest.approx((math.log(4) ** 2 + math.log(8) ** 2) / 2)


def test_the_losses_push_towards_balance_and_small_logits() -> None:
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.5, 0.0]], requires_grad=True)
    moe.balance_loss(logits).backward()
    assert (logits.grad[:, 0] > 0).all()  # type: ignore[index]
    logits.grad = None
    moe.z_loss(logits).backward()
    assert (logits.grad > 0).all()  # type: ignore[operator]


def test_the_router_works_in_float32_whatever_the_model_works_in() -> None:
    x = torch.randn(64, 32).bfloat16()
    router = torch.randn(4, 32) * 10
    found = moe.score(x, router)
    assert found.dtype == torch.float32
    exact = x.double() @ router.double().T
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-5)
    rounded = F.linear(x, router.bfloat16()).double()
    assert (rounded - exact).abs().max() > 0.05  # what bfloat16 would have made of it


def test_jitter_moves_the_logits_a_little_and_only_when_asked() -> None:
    x, router = torch.ones(1, 1), torch.ones(1, 1)
    assert moe.score(x, router).item() == 1
    drawn = {round(moe.score(x, router, 0.1).item(), 4) for _ in range(50)}
    assert len(drawn) > 10
    assert min(drawn) >= 0.9 and max(drawn) <= 1.1  # noqa: PT018


@pytest.mark.skipif(not packs_bfloat16(), reason="oneDNN has no matrices in bfloat16 without AVX-512")
@pytest.mark.parametrize("rows", [[3, 0, 5], [0, 0, 1], [8, 0, 0]])
def test_the_kernel_of_the_gpu_and_packed_experts_compute_the_same(rows: list[int]) -> None:
    weights = torch.randn(3, 16, 32).bfloat16()
    x = torch.randn(sum(rows), 32).bfloat16()
    wanted = moe.grouped(x, weights, torch.tensor(rows))
    torch.testing.assert_close(moe.grouped_on_device(x, weights, torch.tensor(rows)), wanted, atol=0.1, rtol=0.02)
    packed = [torch.ops.mkldnn._reorder_linear_weight(w, 16) for w in weights]
    torch.testing.assert_close(moe.grouped(x, packed, torch.tensor(rows)), wanted, atol=0.1, rtol=0.02)


MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Mixtral, top-1": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 32}),
    "Qwen2 MoE, every other layer, weights not summing to 1": (
        "Qwen2Moe", {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 48,
                     "decoder_sparse_step": 2, "shared_expert_intermediate_size": 1}),
    "Qwen3 MoE": (
        "Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "mlp_only_layers": [0],
                     "norm_topk_prob": True, "head_dim": 32}),
}  # fmt: skip


def random_mixture(folder: Path, name: str) -> None:
    family, changes = MIXTURES[name]
    model = random_model(folder, family, **changes)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "shared_expert.down" in key:
                p.zero_()
    model.save_pretrained(folder)


def agree(folder: Path, base: BaseModel) -> None:
    """Loaded by transformers, the model in `folder` gives what `base` gives."""
    (row,) = random_rows(base, [60])
    with torch.no_grad():
        wanted = reference_model(folder)(torch.tensor([row])).logits[0]
    (found,) = logits_of(base, [row])
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_load_and_save_as_transformers_has_them(name: str, tmp_path: Path) -> None:
    random_mixture(tmp_path / "theirs", name)
    base = load(tmp_path / "theirs", torch.float32)
    agree(tmp_path / "theirs", base)
    save_model(base, tmp_path / "ours")
    agree(tmp_path / "ours", base)
    again = load(tmp_path / "ours", torch.float32)
    assert again.decoder.weights.keys() == base.decoder.weights.keys()
    assert all(torch.equal(w, base.decoder.weights[k]) for k, w in again.decoder.weights.items())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {"tie_word_embeddings": True}), ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Mistral", {"head_dim": 32, "sliding_window": None}), ("Qwen2", {}), ("Qwen3", {"head_dim": 32}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
    ],
)  # fmt: skip
def test_dense_models_are_saved_as_transformers_reads_them(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    random_model(tmp_path / "theirs", family, **changes)
    base = load(tmp_path / "theirs", torch.float32)
    save_model(base, tmp_path / "ours")
    agree(tmp_path / "ours", base)


def test_a_saved_model_keeps_its_tokenizer_template_and_ends(tiny: Path, tmp_path: Path) -> None:
    base = load(tiny, torch.float32)
    save_model(base, tmp_path / "m")
    again, theirs = load(tmp_path / "m", torch.float32), transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    talk = [{"role": "user", "content": "Which color has the sky?"}]
    assert (
        again.chat(talk)
        == base.chat(talk)
        == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    )
    text = base.chat(talk)
    assert again.encode(text) == base.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert (again.eos, again.bos_token, again.eos_token) == (base.eos, base.bos_token, base.eos_token)
    assert {p.name for p in tmp_path.iterdir()} == {"m"}  # nothing half-written beside it


def test_saving_over_a_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(CoterieError, match="already there"):
        save_model(load(tiny, torch.float32), tmp_path / "m")


@pytest.mark.parametrize("layers", ["all", "every-other", "0"])
def test_an_upcycled_model_says_what_the_dense_one_said(layers: str, tiny: Path, tmp_path: Path) -> None:
    dense = load(tiny, torch.float32)
    save_model(upcycle(dense, 4, layers), tmp_path / "m")
    base = load(tmp_path / "m", torch.float32)
    rows = random_rows(dense, [40, 9])
    for found, wanted in zip(logits_of(base, rows), logits_of(dense, rows), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    agree(tmp_path / "m", base)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral"])
def test_every_family_can_be_upcycled(family: str, tmp_path: Path) -> None:
    random_model(tmp_path / "dense", family, sliding_window=None)
    base = upcycle(load(tmp_path / "dense", torch.float32), 3, "every-other", 2)
    save_model(base, tmp_path / "m")
    agree(tmp_path / "m", base)


@pytest.mark.parametrize("layers", ["first", "2", "-1", "0,9", ""])
def test_layers_that_are_not_there_are_refused(layers: str) -> None:
    with pytest.raises(CoterieError, match="every-other"):
        layers_named(layers, 2)
    assert layers_named("1,0", 2) == (0, 1)


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (4, 5), (4, 0)])
def test_impossible_numbers_of_experts_are_refused(experts: int, k: int, tiny_base: BaseModel) -> None:
    with pytest.raises(CoterieError, match="experts per token"):
        upcycle(tiny_base, experts, "all", k)


def test_a_mixture_is_not_upcycled_again(tiny_base: BaseModel) -> None:
    with pytest.raises(CoterieError, match="already"):
        upcycle(upcycle(tiny_base, 2), 2)


def test_experts_shared_by_all_tokens_are_refused_not_left_out(tmp_path: Path) -> None:
    random_model(tmp_path, *("Qwen2Moe",), **MIXTURES["Qwen2 MoE, every other layer, weights not summing to 1"][1])
    with pytest.raises(ModelError, match="shared"):
        load(tmp_path, torch.float32)


def test_a_mixture_that_lacks_an_expert_is_refused_by_name(tmp_path: Path) -> None:
    random_mixture(tmp_path, "Mixtral")
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"num_local_experts": 5}))
    with pytest.raises(ModelError, match=r"experts\.4|gate"):
        load(tmp_path, torch.float32)


@pytest.mark.parametrize("packed", [False, True])
def test_the_engine_serves_a_mixture_as_transformers_does(packed: bool, tiny: Path, tmp_path: Path) -> None:
    """Alone or in a batch: no request loses an expert's work to another."""
    save_model(trained_switch(tiny, gate_normed=False), tmp_path / "m")
    base = load(tmp_path / "m", torch.float32, packed=packed)
    rows = random_rows(base, [12, 30, 5])
    engine = Engine(base, None, slots=3, context=128, queue=8)
    try:
        alone = [engine.submit(row, Sampling(max_tokens=8)) for row in rows[:1]]
        text = [g.text() for g in alone]
        batch = [engine.submit(row, Sampling(max_tokens=8)) for row in rows]
        texts = [g.text() for g in batch]
        assert texts[0] == text[0]
        for row, generation in zip(rows, batch, strict=True):
            theirs = reference_model(tmp_path / "m").generate(torch.tensor([row]), max_new_tokens=8, do_sample=False)
            wanted = theirs[0, len(row) :].tolist()
            ends = [i for i, t in enumerate(wanted) if t in base.eos]
            assert generation.generated == wanted[: ends[0] if ends else None]
    finally:
        engine.close()


@KERNELS
def test_in_bfloat16_packed_and_plain_experts_agree(native: bool, tiny: Path, tmp_path: Path) -> None:
    save_model(trained_switch(tiny), tmp_path / "m")
    with computed_by(native):
        plain, packed = load(tmp_path / "m", torch.bfloat16), load(tmp_path / "m", torch.bfloat16, packed=True)
        exact = load(tmp_path / "m", torch.float32)
        rows = random_rows(plain, [50])
        in_c = grouped.takes(plain.decoder.weights["1.experts.down"])  # packs_bfloat16 may hold without AVX512-BF16
        assert bool(packed.decoder.packed_experts) == (packs_bfloat16() and not in_c)
        for base in (plain, packed):
            error = (logits_of(base, rows)[0] - logits_of(exact, rows)[0]).abs().mean()
            assert error < 0.05 * logits_of(exact, rows)[0].std()
