"""The step of a GPU, as far as a machine without one can tell: what is captured gives the scores that other steps give,
and nothing in it depends on a value or mixes devices."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.engine.by_torch import TorchStep
from coterie.engine.graphs import Bank, Graphs
from coterie.engine.pages import PAGE, Pages
from coterie.experts.adapter import BottleneckConfig
from coterie.experts.expert import Expert
from coterie.experts.lora import LoraConfig
from coterie.experts.mixture import Laid, lay
from coterie.experts.prompt import PromptConfig
from coterie.model.decoder import Decoder
from coterie.model.load import BaseModel
from support import cache_of, random_rows, trained

KINDS: tuple[Any, ...] = (
    LoraConfig(8, 32), LoraConfig(4, 32, ("q_proj", "v_proj"), dora=True), LoraConfig(16, 8, ("down_proj",)),
    BottleneckConfig(8, "houlsby"), BottleneckConfig(24, "pfeiffer", "gelu"), PromptConfig(5),
    BottleneckConfig(16, "pfeiffer", "swish", first_layer=1),
)  # fmt: skip


@pytest.fixture(scope="module")
def biased(tiny_base: BaseModel) -> BaseModel:
    """The tiny model with biases, as Qwen2 has them."""
    decoder, generator = tiny_base.decoder, torch.Generator().manual_seed(1)
    weights = dict(decoder.weights)
    for n in range(decoder.config.layers):
        rows = len(weights[f"{n}.qkv"])
        weights[f"{n}.qkv.bias"] = torch.randn(rows, generator=generator, dtype=decoder.dtype) * 0.3
    return replace(tiny_base, decoder=Decoder(decoder.config, weights))


@pytest.fixture(scope="module")
def experts(biased: BaseModel) -> list[Expert]:
    return [trained(config, biased, seed) for seed, config in enumerate(KINDS)]


@given(
    owners=st.lists(st.integers(-1, len(KINDS) - 1), min_size=1, max_size=9).map(sorted),
    room=st.integers(1, 8), shared=st.lists(st.floats(0.1, 1), max_size=3), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=25)
def test_what_is_captured_gives_the_scores_of_a_plain_step(
    owners: list[int], room: int, shared: list[float], seed: int, biased: BaseModel, experts: list[Expert]
) -> None:
    """Any experts side by side, the last row with several at once; a bank with room for few, used again and again."""
    decoder, rows = biased.decoder, random_rows(biased, [3] * len(owners), seed)
    laid = [lay(expert, decoder) for expert in experts]
    groups = [(laid[i], n, 1, 1.0) for n, i in enumerate(owners) if i >= 0]
    if shared:  # plain LoRA experts can be added up
        groups = [group for group in groups if group[1] != len(owners) - 1]
        groups += [(laid[(0, 2, 0)[k]], len(owners) - 1, 1, share) for k, share in enumerate(shared)]
    plain, captured = TorchStep(decoder), TorchStep(decoder)
    captured.graphs = Graphs(decoder)
    captured.graphs._bank = Bank(decoder, max(room, len({id(g[0]) for g in groups})))
    kept = captured.graphs._bank
    caches = [cache_of(decoder, len(owners), 2 * PAGE) for _ in range(2)]
    embedded, slots = decoder.embed(torch.tensor(rows)), torch.arange(len(owners))
    with torch.inference_mode():
        for t in range(3):
            kept.numbers([laid[(t + seed) % len(laid)]])  # somebody else may have been there in between
            at = torch.full((len(owners),), t)
            wanted, found = (
                step.run(embedded[:, t], at, slots, cache, groups, slots)
                for step, cache in zip((plain, captured), caches, strict=True)
            )
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert captured.graphs._bank is kept
    assert captured.graphs._captured, "nothing was captured: this proves nothing"


def test_a_bank_that_is_full_drops_the_longest_idle_and_leaves_nothing_of_it(
    biased: BaseModel, experts: list[Expert]
) -> None:
    decoder = biased.decoder
    bank, laid = Bank(decoder, 2), [lay(expert, decoder) for expert in experts]
    first, second = bank.numbers(laid[:2])
    assert {first, second} == {1, 2}
    assert bank.numbers(laid[:1]) == [first]  # now the second is the longest idle
    assert bank.numbers([laid[3]]) == [second]
    assert bank.numbers(laid[:1]) == [first]
    x, out = torch.randn(2, decoder.config.width), torch.randn(2, decoder.config.width)
    change = bank.change(torch.tensor([[second], [0]]), torch.ones(2, 1))
    for site in ("o", "qkv"):
        wide = out if site == "o" else torch.randn(2, len(decoder.weights["0.qkv"]))
        torch.testing.assert_close(change(0, site, x[:, : decoder.config.site_input(site)], wide.clone()), wide)
    assert not torch.equal(change(0, "ffn", x, out.clone())[0], out[0])
    assert torch.equal(change(0, "ffn", x, out.clone())[1], out[1])


@pytest.mark.parametrize("wide", [1, 3])
def test_nothing_that_is_captured_depends_on_a_value_or_mixes_devices(
    wide: int, biased: BaseModel, experts: list[Expert]
) -> None:
    """On the device `meta` no kernel runs, but shapes and devices are followed, and whoever asks for a value fails,
    which is what a capture would refuse."""
    config = biased.decoder.config
    with torch.inference_mode():
        shapes = {name: w.shape for name, w in biased.decoder.weights.items()}
        weights = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
        decoder = Decoder(config, weights)
        cache = Pages(config, 4, 4 * PAGE, torch.bfloat16, 0, "meta")
        bank = Bank(decoder, 8)
        bank.numbers([on_meta(lay(expert, biased.decoder)) for expert in experts])

        def fresh(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        out = Graphs(decoder)._step(
            cache, bank, [1], fresh(8, config.width, dtype=torch.bfloat16), fresh(8), fresh(8, config.layers, 2),
            fresh(8, wide), fresh(8, wide, dtype=torch.bfloat16), fresh(1, 8),
        )  # fmt: skip
        assert (out.shape, out.dtype, out.device.type) == ((8, config.vocab), torch.float32, "meta")
        for noticed in (lambda: fresh(3).sum().item(), lambda: fresh(3).nonzero(), lambda: fresh(3) + torch.ones(3)):
            with pytest.raises((RuntimeError, NotImplementedError)):
                noticed()


def on_meta(laid: Laid) -> Laid:
    """An expert with tensors that have shapes and no values."""

    def moved(part: Any) -> Any:
        changes = {
            name: torch.empty(value.shape, dtype=torch.bfloat16, device="meta")
            for name, value in vars(part).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return replace(part, **changes)

    return Laid(
        {key: moved(part) for key, part in laid.low_rank.items()},
        {key: moved(part) for key, part in laid.bottlenecks.items()},
    )
