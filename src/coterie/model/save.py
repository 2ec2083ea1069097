"""Write a base model as a Hugging Face directory, which Coterie, transformers and other engines load as it is.

Notable: written aside and put in place by one rename, so a folder is whole or not there.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from coterie.errors import CoterieError, ModelError, StorageError
from coterie.model.decoder import SITES
from coterie.model.load import BaseModel

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def save_model(base: BaseModel, folder: Path) -> None:
    """Write config.json, model.safetensors, tokenizer and chat template of `base` into the new `folder`.

    Raises CoterieError where the folder is there already, ModelError where Hugging Face has no form for the model,
    StorageError where the disk is full.
    """
    if folder.exists():
        raise CoterieError(f"{folder}: already there; name a new folder")
    facts = _facts(base)
    weights = {k: v.detach().cpu().clone().contiguous() for k, v in hf_weights(base).items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": base.decoder.config.context}
    settings |= {k: v for k, v in (("bos_token", base.bos_token), ("eos_token", base.eos_token)) if v}
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".save-"))
        save_file(weights, scratch / "model.safetensors", {"format": "pt"})
        base.tokenizer.save(str(scratch / "tokenizer.json"))
        (scratch / "chat_template.jinja").write_text(base.template)
        for name, value in (("config.json", facts), ("tokenizer_config.json", settings)):
            (scratch / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        for file in scratch.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
        scratch.chmod(0o755)
        os.rename(scratch, folder)
    except Exception as error:  # safetensors and tokenizers raise their own kinds for a full disk
        raise StorageError(f"{folder}: the model cannot be written: {error}") from error
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


def hf_weights(base: BaseModel) -> dict[str, Tensor]:
    """The weights by Hugging Face's names, projections apart; views of the fused ones."""
    config, ours = base.decoder.config, base.decoder.weights
    out = {"model.embed_tokens.weight": ours["embed"], "model.norm.weight": ours["final_norm"]}
    if not config.tied:
        out["lm_head.weight"] = ours["head"]
    for n in range(config.layers):
        prefix = f"model.layers.{n}."
        out[prefix + "input_layernorm.weight"] = ours[f"{n}.attn_norm"]
        out[prefix + "post_attention_layernorm.weight"] = ours[f"{n}.ffn_norm"]
        if config.qk_norm:
            out[prefix + "self_attn.q_norm.weight"] = ours[f"{n}.q_norm"]
            out[prefix + "self_attn.k_norm.weight"] = ours[f"{n}.k_norm"]
        for site in SITES:
            names, sizes = zip(*config.site_outputs(site), strict=True)
            block = "self_attn" if site in ("qkv", "o") else "mlp"
            for kind, tensor in (("weight", ours.get(f"{n}.{site}")), ("bias", ours.get(f"{n}.{site}.bias"))):
                if tensor is None and kind == "weight":
                    raise ModelError(f"{base.name}: layer {n} is a mixture of experts, which cannot be written so")
                if tensor is not None:
                    parts = zip(names, tensor.split(list(sizes)), strict=True)
                    out |= {f"{prefix}{block}.{p}.{kind}": part for p, part in parts}
    return out


def _facts(base: BaseModel) -> dict[str, Any]:
    c = base.decoder.config
    biased = {site for site in SITES if f"0.{site}.bias" in base.decoder.weights}
    rope = {"rope_type": "default", **c.rope_scaling, "rope_theta": c.rope_theta}
    if rope["rope_type"] == "divided":
        raise ModelError(
            f"{base.name}: Hugging Face has no form for positions stretched as a GGUF file writes them; "
            "start from the model's Hugging Face directory"
        )
    return {
        "architectures": [CLASSES[c.family] + "ForCausalLM"], "model_type": c.family, "vocab_size": c.vocab,
        "hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim, "intermediate_size": c.ffn,
        "max_position_embeddings": c.context, "rms_norm_eps": c.eps, "tie_word_embeddings": c.tied,
        "hidden_act": "silu", "rope_parameters": rope, "sliding_window": None, "use_sliding_window": False,
        "attention_bias": "o" in biased, "mlp_bias": "down" in biased, "eos_token_id": sorted(base.eos),
        "bos_token_id": base.tokenizer.token_to_id(base.bos_token) if base.bos_token else None,
        "dtype": str(base.decoder.dtype).removeprefix("torch."),
    }  # fmt: skip
