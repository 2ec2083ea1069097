"""A classifier on the frozen base model, learned in closed form: kind `classifier`.

Kernel ridge regression of "is it this label's?" on four views of a message: the mean hidden state of its tokens after
a quarter of the layers; what the model is about to say when it is asked in a few words what the writer wants, as the
last token's state at the top and the mean over the question's tokens somewhat below (after PromptEOL, Jiang et al.
2023); and character n-grams, hashed. The kernel is a Gaussian of the mean cosine. The scores of the rows it learned
from, each left out in turn, come from the same inverse (Rifkin and Lippert 2007), so that confidence and threshold need
no rows of their own. Nothing that was said is kept: a row is known by its file and line.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from coterie.errors import DataError, ModelError
from coterie.files import write_atomic
from coterie.model.decoder import attend_packed, packed_positions
from coterie.model.load import BaseModel

KIND, FILE = "classifier", "classifier.safetensors"
BEFORE, AFTER = 'A customer of {} wrote: "', '"\nIn a few words, the customer wants to know about'
GAMMA, RIDGE, HASHED = 1.0, 0.03, 4096  # chosen, with the views, on held-out rows of Banking77's training data
MOST = 10_000  # rows learned from: their kernel is a dense matrix of 400 MB
LONGEST, TOGETHER, NEAREST = 128, 64, 3  # tokens of a message that count; messages read at once; rows shown
Floats = NDArray[np.float32]
Read = Callable[[int, int], None]  # how many texts of how many have been read


@dataclass(frozen=True)
class Verdict:
    """What a message was called. confidence: the probability that this is right; sure: it is at the threshold or above;
    second: the next best label; near: the rows that speak most for it, as file:line, with label and likeness (0..1)."""

    label: str
    confidence: float
    sure: bool
    second: str
    near: tuple[tuple[str, str, float], ...] = ()

    def json(self) -> dict[str, Any]:
        """As API and CLI say it, beside the label."""
        near = [{"where": where, "label": label, "likeness": likeness} for where, label, likeness in self.near]
        return {"confidence": round(self.confidence, 5), "sure": self.sure, "second": self.second, "near": near}


@dataclass(frozen=True)
class Classifier:
    """Learned from rows of `labels` (rows, numbers of `names`), which came from `where`.

    centres (3, 2, width): mean and spread of the hidden views; idf (HASHED); hidden (3, rows, width), of unit length;
    grams (rows, HASHED), sparse, of unit length; solved (rows, names). The probability that the best label is right is
    1 / (1 + exp(-slope * lead - offset)), of its lead over the second; from `threshold` on it is sure.
    """

    business: str
    names: tuple[str, ...]
    where: tuple[str, ...]
    labels: Tensor
    centres: Tensor
    idf: Tensor
    hidden: Tensor
    grams: Tensor
    solved: Tensor
    slope: float = 1.0
    offset: float = 0.0
    threshold: float = 0.5
    error: float = 0.02

    def calibrated(self, slope: float, offset: float, threshold: float, error: float) -> "Classifier":
        """The same with another way from lead to confidence, and another threshold."""
        return replace(self, slope=slope, offset=offset, threshold=threshold, error=error)

    def confidence(self, lead: Floats) -> NDArray[np.float64]:
        """The probability that the best label is right, of its lead."""
        logit = np.clip(self.slope * lead.astype(np.float64) + self.offset, -30, 30)
        out: NDArray[np.float64] = 1 / (1 + np.exp(-logit))
        return out

    def judge(self, base: BaseModel, texts: Sequence[str]) -> list[Verdict]:
        """What each text is called, and why."""
        out: list[Verdict] = []
        for at in range(0, len(texts), 512):
            part = list(texts[at : at + 512])
            kernel = self._kernel(base, part)
            scores = (kernel @ self.solved).numpy()
            sure = self.confidence(lead(scores))
            for row, confidence in enumerate(sure.tolist()):
                best, second = _best_two(scores[row])
                near = (kernel[row] * (self.labels == best)).topk(min(NEAREST, len(self.where)))
                shown = tuple(
                    (self.where[i], self.names[best], round(1 + math.log(max(value, 1e-9)) / GAMMA, 3))
                    for i, value in zip(near.indices.tolist(), near.values.tolist(), strict=True) if value > 0
                )  # fmt: skip
                out.append(
                    Verdict(self.names[best], confidence, confidence >= self.threshold, self.names[second], shown)
                )
        return out

    def _kernel(self, base: BaseModel, texts: list[str]) -> Tensor:
        """(texts, rows)."""
        cosine = torch.zeros(len(texts), len(self.where))
        for states, (mean, spread), mine in zip(
            hidden(base, texts, self.business), self.centres, self.hidden, strict=True
        ):
            cosine += _unit((states - mean) / spread) @ mine.T
        cosine += (self.grams @ _unit(grams(texts) * self.idf).T).T
        return ((cosine / 4 - 1) * GAMMA).exp()

    def save(self, folder: Path) -> None:
        """Write it into the folder of its version: hidden views in float16, n-grams as row, place and value."""
        at, values = self.grams.indices(), self.grams.values()
        tensors = {
            "labels": self.labels.int(), "centres": self.centres, "idf": self.idf, "hidden": self.hidden.half(),
            "gram_rows": at[0].int(), "gram_places": at[1].short(), "gram_values": values.half(), "solved": self.solved,
        }  # fmt: skip
        numbers = [self.slope, self.offset, self.threshold, self.error]
        facts = {"business": self.business, "names": json.dumps(self.names), "where": json.dumps(self.where),
                 "numbers": json.dumps(numbers)}  # fmt: skip
        write_atomic(folder / FILE, save({k: v.contiguous() for k, v in tensors.items()}, facts))


def load(folder: Path, width: int) -> Classifier:
    """The classifier of a version, for a base model of this width. Raises ModelError where the file is damaged."""
    file = folder / FILE
    try:
        with safe_open(file, "pt") as f:
            facts = f.metadata() or {}
            t = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118, not a dict
        names, where = tuple(json.loads(facts["names"])), tuple(json.loads(facts["where"]))
        slope, offset, threshold, error = map(float, json.loads(facts["numbers"]))
        rows = len(where)
        for name, shape in (("centres", (3, 2, width)), ("hidden", (3, rows, width)), ("idf", (HASHED,)),
                            ("solved", (rows, len(names))), ("labels", (rows,))):  # fmt: skip
            if tuple(t[name].shape) != shape:
                raise ValueError(f"{name} is {tuple(t[name].shape)}, and {shape} was expected")
        if not all(bool(torch.isfinite(x).all()) for x in t.values()) or len(names) < 2 or not rows:
            raise ValueError("numbers that are not finite, or too few labels")
        places = torch.stack([t["gram_rows"].long(), t["gram_places"].long()])
        sparse = _sparse(places, t["gram_values"].float(), rows)
        return Classifier(
            facts["business"], names, where, t["labels"].long(), t["centres"], t["idf"], t["hidden"].float(), sparse,
            t["solved"], slope, offset, threshold, error,
        )  # fmt: skip
    except Exception as wrong:  # safetensors raises its own kind
        raise ModelError(f"{file}: damaged, or of another base model ({wrong}); `coterie fit` makes it anew") from wrong


def learn(
    base: BaseModel, business: str, texts: Sequence[str], labels: Sequence[str], where: Sequence[str], seed: int = 0,
    read: Read = lambda _d, _t: None,
) -> tuple[Classifier, Floats, list[int]]:  # fmt: skip
    """Learn in closed form; of more than MOST rows, from a sample. The classifier, not yet calibrated; the scores
    (rows, labels) of each row it learned from, had that row been left out; and the numbers of these rows.

    Raises DataError for fewer than two labels.
    """
    chosen = np.random.default_rng(seed).permutation(len(texts))[:MOST].tolist()
    texts, kept, where = [texts[i] for i in chosen], [labels[i] for i in chosen], [where[i] for i in chosen]
    names = tuple(sorted(set(kept)))
    if len(names) < 2:
        raise DataError(f"a classifier needs rows of at least 2 labels, and there are {len(names)}")
    states = hidden(base, texts, business, read)
    centres = torch.stack([torch.stack([h.mean(dim=0), h.std(dim=0, correction=0) + 1e-6]) for h in states])
    views = torch.stack([_unit((h - mean) / spread) for h, (mean, spread) in zip(states, centres, strict=True)])
    counts = grams(texts)
    idf = torch.log((1 + len(texts)) / (1 + (counts > 0).sum(dim=0))) + 1
    counts = _unit(counts * idf)
    cosine = counts @ counts.T
    for view in views:
        cosine.addmm_(view, view.T)
    inverse = cosine.div_(4).sub_(1).mul_(GAMMA).exp_()
    inverse.diagonal().add_(RIDGE)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inverse))
    place = {name: n for n, name in enumerate(names)}
    numbers = torch.tensor([place[label] for label in kept])
    wanted = torch.nn.functional.one_hot(numbers, len(names)).float() - 1 / len(names)
    solved = inverse @ wanted
    left_out = wanted - solved / inverse.diagonal()[:, None]
    places = counts.nonzero().T
    sparse = _sparse(places, counts[places[0], places[1]], len(texts))
    made = Classifier(business, names, tuple(where), numbers, centres, idf, views, sparse, solved)
    return made, left_out.numpy(), chosen


def lead(scores: Floats) -> Floats:
    """How far the best label of each row is ahead of the second."""
    best = np.sort(scores, axis=1)
    out: Floats = best[:, -1] - best[:, -2]
    return out


@torch.no_grad()
def hidden(base: BaseModel, texts: Sequence[str], business: str, read: Read = lambda _d, _t: None) -> list[Tensor]:
    """The three views of hidden states, (texts, width) each. Equal texts are read once; `read` hears how far it is."""
    number = {text: n for n, text in enumerate(dict.fromkeys(texts))}
    decoder, start = base.decoder, base.encode(base.bos_token or base.eos_token)
    before, after = start + base.encode(BEFORE.format(business)), base.encode(AFTER)
    room = min(LONGEST, decoder.config.context - len(before) - len(after))
    plain = [start + base.encode(base.unmarked(text))[:room] for text in number]
    questions = [before + row[len(start) :] + after for row in plain]
    layers = decoder.config.layers
    quarter, high = max(1, round(layers * 0.26)), max(1, round(layers * 0.87))
    skip, end = len(start), len(after)
    both = quarter + layers  # that a text goes through
    pools = [lambda x: x[-end:].mean(dim=0), lambda x: x[-1]]
    (words,) = _states(
        base, plain, 0, [(0, quarter)], [lambda x: (x[skip:] if len(x) > skip else x).mean(dim=0)],
        lambda done: read(done * quarter // both, len(plain)),
    )  # fmt: skip
    question, last = _states(
        base, questions, len(before), [(0, high), (high, layers)], pools,
        lambda done: read((len(plain) * quarter + done * layers) // both, len(plain)),
    )  # fmt: skip
    back = torch.tensor([number[text] for text in texts], dtype=torch.long)
    return [view[back] for view in (words, question, last)]


def _states(
    base: BaseModel, rows: list[list[int]], shared: int, spans: list[tuple[int, int]],
    pools: list[Callable[[Tensor], Tensor]], read: Callable[[int], None],
) -> list[Tensor]:  # fmt: skip
    """Each token scaled to unit root mean square, pooled after each span of layers by the pool of its place. All rows
    begin with the same `shared` tokens, which are computed once for TOGETHER rows, and not pooled."""
    decoder, out = base.decoder, [torch.zeros(len(rows), base.decoder.config.width) for _ in spans]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # alike in length, as attention pads
    for place in range(0, len(order), TOGETHER):
        chosen = order[place : place + TOGETHER]
        lengths = [len(rows[i]) - shared for i in chosen]
        tokens = rows[chosen[0]][:shared] + [t for i in chosen for t in rows[i][shared:]]
        state = decoder.embed(torch.tensor(tokens, device=decoder.device))
        positions, attend = packed_positions(lengths, decoder.device, shared), attend_packed(lengths, shared)
        for view, (first, end) in enumerate(spans):
            state = decoder.run(state, positions, attend, layers=range(first, end))
            unit = state.float() / state.float().pow(2).mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)
            for i, own in zip(chosen, unit[shared:].split(lengths), strict=True):
                out[view][i] = pools[view](own).cpu()
        read(place + len(chosen))
    return out


def grams(texts: Sequence[str]) -> Tensor:
    """Character n-grams of 2 to 5, hashed, log counts: (texts, HASHED)."""
    out = torch.zeros(len(texts), HASHED)
    for row, text in enumerate(texts):
        padded = f" {' '.join(text.lower().split())} "[:2000]
        found = [_bucket(padded[at : at + n]) for n in range(2, 6) for at in range(len(padded) - n + 1)]
        out[row] = torch.bincount(torch.tensor(found, dtype=torch.long), minlength=HASHED)
    return out.log1p()


@lru_cache(200_000)
def _bucket(gram: str) -> int:
    return int.from_bytes(hashlib.blake2b(gram.encode(errors="replace"), digest_size=4).digest()) % HASHED


def _unit(x: Tensor) -> Tensor:
    out: Tensor = x / x.norm(dim=1, keepdim=True).clamp_min(1e-9)
    return out


def _sparse(places: Tensor, values: Tensor, rows: int) -> Tensor:
    made: Tensor = torch.sparse_coo_tensor(places, values, (rows, HASHED), check_invariants=True)
    return made.coalesce()


def _best_two(scores: Floats) -> tuple[int, int]:
    second, best = np.argsort(scores, kind="stable")[-2:].tolist()
    return best, second
