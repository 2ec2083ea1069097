"""The space in which the router compares texts: what the lower layers of the base model make of them, and their words.

A text is the mean, over its tokens, of the residual stream after a sixth of the layers, each token scaled to unit
root mean square; beside it stands the mean of the tokens' embeddings, where rare tokens weigh more than common ones.
The first says what a text means, the second which very words tell neighbouring subjects apart ("overdraft", "card").
The lower layers are the trunk, which no expert changes, so the same text has the same vector whoever answers. A fixed
background of everyday sentences says where the middle of the space is and how wide it is before any expert has been
seen. docs/routing.md has the measurements behind these choices.

Notable: how rare a token is comes from its id alone. Vocabularies are built from the commonest pieces on, so the id is
a rank, and by Zipf's law one over the rank a frequency (the weights of Arora et al. 2017). No expert's data is counted.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from coterie.engine.by_torch import TorchStep
from coterie.engine.step import Step
from coterie.files import write_atomic
from coterie.model.decoder import attend_packed, packed_positions
from coterie.model.load import BaseModel

Floats = NDArray[np.float32]
LONGEST = 128  # tokens of a text that count
BATCH = 32  # texts embedded at once
WORDS = 0.5  # weight of the words' part of a vector, where the hidden state's has weight 1
COMMON = 1000  # id of the token that weighs half as much as the rarest
LAYERS = 0.17  # share of the base model's layers
RECIPE = f"{LAYERS} {WORDS} {COMMON}"  # vectors of one base model can be compared where this is the same


def depth(base: BaseModel) -> int:
    """How many layers are run: a sixth of them, at least one (5 of SmolLM2-135M's 30)."""
    return max(1, round(base.decoder.config.layers * LAYERS))


def identity(base: BaseModel) -> str:
    """A short name of the space: vectors of two base models, of two depths or of other words cannot be compared.

    The same in float32 and in bfloat16, which lie close enough together.
    """
    weights, digest = base.decoder.weights, hashlib.sha256(f"{depth(base)} tokens {WORDS} {COMMON}".encode())
    for part in (
        weights["embed"][:64],
        weights["final_norm"],
        *(weights[f"{i}.attn_norm"] for i in range(depth(base))),
    ):
        digest.update(part.bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def embed(base: BaseModel, texts: list[str], step: Step | TorchStep | None = None) -> Floats:
    """What the trunk makes of each text, (texts, width of the model)."""
    return _meanings(base, _tokens(base, texts), step)


def locate(base: BaseModel, texts: list[str], step: Step | TorchStep | None = None) -> Floats:
    """Where the router sees each text, (texts, 2 * width of the model): its meaning, and its words."""
    rows = _tokens(base, texts)
    return np.concatenate([_meanings(base, rows, step), WORDS * _words(base, rows)], axis=1)


def _tokens(base: BaseModel, texts: list[str]) -> list[list[int]]:
    return [base.encode(base.unmarked(text))[:LONGEST] for text in texts]


@torch.no_grad()
def _meanings(base: BaseModel, rows: list[list[int]], step: Step | TorchStep | None) -> Floats:
    """Mean of the trunk's output over each row of tokens, (rows, width); a single one by the step in C if there is."""
    decoder = base.decoder
    start = base.encode(base.bos_token or base.eos_token)  # soaks up the attention that a first token draws
    rows = [(start + row)[-decoder.config.context :] for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # alike in length, as attention pads
    out = np.zeros((len(rows), decoder.config.width), np.float32)
    for place in range(0, len(order), BATCH):
        chosen = order[place : place + BATCH]
        lengths = [len(rows[i]) for i in chosen]
        if isinstance(step, Step) and len(chosen) == 1:
            hidden = step.trunk(rows[chosen[0]], depth(base))
        else:
            ids = torch.tensor([t for i in chosen for t in rows[i]], device=decoder.device)
            hidden = decoder.run(
                decoder.embed(ids), packed_positions(lengths, decoder.device), attend_packed(lengths),
                layers=range(depth(base)),
            ).float()  # fmt: skip
        hidden = _scaled(hidden)
        for i, tokens in zip(chosen, hidden.split(lengths), strict=True):
            out[i] = (tokens[len(start) :] if len(tokens) > len(start) else tokens).mean(dim=0).cpu().numpy()
    return out


@torch.no_grad()
def _words(base: BaseModel, rows: list[list[int]]) -> Floats:
    """Mean of the embeddings of each row of tokens, (rows, width), rare tokens weighing more; zeros for no tokens."""
    decoder = base.decoder
    out = np.zeros((len(rows), decoder.config.width), np.float32)
    for i, row in enumerate(rows):
        if row:
            ids = torch.tensor(row, device=decoder.device)
            weights = (ids + 1) / (ids + 1 + COMMON)
            out[i] = (weights / weights.sum() @ _scaled(decoder.embed(ids).float())).cpu().numpy()
    return out


def _scaled(tokens: torch.Tensor) -> torch.Tensor:
    """Each token, (tokens, width), to a root mean square of 1."""
    return tokens / tokens.pow(2).mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)


@dataclass(frozen=True)
class Background:
    """Mean (n) and covariance (n, n) of the background sentences; n: numbers of a place."""

    space: str
    centre: Floats
    scatter: Floats


def background(base: BaseModel, folder: Path | None = None) -> Background:
    """The background of this base model, kept in `folder` for the next time (4.6 kB for each sentence)."""
    space = identity(base)
    file = folder / f"background-{space}.safetensors" if folder else None
    vectors = None
    if file and file.exists():
        try:
            vectors = load_file(file)["vectors"]
        except Exception:  # safetensors raises its own kind; damaged: made anew
            vectors = None
    if vectors is None or vectors.shape != (len(SENTENCES), 2 * base.decoder.config.width):
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
