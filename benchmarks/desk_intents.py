"""A closed-form classifier of intents on the frozen base model: what calibrated abstention is measured with.

Kernel ridge regression of "is it this intent's?" on four views of a message: the mean hidden state of its tokens after
a quarter of the layers (as routing/space.py makes it); what the model is about to say when it is asked in a few words
what the customer wants, as the last token's state at the top and the mean over the question's tokens somewhat below
(after PromptEOL, Jiang et al. 2023); and character n-grams, hashed. The kernel is a Gaussian of the mean cosine; the
confidence is the distance between the best two intents. The scores of the rows it learned from, each left out in
turn, come from the same inverse (Rifkin & Lippert 2007), so the threshold needs no rows of its own.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.model.decoder import attend_packed, packed_positions
from coterie.model.load import BaseModel

BEFORE, AFTER = 'A customer of {} wrote: "', '"\nIn a few words, the customer wants to know about'
GAMMA, RIDGE, HASHED = 1.0, 0.03, 4096  # chosen, with the views, on held-out rows of Banking77's training data
MOST = 10_003  # rows learned from: their kernel is a dense matrix of 400 MB
Floats = NDArray[np.float32]


@torch.no_grad()
def hidden(base: BaseModel, texts: list[str], business: str) -> list[Floats]:
    """The three views of hidden states, (texts, width) each."""
    decoder, start = base.decoder, base.encode(base.bos_token or base.eos_token)
    plain = [start + base.encode(text)[:128] for text in texts]
    before, after = start + base.encode(BEFORE.format(business)), base.encode(AFTER)
    asked = [before + row[len(start) :] + after for row in plain]
    layers = decoder.config.layers
    quarter, high = max(1, round(layers * 0.26)), max(1, round(layers * 0.87))
    (words,) = _states(base, plain, [(0, quarter)], lambda x: (x[len(start) :] if len(x) > len(start) else x).mean(0))
    question, last = _states(
        base, asked, [(0, high), (high, layers)], lambda x: x[-len(after) :].mean(0), lambda x: x[-1]
    )
    return [words, question, last]


def _states(
    base: BaseModel, rows: list[list[int]], spans: list[tuple[int, int]],
    *pools: Callable[[torch.Tensor], torch.Tensor],
) -> list[Floats]:  # fmt: skip
    """Each token scaled to unit root mean square, pooled after each span of layers by the pool of its place."""
    decoder, out = base.decoder, [np.zeros((len(rows), base.decoder.config.width), np.float32) for _ in spans]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for place in range(0, len(order), 64):
        chosen = order[place : place + 64]
        lengths = [len(rows[i]) for i in chosen]
        state = decoder.embed(torch.tensor([t for i in chosen for t in rows[i]], device=decoder.device))
        positions, attend = packed_positions(lengths, decoder.device), attend_packed(lengths)
        for view, (first, end) in enumerate(spans):
            state = decoder.run(state, positions, attend, layers=range(first, end))
            unit = state.float() / state.float().pow(2).mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)
            for i, tokens in zip(chosen, unit.split(lengths), strict=True):
                out[view][i] = pools[view](tokens).cpu().numpy()
    return out


def grams(texts: list[str], weights: Floats | None = None) -> tuple[Floats, Floats]:
    """Character n-grams of 2 to 5, hashed, log counts times inverse document frequency; and these frequencies."""
    out = np.zeros((len(texts), HASHED), np.float32)
    for row, text in enumerate(texts):
        padded = f" {' '.join(text.lower().split())} "
        for n in range(2, 6):
            for at in range(len(padded) - n + 1):
                out[row, _bucket(padded[at : at + n])] += 1
    out = np.log1p(out)
    if weights is None:
        weights = np.log((1 + len(texts)) / (1 + (out > 0).sum(axis=0))).astype(np.float32) + 1
    return out * weights, weights


_buckets: dict[str, int] = {}


def _bucket(gram: str) -> int:
    if gram not in _buckets:
        _buckets[gram] = int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=4).digest()) % HASHED
    return _buckets[gram]


def _unit(x: Floats) -> Floats:
    unit: Floats = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)).astype(np.float32)
    return unit


@dataclass
class Intents:
    """Learned from `texts` with `labels`; `left_out` (rows, intents) are the scores of these rows, each left out."""

    base: BaseModel
    business: str
    names: list[str]
    centres: list[tuple[Floats, Floats]]
    weights: Floats
    views: list[Floats]
    solved: Floats
    left_out: Floats

    def scores(self, texts: list[str]) -> Floats:
        """(texts, intents)."""
        views = _views(self.base, self.business, texts, self.centres, self.weights)
        kernel = _kernel(views, self.views)
        out: Floats = kernel @ self.solved
        return out


def _views(
    base: BaseModel, business: str, texts: list[str], centres: list[tuple[Floats, Floats]], weights: Floats
) -> list[Floats]:
    states = [_unit((h - m) / s) for h, (m, s) in zip(hidden(base, texts, business), centres, strict=True)]
    return [*states, _unit(grams(texts, weights)[0])]


def _kernel(left: list[Floats], right: list[Floats]) -> Floats:
    cosine = np.zeros((len(left[0]), len(right[0])), np.float32)
    for a, b in zip(left, right, strict=True):
        cosine += (a @ b.T) / len(left)
    return np.exp(-GAMMA * (1 - cosine), out=cosine)


def learn(base: BaseModel, business: str, texts: list[str], labels: list[str], seed: int = 0) -> Intents:
    """In closed form; of more than MOST rows, from a sample."""
    if len(texts) > MOST:
        kept = np.random.default_rng(seed).permutation(len(texts))[:MOST]
        texts, labels = [texts[i] for i in kept], [labels[i] for i in kept]
    names = sorted(set(labels))
    states = hidden(base, texts, business)
    centres = [(h.mean(axis=0), h.std(axis=0) + 1e-6) for h in states]
    counts, weights = grams(texts)
    views = [*(_unit((h - m) / s) for h, (m, s) in zip(states, centres, strict=True)), _unit(counts)]
    place = {name: n for n, name in enumerate(names)}
    wanted = np.eye(len(names), dtype=np.float32)[[place[label] for label in labels]] - 1 / len(names)
    inverse = torch.from_numpy(_kernel(views, views))
    inverse.diagonal().add_(RIDGE)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inverse)).numpy()
    solved = inverse @ wanted
    left_out = wanted - solved / np.diag(inverse)[:, None]
    return Intents(
        base, business, names, centres, weights, views, solved.astype(np.float32), left_out.astype(np.float32)
    )


def margin(scores: Floats) -> Floats:
    """The confidence of each row: how far its best intent is ahead."""
    best = np.sort(scores, axis=1)
    lead: Floats = best[:, -1] - best[:, -2]
    return lead


def abstention(confidence: Any, right: Any, at: float) -> dict[str, float]:
    """Share of the rows at or above the threshold, and share of these that are wrong."""
    sent = np.asarray(confidence) >= at
    wrong = ~np.asarray(right, bool)[sent]
    return {"handled": float(sent.mean()), "wrong": float(wrong.mean()) if sent.any() else 0.0}
