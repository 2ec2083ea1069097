"""Constrained decoding: an answer that is one of a list of choices, matches a regex, or fits a JSON schema."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from coterie.errors import CoterieError
from coterie.model.load import BaseModel

SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Constraint:
    """A grammar, in llguidance's notation."""

    grammar: str


def choices(options: Sequence[str]) -> Constraint:
    """One of `options`, to the letter."""
    if not options or not all(options):
        raise CoterieError("choices must be a list of texts, none empty")
    return Constraint(LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(o) for o in options)))


def regex(pattern: str) -> Constraint:
    """A text that `pattern` matches as a whole (the syntax of Rust's regex)."""
    return Constraint(LLMatcher.grammar_from_regex(pattern))


def json_schema(schema: dict[str, Any]) -> Constraint:
    """A JSON text that fits `schema`, spaced as json.dumps does: a small model left free may write spaces on end."""
    try:  # as text, because llguidance overflows the stack on a deep dict
        return Constraint(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=SPACING))
    except (ValueError, RecursionError) as error:
        raise CoterieError(f"the JSON schema cannot be used: {error}") from error


class Grammars:
    """Compiled grammars over one model's vocabulary."""

    def __init__(self, base: BaseModel) -> None:
        known = base.tokenizer.get_vocab_size(with_added_tokens=True)
        size = max(base.decoder.config.vocab, known)
        self.tokenizer = LLTokenizer(base.tokenizer.to_str(), n_vocab=size, eos_token=sorted(base.eos) or None)
        self._compile = lru_cache(maxsize=64)(self._compile_new)

    def _compile_new(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0)
        if error := failure(matcher):
            raise error
        return matcher

    def matcher(self, constraint: Constraint) -> LLMatcher:
        """A fresh matcher. Raises CoterieError where the grammar is not valid."""
        return self._compile(constraint.grammar).deep_copy()

    def mask(self, matcher: LLMatcher, scores: Tensor) -> None:
        """Set the scores (vocab) of tokens that may not come next to minus infinity."""
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        scores.masked_fill_(torch.from_numpy(bits[: len(scores)] == 0).to(scores.device), float("-inf"))


def failure(matcher: LLMatcher) -> CoterieError | None:
    """Why `matcher` cannot go on: its grammar is not valid, or proved too complex on the way."""
    if not matcher.is_error():
        return None
    words = matcher.get_error().partition("<state>")[0].split()
    return CoterieError(f"the constraint cannot be used: {' '.join(words)[:300]}")
