"""Take an expert's change into the weights, and write models as GGUF, which llama.cpp loads.

Notable: `merge` asks the change itself what it makes of the identity matrix, so it serves every change that is linear
at the projections (LoRA, rsLoRA, DoRA) without knowing how it is stored.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor

from coterie.errors import CoterieError, ModelError, StorageError
from coterie.model.decoder import SITES, Change, Decoder, rope_frequencies
from coterie.model.hf import to_hf
from coterie.model.load import GGUF_NAMES, BaseModel

KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}  # fmt: skip
ROWS = 1024  # of the identity at once
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # GGUF's kinds of token


@torch.no_grad()
def merge(base: BaseModel, change: Change) -> BaseModel:
    """A model whose weights are those of `base` with `change` taken in, in the precision of `base`.

    Merge into float32: bfloat16 would round small changes away. Valid for changes that are linear in what they see at
    the projections and do nothing elsewhere; the caller knows the kind.
    """
    decoder = base.decoder
    weights = dict(decoder.weights)
    for layer in range(decoder.config.layers):
        for site in SITES:
            name = f"{layer}.{site}"
            old, bias = decoder.weights[name], decoder.weights.get(f"{name}.bias")
            parts = []
            for start in range(0, old.shape[1], ROWS):
                unit = torch.zeros(min(ROWS, old.shape[1] - start), old.shape[1], dtype=old.dtype, device=old.device)
                unit[:, start:].fill_diagonal_(1)
                parts.append(change(layer, site, unit, old.t()[start : start + ROWS].contiguous()))
            weights[name] = torch.cat(parts).t().contiguous()
            if bias is not None:
                weights[f"{name}.bias"] = change(layer, site, old.new_zeros(1, old.shape[1]), bias[None])[0]
    return replace(base, decoder=Decoder(decoder.config, weights))


def write_gguf(base: BaseModel, file: Path, kind: str = "q8_0", name: str = "") -> None:
    """Write `base` as the new `file`; matrices in `kind` (f32, f16, bf16, q8_0), norms and biases in float32.

    A matrix whose rows q8_0's blocks of 32 do not divide is kept in float16. Raises CoterieError where the file is
    there already, ModelError where GGUF or llama.cpp has no form for the model, StorageError for a full disk.
    """
    if kind not in KINDS:
        raise CoterieError(f"unknown kind of GGUF {kind!r}; known: {', '.join(KINDS)}")
    arch = _architecture(base)
    facts = _facts(base)
    tensors = {_gguf_name(k): v for k, v in to_hf(base.decoder.config, base.decoder.weights)[1].items()}
    vocabulary = _tokenizer(base)

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_name(name or base.name)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_facts(writer, {f"{arch}.{k}": v for k, v in facts.items()} | vocabulary)
        if base.decoder.config.rope_scaling.get("rope_type") in ("llama3", "divided"):
            # llama.cpp divides each frequency by these factors (Llama 3.1's stretched positions).
            plain = rope_frequencies(replace(base.decoder.config, rope_scaling={}))
            factors = (plain / rope_frequencies(base.decoder.config)).numpy()
            writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
        for tensor_name, tensor in tensors.items():
            _add_tensor(writer, tensor_name, _order(base, tensor_name, tensor), kind)

    _write(file, arch, fill)


def write_gguf_lora(base: BaseModel, weights: Mapping[str, Tensor], alpha: float, file: Path) -> None:
    """Write a LoRA expert as the new adapter `file` that llama.cpp lays over the GGUF of its base (`--lora`).

    `weights` go by PEFT's names; llama.cpp scales by `alpha` / rank. Raises ModelError where it is more than a LoRA.
    """
    arch = _architecture(base)

    def fill(writer: gguf.GGUFWriter) -> None:
        _add_facts(writer, {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha)})
        for name, tensor in weights.items():
            stem, mark, side = name.removeprefix("base_model.model.").rpartition(".lora_")
            if not mark or side not in ("A.weight", "B.weight"):
                raise ModelError(f"{name}: llama.cpp's adapters hold LoRA's A and B only; merge this expert instead")
            target = _gguf_name(stem + ".weight")
            # A stands on the input and keeps its order; B's rows are the projection's.
            value = tensor if side[0] == "A" else _order(base, target, tensor)
            _add_tensor(writer, f"{target}.lora_{side[0].lower()}", value, "f32")

    _write(file, arch, fill)


def _architecture(base: BaseModel) -> str:
    """llama.cpp knows Mistral as llama."""
    family = base.decoder.config.family
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ModelError(f"{base.name}: models of the family {family!r} cannot be written as GGUF")
    return "llama" if family == "mistral" else family


def _facts(base: BaseModel) -> dict[str, Any]:
    c = base.decoder.config
    facts: dict[str, Any] = {
        "context_length": c.context, "embedding_length": c.width, "block_count": c.layers,
        "feed_forward_length": c.ffn, "attention.head_count": c.heads, "attention.head_count_kv": c.kv_heads,
        "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.eps), "rope.freq_base": float(c.rope_theta),
        "rope.dimension_count": c.head_dim, "vocab_size": c.vocab,
    }  # fmt: skip
    if c.rope_scaling.get("rope_type", c.rope_scaling.get("type")) == "linear":
        facts |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(c.rope_scaling["factor"])}
    return facts


def _tokenizer(base: BaseModel) -> dict[str, Any]:
    """The vocabulary, merges, kinds of tokens and chat template. Raises ModelError for other than byte-level BPE."""
    spec = json.loads(base.tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("unk_token"):
        raise ModelError(f"{base.name}: only byte-level BPE tokenizers can be written as GGUF, not {model['type']}")
    added = {t["id"]: CONTROL if t["special"] else USER_DEFINED for t in spec["added_tokens"]}
    size = base.decoder.config.vocab
    known = {i: t for t, i in base.tokenizer.get_vocab(with_added_tokens=True).items() if i < size}
    tokens = [known.get(i, f"[PAD{i}]") for i in range(size)]
    kinds = [added.get(i, NORMAL if i in known else UNUSED) for i in range(size)]
    ends = sorted(base.eos)
    end = base.tokenizer.token_to_id(base.eos_token) if base.eos_token else None
    out = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _pre_tokenizer(spec["pre_tokenizer"], base.name),
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        "tokenizer.ggml.eos_token_id": end if end in base.eos else ends[0] if ends else None,
        "tokenizer.ggml.bos_token_id": base.tokenizer.token_to_id(base.bos_token) if base.bos_token else None,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": base.template,
    }  # fmt: skip
    return {k: v for k, v in out.items() if v is not None}


def _pre_tokenizer(spec: dict[str, Any] | None, where: str) -> str:
    """llama.cpp's name of a pre-tokenizer: it knows them by name only. Raises ModelError for one we cannot name."""
    parts = (spec or {}).get("pretokenizers", [spec] if spec else [])
    kinds = [p["type"] for p in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        pattern = parts[0]["pattern"].get("Regex", "")
        if r"\p{N}{1,3}" in pattern:
            return "llama-bpe"
        if r"|\p{N}|" in pattern:
            return "qwen2"
    raise ModelError(f"{where}: its pre-tokenizer ({', '.join(kinds) or 'none'}) has no name in llama.cpp that we know")


def _gguf_name(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight."""
    theirs = {ours: n for n, ours in GGUF_NAMES.items()}
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{theirs[part]}.{suffix}"
    return f"{theirs[stem]}.{suffix}"


def _order(base: BaseModel, name: str, tensor: Tensor) -> Tensor:
    """Rows of q and k with their rotary halves interleaved, as llama.cpp wants them for the family llama."""
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if _architecture(base) != "llama" or part not in ("attn_q", "attn_k"):
        return tensor
    heads = base.decoder.config.heads if part == "attn_q" else base.decoder.config.kv_heads
    rows = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, rows, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: str) -> None:
    value: NDArray[np.float32] = tensor.detach().float().cpu().contiguous().numpy()
    chosen = KINDS[kind] if value.ndim == 2 else Kind.F32
    if chosen == Kind.Q8_0 and value.shape[1] % 32:
        chosen = Kind.F16
    writer.add_tensor(name, gguf.quants.quantize(value, chosen), raw_dtype=chosen)


def _add_facts(writer: gguf.GGUFWriter, facts: dict[str, Any]) -> None:
    for key, value in facts.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _write(file: Path, arch: str, fill: Any) -> None:
    """Let `fill` write into a file aside, and put it in place."""
    if file.exists():
        raise CoterieError(f"{file}: already there; name a new file")
    scratch = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".gguf-")
        os.close(handle)
        scratch = Path(name)
        writer = gguf.GGUFWriter(scratch, arch)
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with scratch.open("rb") as f:
            os.fsync(f.fileno())
        scratch.chmod(0o644)
        os.replace(scratch, file)
    except OSError as error:
        raise StorageError(f"{file}: cannot be written ({error.strerror or error})") from error
    finally:
        if scratch:
            scratch.unlink(missing_ok=True)
