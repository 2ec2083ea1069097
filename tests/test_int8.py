"""Matrices in 8 bits: what rounding keeps, when the step takes them, and that it computes with what it holds."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from coterie.business import Business
from coterie.engine import step as native
from coterie.engine.engine import Engine
from coterie.engine.pages import Pages
from coterie.engine.step import GROUP, In8, Step
from coterie.model.decoder import SITES, Decoder, ModelConfig, packed_positions
from coterie.model.decoder import attend_packed as attend
from coterie.model.load import BaseModel

SHAPES = [(1, 32), (16, 64), (17, 96), (70, 64), (130, 416)]  # outputs, inputs; step.c takes 16 and up to 192 together

pytestmark = pytest.mark.skipif(
    native.dtype() != torch.float32, reason="needs a processor with AVX2 and without AVX512-BF16, and a C compiler"
)


def weight(out: int, wide: int) -> Tensor:
    return torch.randn(out, wide, generator=torch.Generator().manual_seed(out * wide))


@pytest.mark.parametrize(("out", "wide"), SHAPES)
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_a_number_is_off_by_at_most_half_a_step_of_its_group(out: int, wide: int, shift: float) -> None:
    w = weight(out, wide) + shift
    w[0] = 0
    light = In8.of(w)
    off = (light.dense[:out] - w).abs()
    for first in range(0, wide, GROUP):
        group = w[:, first : first + GROUP]
        step = (group.amax(1, keepdim=True).clamp_min(0) - group.amin(1, keepdim=True).clamp_max(0)) / 127
        assert (off[:, first : first + GROUP] <= 0.5 * step + 1e-6).all()
    assert not off[0].any()
    assert light.off == pytest.approx(float(off.square().sum() / w.square().sum().clamp_min(1e-9)), rel=1e-2, abs=1e-12)
    assert not light.dense[out:].any()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_what_gguf_has_rounded_is_kept(kind: str) -> None:
    rounded = gguf.quants.quantize(weight(48, 96).numpy(), gguf.GGMLQuantizationType[kind])
    light = In8.of(w := torch.from_numpy(gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType[kind])))
    assert torch.allclose(light.dense, w, atol=1e-6)
    assert light.off < native.LOST_NOTHING
    assert In8.of(weight(48, 96)).off > 1e3 * native.LOST_NOTHING


def model(rounded: bool) -> Decoder:
    """A random model whose matrices lie on the grid of 8 bits, or on none."""
    torch.manual_seed(0)
    c = ModelConfig(vocab=411, width=96, layers=2, heads=6, kv_heads=2, head_dim=32, ffn=160, context=256,
                    tied=True)  # fmt: skip
    sizes: dict[str, tuple[int, ...]] = {"embed": (411, 96), "final_norm": (96,)}
    for n in range(c.layers):
        sizes |= {f"{n}.attn_norm": (96,), f"{n}.ffn_norm": (96,), f"{n}.qkv": (320, 96), f"{n}.o": (96, 192),
                  f"{n}.gate_up": (320, 96), f"{n}.down": (96, 160)}  # fmt: skip
    weights = {name: torch.randn(size) * 0.3 for name, size in sizes.items()}
    if rounded:
        weights = {name: In8.of(w).dense[: len(w)] if w.dim() == 2 else w for name, w in weights.items()}
    return Decoder(c, weights)


def scores(step: Step, rows: list[list[int]]) -> Tensor:
    """After the last token of rows of equal length, read one token of each at a time: (rows, vocab)."""
    d, slots, last = step.decoder, torch.arange(len(rows)), torch.empty(0)
    cache = Pages(d.config, len(rows), 64, d.dtype)
    for slot in range(len(rows)):
        cache.make_room(cache.begin(slot, cache.parts(None, d.config.layers), []), slot, 64)
    embedded = d.embed(torch.tensor(rows))
    for t in range(len(rows[0])):
        last = step.run(embedded[:, t], torch.full((len(rows),), t), slots, cache, (), slots)
    return last


def in8(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, weights: Any = "exact") -> Step:
    """The step with matrices in 8 bits where they may be, whatever is faster here."""
    monkeypatch.setattr(Step, "_gains", lambda self, names, slots: True)
    step = Step.open(decoder, weights)
    assert step
    return step


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 16, 23])
def test_a_step_computes_with_the_matrices_it_holds_and_a_row_is_the_same_in_any_batch(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = model(rounded=True)
    step = in8(decoder, monkeypatch)
    rows = torch.randint(411, (count, 7), generator=torch.Generator().manual_seed(count)).tolist()
    found = scores(step, rows)
    assert step.in8
    for row, got in zip(rows, found, strict=True):
        hidden = decoder.forward(torch.tensor(row), packed_positions([7]), attend([7]))
        assert torch.allclose(got, decoder.logits(hidden[-1:])[0], atol=1e-3)
        assert torch.equal(scores(step, [row])[0], got)


def test_what_would_lose_something_stays_exact_unless_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = model(rounded=False)
    rows = [[5, 6, 7, 8]]
    exact, light = in8(decoder, monkeypatch), in8(decoder, monkeypatch, "int8")
    assert not exact.in8
    matrices = [decoder.weights[f"{n}.{site}"] for n in range(2) for site in SITES]
    size = sum(w.numel() for w in matrices) + 416 * 96
    assert light.in8 == size + size // GROUP * 8
    hidden = decoder.forward(torch.tensor(rows[0]), packed_positions([4]), attend([4]))
    wanted = decoder.logits(hidden[-1:])
    assert torch.allclose(scores(exact, rows), wanted, atol=1e-3)
    off = (scores(light, rows) - wanted).abs().mean() / wanted.abs().mean()
    assert 1e-4 < off < 0.1


@pytest.mark.parametrize(("slower", "taken"), [(None, True), (1, False), (4, False)])
def test_they_are_taken_where_they_are_slower_for_no_number_of_rows(
    slower: int | None, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is the test's: a product in 8 bits takes 1, an exact one 2; the other way round at `slower`."""
    now = 0.0

    def product(self: Step, matrix: Any, rows: int, out: int, wide: int) -> None:
        nonlocal now
        now += 1 if (matrix.exact is None) == (rows != slower) else 2

    monkeypatch.setattr(Step, "_product", product)
    monkeypatch.setattr("coterie.engine.step.time.perf_counter", lambda: now)
    step = Step.open(model(rounded=True), slots=4)
    assert step
    assert bool(step.in8) is taken
    assert len(step._keep) == len(set(map(id, step._keep))), "what was only measured is let go"


def test_the_measurement_multiplies_by_both(monkeypatch: pytest.MonkeyPatch) -> None:
    step = in8(decoder := model(rounded=True), monkeypatch)
    w, x = decoder.weights["0.down"], torch.ones(3, 160)
    for matrix in (step._exact(w), step._light(w)):
        assert torch.allclose(step._product(matrix, 3, 96, 160), x @ w.T, atol=1e-3)


def test_the_log_says_where_the_setting_changes_nothing(
    shop: Path, tiny_base: BaseModel, caplog: pytest.LogCaptureFixture
) -> None:
    """The tiny model's heads are too small for the step."""
    file = shop / "coterie.toml"
    text = file.read_text()
    for line, said in (("", False), ('weights = "int8"\n', True)):
        file.write_text(text.replace("slots = 4\n", f"slots = 4\n{line}"))
        caplog.clear()
        Business.open(shop).engine().close()
        assert ("weights = int8 changes nothing here" in caplog.text) is said
    assert Engine(tiny_base).close() is None
