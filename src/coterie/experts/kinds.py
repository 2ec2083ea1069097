"""The kinds of expert, each in a file of its own, and the one door to them all."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from coterie.errors import CoterieError, ModelError
from coterie.experts import adapter, classifier, full, lora, prefix, prompt
from coterie.experts.expert import CONFIG, Applied, Expert, read_config
from coterie.experts.instruction import weights_of
from coterie.experts.library import ExpertFacts, Library
from coterie.model.decoder import Decoder, ModelConfig
from coterie.model.load import BaseModel

HUB = re.compile(r"[\w.-]+/[\w.-]+")  # a model's name on the hub
KINDS: dict[str, ModuleType] = {"lora": lora, "adapter": adapter, "prompt": prompt, "prefix": prefix, "full": full}
PEFT_TYPES = {"LORA": lora, "PROMPT_TUNING": prompt, "PREFIX_TUNING": prefix}


def apply(expert: Expert, decoder: Decoder, training: bool = False) -> Applied:
    """What the expert brings to a forward pass, differentiable in its weights."""
    applied: Applied = KINDS[expert.config.kind].apply(expert, decoder, training)
    return applied


def save(expert: Expert, folder: Path, base: str, model: ModelConfig) -> None:
    """Write the expert into `folder`, in PEFT's format or (adapters) AdapterHub's."""
    KINDS[expert.config.kind].save(expert, folder, base, model)


def load(folder: Path, model: ModelConfig) -> Expert:
    """Read an expert of any kind. Raises ModelError where it is damaged, of another kind or another base."""
    if (folder / "model").is_dir():
        raise ModelError(f"{folder}: a model of its own (kind full), which cannot share an engine with others; to "
                         f'serve it, name it in a coterie.toml: base = "{folder / "model"}"')  # fmt: skip
    if (folder / classifier.FILE).exists():
        raise ModelError(f"{folder}: a classifier, which changes nothing in the model; it cannot be used as weights")
    facts = read_config(folder)
    peft = facts.get("peft_type")
    if peft is None and "config" in facts:
        kind: ModuleType = adapter
    elif peft in PEFT_TYPES:
        kind = PEFT_TYPES[peft]
    else:
        raise ModelError(f"{folder / CONFIG}: peft_type {peft!r}; known: {', '.join(PEFT_TYPES)}, and AdapterHub's "
                         "bottleneck adapters")  # fmt: skip
    expert: Expert = kind.load(folder, model)
    return expert


def made_for(folder: Path) -> str:
    """The model of the hub that the exchange format names as its base; "" where it names none, or a path."""
    facts = read_config(folder)
    named = str(facts.get("base_model_name_or_path") or facts.get("model_name") or "")
    return named if HUB.fullmatch(named) and not Path(named).exists() else ""


def read(library: Library, name: str, version: int | None, decoder: Decoder) -> Expert:
    """The weights of an expert in a library, if they were made for this base.

    Raises ModelError where they are damaged or were made for other weights; UnknownExpert.
    """
    facts = library.facts(name, version)
    _check_mark(facts, decoder)
    return load(library.folder(name, facts.version), decoder.config)


@dataclass(frozen=True)
class Labeller:
    """A classifier and the base model that it reads with."""

    learned: classifier.Classifier
    base: BaseModel

    def judge(self, texts: Sequence[str]) -> list[classifier.Verdict]:
        """What each text is called, and why."""
        return self.learned.judge(self.base, texts)


def labeller(library: Library, facts: ExpertFacts, base: BaseModel) -> Labeller:
    """A classifier of a library, ready to label. Raises ModelError where it is damaged or of another base."""
    _check_mark(facts, base.decoder)
    folder = library.folder(facts.name, facts.version)
    return Labeller(classifier.load(folder, base.decoder.config.width), base)


def answering(library: Library, facts: ExpertFacts, base: BaseModel) -> tuple[str, int] | Labeller | None:
    """What answers for an expert: its weights in the engine, a classifier, or nothing but its words."""
    return labeller(library, facts, base) if facts.kind == classifier.KIND else weights_of(facts)


def adds_up(library: Library, facts: ExpertFacts) -> bool:
    """Whether its update can be summed with those of others: a LoRA's can, unless DoRA scales the sum once more."""
    if facts.kind != "lora":
        return False
    try:
        return not read_config(library.folder(facts.name, facts.version)).get("use_dora")
    except CoterieError:  # it answers with that error when it is asked alone
        return False


def has_voice(facts: ExpertFacts) -> bool:
    """Whether it can score the next token in the base's engine, beside others: all that change the base's weights or
    what stands before a prompt, but not a model of its own."""
    return facts.kind != "full" and weights_of(facts) is not None


def _check_mark(facts: ExpertFacts, decoder: Decoder) -> None:
    if facts.base_mark and facts.base_mark != decoder.mark:
        raise ModelError(
            f"{facts.name}, version {facts.version}: made for {facts.base} with the weights {facts.base_mark}; the "
            f"base model here has the weights {decoder.mark}, to which it does not belong: train it again with "
            "`coterie fit`, or name the base model that it was made for in coterie.toml"
        )
