"""Prompt tuning: learned embeddings of virtual tokens before the text; nothing else of the model changes.

Source: Lester et al. 2021. Started from the embeddings of real words, which trains far better than noise (3.2).
Saved as PEFT saves it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coterie.errors import ModelError
from coterie.experts.expert import CONFIG, Applied, Expert, number, read_config, read_weights, write
from coterie.model.decoder import Decoder, ModelConfig

WEIGHTS, NAME = "adapter_model.safetensors", "prompt_embeddings"


@dataclass(frozen=True)
class PromptConfig:
    """`tokens` virtual tokens."""

    tokens: int = 16
    kind: str = "prompt"


def shapes(config: PromptConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of the one weight, by PEFT name."""
    return {NAME: (config.tokens, model.width)}


def fresh(config: PromptConfig, decoder: Decoder, words: list[int]) -> Expert:
    """A new expert: the embeddings of the tokens `words`, repeated or cut to the number of virtual tokens."""
    ids = torch.tensor((words * (config.tokens // len(words) + 1))[: config.tokens], device=decoder.device)
    return Expert(config, {NAME: decoder.embed(ids).detach().float().cpu().clone()})


def apply(expert: Expert, decoder: Decoder, training: bool = False) -> Applied:
    """The virtual tokens, differentiable."""
    return Applied(soft=expert.weights[NAME].to(decoder.device, decoder.dtype))


def save(expert: Expert, folder: Path, base: str, model: ModelConfig) -> None:
    """Write the expert into `folder` in PEFT's format."""
    facts: dict[str, Any] = {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "num_virtual_tokens": len(expert.weights[NAME]), "token_dim": model.width, "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM", "inference_mode": True,
    }  # fmt: skip
    write(folder, WEIGHTS, expert.weights, facts)


def load(folder: Path, model: ModelConfig) -> Expert:
    """Read an expert in PEFT's format. Raises ModelError where it is damaged, of another kind or another base."""
    facts, file = read_config(folder), folder / CONFIG
    if facts.get("num_transformer_submodules") not in (None, 1):
        raise ModelError(f"{file}: num_transformer_submodules is {facts['num_transformer_submodules']}; only decoders")
    config = PromptConfig(int(number(facts, "num_virtual_tokens", file)))
    return Expert(config, read_weights(folder / WEIGHTS, shapes(config, model), "prompt"))
