"""An expert without weights: an instruction, and worked examples shown to the base model before the conversation."""

from coterie.data.read import Message
from coterie.experts import classifier
from coterie.experts.library import ExpertFacts

KIND = "instruction"


def frame(facts: ExpertFacts, messages: list[Message]) -> list[Message]:
    """The conversation as the expert wants it: its instruction where there is none, then its examples, then it."""
    system, rest = (messages[:1], messages[1:]) if messages and messages[0]["role"] == "system" else ([], messages)
    if facts.system and not system:
        system = [{"role": "system", "content": facts.system}]
    shown = [
        {"role": role, "content": text}
        for shot in facts.examples for role, text in zip(("user", "assistant"), shot, strict=True)
    ]  # fmt: skip
    return [*system, *shown, *rest]


def posed(facts: ExpertFacts, prompt: list[Message]) -> list[Message]:
    """A row of test data as this expert gets it: its own instruction in place of the one declared for the task."""
    own = prompt[1:] if facts.kind == KIND and prompt[0]["role"] == "system" else prompt
    return frame(facts, own)


def weights_of(facts: ExpertFacts) -> tuple[str, int] | None:
    """Name and version under which the engine finds its weights; None for an expert that has none there."""
    return None if facts.kind in (KIND, classifier.KIND) else (facts.name, facts.version)
