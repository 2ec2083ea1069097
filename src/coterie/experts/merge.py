"""Several LoRA experts made into one whose update is their weighted sum, exactly.

Ranks are laid one after the other, and each expert's B carries its weight and its scale, so that
B A = sum of weight_i * scale_i * B_i A_i. Source: the `cat` combination of PEFT; Huang et al. 2023 (LoraHub) for use.
"""

from collections.abc import Sequence

import torch

from coterie.experts.expert import Expert
from coterie.experts.lora import BLOCKS, LoraConfig, shapes, weight_name
from coterie.model.decoder import ModelConfig


def merge(loras: Sequence[Expert], weights: Sequence[float], model: ModelConfig) -> Expert:
    """One expert of the summed rank. Projections that an expert leaves alone are zeros in its share. Not for DoRA."""
    rank = sum(lora.config.rank for lora in loras)
    targets = tuple(p for p in BLOCKS if any(p in lora.config.targets for lora in loras))
    merged = Expert(LoraConfig(rank, float(rank), targets), {})  # alpha = rank: a scale of 1
    for name, shape in shapes(merged.config, model).items():
        merged.weights[name] = torch.zeros(shape)
    start = 0
    for lora, weight in zip(loras, weights, strict=True):
        end = start + lora.config.rank
        for layer in range(lora.config.first_layer, model.layers):
            for projection in lora.config.targets:
                a, b = (weight_name(layer, projection, f"lora_{side}.weight") for side in "AB")
                merged.weights[a][start:end] = lora.weights[a]
                merged.weights[b][:, start:end] = lora.weights[b] * (weight * lora.config.scale)
        start = end
    return merged
