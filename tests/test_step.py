"""The decoding step in C computes what PyTorch computes, for every kind of expert, whatever else is in the batch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.engine import step as native
from coterie.engine.engine import Engine
from coterie.engine.guess import continuation
from coterie.engine.request import Blend, Sampling, TokenChoice
from coterie.engine.shelf import Shelf
from coterie.engine.step import Prepared, Step
from coterie.experts import lora
from coterie.experts.expert import Expert
from coterie.experts.kinds import save
from coterie.experts.library import ExpertFacts, Library
from coterie.experts.lora import LoraConfig
from coterie.experts.mixture import lay, mixed
from coterie.model.decoder import SITES, Decoder, attend_packed
from coterie.model.load import BaseModel, load
from coterie.model.upcycle import upcycle
from support import KVCache, cache_of, groups_of, random_rows, train_tokenizer, trained
from test_experts import ALL, CONFIGS, ROWS

if native._library() is None:
    pytest.skip("needs a processor with AVX2 and a C compiler", allow_module_level=True)

DTYPE = native.dtype()

FAMILIES: dict[str, Any] = {
    "Llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "Qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),  # biases
    "Qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {}),  # normed queries and keys
    "Mixtral": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "wide": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"head_dim": 96, "tie_word_embeddings": False}),
}
TOKENS = 22  # more than the 16 that a vector holds


@dataclass(frozen=True)
class Model:
    """A base as the step takes it, the same weights computed in float32 by PyTorch, and the step in C."""

    base: BaseModel
    exact: Decoder
    step: Step


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A random model of each family; the vocabulary fills no block of 16, and no weight is zero or one."""
    out, tokenizer = {}, train_tokenizer()
    for family, (config, kind, more) in FAMILIES.items():
        folder = tmp_path_factory.mktemp("family") / family
        torch.manual_seed(0)
        sizes = {"vocab_size": 411, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
                 "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 160, "max_position_embeddings": 256,
                 "tie_word_embeddings": True, "initializer_range": 0.1}  # fmt: skip
        model = kind(config(**(sizes | more)))
        for name, weight in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                torch.nn.init.normal_(weight, float(name.endswith("norm.weight")), 0.2)
        model.save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(folder)
        out[family] = stepping(load(folder, DTYPE, packed=True))
    once = upcycle(out["Llama"].base, 3, "1", 1, 0)  # one layer of two, one expert for each token, gates below 1
    for name in ("1.experts.gate_up", "1.experts.down"):
        once.decoder.weights[name] += torch.randn_like(once.decoder.weights[name]) * 0.1  # they were copies
    config = replace(once.decoder.config, gate_normed=False)
    out["upcycled"] = stepping(replace(once, decoder=Decoder(config, once.decoder.weights, packed=True)))
    return out


def stepping(base: BaseModel) -> Model:
    step = Step.open(base.decoder)
    assert step is not None
    wide = {name: weight.float() for name, weight in base.decoder.weights.items()}
    return Model(base, Decoder(base.decoder.config, wide), step)


def experts_of(model: Model) -> list[Expert]:
    wide = replace(model.base, decoder=model.exact)
    kinds = [CONFIGS[name] for name in ROWS] + [LoraConfig(24, 30, ALL)]  # a rank of more than one block
    return [trained(config, wide, seed) for seed, config in enumerate(kinds)]


def scores(model: Model, rows: list[list[int]], groups: list[tuple[Prepared, int, int, float]]) -> list[Tensor]:
    """Scores after each token of rows of equal length, (rows, vocab), fed one by one."""
    cache = cache_of(model.base.decoder, len(rows), 64)
    embedded, slots = model.base.decoder.embed(torch.tensor(rows)), torch.arange(len(rows))
    return [
        model.step.run(embedded[:, t], torch.full((len(rows),), t), slots, cache, groups, slots)
        for t in range(len(rows[0]))
    ]


def wanted(
    decoder: Decoder, rows: list[list[int]], experts: list[Expert], owners: Tensor, shares: Tensor | None = None
) -> list[Tensor]:
    """The same by PyTorch."""
    cache = KVCache(decoder.config, len(rows), 64, decoder.dtype, torch.device("cpu"))
    ids, slots = torch.tensor(rows), torch.arange(len(rows))
    change = mixed(groups_of(owners, shares, [lay(e, decoder) for e in experts]), decoder)
    out = []
    for t in range(len(rows[0])):
        at = torch.full((len(rows),), t)
        out.append(decoder.logits(decoder.forward(ids[:, t], at, cache.attend_decode(slots, at), change)))
    return out


@pytest.mark.parametrize("family", [*FAMILIES, "upcycled"])
def test_every_kind_of_expert_and_the_base_get_the_scores_that_pytorch_gives(
    family: str, models: dict[str, Model]
) -> None:
    """Nearer to float32 than PyTorch in bfloat16 comes, for each row; in float32 all but the same."""
    model = models[family]
    experts = experts_of(model)
    owners = torch.tensor([-1, *sorted([*range(len(experts)), 0, 0])])
    rows = random_rows(model.base, [TOKENS] * len(owners))
    groups = []
    for i, expert in enumerate(experts):
        mine = (owners == i).nonzero()[:, 0]
        groups.append((model.step.prepare(expert), int(mine[0]), len(mine), 1.0))
    with torch.no_grad():
        exact = wanted(model.exact, rows, experts, owners)
        plain = wanted(model.base.decoder, rows, experts, owners)
        base = wanted(model.exact, rows, experts, torch.full_like(owners, -1))
    found = scores(model, rows, groups)
    error, theirs, effect = (
        torch.stack([(a - b).abs().mean(1) for a, b in zip(one, other, strict=True)]).mean(0)  # (rows)
        for one, other in ((found, exact), (plain, exact), (base, exact))
    )
    assert (effect[1:] > 5 * error[1:]).all(), "an expert whose effect does not show proves nothing"
    assert (error < (theirs if torch.bfloat16 == DTYPE else 1e-4 * effect[1:].mean())).all()


@given(
    owners=st.lists(st.integers(-1, len(ROWS)), min_size=1, max_size=20).map(sorted), row=st.integers(0, 19),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_a_rows_scores_are_the_same_bit_for_bit_alone_and_in_any_batch(
    owners: list[int], row: int, seed: int, models: dict[str, Model], prepared: list[Prepared]
) -> None:
    model, row = models["Llama"], row % len(owners)
    rows = random_rows(model.base, [3] * len(owners), seed)
    groups = [(prepared[i], owners.index(i), owners.count(i), 1.0) for i in sorted(set(owners)) if i >= 0]
    together = scores(model, rows, groups)
    alone = scores(model, [rows[row]], [(prepared[owners[row]], 0, 1, 1.0)] if owners[row] >= 0 else [])
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[row], b[0])


@given(
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6), family=st.sampled_from(("Qwen3", "Mixtral", "upcycled"))
)  # fmt: skip
def test_a_prompt_read_in_any_stretches_gives_the_same_bits(
    cuts: list[int], family: str, models: dict[str, Model]
) -> None:
    model = models[family]
    length = sum(cuts)
    rows = random_rows(model.base, [length] * 2)
    one_by_one = scores(model, rows, [])
    cache = cache_of(model.base.decoder, 2, 64)
    start = 0
    for count in cuts:
        span = torch.arange(start, start + count).repeat(2)
        slots = torch.arange(2).repeat_interleave(count)
        found = model.step.run(
            model.base.decoder.embed(torch.tensor(rows)[slots, span]), span, slots, cache, [], torch.arange(2 * count)
        )
        for t in range(count):
            assert torch.equal(found[[t, count + t]], one_by_one[start + t])
        start += count


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9), chunk=st.integers(1, 40),
    guessed=st.sampled_from((0, 8, 64)), repeats=st.integers(1, 6), family=st.sampled_from(("Llama", "Mixtral")),
)  # fmt: skip
@settings(max_examples=20)
def test_the_engine_writes_the_same_alone_in_any_batch_in_any_chunks_and_with_any_guesses(
    lengths: list[int], chunk: int, guessed: int, repeats: int, family: str, models: dict[str, Model], shelf: Library
) -> None:
    """Bit for bit: the log-probabilities too, of those that ask for them. A mixture has no experts beside its own."""
    prompts = [(row * repeats)[:40] for row in random_rows(models[family].base, lengths)]
    adapters = [None, *[(name, 1) for name in sorted(shelf.names()) if family == "Llama"]]

    def answers(together: bool, chunk: int, guessed: int) -> list[tuple[list[int], list[float | None]]]:
        with patch("coterie.engine.engine.CHUNK", chunk), patch("coterie.engine.engine.SPECULATED", guessed):
            engine = Engine(replace(models[family].base, eos=frozenset()), shelf, slots=5, context=64)
            try:
                out, waiting = [], []
                for n, prompt in enumerate(prompts):
                    want = Sampling(max_tokens=12 + n % 5, logprobs=1 if n % 3 == 0 else None)
                    waiting.append(engine.submit(prompt, want, adapters[n % len(adapters)]))
                    if not together or n == len(prompts) - 1:
                        for g in waiting:
                            chances = [choice.logprob for piece in g for choice in piece.tokens]
                            out.append((g.generated, chances))
                        waiting.clear()
                return out
            finally:
                engine.close()

    assert answers(True, chunk, guessed) == answers(False, 256, 0)


@pytest.fixture(scope="module")
def shelf(models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> Library:
    """An expert of each of a few kinds."""
    model = models["Llama"]
    library = Library(tmp_path_factory.mktemp("shelf"))
    for number, name in enumerate(("all projections", "DoRA", "Houlsby adapter", "soft prompt", "prefix")):
        expert = trained(CONFIGS[name], replace(model.base, decoder=model.exact), number)
        library.publish(
            ExpertFacts(f"e{number}", kind=CONFIGS[name].kind),
            lambda folder, e=expert: save(e, folder, "x", model.exact.config),  # type: ignore[misc]
        )
    return library


def test_an_expert_is_laid_out_for_pytorch_only_where_that_computes(models: dict[str, Model], shelf: Library) -> None:
    """The norms of DoRA read every matrix of the base: once for each site that the expert changes, and way."""
    decoder = models["Llama"].base.decoder
    kept = Shelf(shelf, decoder, models["Llama"].step, 2**30, frozenset())
    with patch.object(lora, "_row_norms", wraps=lora._row_norms) as norms:
        loaded = kept.open(("e1", 1))
        before = loaded.size
        assert norms.call_count == decoder.config.layers * len(SITES)
        assert loaded.prepared is not None
        assert loaded.laid is None
        assert kept.laid(loaded) is kept.laid(loaded)
    assert norms.call_count == 2 * decoder.config.layers * len(SITES)
    assert loaded.size > before


def test_right_guesses_save_steps(models: dict[str, Model]) -> None:
    """A model that repeats itself is guessed: fewer steps than tokens."""
    engine = Engine(replace(models["Llama"].base, eos=frozenset()), slots=2, context=200)
    try:
        engine.submit([5, 6, 7, 8] * 4, Sampling(max_tokens=120)).text()
        assert engine.stats.generated_tokens == 120
        assert engine.stats.steps < 100
    finally:
        engine.close()


@pytest.mark.parametrize(("tokens", "most", "wanted"), [
    ([1, 2, 3, 4, 5, 1, 2, 3], 2, [4, 5]), ([1, 2, 3, 4, 5, 1, 2, 3], 9, [4, 5, 1, 2, 3]),
    ([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 1, [8]), ([7, 7, 7, 7], 3, [7]),
    ([1, 2, 3, 4], 3, []), ([1], 3, []), ([], 3, []),
])  # fmt: skip
def test_a_continuation_is_what_followed_last_time(tokens: list[int], most: int, wanted: list[int]) -> None:
    assert continuation(tokens, most) == wanted


@pytest.fixture(scope="module")
def prepared(models: dict[str, Model]) -> list[Prepared]:
    return [models["Llama"].step.prepare(expert) for expert in experts_of(models["Llama"])]


@pytest.mark.parametrize("layers", [1, 2])
def test_the_trunk_is_the_residual_stream_after_the_lower_layers(layers: int, models: dict[str, Model]) -> None:
    model = models["Qwen3"]
    (row,) = random_rows(model.base, [TOKENS])
    at = torch.arange(TOKENS)
    wanted = model.exact.run(model.exact.embed(torch.tensor(row)), at, attend_packed([TOKENS]), layers=range(layers))
    found = model.step.trunk(row, layers)
    assert (found - wanted).abs().mean() < 0.02 * wanted.abs().mean()


def test_several_experts_of_one_row_add_up_in_their_shares(models: dict[str, Model]) -> None:
    model = models["Llama"]
    experts = experts_of(model)[:3]
    rows = random_rows(model.base, [TOKENS] * 2)
    shares = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.3, 0.2]])
    ready = [model.step.prepare(expert) for expert in experts]
    found = scores(model, rows, [(one, 1, 1, float(share)) for one, share in zip(ready, shares[1], strict=True)])
    with torch.no_grad():
        exact = wanted(model.exact, rows, experts, torch.full((2,), -1), shares)
        base = wanted(model.exact, rows, experts, torch.full((2,), -1))
    for one, other, plain in zip(found, exact, base, strict=True):
        assert (one - other).abs().mean() < 0.2 * (plain[1] - other[1]).abs().mean()


def test_the_engine_answers_alike_with_and_without_it(
    models: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through slots that move, blends, soft prompts and prefixes: the second token's log-probabilities agree."""
    model = models["Llama"]
    wide = replace(model.base, decoder=model.exact)
    library = Library(tmp_path)
    for number, config in enumerate(CONFIGS.values()):
        expert = trained(config, wide, number)
        library.publish(
            ExpertFacts(f"e{number}", kind=config.kind),
            lambda folder, e=expert: save(e, folder, "x", model.exact.config),  # type: ignore[misc]
        )
    prompts = random_rows(model.base, [5 + n % 7 for n in range(len(CONFIGS) + 3)])
    parts = ((("e0", 1), 0.7), (("e1", 1), 0.4))
    asked = [None, *[(f"e{n}", 1) for n in range(len(CONFIGS))], Blend(parts, "merge"), Blend(parts, "logits")]

    def answers() -> list[TokenChoice]:
        engine = Engine(replace(model.base, eos=frozenset()), library, slots=6, context=64)
        try:
            running = [
                engine.submit(prompt, Sampling(max_tokens=2 + n % 3, logprobs=20), adapter)
                for n, (prompt, adapter) in enumerate(zip(prompts, asked, strict=True))
            ]
            return [[choice for piece in g for choice in piece.tokens][1] for g in running]
        finally:
            engine.close()

    ours = answers()
    monkeypatch.setattr(Step, "open", classmethod(lambda cls, *_: None))
    for with_c, without in zip(ours, answers(), strict=True):
        one, other = dict(with_c.top), dict(without.top)
        both = one.keys() & other.keys()
        assert len(both) >= 8
        assert sum(abs(one[t] - other[t]) for t in both) / len(both) < 0.1


def test_where_it_cannot_be_built_pytorch_computes(
    models: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    native._library.cache_clear()
    try:
        assert Step.open(models["Llama"].base.decoder) is None
        assert "cannot be built" in caplog.text
    finally:
        native._library.cache_clear()


def test_other_models_are_left_to_pytorch(tiny: Path) -> None:
    assert Step.open(load(tiny, torch.bfloat16).decoder) is None  # heads of 16
    assert Step.open(load(tiny, torch.float32).decoder) is None


def test_a_base_in_what_the_step_does_not_compute_from_is_left_to_pytorch(models: dict[str, Model]) -> None:
    other = {name: weight.to(torch.float16) for name, weight in models["Llama"].exact.weights.items()}
    assert Step.open(Decoder(models["Llama"].exact.config, other)) is None


def test_packed_matrices_hold_every_number_where_step_c_reads_it() -> None:
    weight = torch.arange(20 * 7, dtype=torch.float32).view(20, 7).bfloat16()
    found = native.pack(weight, torch.bfloat16)
    assert found.shape == (2, 4, 16, 2)
    for out, wide in ((0, 0), (3, 4), (17, 6), (19, 5)):
        assert found[out // 16, wide // 2, out % 16, wide % 2] == weight[out, wide]
    assert found.float().sum() == weight.float().sum()
    assert native.pack(weight, torch.float32).shape == (2, 7, 16, 1)
