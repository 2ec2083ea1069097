"""The tagging expert of a base model: trained where it is first needed, and kept beside the model."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from coterie.errors import CoterieError
from coterie.model.load import BaseModel
from coterie.privacy import frames
from coterie.privacy.sentences import LOCALES, sentences
from coterie.privacy.tagger import LAYERS, Tagger
from coterie.privacy.teach import teach

SENTENCES, HELD_OUT = 6000, 600


def file_of(base: BaseModel, folder: Path) -> Path:
    """Where the tagger of this base model is kept: another trunk, or other frames, have another file."""
    weights = base.decoder.weights
    digest = hashlib.sha256(repr((frames.FRAMES, frames.PLAIN, LOCALES, LAYERS, SENTENCES)).encode())
    for part in (weights["embed"][:64], *(weights[f"{i}.attn_norm"] for i in range(LAYERS))):
        digest.update(part.float().cpu().numpy().astype("float16").tobytes())
    return folder / f"tagger-{digest.hexdigest()[:16]}.safetensors"


def tagger_of(
    base: BaseModel, folder: Path, progress: Callable[[int, int], None] = lambda _done, _all: None, anew: bool = False
) -> Tagger:
    """The tagging expert of `base`, trained if `folder` has none, or `anew`. Raises StorageError."""
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
