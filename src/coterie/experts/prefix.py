"""Prefix tuning: learned keys and values before the text, in every layer.

Source: Li and Liang 2021, without the reparametrisation; started from the keys and values of real words (4.3).
Saved as PEFT saves it: keys as they stand in the cache, rotated already, so that the text begins at position P.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.errors import ModelError
from coterie.experts.expert import CONFIG, Applied, Expert, number, read_config, read_weights, write
from coterie.model.decoder import Decoder, ModelConfig, attend_packed, packed_positions

WEIGHTS, NAME = "adapter_model.safetensors", "prompt_embeddings"


@dataclass(frozen=True)
class PrefixConfig:
    """`tokens` virtual tokens."""

    tokens: int = 16
    kind: str = "prefix"


def shapes(config: PrefixConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of the one weight, by PEFT name."""
    return {NAME: (config.tokens, model.layers * 2 * model.kv_heads * model.head_dim)}


@torch.no_grad()
def fresh(config: PrefixConfig, decoder: Decoder, words: list[int]) -> Expert:
    """A new expert: the keys and values that the tokens `words` have in the base model."""
    ids = torch.tensor((words * (config.tokens // len(words) + 1))[: config.tokens], device=decoder.device)
    seen: list[Tensor] = []
    inner = attend_packed([config.tokens])

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.extend([k.flatten(1), v.flatten(1)])  # each (P, Hkv * D)
        return inner(layer, q, k, v)

    decoder.run(decoder.embed(ids), packed_positions([config.tokens], decoder.device), attend)
    return Expert(config, {NAME: torch.cat(seen, dim=1).float().cpu()})


def apply(expert: Expert, decoder: Decoder, training: bool = False) -> Applied:
    """The keys and values, differentiable."""
    c = decoder.config
    flat = expert.weights[NAME].to(decoder.device, decoder.dtype)
    return Applied(prefix=flat.view(len(flat), c.layers, 2, c.kv_heads, c.head_dim).permute(1, 2, 0, 3, 4))


def save(expert: Expert, folder: Path, base: str, model: ModelConfig) -> None:
    """Write the expert into `folder` in PEFT's format."""
    facts: dict[str, Any] = {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "num_virtual_tokens": len(expert.weights[NAME]), "token_dim": model.kv_heads * model.head_dim,
        "num_attention_heads": model.kv_heads, "num_layers": model.layers, "num_transformer_submodules": 1,
        "encoder_hidden_size": model.width, "prefix_projection": False, "inference_mode": True,
    }  # fmt: skip
    write(folder, WEIGHTS, expert.weights, facts)


def load(folder: Path, model: ModelConfig) -> Expert:
    """Read an expert in PEFT's format. Raises ModelError where it is damaged, of another kind or another base."""
    facts, file = read_config(folder), folder / CONFIG
    if facts.get("prefix_projection"):
        raise ModelError(f"{file}: prefix_projection is set, which this version cannot serve")
    config = PrefixConfig(int(number(facts, "num_virtual_tokens", file)))
    if int(number(facts, "num_layers", file)) != model.layers:
        raise ModelError(f"{file}: num_layers is {facts['num_layers']}, this base has {model.layers}")
    return Expert(config, read_weights(folder / WEIGHTS, shapes(config, model), "prefix"))
