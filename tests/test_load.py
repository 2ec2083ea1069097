"""Base models load from safetensors and GGUF as written, and what is damaged or unknown is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tokenizers import Tokenizer

from coterie.errors import ModelError
from coterie.model.load import load
from coterie.model.pull import find, pull
from support import interleave, logits_of, random_rows, write_gguf

LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
QUANTISED = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
K_QUANTS = (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
FACTS = {
    "embedding_length": 64, "block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 2,
    "feed_forward_length": 128, "context_length": 512, "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 10000.0,
}  # fmt: skip


def tiny_gguf(path: Path, tiny: Path, kind: Kind = Kind.F32, more: dict[str, Any] | None = None, **kw: Any) -> Path:
    """The tiny model as a GGUF file whose matrices are quantised as `kind`."""
    weights = {k: v.numpy() for k, v in load_file(tiny / "model.safetensors").items()}
    plain = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    for n in range(2):
        for ours, theirs in LAYER.items():
            w = weights[f"model.layers.{n}.{theirs}.weight"]
            heads = {"attn_q": 4, "attn_k": 2}.get(ours)
            plain[f"blk.{n}.{ours}.weight"] = interleave(w, heads) if heads else w
    tensors = {
        name: (gguf.quants.quantize(w, kind), kind) if w.ndim == 2 else (w, Kind.F32) for name, w in plain.items()
    } | kw.pop("tensors", {})
    return write_gguf(path, tensors, Tokenizer.from_file(str(tiny / "tokenizer.json")), FACTS | (more or {}), **kw)


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda k: k.name)
def test_gguf_loads_the_weights_that_were_quantised(kind: Kind, tiny: Path, tmp_path: Path) -> None:
    base = load(tiny_gguf(tmp_path / "m.gguf", tiny, kind), torch.float32)
    exact = load(tiny, torch.float32)
    for name, w in exact.decoder.weights.items():
        found = base.decoder.weights[name].cpu()
        if w.dim() == 2:
            # Quantising works row by row, so doing it before or after the rows are put in order is the same.
            w = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w.cpu().numpy(), kind), kind).copy())
        assert torch.equal(found, w.cpu()), name


@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda k: k.name)
def test_gguf_loads_k_quants_as_the_gguf_package_reads_them(kind: Kind, tiny: Path, tmp_path: Path) -> None:
    """The package cannot write these, so the bytes are random. Blocks hold 256 numbers: one layer of that width."""
    rng = np.random.default_rng(0)
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    rows = {"attn_q": 256, "attn_k": 256, "attn_v": 256, "attn_output": 256, "ffn_gate": 256, "ffn_up": 256}
    shapes = {f"blk.0.{n}": r for n, r in rows.items()} | {"blk.0.ffn_down": 256, "token_embd": 392}
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = {n: rng.integers(0, 60, (r, 256 // block * size), dtype=np.uint8) for n, r in shapes.items()}
    norms = {n: (np.ones(256, np.float32), Kind.F32) for n in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")}
    tensors = {f"{n}.weight": pair for n, pair in ({n: (r, kind) for n, r in raw.items()} | norms).items()}
    facts = FACTS | {"embedding_length": 256, "block_count": 1, "feed_forward_length": 256}
    facts["attention.head_count_kv"] = 4
    base = load(write_gguf(tmp_path / "m.gguf", tensors, tokenizer, facts, family="qwen2"), torch.float32)
    fused = {"embed": ["token_embd"], "0.qkv": ["blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v"],
             "0.gate_up": ["blk.0.ffn_gate", "blk.0.ffn_up"], "0.down": ["blk.0.ffn_down"]}  # fmt: skip
    for name, parts in fused.items():
        wanted = np.concatenate([gguf.quants.dequantize(raw[p], kind) for p in parts])
        assert np.isfinite(wanted).all()
        assert wanted.std() > 0
        assert np.array_equal(base.decoder.weights[name].cpu().numpy(), wanted), name


def test_gguf_and_safetensors_of_a_model_give_the_same_tokens_and_scores(tiny: Path, tmp_path: Path) -> None:
    exact, base = load(tiny, torch.float32), load(tiny_gguf(tmp_path / "m.gguf", tiny), torch.float32)
    rows = random_rows(base, [30, 7])
    for a, b in zip(logits_of(base, rows), logits_of(exact, rows), strict=True):
        torch.testing.assert_close(a, b)
    for text in ("Hello, wörld! 123", "<|im_start|>user\nHi<|im_end|>\n", "  two  spaces\n\n\ttab 你好"):
        assert base.encode(text) == exact.encode(text)
        assert base.tokenizer.decode(base.encode(text), skip_special_tokens=False) == text
    assert (base.eos, base.eos_token, base.bos_token) == (exact.eos, exact.eos_token, exact.bos_token)


def test_gguf_with_stretched_positions_of_llama_3_computes_them(tiny: Path, tmp_path: Path) -> None:
    """llama.cpp's converter stores what each frequency is divided by in `rope_freqs.weight`."""
    factors = np.array([1, 1, 1.5, 2, 4, 8, 8, 8], np.float32)
    path = tiny_gguf(tmp_path / "m.gguf", tiny, tensors={"rope_freqs.weight": (factors, Kind.F32)})
    base = load(path, torch.float32)
    plain = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    wanted = np.cos(np.outer(np.arange(512), plain / factors))
    np.testing.assert_allclose(base.decoder.cos.cpu().numpy(), wanted, atol=1e-3)


def test_gguf_keeps_tokens_that_a_vocabulary_defines_beside_the_special_ones_whole(tiny: Path, tmp_path: Path) -> None:
    """Type 4, such as Qwen3's <think>: found in text as one token, and not left out of the answer."""
    token = next(
        t
        for t in Tokenizer.from_file(str(tiny / "tokenizer.json")).get_vocab()
        if t.isascii() and t.isalpha() and len(t) > 2
    )
    base = load(tiny_gguf(tmp_path / "m.gguf", tiny, kinds={token: 4}), torch.float32)
    text = f"zz{token}zz"
    number = base.tokenizer.token_to_id(token)
    assert number in base.encode(text)
    assert base.tokenizer.decode(base.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "in 2024", ["in", "Ġ", "2", "0", "2", "4"]),
        ("llama-bpe", "x 12345!", ["x", "Ġ", "123", "45", "!"]),
        ("qwen2", "x 12!", ["x", "Ġ", "1", "2", "!"]),
        ("gpt-2", "x 12345!", ["x", "Ġ12345", "!"]),
    ],
)
def test_gguf_splits_text_as_the_tokenizer_it_names(
    pre: str, text: str, pieces: list[str], tiny: Path, tmp_path: Path
) -> None:
    tokenizer = load(tiny_gguf(tmp_path / "m.gguf", tiny, pre=pre), torch.float32).tokenizer
    assert [p for p, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    facts = {k: v for k, v in (json.loads(file.read_text()) | changes).items() if v != "absent"}
    file.write_text(json.dumps(facts))


def _cut(file: Path, share: float) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * share)])


def _pickle_only(folder: Path) -> None:
    torch.save({"model.embed_tokens.weight": torch.ones(2)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "unknown architecture": (lambda f: _edit(f, model_type="mamba"), "config.json.*mamba.*known: llama"),
    "config lacks a field": (lambda f: _edit(f, hidden_size="absent"), "config.json.*hidden_size"),
    "config of another size": (lambda f: _edit(f, intermediate_size=96), "model.layers.0.mlp.gate_proj.weight"),
    "more layers than weights": (lambda f: _edit(f, num_hidden_layers=3), "lack model.layers.2"),
    "quantised by another library": (lambda f: _edit(f, quantization_config={"a": 1}), "config.json.*quanti"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "broken tokenizer": (lambda f: _cut(f / "tokenizer.json", 0.5), "tokenizer.json"),
    "broken tokenizer_config": (lambda f: _cut(f / "tokenizer_config.json", 0.5), "tokenizer_config.json"),
    "weights cut in the middle": (lambda f: _cut(f / "model.safetensors", 0.5), "model.safetensors"),
    "weights cut in the header": (lambda f: _cut(f / "model.safetensors", 0.001), "model.safetensors"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "weights absent": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "weights only as pickle": (_pickle_only, "pickle|pytorch_model.bin"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(damage: str, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny, folder)
    load(folder, torch.float32)
    break_it, words = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(ModelError, match=words) as caught:
        load(folder, torch.float32)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_gguf_is_refused_by_name(share: float, tiny: Path, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "cut.gguf", tiny)
    _cut(path, share)
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        load(path, torch.float32)


@pytest.mark.parametrize(
    ("more", "options", "words"),
    [
        ({}, {"family": "mamba"}, "mamba.*known: llama"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}, "yarn"),
        ({"block_count": 3}, {}, "lack.*model.layers.2"),
        ({}, {"tensors": {"output_norm.weight": (np.ones(64, np.int32), Kind.I32)}}, "output_norm.weight"),
    ],
)
def test_a_gguf_that_cannot_be_served_is_refused_by_name(
    more: dict[str, Any], options: dict[str, Any], words: str, tiny: Path, tmp_path: Path
) -> None:
    path = tiny_gguf(tmp_path / "odd.gguf", tiny, more=more, **options)
    with pytest.raises(ModelError, match=words) as caught:
        load(path, torch.float32)
    assert "odd.gguf" in str(caught.value)


def test_a_gguf_without_its_facts_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"bare\.gguf: lacks"):
        load(tmp_path / "bare.gguf", torch.float32)


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no such model"):
        load(tmp_path / "none", torch.float32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path / "empty", torch.float32)
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find("some/model") is None
    with pytest.raises(ModelError, match="unknown base model 'some/model'"):
        pull("some/model")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_model_is_found_by_path_and_on_the_shelf_of_coterie_home(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path))
    shutil.copytree(tiny, tmp_path / "models" / "some--model")
    assert pull("some/model") == tmp_path / "models" / "some--model"
    assert pull(str(tiny)) == tiny


def test_the_end_of_an_answer_is_known_where_config_json_does_not_say(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "silent"
    shutil.copytree(tiny, folder)
    _edit(folder, eos_token_id=None)
    base = load(folder, torch.float32)
    assert base.eos == {base.tokenizer.token_to_id("<|im_end|>")}
