"""Bottleneck adapters: a small network after the attention and feed-forward blocks of a layer, out + up(f(down(.))).

Two placements. Houlsby et al. 2019 put one after each block, which reads the block's output. Pfeiffer et al. 2021
put one after the feed-forward only, which reads the residual stream with that output added. Saved as AdapterHub's
`adapters` library saves them (double_seq_bn and seq_bn), which loads them as they are.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.errors import ModelError
from coterie.experts.expert import CONFIG, Applied, Expert, number, read_config, read_weights, write
from coterie.model.decoder import Decoder, ModelConfig

WEIGHTS = "adapter.safetensors"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "swish": F.silu, "silu": F.silu, "gelu": F.gelu}
PLACES = {"houlsby": ("attn", "ffn"), "pfeiffer": ("ffn",)}
MODULES = {"attn": "attention_adapters", "ffn": "output_adapters"}
NAME = re.compile(r".*layers\.(\d+)\.(attention_adapters|output_adapters)\.adapters\.[^.]+\.(.+)")


@dataclass(frozen=True)
class BottleneckConfig:
    """`size` is the width of the bottleneck; `placement` houlsby or pfeiffer."""

    size: int = 36
    placement: str = "houlsby"
    activation: str = "swish"
    scaling: float = 1.0
    first_layer: int = 0
    kind: str = "adapter"

    @property
    def reads_sum(self) -> bool:
        """Whether the adapter reads the residual stream with the block's output added, not the output alone."""
        return self.placement == "pfeiffer"


def weight_name(layer: int, block: str, part: str) -> str:
    """AdapterHub's name, with the adapter called `coterie`."""
    return f"model.layers.{layer}.{MODULES[block]}.adapters.coterie.{part}"


def shapes(config: BottleneckConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight, by AdapterHub name."""
    out: dict[str, tuple[int, ...]] = {}
    for layer in range(config.first_layer, model.layers):
        for block in PLACES[config.placement]:
            out[weight_name(layer, block, "adapter_down.0.weight")] = (config.size, model.width)
            out[weight_name(layer, block, "adapter_down.0.bias")] = (config.size,)
            out[weight_name(layer, block, "adapter_up.weight")] = (model.width, config.size)
            out[weight_name(layer, block, "adapter_up.bias")] = (model.width,)
    return out


def fresh(config: BottleneckConfig, decoder: Decoder, seed: int = 0) -> Expert:
    """A new expert: down random, up zero, so that it changes nothing yet (as He et al. 2022 start them)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.zeros(shape) for name, shape in shapes(config, decoder.config).items()}
    for name, w in weights.items():
        if name.endswith("adapter_down.0.weight"):
            w.copy_((torch.rand(w.shape, generator=generator) * 2 - 1) / w.shape[1] ** 0.5)
    return Expert(config, weights)


def apply(expert: Expert, decoder: Decoder, training: bool = False) -> Applied:
    """What the expert makes of the output of each block, differentiable in its weights."""
    config: BottleneckConfig = expert.config
    dtype, device, f = decoder.dtype, decoder.device, ACTIVATIONS[config.activation]
    weights = {name: w.to(device, dtype) for name, w in expert.weights.items()}

    def change(layer: int, site: str, x: Tensor, out: Tensor) -> Tensor:
        if layer < config.first_layer or site not in PLACES[config.placement]:
            return out

        def part(name: str) -> Tensor:
            return weights[weight_name(layer, site, name)]

        read = x + out if config.reads_sum else out
        inner = f(F.linear(read, part("adapter_down.0.weight"), part("adapter_down.0.bias")))
        return out + F.linear(inner, part("adapter_up.weight"), part("adapter_up.bias")) * config.scaling

    return Applied(change)


def save(expert: Expert, folder: Path, base: str, model: ModelConfig) -> None:
    """Write the expert into `folder` in AdapterHub's format."""
    c: BottleneckConfig = expert.config
    inner = {
        "mh_adapter": "attn" in PLACES[c.placement], "output_adapter": True, "reduction_factor": model.width / c.size,
        "non_linearity": c.activation, "original_ln_before": c.reads_sum, "original_ln_after": True,
        "ln_before": False, "ln_after": False, "init_weights": "bert", "is_parallel": False, "scaling": c.scaling,
        "use_gating": False, "residual_before_ln": True, "adapter_residual_before_ln": False, "inv_adapter": None,
        "inv_adapter_reduction_factor": None, "cross_adapter": False, "leave_out": list(range(c.first_layer)),
        "dropout": 0.0, "phm_layer": False,
    }  # fmt: skip
    facts = {
        "config": inner, "hidden_size": model.width, "model_class": "LlamaForCausalLM", "model_type": "llama",
        "model_name": base, "name": "coterie", "version": "adapters.1.2.0",
    }  # fmt: skip
    write(folder, WEIGHTS, expert.weights, facts)


def load(folder: Path, model: ModelConfig) -> Expert:
    """Read an expert in AdapterHub's format. Raises ModelError where it is damaged, of another kind or base."""
    config = _config(read_config(folder), folder / CONFIG, model)
    weights = read_weights(folder / WEIGHTS, shapes(config, model), "bottleneck adapter", _own_name)
    return Expert(config, weights)


def _own_name(name: str) -> str:
    """Our name for a weight whose adapter may be called anything."""
    found = NAME.fullmatch(name)
    if not found:
        return name
    block = next(b for b, module in MODULES.items() if module == found[2])
    return weight_name(int(found[1]), block, found[3])


def _config(facts: dict[str, Any], file: Path, model: ModelConfig) -> BottleneckConfig:
    inner = facts.get("config")
    if not isinstance(inner, dict):
        raise ModelError(f"{file}: lacks 'config', which AdapterHub's bottleneck adapters have")
    unserved = {"ln_before", "ln_after", "is_parallel", "use_gating", "inv_adapter", "cross_adapter", "phm_layer",
                "adapter_residual_before_ln"}  # fmt: skip
    for field in sorted(unserved):
        if inner.get(field):
            raise ModelError(f"{file}: {field} is set, which this version cannot serve")
    places = (bool(inner.get("mh_adapter")), bool(inner.get("output_adapter")), bool(inner.get("original_ln_before")))
    placement = {(True, True, False): "houlsby", (False, True, True): "pfeiffer"}.get(places)
    if placement is None:
        raise ModelError(f"{file}: mh_adapter, output_adapter, original_ln_before = {places}; known are Houlsby's "
                         "(true, true, false) and Pfeiffer's (false, true, true)")  # fmt: skip
    if inner.get("non_linearity") not in ACTIVATIONS:
        raise ModelError(f"{file}: non_linearity {inner.get('non_linearity')!r}; known: {', '.join(ACTIVATIONS)}")
    left_out = sorted(inner.get("leave_out") or [])
    if left_out != list(range(len(left_out))):
        raise ModelError(f"{file}: leave_out {left_out}: only the first layers can be left out")
    size = int(model.width // number(inner, "reduction_factor", file))
    return BottleneckConfig(
        size, placement, inner["non_linearity"], float(number(inner, "scaling", file)), len(left_out)
    )
