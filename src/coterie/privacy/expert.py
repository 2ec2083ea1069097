"""The tagging expert of a base model: trained where it is first needed, and kept beside the model."""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from coterie.data.private import Span
from coterie.errors import CoterieError
from coterie.model.load import BaseModel
from coterie.model.pull import models_dir
from coterie.privacy import frames
from coterie.privacy.sentences import LOCALES, sentences
from coterie.privacy.tagger import LAYERS, Tagger
from coterie.privacy.teach import teach

SENTENCES, HELD_OUT = 6000, 600
_opening = threading.Lock()  # of all: what two need at once is trained once


def file_of(base: BaseModel, folder: Path) -> Path:
    """Where the tagger of this base model is kept: another trunk, or other frames, have another file."""
    weights = base.decoder.weights
    digest = hashlib.sha256(repr((frames.FRAMES, frames.PLAIN, LOCALES, LAYERS, SENTENCES)).encode())
    for part in (weights["embed"][:64], *(weights[f"{i}.attn_norm"] for i in range(LAYERS))):
        digest.update(part.float().cpu().numpy().astype("float16").tobytes())
    return folder / f"tagger-{digest.hexdigest()[:16]}.safetensors"


def taggers_dir() -> Path:
    """Where tagging experts are kept: beside the base models."""
    return models_dir().parent / "taggers"


def tagger_of(
    base: BaseModel, folder: Path | None = None, progress: Callable[[int, int], None] = lambda _done, _all: None,
    anew: bool = False,
) -> Tagger:  # fmt: skip
    """The tagging expert of `base`, trained if `folder` has none, or `anew`. Raises StorageError."""
    folder = folder or taggers_dir()
    file = file_of(base, folder)
    if file.exists() and not anew:
        try:
            return Tagger.load(base, file)
        except CoterieError:  # damaged: made anew
            file.unlink(missing_ok=True)
    made = sentences(SENTENCES + HELD_OUT)
    tagger = teach(base, made[:SENTENCES], made[SENTENCES:], epochs=6, progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    tagger.save(file)
    return tagger


class WhenNeeded:
    """The tagging expert, opened (or trained) at the first text that is to be masked."""

    def __init__(self, base: BaseModel, tell: Callable[[str], None] = lambda _: None) -> None:
        self.base, self.tell = base, tell
        self._tagger: Tagger | None = None

    def open(self) -> Tagger:
        """Now. Raises StorageError."""
        with _opening:
            if self._tagger is None:
                if not file_of(self.base, taggers_dir()).exists():
                    self.tell("training the tagging expert that finds names and addresses (once, a minute or two)")
                self._tagger = tagger_of(self.base)
            return self._tagger

    def find(self, texts: list[str]) -> list[list[Span]]:
        """The spans in each text."""
        return (self._tagger or self.open()).find(texts)
