"""Take experts out of the house: merged into a full model, or as an adapter for llama.cpp."""

import math
import shutil
from pathlib import Path

import torch

from coterie.business import Business
from coterie.errors import CoterieError
from coterie.experts import kinds
from coterie.experts.library import ExpertFacts
from coterie.files import check_free
from coterie.model.export import KINDS, merge, write_gguf, write_gguf_lora
from coterie.model.load import load
from coterie.model.save import save_model


def merge_expert(business: Business, name: str, target: Path, gguf: str = "", version: int | None = None) -> Path:
    """Write base and expert as one model: a Hugging Face directory, or one GGUF file where `gguf` names its kind.

    Merged in float32 and written so (GGUF: in its kind). Raises CoterieError where the target is there, the kind of
    expert cannot be merged, or the kind of GGUF is unknown; UnknownExpert, ModelError, StorageError.
    """
    facts = _lora_facts(business, name, version)
    if gguf and gguf not in KINDS:
        raise CoterieError(f"unknown kind of GGUF {gguf!r}; known: {', '.join(KINDS)}")
    check_free(target)
    base = load(business.base_path(), torch.float32)
    expert = kinds.read(business.library, name, facts.version, base.decoder)
    change = kinds.apply(expert, base.decoder).change
    assert change is not None, "LoRA changes projections"
    whole = merge(base, change)
    if gguf:
        write_gguf(whole, target, gguf, f"{base.name}-{name}-{facts.version}")
    else:
        save_model(whole, target)
        shutil.copy(business.library.folder(name, facts.version) / "README.md", target / "README.md")
    return target


def export_gguf_lora(business: Business, name: str, target: Path, version: int | None = None) -> Path:
    """Write a LoRA expert as a GGUF adapter, which llama.cpp lays over its base model's GGUF. Errors as above."""
    facts = _lora_facts(business, name, version)
    check_free(target)
    base = load(business.base_path(), torch.float32)
    expert = kinds.read(business.library, name, facts.version, base.decoder)
    c = expert.config
    # llama.cpp scales by alpha / rank; rank-stabilised experts by alpha / sqrt(rank).
    write_gguf_lora(base, expert.weights, c.alpha * math.sqrt(c.rank) if c.rslora else c.alpha, target)
    return target


def needs_list(facts: ExpertFacts) -> str:
    """A word to whoever takes out an expert that has learned to choose and not to write; empty for any other."""
    if not facts.choices or facts.training.get("whole_answers", True):
        return ""
    return (
        f"{facts.name} has learned to choose among its {len(facts.choices)} choices, not to write them: elsewhere, "
        "hold its answers to that list, or train it with training.whole_answers = true"
    )


def _lora_facts(business: Business, name: str, version: int | None) -> ExpertFacts:
    facts = business.library.facts(name, version)
    if facts.kind != "lora":
        raise CoterieError(f"{name} is an expert of kind {facts.kind!r}; only LoRA experts can be merged into weights")
    return facts
