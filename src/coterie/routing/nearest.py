"""The router behind "auto": the expert whose training questions are nearest, or none of them.

Each expert is published with a profile: embeddings of a sample of its questions, and how near its own questions
are to each other. A request goes to the expert with the highest cosine similarity to its nearest questions,
provided it is as near as that expert's own questions usually are; else the base model answers. The embedding is
the mean hidden state of the base model itself, so nothing else need be loaded.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from coterie.errors import ModelError
from coterie.model.decoder import attend_packed, packed_positions
from coterie.model.load import BaseModel

FILE = "profile.safetensors"
SAMPLE = 256  # questions kept for each expert
NEAREST = 3  # a similarity is the mean over this many
OUTLIERS = 0.05  # share of an expert's own questions that its threshold would turn away
LONGEST = 128  # tokens of a question that count


@dataclass(frozen=True)
class Profile:
    """`vectors` (sample, width), unit length, around `centre` (width); `threshold`, a cosine."""

    vectors: NDArray[np.float32]
    centre: NDArray[np.float32]
    threshold: float

    def save(self, folder: Path) -> None:
        """Write it into the folder of an expert's version."""
        threshold = np.array([self.threshold], np.float32)
        save_file({"vectors": self.vectors, "centre": self.centre, "threshold": threshold}, folder / FILE)


def load_profile(folder: Path) -> Profile | None:
    """The profile of a version; None for an expert that was imported without one."""
    if not (folder / FILE).exists():
        return None
    try:
        tensors = load_file(folder / FILE)
        return Profile(tensors["vectors"], tensors["centre"], float(tensors["threshold"][0]))
    except Exception as error:  # safetensors raises its own kind
        raise ModelError(f"{folder / FILE}: damaged ({error})") from error


@torch.no_grad()
def embed(base: BaseModel, texts: list[str]) -> NDArray[np.float32]:
    """Mean hidden state of each text, (texts, width)."""
    out = []
    for start in range(0, len(texts), 32):
        ids = [base.encode(t)[:LONGEST] or [0] for t in texts[start : start + 32]]
        lengths = [len(i) for i in ids]
        flat = torch.tensor([t for i in ids for t in i], device=base.decoder.device)
        hidden = base.decoder.forward(flat, packed_positions(lengths, flat.device), attend_packed(lengths)).float()
        out += [part.mean(dim=0).cpu().numpy() for part in hidden.split(lengths)]
    return np.stack(out).astype(np.float32)


def make_profile(base: BaseModel, questions: list[str], seed: int = 0) -> Profile:
    """The profile of an expert that was trained on `questions`."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(questions))[:SAMPLE]
    raw = embed(base, [questions[i] for i in chosen])
    centre = embed(base, BACKGROUND).mean(axis=0)
    vectors = _unit(raw - centre)
    own = vectors @ vectors.T
    np.fill_diagonal(own, -1)
    usual = _nearest(own)
    return Profile(vectors, centre, float(np.quantile(usual, OUTLIERS)))


def route(base: BaseModel, profiles: dict[str, Profile], text: str) -> tuple[str | None, float]:
    """The expert for `text` and its similarity; None where no expert is near enough."""
    if not profiles:
        return None, 0.0
    vector = embed(base, [text])[0]
    scores = {}
    for name, p in profiles.items():
        similarity = float(_nearest((p.vectors @ _unit(vector - p.centre))[None])[0])
        scores[name] = (similarity >= p.threshold, similarity)
    best = max(scores, key=lambda name: scores[name])
    near, similarity = scores[best]
    return (best if near else None), similarity


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    unit: NDArray[np.float32] = (x / np.maximum(norm, 1e-9)).astype(np.float32)
    return unit


def _nearest(similarities: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of the NEAREST highest in each row."""
    k = min(NEAREST, similarities.shape[-1])
    nearest: NDArray[np.float32] = np.partition(similarities, -k, axis=-1)[..., -k:].mean(axis=-1)
    return nearest


# Everyday sentences on many subjects: their mean is what all embeddings share, and is taken away.
BACKGROUND = [
    "What time is it in Tokyo?", "Write a poem about the sea.", "How do I boil an egg?", "Explain gravity to a child.",
    "The train leaves at half past nine.", "Who painted this portrait?", "Translate this sentence into French.",
    "My back hurts when I sit too long.", "Sort a list of numbers in Python.", "What is seven times eight?",
    "Tell me a joke.", "The meeting was moved to Thursday.", "How far away is the moon?", "Is it going to rain today?",
    "Summarise the following paragraph.", "Which team won the cup last year?", "I would like to learn the piano.",
    "Why do cats purr?", "Give me three names for a boat.", "How does a bill become a law?",
]  # fmt: skip
