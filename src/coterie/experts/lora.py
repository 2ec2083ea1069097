"""LoRA: a low-rank change to each projection, y = W x + scale * B A x.

Notable: weights are kept under PEFT's names, so that a version in the library is a folder that `peft` loads as
it is. Rows of a mixed batch that belong to different experts share two matrix products for each site: the A of
all experts stacked, the columns of other experts set to zero, the B of all experts side by side.
Sources: Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rsLoRA); Chen et al. 2023 (Punica: many LoRAs in one batch).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.errors import ModelError
from coterie.model.decoder import SITES, Change, Decoder, ModelConfig
from coterie.model.gradients import low_rank

BLOCKS = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip
UNSERVED = (
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "layers_to_transform",
    "alora_invocation_tokens", "use_qalora",
)  # fmt: skip
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class LoraConfig:
    """Rank, alpha, and which projections an expert changes."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = tuple(BLOCKS)
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass
class Lora:
    """The weights of one expert: for each target, `lora_A` (rank, in) and `lora_B` (out, rank), by PEFT name."""

    config: LoraConfig
    weights: dict[str, Tensor]


def weight_name(layer: int, projection: str, side: str) -> str:
    """PEFT's name of `lora_A` or `lora_B` of a projection."""
    return f"base_model.model.model.layers.{layer}.{BLOCKS[projection]}.{projection}.lora_{side}.weight"


def shapes(config: LoraConfig, model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every weight an expert of this shape has, by PEFT name."""
    out: dict[str, tuple[int, int]] = {}
    for layer in range(model.layers):
        for site in SITES:
            for projection, size in model.site_outputs(site):
                if projection in config.targets:
                    out[weight_name(layer, projection, "A")] = (config.rank, model.site_input(site))
                    out[weight_name(layer, projection, "B")] = (size, config.rank)
    return out


def fresh(config: LoraConfig, model: ModelConfig, seed: int = 0) -> Lora:
    """An expert that changes nothing yet: A uniform as in PEFT, B zero. Float32, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in shapes(config, model).items():
        bound = 1 / math.sqrt(shape[1]) if ".lora_A." in name else 0.0
        weights[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
    return Lora(config, weights)


def site_matrices(lora: Lora, model: ModelConfig, layer: int, site: str, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """A (R, in) and scaled B (out, R) of a fused site; None where the expert leaves the site alone.

    The A of the site's projections are stacked and their B stand on a block diagonal. Differentiable.
    """
    downs, ups = [], []
    for projection, size in model.site_outputs(site):
        if projection in lora.config.targets:
            downs.append(lora.weights[weight_name(layer, projection, "A")].to(like))
            ups.append(lora.weights[weight_name(layer, projection, "B")].to(like))
        else:
            ups.append(like.new_zeros(size, 0))
    if not downs:
        return None
    return torch.cat(downs), torch.block_diag(*ups) * lora.config.scale


def training_change(lora: Lora, decoder: Decoder) -> Change:
    """What `lora` makes of every row, differentiable in its weights."""
    sites: dict[str, list[tuple[str, slice]]] = {}  # projections that the expert changes, and their columns
    for site in SITES:
        sites[site], start = [], 0
        for projection, size in decoder.config.site_outputs(site):
            if projection in lora.config.targets:
                sites[site].append((projection, slice(start, start + size)))
            start += size

    def change(layer: int, site: str, x: Tensor, out: Tensor) -> Tensor:
        found = sites.get(site)
        if not found:
            return out
        downs, ups = ([lora.weights[weight_name(layer, p, side)] for p, _ in found] for side in "AB")
        return low_rank(out, x, downs, ups, [span for _, span in found], lora.config.scale)

    return change


class LoraStack:
    """Several experts laid side by side, to serve a batch whose rows belong to any of them or to none."""

    def __init__(self, loras: list[Lora], decoder: Decoder) -> None:
        self.decoder = decoder
        self.sites: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self.owners: dict[str, Tensor] = {}  # of each column of a site, (R of all experts)
        like = decoder.weights["final_norm"]
        for site in SITES:
            for layer in range(decoder.config.layers):
                found = [site_matrices(lora, decoder.config, layer, site, like) for lora in loras]
                pairs = [(i, pair) for i, pair in enumerate(found) if pair is not None]
                if not pairs:
                    continue
                columns = [torch.full((pair[0].shape[0],), i) for i, pair in pairs]
                self.owners[site] = torch.cat(columns).to(like.device)
                down, up = torch.cat([p[0] for _, p in pairs]), torch.cat([p[1] for _, p in pairs], dim=1)
                self.sites[layer, site] = (decoder.pack(down), decoder.pack(up))

    def change(self, owners: Tensor) -> Change | None:
        """The change for rows `owners` (N), each an index into the stack, or -1 for the base model."""
        if not self.sites or bool((owners < 0).all()):
            return None
        dtype, device = self.decoder.dtype, self.decoder.device
        masks = {site: (own == owners.to(device)[:, None]).to(dtype) for site, own in self.owners.items()}

        def change(layer: int, site: str, x: Tensor, out: Tensor) -> Tensor:
            found = self.sites.get((layer, site))
            if found is None:
                return out
            return out + self.decoder.apply(self.decoder.apply(x, found[0]).mul_(masks[site]), found[1])

        return change


def save(lora: Lora, folder: Path, base: str) -> None:
    """Write `lora` into `folder` in PEFT's format."""
    save_file({k: v.detach().float().contiguous() for k, v in lora.weights.items()}, folder / WEIGHTS)
    c = lora.config
    peft = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": c.rank,
        "lora_alpha": c.alpha, "lora_dropout": 0.0, "target_modules": sorted(c.targets), "bias": "none",
        "use_rslora": c.rslora, "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(peft, indent=2) + "\n")


def load(folder: Path, model: ModelConfig) -> Lora:
    """Read an expert in PEFT's format. Raises ModelError where it is damaged, of another kind or another base."""
    try:
        config = _config(json.loads((folder / CONFIG).read_text()), folder / CONFIG)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{folder / CONFIG}: not a PEFT adapter's configuration ({type(error).__name__}: {error})"
        ) from error
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS}: truncated or not safetensors: {error}") from error
    expected = shapes(config, model)
    for name, shape in expected.items():
        if name not in weights:
            raise ModelError(f"{folder / WEIGHTS}: lacks {name}; was it trained for another base model?")
        if tuple(weights[name].shape) != shape:
            raise ModelError(f"{folder / WEIGHTS}: {name} is {tuple(weights[name].shape)}, this base needs {shape}")
    unknown = sorted(weights.keys() - expected.keys())
    if unknown:
        raise ModelError(f"{folder / WEIGHTS}: {unknown[0]} is not a weight of a LoRA expert for this base")
    return Lora(config, {k: v.float() for k, v in weights.items()})


def _config(facts: dict[str, Any], file: Path) -> LoraConfig:
    if facts.get("peft_type") != "LORA":
        raise ModelError(f"{file}: peft_type {facts.get('peft_type')!r}; only LORA can be imported")
    for field in UNSERVED:
        if facts.get(field):
            raise ModelError(f"{file}: {field} is set, which this version cannot serve")
    if facts.get("bias", "none") != "none":
        raise ModelError(f"{file}: bias={facts['bias']!r}; only 'none' can be served")
    for field in ("r", "lora_alpha"):
        if not isinstance(facts.get(field), int | float):
            raise ModelError(f"{file}: {field!r} is {facts.get(field)!r}, not a number")
    targets = facts.get("target_modules") or []
    targets = list(BLOCKS) if targets == "all-linear" else targets
    if isinstance(targets, list):  # PEFT also writes whole paths; `load` sees to it that every layer is there
        targets = [t.rpartition(".")[2] for t in targets]
    if isinstance(targets, str) or not targets or not set(targets) <= BLOCKS.keys():
        raise ModelError(f"{file}: target_modules {targets!r}; known: {', '.join(BLOCKS)}")
    return LoraConfig(
        int(facts["r"]), float(facts["lora_alpha"]), tuple(p for p in BLOCKS if p in targets),
        bool(facts.get("use_rslora")),
    )  # fmt: skip
