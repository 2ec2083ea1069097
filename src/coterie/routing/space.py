"""The space in which the router compares texts: what the lower layers of the base model make of them, and their words.

A text is the mean, over its tokens, of the residual stream after a quarter of the layers, each token scaled to unit
root mean square; beside it stands a sketch of its words. The lower layers are the trunk, which no expert changes, so
the same text has the same vector whoever answers. A fixed background of everyday sentences says where the middle of
the space is and how wide it is before any expert has been seen. docs/routing.md has the measurements behind these
choices.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from coterie.engine.step import Step
from coterie.files import write_atomic
from coterie.model.decoder import attend_packed, packed_positions
from coterie.model.load import BaseModel
from coterie.routing.words import PLACES, sketch

Floats = NDArray[np.float32]
LONGEST = 128  # tokens of a text that count
BATCH = 32  # texts embedded at once
WORDS = 3.0  # length of the words' part of a vector; the hidden state's is at most the root of its width (24)


def depth(base: BaseModel) -> int:
    """How many layers are run: a quarter of them, at least one (8 of SmolLM2-135M's 30)."""
    return max(1, round(base.decoder.config.layers * 0.26))


def identity(base: BaseModel) -> str:
    """A short name of the space: vectors of two base models, of two depths, or of other sketches cannot be compared.

    The same in float32 and in bfloat16, which lie close enough together.
    """
    weights, digest = base.decoder.weights, hashlib.sha256(f"{depth(base)} {PLACES} {WORDS}".encode())
    for part in (
        weights["embed"][:64],
        weights["final_norm"],
        *(weights[f"{i}.attn_norm"] for i in range(depth(base))),
    ):
        digest.update(part.bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def embed(base: BaseModel, texts: list[str], step: Step | None = None) -> Floats:
    """The vector of each text, (texts, width); a single one by the engine's step in C where there is one."""
    decoder = base.decoder
    start = base.encode(base.bos_token or base.eos_token)  # soaks up the attention that a first token draws
    rows = [(start + base.encode(text)[:LONGEST])[-decoder.config.context :] for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # alike in length, as attention pads
    out = np.zeros((len(texts), decoder.config.width), np.float32)
    for place in range(0, len(order), BATCH):
        chosen = order[place : place + BATCH]
        lengths = [len(rows[i]) for i in chosen]
        if step and len(chosen) == 1:
            hidden = step.trunk(rows[chosen[0]], depth(base))
        else:
            ids = torch.tensor([t for i in chosen for t in rows[i]], device=decoder.device)
            hidden = decoder.run(
                decoder.embed(ids), packed_positions(lengths, decoder.device), attend_packed(lengths),
                layers=range(depth(base)),
            ).float()  # fmt: skip
        hidden = hidden / hidden.pow(2).mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)
        for i, tokens in zip(chosen, hidden.split(lengths), strict=True):
            out[i] = (tokens[len(start) :] if len(tokens) > len(start) else tokens).mean(dim=0).cpu().numpy()
    return out


def locate(base: BaseModel, texts: list[str], step: Step | None = None) -> Floats:
    """Where the router sees each text, (texts, width + PLACES): its vector, and the sketch of its words."""
    words = np.stack([sketch(text) for text in texts]) if texts else np.zeros((0, PLACES), np.float32)
    return np.concatenate([embed(base, texts, step), WORDS * words], axis=1)


@dataclass(frozen=True)
class Background:
    """Mean (n) and covariance (n, n) of the background sentences; n: numbers of a place."""

    space: str
    centre: Floats
    scatter: Floats


def background(base: BaseModel, folder: Path | None = None) -> Background:
    """The background of this base model, kept in `folder` for the next time (3.3 kB for each sentence)."""
    space = identity(base)
    file = folder / f"background-{space}.safetensors" if folder else None
    vectors = None
    if file and file.exists():
        try:
            vectors = load_file(file)["vectors"]
        except Exception:  # safetensors raises its own kind; damaged: made anew
            vectors = None
    if vectors is None or vectors.shape != (len(SENTENCES), base.decoder.config.width + PLACES):
        vectors = locate(base, SENTENCES)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, save({"vectors": vectors}))
    centre = vectors.mean(axis=0)
    return Background(space, centre, np.cov(vectors, rowvar=False, bias=True).astype(np.float32))


_FRAMES = (
    "How do I {verb} {thing}?", "What is the best {thing}?", "Tell me about {thing}.",
    "Why did {thing} change so much?", "I want to {verb} {thing} today.",
    "Can you {verb} {thing} for me?", "Write a story about {thing}.",
    "Explain {thing} to a child.", "The {thing} was better than we thought.", "My {thing} does not work any more.",
    "Where can I find {thing}?", "Please {verb} {thing} and {other}.", "Compare {thing} with {other}.",
    "List five facts about {thing}.", "When was {thing} first seen?", "She said that {thing} would be late.",
    "if {thing} is less than {other}, return {thing}", "He bought 3 {thing} and 12 {other}.",
    "Summarise this text about {thing}.", "Is {thing} the same as {other}?", "Who is responsible for {thing}?",
    "How many {thing} are there in {other}?", "Thank you, the {thing} is fine.",
    "Could you translate {thing} into French?", "In 1987 the {thing} became famous because of {other}.",
)  # fmt: skip
_THINGS = (
    "the weather", "my garden", "a mountain", "the piano", "an old car", "the government", "a good book", "breakfast",
    "the moon", "my sister", "mathematics", "the internet", "a broken bone", "the economy", "a cat", "football",
    "the war", "coffee", "a train ticket", "my job", "the sea", "poetry", "a computer program", "money", "my house",
    "the election", "chemistry", "a film", "a birthday party", "the hospital", "the law", "a recipe", "music",
    "the king", "the factory", "a river", "a language", "my phone", "the school", "insurance", "clothes", "painting",
    "energy", "the bus", "medicine", "a dream", "the police", "religion", "wood", "space travel", "a spreadsheet",
    "my back", "bread", "an airport", "history", "a contract", "the market", "bees", "love", "the library", "rain",
    "the desert", "a camera", "an exam", "cheese", "a password", "the newspaper", "the wind", "a museum",
    "my neighbour", "the sun", "a virus", "the kitchen", "a bicycle", "philosophy", "sleep", "a dictionary",
    "the team", "a photograph",
)  # fmt: skip
_VERBS = ("make", "repair", "sell", "understand", "find", "learn", "clean", "compare", "open", "remember", "order")
SENTENCES = [
    _FRAMES[i % len(_FRAMES)].format(
        verb=_VERBS[i % len(_VERBS)], thing=_THINGS[(i * 31) % len(_THINGS)], other=_THINGS[(i * 47 + 9) % len(_THINGS)]
    )
    for i in range(400)
]
