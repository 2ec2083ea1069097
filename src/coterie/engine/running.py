"""A request under way in the engine, and the rows that a step computes for several of them."""

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from coterie.engine.pages import Sequence
from coterie.engine.request import Generation
from coterie.engine.shelf import Loaded
from coterie.engine.text import TextStream
from coterie.model.decoder import Decoder


@dataclass(eq=False)
class Running:
    """A request that holds a cache slot, or one voice of several whose scores are averaged (a Blend of `logits`).

    The first voice leads: it chooses the token and owns the others, which follow it and share its request.
    """

    request: Generation
    loaded: Loaded | None
    stream: TextStream
    rng: np.random.Generator
    matcher: LLMatcher | None
    shared: tuple[tuple[Loaded, float], ...] = ()  # instead of one expert: several, in shares
    woken: int = 0  # of those, how many each token wakes by Arrow, instead of in shares
    weight: float = 1.0  # of this voice
    leads: bool = True
    followers: "list[Running]" = field(default_factory=list)
    length: int = 0  # tokens in the cache
    held: Sequence | None = None  # its pages, from its first turn on

    @property
    def ahead(self) -> int:
        """Virtual tokens before the prompt."""
        return self.loaded.ahead if self.loaded else 0

    @property
    def unread(self) -> int:
        """Tokens that are not in the cache yet: of the prompt, or the last one chosen and those it brought with it."""
        return self.ahead + len(self.request.prompt) + len(self.request.generated) - self.length

    @property
    def tokens(self) -> list[int]:
        """All of them so far, the virtual ones as -1."""
        return [-1] * self.ahead + self.request.prompt + self.request.generated

    @property
    def whole(self) -> bool:
        """Whether PyTorch has to read its prompt, in one piece, whose pages then are nobody else's."""
        return bool(self.woken) or self.request.sampling.echo

    @property
    def voices(self) -> "list[Running]":
        """This row and those that follow it; each holds a slot."""
        return [self, *self.followers]

    @property
    def experts(self) -> "list[Loaded]":
        """Those it computes with."""
        return [self.loaded] if self.loaded else [loaded for loaded, _ in self.shared]

    def next_tokens(self, count: int) -> list[int]:
        """The first `count` that are not in the cache, 0 for a virtual one."""
        if self.request.generated:  # all of the prompt has been read
            return self.request.generated[-self.unread :][:count]
        start, end = self.length, self.length + count
        virtual = min(count, max(0, self.ahead - start))
        return [0] * virtual + self.request.prompt[max(0, start - self.ahead) : max(0, end - self.ahead)]


# A row, how many of its unread tokens it reads in a step, and its guess of those that follow them.
Turn = tuple[Running, int, list[int]]


@dataclass(frozen=True)
class Batch:
    """What a step's `run` takes, a row for each token; all but `embedded` on the CPU. turns (rows): whose each is."""

    embedded: Tensor
    positions: Tensor
    slots: Tensor
    groups: list[tuple[Any, int, int, float]]
    wanted: Tensor
    starts: Tensor
    turns: Tensor


@dataclass(frozen=True)
class _Stretch:
    """Tokens of one turn, from position `start` on, that begin at the same layer."""

    layer: int
    turn: int
    row: Running
    start: int
    tokens: list[int]


def batch(turns: list[Turn], running: Ordered[Running], decoder: Decoder, ready: Callable[[Loaded], Any]) -> Batch:
    """The tokens of `turns`, those that begin lower first and an expert's side by side. Wanted: each turn's scores
    from its last unread token on, where it reads them all. `ready`: an expert as the step wants it."""
    stretches: list[_Stretch] = []
    for turn, (row, count, guess) in enumerate(turns):
        assert row.held, "begun with its turn"
        tokens = row.next_tokens(count) + guess
        for layer, start, end in row.held.spans(row.length, row.length + len(tokens)):
            stretches.append(_Stretch(layer, turn, row, start, tokens[start - row.length : end - row.length]))
    stretches.sort(key=lambda s: (s.layer, id(s.row.loaded)))
    embedded = decoder.embed(torch.tensor([t for s in stretches for t in s.tokens], device=decoder.device))
    groups: list[tuple[Any, int, int, float]] = []
    ends, place, layer = dict[Running, int](), 0, 0
    for s in stretches:
        count, soft = len(s.tokens), s.row.loaded.applied.soft if s.row.loaded else None
        if soft is not None and s.start < len(soft):
            embedded[place : place + min(count, len(soft) - s.start)] = soft[s.start : s.start + count]
        for loaded, share in [(s.row.loaded, 1.0)] if s.row.loaded else s.row.shared:
            expert = ready(loaded)
            if s.row.loaded and groups and groups[-1][0] is expert and s.layer == layer:
                groups[-1] = (expert, groups[-1][1], groups[-1][2] + count, share)
            else:
                groups.append((expert, place, count, share))
        place, layer = place + count, s.layer
        ends.setdefault(s.row, place)  # a turn's last tokens begin lowest, and so come first
    wanted = [
        n for row, count, guess in turns if count == row.unread for n in range(ends[row] - len(guess) - 1, ends[row])
    ]
    repeats = torch.tensor([len(s.tokens) for s in stretches])
    where = {row: slot for slot, row in enumerate(running)}

    def each(of: Callable[[_Stretch], int]) -> Tensor:
        return torch.tensor([of(s) for s in stretches]).repeat_interleave(repeats)

    positions = torch.cat([torch.arange(s.start, s.start + len(s.tokens)) for s in stretches])
    return Batch(
        embedded, positions, each(lambda s: where[s.row]), groups, torch.tensor(wanted, dtype=torch.long),
        each(lambda s: s.layer), each(lambda s: s.turn),
    )  # fmt: skip
