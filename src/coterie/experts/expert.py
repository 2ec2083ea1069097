"""What all kinds of expert have in common: settings, weights, and what they bring to a forward pass."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from coterie.errors import ModelError
from coterie.model.decoder import Change, Decoder

CONFIG = "adapter_config.json"


@dataclass(eq=False)
class Expert:
    """One trained component: its settings, and its weights in float32 by the names of its exchange format."""

    config: Any  # the frozen dataclass of its kind, in the kind's own file; each has `kind`
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Applied:
    """What an expert brings to a forward pass; each kind fills one field.

    Built anew for each training step, differentiable in the expert's weights.
    """

    change: Change | None = None
    soft: Tensor | None = None  # (P, width): embeddings of virtual tokens before the text
    prefix: Tensor | None = None  # (layers, 2, P, Hkv, D): keys and values before the text
    decoder: Decoder | None = None  # a model of its own, in place of the base


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json in `folder`. Raises ModelError."""
    try:
        facts = json.loads((folder / CONFIG).read_text())
        if not isinstance(facts, dict):
            raise ValueError(f"a {type(facts).__name__}, not an object")
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG}: not an adapter's configuration ({error})") from error
    return facts


def number(facts: dict[str, Any], field: str, where: Path) -> float:
    """A numeric field of a configuration. Raises ModelError, naming it."""
    value = facts.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"{where}: {field!r} is {value!r}, not a number")
    return value


def read_weights(
    file: Path, expected: dict[str, tuple[int, ...]], kind: str, rename: Callable[[str], str] = lambda name: name
) -> dict[str, Tensor]:
    """The tensors of `file` in float32, if they are those that `expected` names. Raises ModelError."""
    try:
        # Not mapped: whoever writes into the file later would change, or end, what answers.
        weights = {rename(name): w for name, w in safetensors.load(file.read_bytes()).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: truncated or not safetensors: {error}") from error
    for name, shape in expected.items():
        if name not in weights:
            raise ModelError(f"{file}: lacks {name}; was it trained for another base model?")
        if tuple(weights[name].shape) != shape:
            raise ModelError(f"{file}: {name} is {tuple(weights[name].shape)}, this base needs {shape}")
    unknown = sorted(weights.keys() - expected.keys())
    if unknown:
        raise ModelError(f"{file}: {unknown[0]} is not a weight of a {kind} expert for this base")
    return {name: w.float() for name, w in weights.items()}


def write(folder: Path, file: str, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Weights and adapter_config.json into `folder`."""
    safetensors.save_file({k: v.detach().float().contiguous() for k, v in weights.items()}, folder / file)
    (folder / CONFIG).write_text(json.dumps(facts, indent=2) + "\n")
