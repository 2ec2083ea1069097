"""The backward passes that are written out give the gradients that autograd and PEFT give."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coterie.experts import lora as loras
from coterie.experts.expert import Expert
from coterie.experts.kinds import apply
from coterie.experts.lora import LoraConfig
from coterie.model.decoder import attend_packed, rope_frequencies
from coterie.model.gradients import low_rank, rms_norm, rotate, swiglu
from coterie.model.load import BaseModel
from coterie.tuning.forward import completion_loss
from support import random_rows


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output of `function`, and what an uneven loss on it sends back to each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (out * weights).sum().backward()
    return [out.detach(), *(x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves)]


def assert_same(ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    for found, wanted in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-4)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@given(n=st.integers(1, 9), seed=st.integers(0, 99))
def test_norm_rotation_and_swiglu_have_the_gradients_of_their_formulas(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(n, 16) * 3, torch.randn(16)
    assert_same(
        lambda x: rms_norm(x, weight, 1e-5),
        lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight,
        [x],
    )
    assert_same(swiglu, lambda x: F.silu(x[:, :8]) * x[:, 8:], [x])
    angles = torch.randn(n, 1, 4)
    cos, sin = angles.cos(), angles.sin()
    tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    assert_same(lambda x: rotate(x, *tables), lambda x: turned(x, cos, sin), [torch.randn(n, 3, 8)])


def test_a_norm_whose_weight_learns_gets_its_gradient_too() -> None:
    assert_same(
        lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w,
        [torch.randn(4, 16), torch.randn(16)],
    )  # fmt: skip


@given(n=st.integers(1, 9), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_a_low_rank_change_has_the_gradients_of_its_formula(n: int, sizes: list[int], seed: int) -> None:
    """Several projections side by side, each with its own A and B, with columns between that none changes."""
    torch.manual_seed(seed)
    spans, start = [], 0
    for size in sizes:
        spans.append(slice(start, start + size))
        start += size + 1
    count = len(sizes)
    weights = [torch.randn(2, 6) for _ in sizes] + [torch.randn(size, 2) for size in sizes]

    def ours(out: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        return low_rank(out * 1, x, list(weights[:count]), list(weights[count:]), spans, 0.7)

    def plain(out: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        parts = zip(weights[:count], weights[count:], spans, strict=True)
        return out + sum(F.pad(0.7 * x @ a.T @ b.T, (s.start, start - s.stop)) for a, b, s in parts)

    assert_same(ours, plain, [torch.randn(n, start), torch.randn(n, 6), *weights])


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4), shared=st.integers(0, 5),
    heads=st.sampled_from([1, 2]), seed=st.integers(0, 99),
)  # fmt: skip
def test_packed_attention_has_the_gradients_of_each_sequence_alone(
    lengths: list[int], shared: int, heads: int, seed: int
) -> None:
    """`shared` tokens stand before every sequence; what they get back is the sum over the sequences."""
    torch.manual_seed(seed)
    total = shared + sum(lengths)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs, begin = [], shared
        for length in [0, *lengths]:
            rows = [*range(shared), *range(begin, begin + length)]
            begin += length
            qs, ks, vs = (x[rows].transpose(0, 1) for x in (q, k, v))
            whole = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=True).transpose(0, 1)
            outs.append(whole[shared:] if length else whole)
        return torch.cat(outs)

    inputs = [torch.randn(total, 2 * heads, 8), torch.randn(total, heads, 8), torch.randn(total, heads, 8)]
    assert_same(lambda *qkv: attend_packed(lengths, shared)(0, *qkv), plain, inputs)


def test_tables_of_rotation_are_those_of_the_paper(tiny_base: BaseModel) -> None:
    """Position m turns pair i by m * theta^(-2i/d) (Su et al. 2021, eq. 15)."""
    config = tiny_base.decoder.config
    angles = torch.outer(torch.arange(5.0), rope_frequencies(config)).unsqueeze(1)
    x = torch.randn(5, 2, config.head_dim)
    cos, sin = angles.cos(), angles.sin()
    found = rotate(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    torch.testing.assert_close(found, turned(x, cos, sin))


def learning(base: BaseModel, config: LoraConfig) -> Expert:
    """An expert with no zero matrix, ready to take gradients."""
    lora = loras.fresh(config, base.decoder, seed=1)
    generator = torch.Generator().manual_seed(1)
    for w in lora.weights.values():
        w.copy_(torch.randn(w.shape, generator=generator) * 0.1).requires_grad_()
    return lora


def marked_rows(base: BaseModel, lengths: list[int], start: int, learned: int) -> list[tuple[Tensor, Tensor]]:
    """Random rows that begin with the same `start` tokens, the last `learned` of each to be learned."""
    (head,) = random_rows(base, [start], seed=5)
    out = []
    for row in random_rows(base, lengths):
        tokens = torch.tensor(head + row, dtype=torch.int32)
        out.append((tokens, torch.arange(len(tokens)) >= len(tokens) - learned))
    return out


@pytest.mark.parametrize("start", [0, 12], ids=["no common start", "common start"])
def test_an_expert_in_training_gets_the_gradients_that_peft_gives_it(
    start: int, tiny: Path, tiny_base: BaseModel, tmp_path: Path
) -> None:
    lora = learning(tiny_base, LoraConfig(4, 10))
    rows = marked_rows(tiny_base, [9, 14, 6], start, 3)
    loss, count = completion_loss(tiny_base.decoder, apply(lora, tiny_base.decoder), rows)
    loss.backward()  # type: ignore[no-untyped-call]
    loras.save(lora, tmp_path, str(tiny), tiny_base.decoder.config)
    model = transformers.LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    for tokens, marks in rows:
        ids = tokens.long()[None]
        (theirs(ids, labels=ids.masked_fill(~marks, -100)).loss * int(marks.sum())).backward()
    wanted = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert count == 9
    assert wanted.keys() == lora.weights.keys()
    for name, w in lora.weights.items():
        torch.testing.assert_close(w.grad, wanted[name], atol=2e-5, rtol=1e-3)


@given(
    lengths=st.lists(st.integers(5, 12), min_size=1, max_size=4), start=st.integers(0, 12), learned=st.integers(1, 4)
)
def test_rows_trained_together_weigh_what_they_weigh_alone(
    tiny_base: BaseModel, lengths: list[int], start: int, learned: int
) -> None:
    """Whatever the rows have in common at their start: it is computed once, and loss and gradients are the same."""
    rows = marked_rows(tiny_base, lengths, start, learned)
    lora = learning(tiny_base, LoraConfig(2, 8))
    together, count = completion_loss(tiny_base.decoder, apply(lora, tiny_base.decoder), rows)
    found = torch.autograd.grad(together, list(lora.weights.values()))
    alone = [completion_loss(tiny_base.decoder, apply(lora, tiny_base.decoder), [row])[0] for row in rows]
    wanted = torch.autograd.grad(torch.stack(alone).sum(), list(lora.weights.values()))
    assert count == learned * len(rows)
    torch.testing.assert_close(together, torch.stack(alone).sum(), atol=1e-4, rtol=1e-5)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, atol=5e-5, rtol=2e-3)
