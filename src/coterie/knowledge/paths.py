"""Which relations a question asks for, one after another: a small model that learns from questions and their paths.

Notable: a linear model over words, pairs and triples of words of the question, with what it names masked, each
crossed with the hop and with the relations taken so far; it chooses the next relation or the end. A relation is also
known by its own words, so that an untrained finder, or a relation never seen in training, is found by name. It trains
in seconds on a processor (Adam on hashed features) and is written as safetensors.
"""

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from rapidfuzz.fuzz import ratio
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding_bag

from coterie.errors import DataError
from coterie.files import write_atomic
from coterie.knowledge.entities import plain

LIST, COUNT = "=list", "=count"  # how a path ends: the things it leads to, or how many they are
BUCKETS = 1 << 14  # of hashed features
HOPS = 3
BEAM = 6
BY_NAME = 6.0  # nats of a relation whose words all stand in the question
UNASKED = 0.35  # share of a relation's words' likeness that is chance
EPOCHS, BATCH = 15, 128
MANY = 500  # questions from which all that was learned counts
FOLDS, SHARES = 5, (0.0, 0.1, 0.25, 0.5, 1.0)  # of fewer: how much of it counts is tried
MASK = "entity"


@dataclass(frozen=True)
class Asked:
    """A question with its named thing masked, and the path that answers it: relations, and how it ends."""

    words: tuple[str, ...]
    path: tuple[str, ...]
    end: str = LIST


@dataclass(frozen=True)
class RelationPath:
    """A path found for a question; `score` is its log-probability in nats, among the paths that the graph has."""

    relations: tuple[str, ...]
    end: str
    score: float


Next = Callable[[tuple[str, ...]], set[str]]  # relations that lead on from the end of a path that the graph has


def mask(question: str, start: int = 0, end: int = 0) -> tuple[str, ...]:
    """The words of a question, those from start to end (of `plain`) as one mark."""
    words = plain(question).split()
    return tuple([*words[:start], MASK, *words[end:]] if end > start else words)


def features(words: Sequence[str], taken: Sequence[str]) -> list[int]:
    """Hashed features of a question and the relations taken so far."""
    padded = ["<", *words, ">"]
    grams = {" ".join(padded[i : i + n]) for n in (1, 2, 3) for i in range(len(padded) - n + 1)}
    place = words.index(MASK) if MASK in words else -1
    if place >= 0:  # how far a word stands from what is named says which hop it belongs to
        grams |= {f"{max(-9, min(9, i - place))}:{word}" for i, word in enumerate(words)}
        grams |= {f"{len(words) - place}:{place}"}
    state = [f"hop{len(taken)}", f"after {taken[-1] if taken else ''}", "path " + ".".join(taken)]
    return [zlib.crc32(f"{s}|{g}".encode()) % BUCKETS for s in state for g in [*sorted(grams), ""]]


@dataclass
class Finder:
    """The model. `labels` are the words of each relation; weights are (BUCKETS, choices), choices the last of all."""

    labels: dict[str, str]  # of every relation of the graph
    choices: list[str] = field(default_factory=list)  # relations seen in training, and ends
    weight: Tensor = field(default_factory=lambda: torch.zeros(BUCKETS, 0))

    def scores(self, words: Sequence[str], taken: Sequence[str], allowed: Sequence[str]) -> list[float]:
        """Log-probability of each of `allowed` as the next choice, over these and no others."""
        known = {name: i for i, name in enumerate(self.choices)}
        hashed = features(words, taken)
        learned = self.weight[hashed].sum(dim=0) / len(hashed) ** 0.5 if self.choices else torch.zeros(0)
        raw = [
            (float(learned[known[name]]) if name in known else 0.0) + BY_NAME * self.likeness(words, name, taken)
            for name in allowed
        ]
        return torch.log_softmax(torch.tensor(raw), dim=0).tolist()

    def likeness(self, words: Sequence[str], choice: str, taken: Sequence[str] = ()) -> float:
        """How well a choice's own words stand in the question, 0 to 1."""
        if choice == COUNT:
            return float("how many" in " ".join(words)) * float(bool(taken))
        if choice == LIST:
            return 0.5 if taken else 0.0
        if choice in taken:  # its words were used
            return 0.0
        parts = plain(split_words(self.labels.get(choice, choice))).split()
        best = [max((_alike(part, word) for word in words), default=0.0) for part in parts]
        return max(0.0, float(np.mean(best)) - UNASKED) / (1 - UNASKED) if best else 0.0

    def find(self, words: Sequence[str], follow: Next, hops: int = HOPS, most: int = BEAM) -> list[RelationPath]:
        """The likeliest paths of 1 to `hops` relations that the graph has, best first."""
        beam: list[tuple[tuple[str, ...], float]] = [((), 0.0)]
        done: list[RelationPath] = []
        for hop in range(hops + 1):
            grown: list[tuple[tuple[str, ...], float]] = []
            for taken, score in beam:
                relations = sorted(follow(taken)) if hop < hops else []
                allowed = [*relations, *([LIST, COUNT] if taken else [])]
                if not allowed:
                    continue
                for name, more in zip(allowed, self.scores(words, taken, allowed), strict=True):
                    if name in (LIST, COUNT):
                        done.append(RelationPath(taken, name, score + more))
                    else:
                        grown.append(((*taken, name), score + more))
            beam = sorted(grown, key=lambda b: -b[1])[:most]
        return sorted(done, key=lambda p: -p.score)[:most]

    def learn(self, rows: Sequence[Asked], seed: int = 0) -> None:
        """Train on questions with their paths, from the start. Raises DataError for none.

        Every hop of a path is an example, and so is its end. What is learned comes on top of what the relations' own
        words say. How much it counts is tried on questions held out in turn where there are few: a handful of
        examples may teach less than the words themselves say.
        """
        if not rows:
            raise DataError("no questions to learn paths from")
        self.choices = [*sorted({r for row in rows for r in row.path}), LIST, COUNT]
        known = {name: i for i, name in enumerate(self.choices)}
        bags, targets, said, owner = [], [], [], []
        for number, row in enumerate(rows):
            for hop, choice in enumerate((*row.path, row.end)):
                taken = row.path[:hop]
                bags.append(torch.tensor(features(row.words, taken)))
                targets.append(known[choice])
                said.append([BY_NAME * self.likeness(row.words, name, taken) for name in self.choices])
                owner.append(number % FOLDS)
        wanted, by_name, fold = torch.tensor(targets), torch.tensor(said), torch.tensor(owner)

        def fit(places: list[int]) -> Tensor:
            return _fit([bags[i] for i in places], wanted[places], by_name[places], seed)

        share = 1.0
        if len(rows) < MANY:
            loss = dict.fromkeys(SHARES, 0.0)
            for out in range(FOLDS):
                kept, held = (fold != out).nonzero()[:, 0].tolist(), (fold == out).nonzero()[:, 0].tolist()
                if kept and held:
                    learned = _sums([bags[i] for i in held], fit(kept))
                    for part in SHARES:
                        found = part * learned + by_name[held]
                        loss[part] += float(cross_entropy(found, wanted[held], reduction="sum"))
            share = min(SHARES, key=lambda part: loss[part])
        self.weight = share * fit(list(range(len(bags))))

    def save(self, file: Path) -> None:
        """Write what was learned, whole or not at all; the labels are the graph's, which says who may see them."""
        about = {"choices": json.dumps(self.choices)}
        write_atomic(file, save({"weight": self.weight.contiguous()}, about))

    @classmethod
    def load(cls, file: Path) -> "Finder":
        """Raises DataError where the file is not such a finder."""
        try:
            with safe_open(file, "pt") as f:
                about: Mapping[str, str] = f.metadata()
                weight = f.get_tensor("weight")
            return cls({}, json.loads(about["choices"]), weight)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: no path finder ({type(error).__name__}: {error})") from error


def _sums(bags: Sequence[Tensor], weight: Tensor) -> Tensor:
    """What weight (BUCKETS, choices) says of each bag of features, (bags, choices)."""
    counts = torch.tensor([len(bag) for bag in bags])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts[:-1].cumsum(0)])
    return embedding_bag(torch.cat(list(bags)), weight, starts, mode="sum") / counts[:, None] ** 0.5


def _fit(bags: Sequence[Tensor], wanted: Tensor, by_name: Tensor, seed: int) -> Tensor:
    """Weights (BUCKETS, choices) that, added to `by_name` (bags, choices), choose the wanted (bags); AdamW."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(BUCKETS, by_name.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.05, weight_decay=1e-3)
    for _ in range(EPOCHS):
        order = torch.randperm(len(bags), generator=generator)
        for chosen in order.split(BATCH):
            value = cross_entropy(_sums([bags[i] for i in chosen.tolist()], weight) + by_name[chosen], wanted[chosen])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return weight.detach()


@lru_cache(maxsize=100_000)
def _alike(a: str, b: str) -> float:
    return ratio(a, b) / 100


def split_words(name: str) -> str:
    """The words of an IRI's last part, or of a name: placeOfBirth, place_of_birth."""
    last = re.split(r"[/#:]", name.rstrip("/#"))[-1]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", last)
