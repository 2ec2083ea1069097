"""Weights in 8 bits: products by them, when the engine takes them, and what it then writes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from torch import Tensor

from coterie.business import Business
from coterie.engine import rounded as choice
from coterie.engine.engine import Engine
from coterie.engine.request import Sampling
from coterie.experts import lora
from coterie.experts.expert import Expert
from coterie.experts.kinds import apply, save
from coterie.experts.library import ExpertFacts, Library
from coterie.experts.lora import LoraConfig
from coterie.model import int8
from coterie.model.decoder import Decoder, KVCache
from coterie.model.int8 import Int8Matrix
from coterie.model.load import BaseModel, load
from support import random_rows, trained

SHAPES = [(1, 1), (5, 7), (16, 64), (17, 33), (70, 64), (130, 96)]  # outputs, inputs; int8.c takes 16 and 64 together
COUNT = 12  # tokens of the answers that are compared

pytestmark = pytest.mark.skipif(
    not int8.computes(torch.float32), reason="needs a processor with AVX2, and a C compiler"
)


def weight(out: int, wide: int) -> Tensor:
    return torch.randn(out, wide, generator=torch.Generator().manual_seed(out * wide))


def stands_for(matrix: Int8Matrix) -> Tensor:
    """What it multiplies by, (out, in): one input at a time."""
    return matrix.product(torch.eye(matrix.shape[1])).T


# Matrices


@pytest.mark.parametrize(("out", "wide"), SHAPES)
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_a_number_is_off_by_at_most_half_a_step_of_its_group(out: int, wide: int, shift: float) -> None:
    w = weight(out, wide) + shift
    w[0] = 0
    off = (stands_for(Int8Matrix(w)) - w).abs()
    for first in range(0, wide, int8.GROUP):
        group = w[:, first : first + int8.GROUP]
        step = (group.amax(1, keepdim=True).clamp_min(0) - group.amin(1, keepdim=True).clamp_max(0)) / 127
        assert (off[:, first : first + int8.GROUP] <= 0.5 * step + 1e-6).all()
    assert not off[0].any()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_what_gguf_has_rounded_is_kept(kind: str) -> None:
    rounded = gguf.quants.quantize(weight(48, 96).numpy(), gguf.GGMLQuantizationType[kind])
    w = torch.from_numpy(gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType[kind]))
    assert torch.allclose(stands_for(Int8Matrix(w)), w, atol=1e-6)


@pytest.mark.parametrize(("out", "wide"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 20])
def test_products_are_those_of_the_rounded_matrix(out: int, wide: int, rows: int) -> None:
    matrix, x, bias = Int8Matrix(weight(out, wide)), weight(rows, wide), weight(1, out)[0]
    wanted = x @ stands_for(matrix).T
    assert torch.allclose(matrix.product(x), wanted, atol=1e-4)
    assert torch.allclose(matrix.product(x, bias), wanted + bias, atol=1e-4)
    assert torch.allclose(matrix.product(x.T.contiguous().T), wanted, atol=1e-4)  # not contiguous


def test_a_row_is_the_same_to_the_bit_alone_and_in_any_batch() -> None:
    matrix, x = Int8Matrix(weight(150, 96)), weight(40, 96)
    alone = torch.cat([matrix.product(row[None]) for row in x])
    for count in range(1, 41):
        assert torch.equal(matrix.product(x[:count]), alone[:count])
        assert torch.equal(matrix.product(x[40 - count :]), alone[40 - count :])


def test_threads_change_nothing() -> None:
    matrix, x, threads = Int8Matrix(weight(150, 96)), weight(9, 96), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = matrix.product(x)
        torch.set_num_threads(3)
        assert torch.equal(matrix.product(x), one)
    finally:
        torch.set_num_threads(threads)


# When they are taken


@pytest.mark.parametrize(
    ("exact", "rounded", "most"),
    [
        ({1: 4, 2: 4, 4: 4}, {1: 1, 2: 2, 4: 3}, 4),
        ({1: 4, 2: 4, 4: 4}, {1: 1, 2: 2, 4: 5}, 2),
        ({1: 4, 2: 4, 4: 4}, {1: 1, 2: 5, 4: 1}, 1),  # a batch between must not be slower
        ({1: 4, 2: 4, 4: 4}, {1: 4, 2: 1, 4: 1}, 0),  # as fast is not faster
    ],
)
def test_they_are_taken_up_to_the_rows_at_which_they_stop_being_faster(
    monkeypatch: pytest.MonkeyPatch, exact: dict[int, float], rounded: dict[int, float], most: int
) -> None:
    now = 0.0

    def way(seconds: dict[int, float]) -> Callable[[int], None]:
        def work(rows: int) -> None:
            nonlocal now
            now += seconds[rows]

        return work

    monkeypatch.setattr(int8, "time", SimpleNamespace(perf_counter=lambda: now))
    assert int8.wins_up_to(way(exact), way(rounded), [1, 2, 4]) == most


@pytest.mark.parametrize("slots", [1, 5, 16])
def test_the_measurement_runs_both_ways_for_every_size_of_batch(
    monkeypatch: pytest.MonkeyPatch, tiny_base: BaseModel, slots: int
) -> None:
    asked: list[list[int]] = []

    def all_win(exact: Callable[[int], None], light: Callable[[int], None], rows: list[int]) -> int:
        for way in (exact, light):
            for count in rows:
                way(count)
        asked.append(rows)
        return rows[-1]

    monkeypatch.setattr(int8, "wins_up_to", all_win)
    found = choice.rounded(tiny_base.decoder, slots)
    assert found
    assert found.most == slots
    assert asked[0][0] == 1
    assert asked[0][-1] == slots
    size = sum(w.numel() for w in (tiny_base.decoder.weights[name] for name in tiny_base.decoder.matrices))
    assert size <= found.nbytes < 1.3 * size  # a byte a number, and 8 for 32 of them
    monkeypatch.setattr(int8, "wins_up_to", lambda *_: 0)
    assert choice.rounded(tiny_base.decoder, slots) is None


def test_where_they_cannot_be_computed_the_weights_stay_exact_and_the_log_says_so(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert choice.rounded(load(tiny, torch.bfloat16).decoder, 4) is None
    assert "weights = int8 changes nothing here" in caplog.text


def test_the_exact_decoder_and_its_mark_stay_as_they_are(tiny_base: BaseModel) -> None:
    exact = tiny_base.decoder
    x = weight(3, exact.config.width)
    before, light = exact.linear(x, "0.qkv"), exact.in_int8()
    assert torch.equal(exact.linear(x, "0.qkv"), before)
    assert not torch.equal(light.linear(x, "0.qkv"), before)
    assert light.mark == exact.mark
    assert set(light.int8) == set(exact.matrices)


# What the engine writes


@pytest.fixture(scope="module")
def experts(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Library, dict[str, Expert]]:
    library, made = Library(tmp_path_factory.mktemp("library")), {}
    for seed, name in enumerate(("plain", "scaled")):
        expert = made[name] = trained(LoraConfig(4, 16, dora=name == "scaled"), tiny_base, seed)
        facts = ExpertFacts(name, "lora")
        library.publish(facts, lambda to, e=expert: save(e, to, "tiny", tiny_base.decoder.config))  # type: ignore[misc]
    return library, made


@pytest.fixture
def engine(
    tiny_base: BaseModel, experts: tuple[Library, dict[str, Expert]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """An engine with rounded weights for batches of up to 4, whatever is faster here."""
    monkeypatch.setattr(int8, "wins_up_to", lambda _exact, _light, rows: rows[-1])
    engine = Engine(tiny_base, experts[0], slots=4, context=128, weights="int8")
    yield engine
    engine.close()


@torch.inference_mode()
def written(reads: Decoder, writes: Decoder, prompt: list[int], expert: Expert | None) -> tuple[list[int], list[float]]:
    """The greedy answer of plain passes, a decoder for the prompt and one for what follows, with log-probabilities."""
    cache = KVCache(reads.config, 1, len(prompt) + COUNT, reads.dtype, reads.device)
    change, slot = apply(expert, reads).change if expert else None, torch.zeros(1, dtype=torch.long)
    at = torch.arange(len(prompt))
    attend = cache.attend_prefill(slot.repeat(len(prompt)), at, [len(prompt)])
    scores = reads.logits(reads.forward(torch.tensor(prompt), at, attend, change)[-1:])
    ids, logprobs = list[int](), list[float]()
    while len(ids) < COUNT:
        ids.append(int(scores.argmax()))
        logprobs.append(float(scores.log_softmax(1).max()))
        at = torch.tensor([len(prompt) + len(ids) - 1])
        hidden = writes.forward(torch.tensor(ids[-1:]), at, cache.attend_decode(slot, at), change)
        scores = writes.logits(hidden)
    return ids, logprobs


def test_prompts_are_read_exactly_and_answers_written_with_rounded_weights(
    engine: Engine, tiny_base: BaseModel, experts: tuple[Library, dict[str, Expert]]
) -> None:
    """Alone and in one batch, of the base and of experts on top."""
    exact, light = tiny_base.decoder, tiny_base.decoder.in_int8()
    prompts = random_rows(tiny_base, [9, 5, 30], seed=2)
    askers = list(zip(prompts, (None, "plain", "scaled"), strict=True))
    sampling = Sampling(max_tokens=COUNT, logprobs=0)

    def ask(batch: list[tuple[list[int], str | None]]) -> list[list[float]]:
        under_way = [engine.submit(prompt, sampling, (name, 1) if name else None) for prompt, name in batch]
        return [[choice.logprob or 0.0 for piece in each for choice in piece.tokens] for each in under_way]

    alone, together = [ask([asker])[0] for asker in askers], ask(askers)
    differs = False
    for (prompt, name), got, by_itself in zip(askers, together, alone, strict=True):
        assert torch.allclose(torch.tensor(got), torch.tensor(by_itself), atol=1e-4)
        expert = experts[1][name] if name else None
        _, wanted = written(exact, light, prompt, expert)
        _, plain = written(exact, exact, prompt, expert)
        count = min(len(got), COUNT)
        assert count > 2
        assert torch.allclose(torch.tensor(got[:count]), torch.tensor(wanted[:count]), atol=1e-4)
        differs |= not torch.allclose(torch.tensor(got[:count]), torch.tensor(plain[:count]), atol=1e-3)
        assert abs(got[0] - plain[0]) < 1e-4  # the first token comes out of the prompt
    assert differs


def test_larger_batches_than_those_that_gain_are_exact(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    monkeypatch.setattr(int8, "wins_up_to", lambda *_: 1)
    assert engine.rounded
    small = Engine(tiny_base, None, slots=4, context=128, weights="int8")
    used: list[int] = []
    assert small.rounded
    product = small.rounded.decoder.forward
    monkeypatch.setattr(
        small.rounded.decoder, "forward", lambda ids, *more: (used.append(len(ids)), product(ids, *more))[1]
    )
    try:
        sampling = Sampling(max_tokens=COUNT)
        prompts = random_rows(tiny_base, [5, 5, 5], seed=4)
        for each in [small.submit(prompt, sampling) for prompt in prompts]:
            each.text()
        assert set(used) <= {1}
        small.submit(prompts[0], sampling).text()
        assert 1 in used
    finally:
        small.close()


def test_weights_are_exact_unless_the_business_says_otherwise(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "wins_up_to", lambda _exact, _light, rows: rows[-1])
    file = shop / "coterie.toml"
    text = file.read_text()
    for line, wanted in (("", None), ('weights = "exact"\n', None), ('weights = "int8"\n', 4)):
        file.write_text(text.replace("slots = 4\n", f"slots = 4\n{line}"))
        engine = Business.open(shop).engine()
        engine.close()
        assert (engine.rounded.most if engine.rounded else None) == wanted


def test_low_rank_updates_know_nothing_of_it(tiny_base: BaseModel) -> None:
    """DoRA's lengths come from the exact matrices."""
    expert = trained(LoraConfig(4, 16, dora=True), tiny_base, 3)
    exact, light = lora.sites_of(expert, tiny_base.decoder), lora.sites_of(expert, tiny_base.decoder.in_int8())
    for place, site in exact.items():
        assert site.gain is not None
        other = light[place].gain
        assert other is not None
        assert torch.equal(site.gain, other)
