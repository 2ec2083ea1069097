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
from pathlib import Path

import numpy as np
import torch
from rapidfuzz.fuzz import ratio
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding_bag

from coterie.errors import DataError
from coterie.experts.library import write_atomic_bytes
from coterie.knowledge.entities import plain

LIST, COUNT = "=list", "=count"  # how a path ends: the things it leads to, or how many they are
BUCKETS = 1 << 14  # of hashed features
HOPS = 3
BEAM = 6
BY_NAME = 6.0  # nats of a relation whose words all stand in the question, before training weighs it
UNASKED = 0.35  # share of a relation's words' likeness that is chance
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
    by_name: float = BY_NAME

    def scores(self, words: Sequence[str], taken: Sequence[str], allowed: Sequence[str]) -> list[float]:
        """Log-probability of each of `allowed` as the next choice, over these and no others."""
        known = {name: i for i, name in enumerate(self.choices)}
        learned = self.weight[features(words, taken)].sum(dim=0) if self.choices else torch.zeros(0)
        named = [self.likeness(words, name, taken) for name in allowed]
        raw = [
            (float(learned[known[name]]) if name in known else float(learned.min()) if self.choices else 0.0)
            + self.by_name * like
            for name, like in zip(allowed, named, strict=True)
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
        best = [max((ratio(part, word) for word in words), default=0.0) / 100 for part in parts]
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

    def learn(self, rows: Sequence[Asked], epochs: int = 12, seed: int = 0) -> float:
        """Train on questions with their paths, from the start; the last mean loss in nats. Raises DataError for none.

        Adam, decoupled decay; every hop of a path is an example, and so is its end.
        """
        if not rows:
            raise DataError("no questions to learn paths from")
        self.choices = [*sorted({r for row in rows for r in row.path}), LIST, COUNT]
        known = {name: i for i, name in enumerate(self.choices)}
        bags, targets = [], []
        for row in rows:
            for hop, choice in enumerate((*row.path, row.end)):
                bags.append(torch.tensor(features(row.words, row.path[:hop])))
                targets.append(known[choice])
        generator = torch.Generator().manual_seed(seed)
        weight = torch.zeros(BUCKETS, len(self.choices), requires_grad=True)
        optimizer, loss = torch.optim.AdamW([weight], lr=0.02, weight_decay=1e-3), 0.0
        wanted = torch.tensor(targets)
        for _ in range(epochs):
            order, total = torch.randperm(len(bags), generator=generator).tolist(), 0.0
            for start in range(0, len(order), 128):
                chosen = order[start : start + 128]
                sizes = torch.tensor([0, *(len(bags[i]) for i in chosen[:-1])]).cumsum(0)
                found = embedding_bag(torch.cat([bags[i] for i in chosen]), weight, sizes, mode="sum")
                value = cross_entropy(found, wanted[chosen])
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total += float(value.detach()) * len(chosen)
            loss = total / len(bags)
        self.weight, self.by_name = weight.detach(), 1.0
        return loss

    def save(self, file: Path) -> None:
        """Write it down, whole or not at all."""
        about = {"labels": json.dumps(self.labels), "choices": json.dumps(self.choices), "by_name": str(self.by_name)}
        write_atomic_bytes(file, save({"weight": self.weight.contiguous()}, about))

    @classmethod
    def load(cls, file: Path) -> "Finder":
        """Raises DataError where the file is not such a finder."""
        try:
            with safe_open(file, "pt") as f:
                about: Mapping[str, str] = f.metadata()
                weight = f.get_tensor("weight")
            return cls(json.loads(about["labels"]), json.loads(about["choices"]), weight, float(about["by_name"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: no path finder ({type(error).__name__}: {error})") from error


def split_words(name: str) -> str:
    """The words of an IRI's last part, or of a name: placeOfBirth, place_of_birth."""
    last = re.split(r"[/#:]", name.rstrip("/#"))[-1]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", last)
