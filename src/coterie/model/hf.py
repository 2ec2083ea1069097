"""A Hugging Face directory's config.json and weight names, and ours, both ways: dense models, mixtures of experts.

Notable: which layout a mixture is written in follows from what it is. Mixtral's has experts in every layer; Qwen's
also knows dense layers between, q and k norms (Qwen3) or biases (Qwen2), and gate weights that do not sum to 1.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.errors import ModelError
from coterie.model.decoder import ModelConfig

DENSE = ("llama", "mistral", "qwen2", "qwen3")
MIXTURES = {"mixtral": "mistral", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3"}  # and the family of their attention
FAMILIES = (*DENSE, *MIXTURES)
ROPES = ("default", "linear", "llama3", "dynamic")  # dynamic changes nothing within the context, and we stay there
CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe",
}  # fmt: skip


class Facts(dict[str, Any]):
    """What a file says of its model. Asking for a fact that it lacks raises ModelError."""

    def __init__(self, facts: dict[str, Any], where: Path) -> None:
        super().__init__(facts)
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise ModelError(f"{self.where}: lacks {key!r}: is the download complete?")


def read_facts(file: Path) -> Facts:
    """What config.json says, or ModelError."""
    try:
        facts = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    if not isinstance(facts, dict):
        raise ModelError(f"{file}: not the configuration of a model")
    return Facts(facts, file)


def config_of(hf: Facts) -> ModelConfig:
    """The decoder that a config.json describes. Raises ModelError for arithmetic that the decoder does not do."""
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ModelError(f"{hf.where}: model_type {family!r}; known: {', '.join(FAMILIES)}")
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    _check_known(hf, rope)
    windowed = family in ("mistral", "mixtral") or hf.get("use_sliding_window")
    window = (hf.get("sliding_window") if windowed else None) or hf["max_position_embeddings"]
    heads = hf["num_attention_heads"]
    config = ModelConfig(
        vocab=hf["vocab_size"], width=hf["hidden_size"], layers=hf["num_hidden_layers"], heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads, head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        ffn=hf["intermediate_size"], context=min(window, hf["max_position_embeddings"]), eps=hf["rms_norm_eps"],
        rope_theta=hf.get("rope_theta") or rope.get("rope_theta", 10000.0), rope_scaling=rope,
        tied=hf.get("tie_word_embeddings", False), qk_norm=family.startswith("qwen3"), family=family,
        **_mixture(hf, family),
    )  # fmt: skip
    if config.experts and not 1 <= config.experts_per_token <= config.experts:
        raise ModelError(f"{hf.where}: {config.experts_per_token} experts per token, of {config.experts}")
    return config


def _mixture(hf: Facts, family: str) -> dict[str, Any]:
    if family not in MIXTURES:
        return {}
    layers = range(hf["num_hidden_layers"])
    qwen = family != "mixtral"
    skipped, step = hf.get("mlp_only_layers") or [], hf.get("decoder_sparse_step", 1)
    return {
        "experts": hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"],
        "experts_per_token": hf["num_experts_per_tok"],
        "gate_normed": bool(hf.get("norm_topk_prob", False)) if qwen else True,
        "sparse": tuple(n for n in layers if not qwen or (n not in skipped and (n + 1) % step == 0)),
        "expert_ffn": hf["moe_intermediate_size"] if qwen else 0,
    }


def _check_known(hf: Facts, rope: dict[str, Any]) -> None:
    """Raise ModelError where the config asks for arithmetic that the decoder does not do."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    activation = hf.get("hidden_act", "silu")
    for good, what in (
        (kind in ROPES, f"rope type {kind!r}; known: {', '.join(ROPES)}"),
        (activation == "silu", f"hidden_act {activation!r}; known: silu"),
        (not hf.get("quantization_config"), "quantised weights; use the model's plain safetensors, or a GGUF file"),
        (hf.get("shared_expert_intermediate_size", 0) <= 1, "experts shared by all tokens, which are not computed"),
    ):
        if not good:
            raise ModelError(f"{hf.where}: {what}")


def attention_names(layer: int, site: str) -> str:
    """Where a layer's projections of a dense site stand; followed by their names."""
    return f"model.layers.{layer}.{'self_attn' if site in ('qkv', 'o') else 'mlp'}."


def expert_names(family: str, layer: int, expert: int) -> tuple[str, str, str]:
    """Names of one expert's gate, up and down projection."""
    if family == "mixtral":
        stem, parts = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.", ("w1", "w3", "w2")
    else:
        stem, parts = f"model.layers.{layer}.mlp.experts.{expert}.", ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (f"{stem}{part}.weight" for part in parts)
    return gate, up, down


def router_name(family: str, layer: int) -> str:
    return f"model.layers.{layer}.{'block_sparse_moe' if family == 'mixtral' else 'mlp'}.gate.weight"


def layout(config: ModelConfig, weights: dict[str, Tensor]) -> str:
    """The model_type in whose layout transformers can read this model."""
    biased = any(name.endswith(".qkv.bias") for name in weights)
    if not config.experts:
        dense = MIXTURES.get(config.family, config.family)
        return "llama" if dense == "mistral" and biased else dense
    if config.qk_norm:
        return "qwen3_moe"
    everywhere = len(config.sparse) == config.layers
    return "mixtral" if everywhere and config.gate_normed and not biased else "qwen2_moe"


def to_hf(config: ModelConfig, weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts for config.json and the weights by Hugging Face's names. Raises ModelError where no layout holds them.

    The weights are views of ours where they can be.
    """
    family = layout(config, weights)
    out = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["final_norm"]}
    if not config.tied:
        out["lm_head.weight"] = weights["head"]
    biases = {site: any(f"{n}.{site}.bias" in weights for n in range(config.layers)) for site in ("qkv", "o", "gate_up",
              "down")}  # fmt: skip
    biased_mlp = biases["gate_up"] or biases["down"]
    # Llama's and Qwen3's one switch gives all four projections of attention a bias; Qwen2 has three and no switch.
    written = {
        "qkv": family in ("qwen2",) or biases["qkv"] or biases["o"],
        "o": family not in ("qwen2", "qwen2_moe") and (biases["qkv"] or biases["o"]),
        "gate_up": biased_mlp, "down": biased_mlp,
    }  # fmt: skip
    if any(has and not written[site] for site, has in biases.items()) or (biased_mlp and family != "llama"):
        raise ModelError(f"a {family} model with these biases has no layout that transformers reads")
    for n in range(config.layers):
        prefix = f"model.layers.{n}."
        out[prefix + "input_layernorm.weight"] = weights[f"{n}.attn_norm"]
        out[prefix + "post_attention_layernorm.weight"] = weights[f"{n}.ffn_norm"]
        if config.qk_norm:
            out[prefix + "self_attn.q_norm.weight"] = weights[f"{n}.q_norm"]
            out[prefix + "self_attn.k_norm.weight"] = weights[f"{n}.k_norm"]
        for site in config.dense_sites(n):
            names, sizes = zip(*config.site_outputs(site), strict=True)
            for kind, tensor in ((".weight", weights[f"{n}.{site}"]), (".bias", weights.get(f"{n}.{site}.bias"))):
                if tensor is None and written[site]:
                    tensor = weights["embed"].new_zeros(sum(sizes))
                if tensor is not None:
                    parts = tensor.split(list(sizes))
                    out |= {f"{attention_names(n, site)}{name}{kind}": p for name, p in zip(names, parts, strict=True)}
        if n in config.sparse:
            out |= _sparse_layer(config, family, n, weights)
    return _facts(config, family, written) | {"dtype": str(weights["embed"].dtype).removeprefix("torch.")}, out


def _sparse_layer(config: ModelConfig, family: str, n: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {router_name(family, n): weights[f"{n}.router"]}
    for e in range(config.experts):
        names = expert_names(family, n, e)
        halves = weights[f"{n}.experts.gate_up"][e].chunk(2)
        out |= dict(zip(names, (*halves, weights[f"{n}.experts.down"][e]), strict=True))
    if family == "qwen2_moe":  # the layout wants an expert shared by all tokens: one that always says zero
        like, stem = weights["embed"], f"model.layers.{n}.mlp.shared_expert"
        out |= {f"{stem}.{p}.weight": like.new_zeros(1, config.width) for p in ("gate_proj", "up_proj")}
        out |= {f"{stem}.down_proj.weight": like.new_zeros(config.width, 1),
                f"{stem}_gate.weight": like.new_zeros(1, config.width)}  # fmt: skip
    return out


def _facts(config: ModelConfig, family: str, biased: dict[str, bool]) -> dict[str, Any]:
    rope = {"rope_type": "default", **config.rope_scaling, "rope_theta": config.rope_theta}
    if rope["rope_type"] == "divided":
        raise ModelError("positions stretched as a GGUF file writes them have no layout that transformers reads; start "
                         "from the model's Hugging Face directory")  # fmt: skip
    facts: dict[str, Any] = {
        "architectures": [CLASSES[family] + "ForCausalLM"], "model_type": family, "vocab_size": config.vocab,
        "hidden_size": config.width, "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "intermediate_size": config.ffn,
        "max_position_embeddings": config.context, "rms_norm_eps": config.eps, "tie_word_embeddings": config.tied,
        "hidden_act": "silu", "rope_parameters": rope, "use_sliding_window": False, "sliding_window": None,
        "attention_bias": biased["o"], "mlp_bias": biased["down"],
    }  # fmt: skip
    if family in MIXTURES:
        facts |= {
            "num_local_experts": config.experts, "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token, "norm_topk_prob": config.gate_normed,
            "moe_intermediate_size": config.expert_ffn or config.ffn, "decoder_sparse_step": 1,
            "mlp_only_layers": [n for n in range(config.layers) if n not in config.sparse],
        }  # fmt: skip
    if family == "mixtral":
        facts["intermediate_size"] = config.expert_ffn or config.ffn
    if family == "qwen2_moe":
        facts |= {"shared_expert_intermediate_size": 1, "qkv_bias": biased["qkv"]}
    return facts


def null_shared_expert(raw: dict[str, Tensor], layer: int) -> bool:
    """Whether what a layer adds for all tokens alike is nothing, as `to_hf` writes it."""
    down = raw.get(f"model.layers.{layer}.mlp.shared_expert.down_proj.weight")
    return down is None or not bool(torch.count_nonzero(down))
