"""What a model is made of and what it costs: parameters, memory, arithmetic, and speed on named hardware.

Notable: everything but the speed is exact arithmetic on the shapes in config.json (or in a GGUF file's header), no
weights needed; tests hold it against transformers and torch's FLOP counter. Speed is a roofline (Williams et al.
2009): a step takes as long as its arithmetic at the hardware's rate or its bytes at the memory's, whichever is
longer, each at a share that real programs reach. FLOPs are counted as two for each multiply-add.
"""

import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from coterie.errors import ModelError
from coterie.model.decoder import SITES, ModelConfig
from coterie.model.hf import config_of, read_facts
from coterie.model.load import default_dtype, gguf_config

BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5625}  # int4: blocks of 32 with a scale of 2 bytes
# Share of the hardware's rates that a step is taken to reach. Measured by benchmarks/anatomy.py on two AVX2 cores: 0.68
# and 0.46 for 1 and 16 answers at once, 0.94 for a prompt; their geometric mean is 0.67. Assumed for GPUs.
REACHED = 0.6


@dataclass(frozen=True)
class Hardware:
    """`flops` per second in bfloat16, `bandwidth` and `memory` in bytes, `price` in dollars an hour."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    price: float
    source: str


# Dense bfloat16 or float16 rates, without sparsity. Prices are on-demand list prices of Linux in us-east-1 as known
# in 2024 and change often: give your own with --price.
HARDWARE = {
    "L4": Hardware("L4", 121e12, 300e9, 24e9, 0.80, "NVIDIA L4 datasheet (242 with sparsity); AWS g6.xlarge"),
    "A10G": Hardware("A10G", 70e12, 600e9, 24e9, 1.01, "NVIDIA A10G datasheet, AWS g5.xlarge"),
    "H100": Hardware("H100", 989e12, 3350e9, 80e9, 6.88, "NVIDIA H100 SXM datasheet; AWS p5.48xlarge / 8"),
    "vm2": Hardware("vm2", 0.25e12, 20e9, 8e9, 0.09, "2 vCPUs with AVX-512 bf16, as AWS m7a.large: estimated"),
}


@dataclass(frozen=True)
class Anatomy:
    """One model's facts. FLOPs are for one token; `context` is the most tokens it was made for."""

    name: str
    config: ModelConfig
    parameters: int
    active_parameters: int
    attention: str
    kv_bytes_per_token: int  # in bfloat16

    def weight_bytes(self, dtype: str) -> float:
        """Bytes of all weights."""
        return self.parameters * BYTES[dtype]

    def flops(self, context: int) -> int:
        """FLOPs to read one token with `context` tokens to attend to, itself among them, scores over the vocabulary
        included: one decoding step."""
        c = self.config
        return 2 * matrix_parameters(c, active=True) + 4 * c.layers * c.heads * c.head_dim * min(context, c.context)

    def prefill_flops(self, tokens: int) -> int:
        """FLOPs to read a prompt of `tokens` in one go: scores over the vocabulary for the last token only, and
        attention over the whole square, as it is computed."""
        c = self.config
        layers = 2 * (matrix_parameters(c, active=True) - c.vocab * c.width)
        return tokens * layers + 4 * c.layers * c.heads * c.head_dim * tokens**2 + 2 * c.vocab * c.width

    def step_bytes(self, dtype: str, context: int, batch: int) -> float:
        """Bytes that a decoding step of `batch` sequences reads: weights once, each sequence's cache."""
        return touched_parameters(self.config, batch) * BYTES[dtype] + batch * context * self.kv_bytes_per_token

    def intensity(self, dtype: str, context: int, batch: int) -> float:
        """FLOPs for each byte read in a decoding step."""
        return batch * self.flops(context) / self.step_bytes(dtype, context, batch)


@dataclass(frozen=True)
class Speed:
    """An estimate: `batch` sequences at `context` tokens; None where the weights and caches do not fit."""

    hardware: str
    decode_tokens_per_s: float | None
    prefill_tokens_per_s: float | None
    dollars_per_million_tokens: float | None


def matrix_parameters(c: ModelConfig, active: bool = False) -> int:
    """Parameters of all matrices that a token is multiplied by: every expert's, or those of its own experts only."""
    inner = c.expert_ffn or c.ffn
    total = c.vocab * c.width
    for layer in range(c.layers):
        total += sum(c.site_input(s) * size for s in c.dense_sites(layer) for _, size in c.site_outputs(s))
        if layer in c.sparse:
            total += c.experts * c.width + (c.experts_per_token if active else c.experts) * 3 * c.width * inner
    return total


def parameters(c: ModelConfig, active: bool = False, biases: tuple[str, ...] = ()) -> int:
    """All parameters: matrices, embedding, norms, biases of the sites named."""
    total = matrix_parameters(c, active) + (0 if c.tied else c.vocab * c.width)
    total += c.width * (2 * c.layers + 1) + (2 * c.head_dim * c.layers if c.qk_norm else 0)
    return total + c.layers * sum(size for site in biases for _, size in c.site_outputs(site))


def touched_parameters(c: ModelConfig, batch: int) -> float:
    """Parameters that a step of `batch` tokens reads: of a layer's experts those that any token is expected to choose,
    were choices even."""
    missed = (1 - c.experts_per_token / c.experts) ** batch if c.experts else 1.0
    inner = c.expert_ffn or c.ffn
    return (
        parameters(c) - len(c.sparse) * c.experts * 3 * c.width * inner * missed - (0 if c.tied else c.vocab * c.width)
    )


def attention_kind(c: ModelConfig, window: int | None = None) -> str:
    """Multi-head, grouped-query or multi-query, and the sliding window where there is one."""
    kind = f"grouped-query ({c.heads} heads, {c.kv_heads} of keys)"
    if c.kv_heads == c.heads:
        kind = f"multi-head ({c.heads})"
    elif c.kv_heads == 1:
        kind = f"multi-query ({c.heads} heads)"
    return kind + (f", sliding window of {window}" if window else "")


def examine(path: Path) -> Anatomy:
    """The anatomy of a model directory, a config.json alone, or a .gguf file. Raises ModelError."""
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        if not found:
            raise ModelError(f"{path}: no config.json and no .gguf in this directory")
        return _of_gguf(found[0], path.name)
    if not path.exists():
        raise ModelError(f"{path}: no such model; name a directory, a config.json, a .gguf file or a pulled model")
    if path.suffix == ".gguf":
        return _of_gguf(path, path.stem)
    hf = read_facts(path if path.is_file() else path / "config.json")
    config = config_of(hf)
    biases = _biases(hf, config.family)
    window = hf.get("sliding_window") if config.context < hf["max_position_embeddings"] else None
    # Context is what the product serves: within the window where there is one.
    return _anatomy(hf.where.parent.resolve().name, config, biases, window)


def _of_gguf(path: Path, name: str) -> Anatomy:
    config, _, names = gguf_config(path)
    sites = {"qkv": "attn_q.bias", "o": "attn_output.bias", "gate_up": "ffn_gate.bias", "down": "ffn_down.bias"}
    return _anatomy(name, config, tuple(s for s in SITES if f"blk.0.{sites[s]}" in names), None)


def _biases(hf: dict[str, Any], family: str) -> tuple[str, ...]:
    attention, mlp = bool(hf.get("attention_bias")), bool(hf.get("mlp_bias"))
    if family in ("qwen2", "qwen2_moe"):
        return ("qkv",) if family == "qwen2" or hf.get("qkv_bias", True) else ()
    if family in ("mistral", "mixtral"):
        return ()
    return (*(("qkv", "o") if attention else ()), *(("gate_up", "down") if mlp and family == "llama" else ()))


def _anatomy(name: str, config: ModelConfig, biases: tuple[str, ...], window: int | None) -> Anatomy:
    return Anatomy(
        name, config, parameters(config, biases=biases), parameters(config, active=True, biases=biases),
        attention_kind(config, window), 2 * config.layers * config.kv_heads * config.head_dim * 2,
    )  # fmt: skip


def estimate(a: Anatomy, on: Hardware, dtype: str, context: int, batch: int) -> Speed:
    """Decoding and prefill speed of `batch` sequences at once, and what a million generated tokens cost."""
    context = min(context, a.config.context)
    if a.weight_bytes(dtype) + batch * context * a.kv_bytes_per_token > on.memory:
        return Speed(on.name, None, None, None)
    step_s = max(batch * a.flops(context) / on.flops, a.step_bytes(dtype, context, batch) / on.bandwidth) / REACHED
    prefill_s = max(a.prefill_flops(context) / on.flops, a.weight_bytes(dtype) / on.bandwidth) / REACHED
    decode = batch / step_s
    return Speed(on.name, decode, context / prefill_s, on.price / 3600 / decode * 1e6)


def probe(price: float = 0.0, seconds: float = 0.3) -> Hardware:
    """This machine, measured on the spot: a matrix product in the precision that models are loaded in, and a pass over
    memory beyond the caches."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=default_dtype())
    flops = 2 * size**3 / _fastest(lambda: a @ a, seconds, device)
    # In float32, because a CPU's product of a bfloat16 matrix and vector is bound by arithmetic.
    rows = torch.ones((1 << 16) if device.type == "cuda" else (1 << 14), 4096, device=device)
    vector = torch.ones(4096, device=device)
    bandwidth = rows.numel() * 4 / _fastest(lambda: rows @ vector, seconds, device)
    if device.type == "cuda":
        memory = float(torch.cuda.get_device_properties(device).total_memory)
    else:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Hardware("here", flops, bandwidth, memory, price, "measured now")


def _fastest(work: Any, seconds: float, device: torch.device) -> float:
    """Seconds of the fastest run within `seconds` (the fastest, because others may use the machine)."""
    best = float("inf")
    work()
    end = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def compare(
    found: list[Anatomy], hardware: list[Hardware], dtype: str, context: int, batch: int
) -> list[dict[str, Any]]:
    """Everything about each model as plain values, for --json and the table."""
    out = []
    for a in found:
        at = min(context, a.config.context)
        out.append({
            "model": a.name, "family": a.config.family, "parameters": a.parameters,
            "active_parameters": a.active_parameters, "layers": a.config.layers, "width": a.config.width,
            "experts": a.config.experts, "experts_per_token": a.config.experts_per_token if a.config.experts else 0,
            "attention": a.attention, "context": a.config.context,
            "weight_bytes": {d: round(a.weight_bytes(d)) for d in BYTES}, "kv_bytes_per_token": a.kv_bytes_per_token,
            "flops_per_token": {"context": at, "decode": a.flops(at), "prefill": a.prefill_flops(at) // at},
            "flops_per_byte": round(a.intensity(dtype, at, batch), 2), "dtype": dtype, "batch": batch,
            "speed": [asdict(estimate(a, h, dtype, at, batch)) for h in hardware],
        })  # fmt: skip
    return out


def priced(hardware: Hardware, price: float | None) -> Hardware:
    """The same hardware at another price an hour."""
    return hardware if price is None else replace(hardware, price=price)
