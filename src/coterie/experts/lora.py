"""LoRA: a low-rank change to each projection, y = W x + scale * B A x; DoRA scales the rows of W + scale * B A too.

Notable: weights are kept under PEFT's names, so that a version in the library is a folder that `peft` loads as
it is. The projections that the decoder fuses at a site are fused here as well: their A stacked, their B on a
block diagonal.
Sources: Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rsLoRA); Liu et al. 2024 (DoRA).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.errors import ModelError
from coterie.experts.expert import CONFIG, Applied, Expert, number, read_config, read_weights, write
from coterie.model.decoder import SITES, Change, Decoder, ModelConfig
from coterie.model.gradients import low_rank

BLOCKS = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip
UNSERVED = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "alora_invocation_tokens", "use_qalora",
    "lora_bias", "layer_replication", "trainable_token_indices", "exclude_modules",
)  # fmt: skip
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraConfig:
    """Rank, alpha, and what an expert changes: which projections, from which layer on."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = tuple(BLOCKS)
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    first_layer: int = 0
    kind: str = "lora"

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def weight_name(layer: int, projection: str, part: str) -> str:
    """PEFT's name of `lora_A.weight`, `lora_B.weight` or `lora_magnitude_vector` of a projection."""
    return f"base_model.model.model.layers.{layer}.{BLOCKS[projection]}.{projection}.{part}"


def shapes(config: LoraConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of an expert, by PEFT name. Mixtures of experts are left as they are."""
    out: dict[str, tuple[int, ...]] = {}
    for layer in range(config.first_layer, model.layers):
        for site in model.dense_sites(layer):
            for projection, size in model.site_outputs(site):
                if projection in config.targets:
                    out[weight_name(layer, projection, "lora_A.weight")] = (config.rank, model.site_input(site))
                    out[weight_name(layer, projection, "lora_B.weight")] = (size, config.rank)
                    if config.dora:
                        out[weight_name(layer, projection, "lora_magnitude_vector")] = (size,)
    return out


def fresh(config: LoraConfig, decoder: Decoder, seed: int = 0) -> Expert:
    """A new expert: A random, B zero, so that it changes nothing yet. Rank and targets decide its size."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(config, decoder.config).items():
        weights[name] = torch.zeros(shape)
        if ".lora_A." in name:  # kaiming_uniform with a = sqrt(5), as PEFT starts A
            bound = 1 / math.sqrt(shape[1])
            weights[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
    for layer in range(config.first_layer, decoder.config.layers) if config.dora else ():
        for site in decoder.config.dense_sites(layer):
            norms = decoder.weights[f"{layer}.{site}"].float().norm(dim=1)
            for (projection, _), part in zip(
                decoder.config.site_outputs(site), norms.split([n for _, n in decoder.config.site_outputs(site)]),
                strict=True,
            ):  # fmt: skip
                if projection in config.targets:
                    weights[weight_name(layer, projection, "lora_magnitude_vector")] = part.cpu().clone()
    return Expert(config, weights)


@dataclass(frozen=True)
class Site:
    """One expert at one fused site: `down` (R, in), `up` (out, R) already scaled, `gain` (out) of DoRA or None."""

    down: Tensor
    up: Tensor
    gain: Tensor | None


def site_of(expert: Expert, decoder: Decoder, layer: int, site: str, dtype: torch.dtype | None = None) -> Site | None:
    """The expert at a site, by default in the base's precision; None where it leaves the site alone. Differentiable."""
    config: LoraConfig = expert.config
    if layer < config.first_layer or site not in decoder.config.dense_sites(layer):
        return None
    like, model = decoder.weights["final_norm"].to(dtype or decoder.dtype), decoder.config
    downs, ups, gains = [], [], []
    for projection, size in model.site_outputs(site):
        if projection in config.targets:
            downs.append(expert.weights[weight_name(layer, projection, "lora_A.weight")].to(like))
            ups.append(expert.weights[weight_name(layer, projection, "lora_B.weight")].to(like))
            if config.dora:
                gains.append(expert.weights[weight_name(layer, projection, "lora_magnitude_vector")].to(like.device))
        else:
            ups.append(like.new_zeros(size, 0))
            gains.append(torch.zeros(size, device=like.device))  # replaced by the row's own norm below
    if not downs:
        return None
    down, up = torch.cat(downs), torch.block_diag(*ups) * config.scale
    if not config.dora:
        return Site(down, up, None)
    norms = _row_norms(decoder.weights[f"{layer}.{site}"], down, up)
    magnitude = torch.cat(gains)
    return Site(down, up, torch.where(magnitude == 0, 1.0, magnitude / norms).to(like))


def sites_of(expert: Expert, decoder: Decoder) -> dict[tuple[int, str], Site]:
    """A LoRA expert at every site that it changes, by layer and site; empty for the other kinds. Differentiable."""
    layers = range(expert.config.first_layer, decoder.config.layers) if expert.config.kind == "lora" else ()
    found = {(layer, site): site_of(expert, decoder, layer, site) for layer in layers for site in SITES}
    return {place: one for place, one in found.items() if one is not None}


def columns(config: LoraConfig, model: ModelConfig, site: str) -> list[int]:
    """For each row of a fused site's `down`, (R), which of the site's projections it belongs to."""
    parts = enumerate(model.site_outputs(site))
    return [i for i, (projection, _) in parts if projection in config.targets for _ in range(config.rank)]


@torch.no_grad()
def merged(expert: Expert, decoder: Decoder, layer: int, site: str) -> Tensor | None:
    """The base's weight at a site (out, in) with the expert in it, in float32; None where it is left alone."""
    found = site_of(expert, decoder, layer, site, torch.float32)
    if found is None:
        return None
    whole = decoder.weights[f"{layer}.{site}"].float() + found.up @ found.down
    return whole if found.gain is None else whole * found.gain[:, None]


@torch.no_grad()
def _row_norms(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Norm of each row of weight (out, in) + up down, (out), without forming the sum; a constant (DoRA, 4.3)."""
    w, a, b = weight.float(), down.float(), up.float()
    squares = (w * w).sum(1) + 2 * ((w @ a.T) * b).sum(1) + ((b @ (a @ a.T)) * b).sum(1)
    return squares.clamp_min(1e-12).sqrt()


def apply(expert: Expert, decoder: Decoder, training: bool = False) -> Applied:
    """What the expert makes of every row, differentiable in its weights."""
    config: LoraConfig = expert.config
    if config.dora:
        return Applied(_dora(expert, decoder, training))
    sites: dict[str, list[tuple[str, slice]]] = {}  # projections that the expert changes, and their columns
    for site in SITES:
        sites[site], start = [], 0
        for projection, size in decoder.config.site_outputs(site):
            if projection in config.targets:
                sites[site].append((projection, slice(start, start + size)))
            start += size

    def change(layer: int, site: str, x: Tensor, out: Tensor) -> Tensor:
        found = sites.get(site)
        if not found or layer < config.first_layer:
            return out
        if training and config.dropout:
            x = F.dropout(x, config.dropout)
        downs, ups = (
            [expert.weights[weight_name(layer, projection, f"lora_{side}.weight")] for projection, _ in found]
            for side in "AB"
        )
        return low_rank(out, x, downs, ups, [span for _, span in found], config.scale)

    return Applied(change)


def _dora(expert: Expert, decoder: Decoder, training: bool) -> Change:
    config: LoraConfig = expert.config
    sites = sites_of(expert, decoder)

    def change(layer: int, site: str, x: Tensor, out: Tensor) -> Tensor:
        found = sites.get((layer, site))
        if found is None or found.gain is None:
            return out
        if training and config.dropout:
            x = F.dropout(x, config.dropout)
        added = (x @ found.down.T) @ found.up.T
        bias = decoder.weights.get(f"{layer}.{site}.bias")
        if bias is None:
            return (out + added) * found.gain
        return (out - bias + added) * found.gain + bias

    return change


def save(expert: Expert, folder: Path, base: str, model: ModelConfig) -> None:
    """Write the expert into `folder` in PEFT's format."""
    c: LoraConfig = expert.config
    facts: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": c.rank,
        "lora_alpha": c.alpha, "lora_dropout": c.dropout, "target_modules": sorted(c.targets), "bias": "none",
        "use_rslora": c.rslora, "use_dora": c.dora, "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    if c.first_layer:
        facts |= {"layers_to_transform": list(range(c.first_layer, model.layers)), "layers_pattern": "layers"}
    write(folder, WEIGHTS, expert.weights, facts)


def load(folder: Path, model: ModelConfig) -> Expert:
    """Read an expert in PEFT's format. Raises ModelError where it is damaged, of another kind or another base."""
    config = _config(read_config(folder), folder / CONFIG, model)
    return Expert(config, read_weights(folder / WEIGHTS, shapes(config, model), "LoRA"))


def _config(facts: dict[str, Any], file: Path, model: ModelConfig) -> LoraConfig:
    for field in UNSERVED:
        if facts.get(field):
            raise ModelError(f"{file}: {field} is set, which this version cannot serve")
    if facts.get("bias", "none") != "none":
        raise ModelError(f"{file}: bias={facts['bias']!r}; only 'none' can be served")
    targets = facts.get("target_modules") or []
    targets = list(BLOCKS) if targets == "all-linear" else targets
    if isinstance(targets, list):  # PEFT also writes whole paths; `load` sees to it that every layer is there
        targets = [t.rpartition(".")[2] for t in targets]
    if isinstance(targets, str) or not targets or not set(targets) <= BLOCKS.keys():
        raise ModelError(f"{file}: target_modules {targets!r}; known: {', '.join(BLOCKS)}")
    layers = facts.get("layers_to_transform")
    layers = sorted([layers] if isinstance(layers, int) else layers) if layers else list(range(model.layers))
    if layers != list(range(layers[0], model.layers)):
        raise ModelError(f"{file}: layers_to_transform {layers}: only the last layers of the base can be served, "
                         f"from any one up to {model.layers - 1}")  # fmt: skip
    return LoraConfig(
        int(number(facts, "r", file)), float(number(facts, "lora_alpha", file)),
        tuple(p for p in BLOCKS if p in targets), bool(facts.get("use_rslora")), bool(facts.get("use_dora")),
        float(facts.get("lora_dropout") or 0.0), layers[0],
    )  # fmt: skip
