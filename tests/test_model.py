"""The decoder computes what transformers computes, alone, in packed batches and from its cache."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from coterie.data.read import read
from coterie.engine import step as native
from coterie.engine.step import Step
from coterie.errors import ModelError
from coterie.model.decoder import packed_positions, packs_bfloat16
from coterie.model.load import BaseModel, load
from support import KVCache, cache_of, logits_of, random_rows, reference_model, train_tokenizer

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n\n\nprint(add(2, 3))",
    "Grüße aus Köln: 12.345 € — 你好, мир! 🙂",
)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "SmolLM2, tied": ("Llama", {"tie_word_embeddings": True}),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama 3, stretched": ("Llama", {"rope_parameters": LLAMA3}),
    "linear positions": ("Llama", rope("linear", factor=4.0)),
    "dynamic positions, within the context": ("Llama", rope("dynamic", factor=2.0)),
    "Mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "Qwen2, with attention bias": ("Qwen2", {}),
    "Qwen2.5, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen3, with normed q and k": ("Qwen3", {"head_dim": 32}),
    "Qwen3, tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


def random_model(folder: Path, family: str, **changes: Any) -> transformers.PreTrainedModel:
    """Save a random transformers model into `folder`, with a tokenizer; every tensor random, norms and biases too."""
    facts = {
        "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "eos_token_id": 1,
    }  # fmt: skip
    config = getattr(transformers, family + "Config")(**facts | changes)
    torch.manual_seed(1)
    model = getattr(transformers, family + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.dim() > 1 else torch.rand_like(p) + 0.5)
    model.save_pretrained(folder)
    train_tokenizer().save(str(folder / "tokenizer.json"))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    model = random_model(tmp_path, family, **changes)
    base = load(tmp_path, torch.float32)
    (row,) = random_rows(base, [100])
    with torch.no_grad():
        wanted = model(torch.tensor([row])).logits[0]
    (found,) = logits_of(base, [row])
    assert wanted.std() > 0.5  # else any two models agree
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (rope("yarn", factor=4.0, original_max_position_embeddings=32), "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_a_model_whose_arithmetic_is_not_known_is_refused_not_computed_wrongly(
    changes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    random_model(tmp_path, "Llama", **changes)
    with pytest.raises(ModelError, match=word) as caught:
        load(tmp_path, torch.float32)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "context"),
    [
        ("Mistral", {"sliding_window": 16}, 16),
        ("Mistral", {"sliding_window": 4096}, 128),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, 16),
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 16}, 128),
    ],
)
def test_a_sliding_window_bounds_the_context(
    family: str, changes: dict[str, Any], context: int, tmp_path: Path
) -> None:
    random_model(tmp_path, family, **changes)
    assert load(tmp_path, torch.float32).decoder.config.context == context


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_packed_batch_gives_each_sequence_what_it_gets_alone(
    tiny_base: BaseModel, lengths: list[int], seed: int
) -> None:
    rows = random_rows(tiny_base, lengths, seed)
    for row, packed in zip(rows, logits_of(tiny_base, rows), strict=True):
        torch.testing.assert_close(packed, logits_of(tiny_base, [row])[0], atol=1e-4, rtol=1e-4)


@given(data=st.data())
def test_decoding_from_the_cache_equals_one_whole_forward(tiny_base: BaseModel, data: st.DataObject) -> None:
    """Prompts of any lengths in any cache slots, then one token at a time for all of them."""
    decoder, device = tiny_base.decoder, tiny_base.decoder.device
    count, steps = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    prompts = data.draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    slots = data.draw(st.permutations(range(4)))[:count]
    rows = random_rows(tiny_base, [p + steps for p in prompts], data.draw(st.integers(0, 99)))
    cache = KVCache(decoder.config, 4, 20, decoder.dtype, device)
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    with torch.no_grad():
        ids = torch.tensor([t for row, p in zip(rows, prompts, strict=True) for t in row[:p]], device=device)
        owners = torch.tensor(slots, device=device).repeat_interleave(torch.tensor(prompts, device=device))
        positions = packed_positions(prompts, device)
        hidden = decoder.forward(ids, positions, cache.attend_prefill(owners, positions, prompts))
        for i, part in enumerate(decoder.logits(hidden).split(prompts)):
            found[i].append(part)
        for step in range(steps):
            at = torch.tensor(prompts, device=device) + step
            ids = torch.tensor([row[int(p)] for row, p in zip(rows, at, strict=True)], device=device)
            hidden = decoder.forward(ids, at, cache.attend_decode(torch.tensor(slots, device=device), at))
            for i, part in enumerate(decoder.logits(hidden).split(1)):
                found[i].append(part)
    for row, parts in zip(rows, found, strict=True):
        torch.testing.assert_close(torch.cat(parts).cpu(), logits_of(tiny_base, [row])[0], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def smol32(smol_path: Path) -> BaseModel:
    return load(smol_path, torch.float32)


@pytest.fixture(scope="module")
def smol_reference(smol_path: Path) -> transformers.PreTrainedModel:
    return reference_model(smol_path)


@pytest.mark.parametrize("text", TEXTS, ids=("prose", "code", "many scripts"))
def test_smollm2_scores_as_in_transformers(
    text: str, smol32: BaseModel, smol_reference: transformers.PreTrainedModel
) -> None:
    ids = smol32.encode(text)
    with torch.no_grad():
        wanted = smol_reference(torch.tensor([ids])).logits[0]
    (found,) = logits_of(smol32, [ids])
    assert (found - wanted).abs().max() < 1e-3
    assert found.argmax(-1).tolist() == wanted.argmax(-1).tolist()


@pytest.mark.skipif(native._library() is None, reason="needs a processor with AVX2 and a C compiler")
def test_the_step_in_c_chooses_the_token_that_transformers_chooses_in_float32(
    smol_path: Path, smol_reference: transformers.PreTrainedModel, public_data: Callable[[str], Path]
) -> None:
    """Of SmolLM2, over all tokens, near ties too.

    In bfloat16, of 6,258 of customers' questions it is 99.6%; of 5,760 of Shakespeare 99.0%, and PyTorch comes to 97%.
    """
    dtype = native.dtype()
    base = load(smol_path, dtype, packed=True)
    step = Step.open(base.decoder)
    assert step is not None
    asked = read(public_data("banking77/test.csv"), {"prompt": "text", "completion": "category"}, "")
    rows = [base.encode(base.chat(list(e.prompt))) for e in islice(asked, 40 if torch.bfloat16 == dtype else 10)]
    agreed = 0
    for row in rows:
        at, slots = torch.arange(len(row)), torch.zeros(len(row), dtype=torch.long)
        cache = cache_of(base.decoder, 1, len(row))
        found = step.run(base.decoder.embed(torch.tensor(row)), at, slots, cache, [], at)
        with torch.no_grad():
            wanted = smol_reference(torch.tensor([row])).logits[0]
        agreed += int((found.argmax(-1) == wanted.argmax(-1)).sum())
    assert agreed > 0.99 * sum(map(len, rows))


@pytest.mark.skipif(not packs_bfloat16(), reason="bfloat16 is only emulated on this processor")
def test_bfloat16_chooses_the_token_of_float32_wherever_the_choice_is_clear(
    smol_path: Path, smol32: BaseModel, public_data: Callable[[str], Path]
) -> None:
    """Over all tokens the two agree on 96.5%, transformers' own bfloat16 on 96.9%.

    The rest are near ties, which rounding may turn; so only those that lead by 0.25 or more count.
    """
    text = public_data("tinyshakespeare/input.txt").read_text()
    half = load(smol_path, torch.bfloat16, packed=True)
    rows = [smol32.encode(text[at : at + 1000])[:160] for at in range(0, 20_000, 5_000)]
    exact, rounded = (torch.cat(logits_of(model, rows)) for model in (smol32, half))
    top = exact.topk(2).values
    clear = top[:, 0] - top[:, 1] > 0.25
    assert int(clear.sum()) > 400
    agree = (exact.argmax(-1) == rounded.argmax(-1)).double()
    assert agree[clear].mean() > 0.99
    assert agree.mean() > 0.94


def test_smollm2_goes_on_sensibly(smol: BaseModel) -> None:
    (scores,) = logits_of(smol, [smol.encode(TEXTS[0])])
    assert smol.tokenizer.decode([int(scores[-1].argmax())]).strip() == "Rome"
