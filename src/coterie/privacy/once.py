"""Masking of texts that belong to no customer of the desk: a request to the API, a row of training data, what a model
on another machine is asked. Their pseudonyms live as long as the texts, and are kept nowhere.

Notable: the same text is always masked alike, so that what a remote model gives for it can be compared and kept.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from coterie.data.private import Span
from coterie.data.read import FACTS, Row
from coterie.model.load import BaseModel
from coterie.privacy.deidentify import Detector, Mask
from coterie.privacy.expert import WhenNeeded
from coterie.privacy.pseudonyms import Pseudonyms
from coterie.privacy.vault import Masked

Detect = Callable[[str], list[Span]]
Once = Callable[[Sequence[str]], Masked]  # texts that belong together: one name has one pseudonym in all of them


def detector_of(base: BaseModel, tell: Callable[[str], None] = lambda _: None) -> Detector:
    """What finds private data: the rules, and the tagging expert of a base model, opened when it is needed."""
    return Detector(WhenNeeded(base, tell))


def mask_row(detector: Detect, row: Row) -> Row:
    """A row of a data file with every text in it masked, however deep; who it is from, under what licence, stays."""
    kept = set(FACTS)
    texts = list(_texts([v for k, v in row.items() if k not in kept]))
    masked = dict(zip(texts, mask_once(detector, texts).texts, strict=True))

    def put(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: put(v) for k, v in value.items()}
        return (
            [put(v) for v in value] if isinstance(value, list) else masked[value] if isinstance(value, str) else value
        )

    return {k: v if k in kept else put(v) for k, v in row.items()}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def mask_once(detector: Detect, texts: Sequence[str]) -> Masked:
    """The texts with pseudonyms, and what puts the values back. Raises MaskingFailed."""
    mask = Mask(detector, Pseudonyms())
    return Masked([mask.hide(text) for text in texts], mask.restore, mask.restoring)
