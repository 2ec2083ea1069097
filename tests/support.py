"""What several tests need: a tokenizer trained on the spot, a GGUF writer, and plain forward passes."""

import json
import threading
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from coterie.engine.pages import Pages
from coterie.experts.expert import Applied, Expert
from coterie.experts.kinds import KINDS, apply
from coterie.model.decoder import Attend, Change, Decoder, ModelConfig, attend_packed, packed_positions
from coterie.model.load import BaseModel
from coterie.tuning.forward import hidden_states

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.", "Which color has the sky? The sky is blue.",
    "Name the color of a ripe tomato: red.", "Hello, I am Ada. Welcome, Ada!", "Good day, where is my order?",
    "system user assistant", "The grass is green and the lemon is yellow.", "What color has the sea in the morning?",
)  # fmt: skip


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of a few hundred tokens, able to spell anything."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")],
    )  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def logits_of(base: BaseModel, rows: list[list[int]], change: Change | None = None) -> list[Tensor]:
    """Scores (tokens, vocab) of each row, all rows packed into one forward."""
    lengths, device = [len(row) for row in rows], base.decoder.device
    ids = torch.tensor([t for row in rows for t in row], device=device)
    with torch.no_grad():
        hidden = base.decoder.forward(ids, packed_positions(lengths, device), attend_packed(lengths), change)
        return list(base.decoder.logits(hidden).cpu().split(lengths))


def random_rows(base: BaseModel, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Rows of random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, base.decoder.config.vocab, n).tolist() for n in lengths]


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter stores them (`LlamaModel.permute` in convert_hf_to_gguf.py)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(
    path: Path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]], tokenizer: Tokenizer,
    facts: dict[str, Any], family: str = "llama", pre: str = "default", kinds: dict[str, int] | None = None,
) -> Path:  # fmt: skip
    """A GGUF file of `tensors`, each the bytes of a quantised matrix and its type, with a byte-level BPE."""
    writer = gguf.GGUFWriter(path, family)
    for key, value in facts.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        (writer.add_string if isinstance(value, str) else add)(f"{family}.{key}", value)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([t for t, _ in vocab])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    special = {"<|im_start|>": 3, "<|im_end|>": 3} | (kinds or {})
    writer.add_token_types([special.get(t, 1) for t, _ in vocab])
    writer.add_bos_token_id(tokenizer.token_to_id("<|im_start|>"))
    writer.add_eos_token_id(tokenizer.token_to_id("<|im_end|>"))
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reference_model(path: Path) -> transformers.PreTrainedModel:
    """The same model in transformers, in float32: a folder of safetensors, or one with a GGUF file.

    transformers reads the file's head twice, and makes its table of names anew for each of 397 modules; once will do.
    """
    ggufs = list(path.glob("*.gguf"))
    options = {"gguf_file": ggufs[0].name} if ggufs else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()


class KVCache:
    """What the engine's pages are compared with: keys and values of `slots` sequences of up to `length` tokens in one
    piece, (layers, slots, Hkv, length, D)."""

    def __init__(self, config: ModelConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.layers, slots, config.kv_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def attend_prefill(self, slots: Tensor, positions: Tensor, lengths: list[int]) -> Attend:
        """Packed attention over whole prompts that also fills the cache; `slots`, `positions` are (N)."""
        inner = attend_packed(lengths)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer][slots, :, positions] = k
            self.values[layer][slots, :, positions] = v
            return inner(layer, q, k, v)

        return attend

    def attend_decode(self, slots: Tensor, positions: Tensor) -> Attend:
        """One new token for each sequence; the heads of a group stand as queries, so nothing is repeated."""
        span = int(positions.max()) + 1
        mask = (torch.arange(span, device=positions.device) <= positions[:, None])[:, None, None]  # (B,1,1,S)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer][slots, :, positions] = k
            self.values[layer][slots, :, positions] = v
            keys, values = self.keys[layer, slots, :, :span], self.values[layer, slots, :, :span]
            grouped = q.view(len(q), k.shape[1], -1, q.shape[-1])  # (B, Hkv, G, D)
            mixed: Tensor = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).view_as(q)
            return mixed

        return attend


def groups_of(owners: Tensor, shares: Tensor | None, experts: list[Any]) -> list[tuple[Any, int, int, float]]:
    """As a step wants them: each row's expert (`owners` (N), -1 for none), and `shares` (N, experts) of several."""
    alone = [(experts[i], n, 1, 1.0) for n, i in enumerate(owners.tolist()) if i >= 0]
    rows = [] if shares is None else shares.tolist()
    return alone + [(experts[i], n, 1, w) for n, row in enumerate(rows) for i, w in enumerate(row) if w]


def cache_of(decoder: Decoder, slots: int, length: int) -> Pages:
    """Room for `slots` sequences of `length` tokens."""
    cache = Pages(decoder.config, slots, length, decoder.dtype)
    for slot in range(slots):
        cache.make_room(cache.begin(slot, cache.parts(None, decoder.config.layers), []), slot, length)
    return cache


def reference_tokenizer(path: Path) -> transformers.PreTrainedTokenizerBase:
    """The same model's tokenizer in transformers."""
    ggufs = list(path.glob("*.gguf"))
    return transformers.AutoTokenizer.from_pretrained(path, **({"gguf_file": ggufs[0].name} if ggufs else {}))


def fresh(config: Any, base: BaseModel, seed: int = 0) -> Expert:
    """A new expert of any kind but full."""
    module = KINDS[config.kind]
    words = base.encode("Hello, Ada") if config.kind in ("prompt", "prefix") else seed
    expert: Expert = module.fresh(config, base.decoder, words)
    return expert


def trained(config: Any, base: BaseModel, seed: int = 0) -> Expert:
    """An expert as if it had been trained: no matrix is zero."""
    expert = fresh(config, base, seed)
    generator = torch.Generator().manual_seed(seed)
    for w in expert.weights.values():
        w.add_(torch.randn(w.shape, generator=generator) * 0.1)
    return expert


def logits_with(base: BaseModel, rows: list[list[int]], expert: Expert | None) -> list[torch.Tensor]:
    """Scores (tokens, vocab) of each row with an expert applied as in training, without gradients."""
    applied = apply(expert, base.decoder) if expert else Applied()
    with torch.no_grad():
        hidden = hidden_states(base.decoder, applied, [torch.tensor(row) for row in rows])
        return list(base.decoder.logits(hidden).cpu().split([len(row) for row in rows]))


def greedy(base: BaseModel, prompt: list[int], count: int, expert: Expert | None = None) -> tuple[list[int], float]:
    """At most `count` tokens, each by a whole forward pass, and the least lead of a chosen score over the next.

    Where the lead is clear, rounding cannot turn a choice, and whoever computes the same chooses the same.
    """
    ids, lead = list(prompt), float("inf")
    while len(ids) < len(prompt) + count:
        top = logits_with(base, [ids], expert)[0][-1].topk(2)
        lead = min(lead, float(top.values[0] - top.values[1]))
        if int(top.indices[0]) in base.eos:
            break
        ids.append(int(top.indices[0]))
    return ids[len(prompt) :], lead


class Gate:
    """A base model whose decoder waits for `leave` before each forward, and fails where `fails` says so of its ids."""

    def __init__(self, base: BaseModel) -> None:
        decoder = copy(base.decoder)
        self._embed, decoder.embed = decoder.embed, self._look  # type: ignore[method-assign]
        self._run, decoder.run = decoder.run, self._wait  # type: ignore[method-assign]
        self.base = replace(base, decoder=decoder)
        self.begun, self.leave = threading.Semaphore(0), threading.Semaphore(0)
        self.sizes: list[int] = []  # tokens of each forward
        self.fails: Callable[[Tensor], bool] = lambda _ids: False
        self.opened = False

    def open(self) -> None:
        """Wait no more."""
        self.opened = True
        self.leave.release()

    def _look(self, ids: Tensor) -> Tensor:
        if self.fails(ids):
            raise RuntimeError("the forward fails, as the test asked")
        return self._embed(ids)

    def _wait(self, hidden: Tensor, *args: Any) -> Tensor:
        self.sizes.append(len(hidden))
        self.begun.release()
        if not self.opened:
            assert self.leave.acquire(timeout=60)
        return self._run(hidden, *args)
