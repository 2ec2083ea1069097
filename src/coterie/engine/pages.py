"""The engine's cache: keys and values in pages of 32 tokens, which texts that begin alike share.

Notable: a page belongs to whoever computed its layers. The layers below an expert's first changed one (the trunk) are
the base's, whichever expert answers: experts confined to the upper layers (the branch) find there what the base or
another of them has read. Beside a page of the trunk lies the residual stream that comes out of it, so a conversation
that changes its expert goes on from there and computes only the branch. Page and stream are what the step would write
again, bit for bit, since a row's sums never depend on its batch (step.c).
Pages are found by their layers, their owner and a digest of all tokens up to their end; those that no sequence holds
stay, up to a budget, and the longest idle go first. Source: Kwon et al. 2023 (PagedAttention).
"""

from array import array
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.model.decoder import Attend, ModelConfig

PAGE = 32  # tokens; step.c wants a multiple of 4. With 16, blocks begin so often that reading them is 5% slower
APART = 8  # rows of one sequence that read the cache each for itself; more of them together
MOST_CUTS = 3  # layers at which a trunk may end; each keeps a residual stream for every token
TYPES = {torch.bfloat16: np.uint16, torch.float32: np.float32}


@dataclass(frozen=True)
class Part:
    """Layers [first, end) of a sequence, and whose they are: None for the base, else what tells its experts apart."""

    first: int
    end: int
    owner: Hashable = None


Key = tuple[Part, bytes]
# Which rows, and what the cache of a layer makes of their queries (n, H, D): mixed values (n, H, D).
Reader = tuple[slice | Tensor, Callable[[int, Tensor], Tensor]]


@dataclass(eq=False)
class Page:
    """`PAGE` tokens of a part: a block for each layer, and a block of the residual stream after them (-1: not kept)."""

    blocks: list[int]
    entry: int
    users: int = 1
    key: Key | None = None  # under which others find it, once it is full


@dataclass(eq=False)
class Sequence:
    """What one text holds of the cache, by part. Parts follow one another and cover all layers."""

    parts: tuple[Part, ...]
    pages: list[list[Page]]
    known: list[int]  # tokens of each part that others had left there; fewer from part to part
    digests: list[bytes] = field(default_factory=list)
    offered: int = 0  # pages of each part that others may find

    def spans(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Tokens [start, end) by the layer at which each has to begin: (layer, start, end)."""
        out = []
        for number in reversed(range(len(self.parts))):
            until = min(end, self.known[number - 1]) if number else end
            if start < until:
                out.append((self.parts[number].first, start, until))
                start = until
        return out


class Pages:
    """Keys and values of `slots` sequences of up to `length` tokens, and of those that ended, up to `idle` bytes."""

    def __init__(
        self, config: ModelConfig, slots: int, length: int, dtype: torch.dtype, idle: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        c, self.config, self.budget = config, config, idle
        self.span = -(-length // PAGE)
        shape = (c.kv_heads, PAGE, c.head_dim)
        self.block_bytes = 2 * c.kv_heads * PAGE * c.head_dim * dtype.itemsize
        self.entry_bytes = PAGE * c.width * 4
        most = slots * self.span
        # The last block, and entry, are nobody's: rows that only fill up a batch write there.
        self.nowhere = most * c.layers + idle // self.block_bytes, most * MOST_CUTS + idle // self.entry_bytes
        self.keys, self.values = (_zeros((self.nowhere[0] + 1, *shape), dtype, device) for _ in range(2))
        self.streams = _zeros((self.nowhere[1] + 1, PAGE, c.width), torch.float32, device)
        self.table = np.zeros((slots, c.layers, self.span), dtype=np.int32)
        self.entries = np.full((slots, c.layers, self.span), -1, dtype=np.int32)
        self.cuts: list[int] = []
        self._blocks, self._entries = _Free(), _Free()
        self._known: dict[Key, Page] = {}
        self._idle: dict[Page, int] = {}  # pages that nobody holds and their bytes, the longest idle first
        self.idle = 0  # bytes of those

    def parts(self, owner: Hashable, first_layer: int) -> tuple[Part, ...]:
        """Whose the layers are of experts `owner` that leave those below `first_layer` alone (the base: all)."""
        layers = self.config.layers
        if 0 < first_layer < layers and first_layer not in self.cuts and len(self.cuts) < MOST_CUTS:
            self.cuts = sorted([*self.cuts, first_layer])
        edges = [0, *(cut for cut in self.cuts if cut <= first_layer)]
        trunk = [Part(a, b) for a, b in pairwise(edges)]
        return (*trunk, Part(edges[-1], layers, owner))

    def begin(self, slot: int, parts: tuple[Part, ...], tokens: list[int]) -> Sequence:
        """A sequence at `slot`, with the pages that hold the beginning of `tokens`, whose last one stays to be read."""
        sequence = Sequence(parts, [], [])
        self.entries[slot] = -1
        limit = len(tokens) // PAGE
        for number in range(limit):
            _digest(sequence, tokens[number * PAGE : (number + 1) * PAGE])
        for part in parts:
            if part.end == self.config.layers:
                limit = min(limit, (len(tokens) - 1) // PAGE)
            pages: list[Page] = []
            while len(pages) < limit and (page := self._known.get((part, sequence.digests[len(pages)]))):
                self.idle -= self._idle.pop(page, 0)
                page.users += 1
                self._place(slot, part, len(pages), page)
                pages.append(page)
            limit = len(pages)
            sequence.pages.append(pages)
            sequence.known.append(limit * PAGE)
        return sequence

    def make_room(self, sequence: Sequence, slot: int, length: int) -> None:
        """Pages for all of the first `length` tokens."""
        for part, pages in zip(sequence.parts, sequence.pages, strict=True):
            while len(pages) * PAGE < length:
                inner = part.owner is None and part.end < self.config.layers
                page = Page(self._blocks.take(part.end - part.first), self._entries.take(1)[0] if inner else -1)
                self._place(slot, part, len(pages), page)
                pages.append(page)

    def _place(self, slot: int, part: Part, number: int, page: Page) -> None:
        self.table[slot, part.first : part.end, number] = page.blocks
        if page.entry >= 0:
            self.entries[slot, part.end, number] = page.entry

    def offer(self, sequence: Sequence, tokens: list[int], length: int) -> None:
        """Let others find what has been computed of `tokens`: the first `length`."""
        if not self.budget:
            return
        for number in range(sequence.offered, length // PAGE):
            if number == len(sequence.digests):
                _digest(sequence, tokens[number * PAGE : (number + 1) * PAGE])
            for part, pages in zip(sequence.parts, sequence.pages, strict=True):
                page, key = pages[number], (part, sequence.digests[number])
                if page.key is None and key not in self._known:
                    page.key = key
                    self._known[key] = page
        sequence.offered = max(sequence.offered, length // PAGE)

    def release(self, sequence: Sequence) -> None:
        """The sequence has ended. What others may find stays idle, its end before its beginning the first to go."""
        for number in reversed(range(max(map(len, sequence.pages), default=0))):
            for part, pages in zip(reversed(sequence.parts), reversed(sequence.pages), strict=True):
                if number >= len(pages):
                    continue
                page = pages[number]
                page.users -= 1
                if not page.users and page.key is None:
                    self._free(page)
                elif not page.users:
                    size = (part.end - part.first) * self.block_bytes + self.entry_bytes * (page.entry >= 0)
                    self._idle[page] = size
                    self.idle += size
        sequence.pages = [[] for _ in sequence.parts]
        while self.idle > self.budget:
            oldest = next(iter(self._idle))
            self.idle -= self._idle.pop(oldest)
            self._free(oldest)

    def _free(self, page: Page) -> None:
        if page.key is not None:
            del self._known[page.key]
        self._blocks.give(page.blocks)
        if page.entry >= 0:
            self._entries.give([page.entry])

    def move(self, source: int, target: int) -> None:
        """What the sequence at slot `source` holds, now at slot `target`."""
        self.table[target], self.entries[target] = self.table[source], self.entries[source]

    def put(self, slot: int, start: int, prefix: Tensor) -> None:
        """Keys and values (layers, 2, P, Hkv, D) of no tokens, from token `start` on, at the beginning of `slot`."""
        at = torch.arange(start, prefix.shape[2])
        blocks = torch.from_numpy(self.table[slot]).long()[:, at // PAGE].to(self.keys.device)  # (layers, P)
        at = at.to(self.keys.device)
        for store, given in ((self.keys, prefix[:, 0, start:]), (self.values, prefix[:, 1, start:])):
            store[blocks, :, at % PAGE] = given

    # For what PyTorch computes, on whichever device

    def attend(self, slots: Tensor, positions: Tensor) -> Attend:
        """Every row is a token at `positions` (N) of the sequence at `slots` (N), both on the CPU: its keys and values
        are stored, and it attends to its own sequence up to itself."""
        device = self.keys.device
        blocks = torch.from_numpy(self.table[slots.numpy(), :, (positions // PAGE).numpy()]).to(device).long()
        at = (positions % PAGE).to(device)
        ends = [0, *((slots[1:] != slots[:-1]).nonzero()[:, 0] + 1).tolist(), len(slots)]
        runs = [(a, b) for a, b in pairwise(ends) if b - a > APART]  # stretches of prompts, each read by itself
        others = torch.tensor([n for a, b in pairwise(ends) if b - a <= APART for n in range(a, b)], dtype=torch.long)
        readers: list[Reader] = [
            (slice(a, b), self._stretch(self.pages_of(slots[a : a + 1], positions[a:b])[0], positions[a:b]))
            for a, b in runs
        ]
        if len(others):
            pages = self.pages_of(slots[others], positions[others])
            readers.append((others.to(device), self._each(pages, positions[others].to(device))))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(blocks[:, layer], at, k, v)
            out = torch.empty_like(q)
            for where, read in readers:
                out[where] = read(layer, q[where])
            return out

        return attend

    def pages_of(self, slots: Tensor, positions: Tensor) -> Tensor:
        """The blocks, (N, layers, pages), that hold what rows see, on the cache's device."""
        read = -(-(int(positions.max()) + 1) // PAGE)
        return torch.from_numpy(self.table[slots.numpy(), :, :read]).to(self.keys.device).long()

    def attend_each(self, pages: Tensor, positions: Tensor) -> Attend:
        """As `attend`, each row for itself, by tensors of the cache's device alone: the blocks `pages` (N, layers, P)
        of its sequence, of which only those up to its place count. Nothing here depends on a value."""
        number, at = positions // PAGE, positions % PAGE
        blocks = pages.gather(2, number[:, None, None].expand(-1, pages.shape[1], 1))[:, :, 0]
        read = self._each(pages, positions)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(blocks[:, layer], at, k, v)
            return read(layer, q)

        return attend

    def _write(self, blocks: Tensor, at: Tensor, k: Tensor, v: Tensor) -> None:
        """Put keys and values (N, Hkv, D) at places `at` (N) of `blocks` (N)."""
        self.keys[blocks, :, at] = k
        self.values[blocks, :, at] = v

    def _stretch(self, pages: Tensor, positions: Tensor) -> Callable[[int, Tensor], Tensor]:
        """How rows of one sequence, which lies in the blocks `pages` (layers, P), read the cache."""
        span = int(positions.max()) + 1
        whole = torch.equal(positions, torch.arange(span))  # from the beginning and in order: no mask to read
        mask = None if whole else (torch.arange(span) <= positions[:, None]).to(pages.device)  # (n, S)

        def read(layer: int, q: Tensor) -> Tensor:
            keys, values = (
                t[pages[layer]].transpose(0, 1).flatten(1, 2)[None, :, :span] for t in (self.keys, self.values)
            )  # (1, Hkv, S, D)
            mixed = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None], keys, values, attn_mask=mask, is_causal=whole,
                enable_gqa=q.shape[1] != keys.shape[1],
            )  # fmt: skip
            return mixed[0].transpose(0, 1)

        return read

    def _each(self, pages: Tensor, positions: Tensor) -> Callable[[int, Tensor], Tensor]:
        """How rows of any sequences read the cache: the heads of a group stand as queries, so nothing is repeated."""
        span = torch.arange(pages.shape[2] * PAGE, device=pages.device)
        mask = (span <= positions[:, None])[:, None, None]  # (B, 1, 1, S)

        def read(layer: int, q: Tensor) -> Tensor:
            keys, values = (t[pages[:, layer]].transpose(1, 2).flatten(2, 3) for t in (self.keys, self.values))
            grouped = q.view(len(q), keys.shape[1], -1, q.shape[-1])  # (B, Hkv, G, D); keys and values (B, Hkv, S, D)
            return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).view_as(q)

        return read

    def stream(self, layer: int, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some rows have their residual stream before `layer` kept, and where: (k) rows, (k) places in
        `streams.flatten(0, 1)`. Rows as in `attend`."""
        entries = torch.from_numpy(self.entries[slots.numpy(), layer, (positions // PAGE).numpy()]).long()
        rows = (entries >= 0).nonzero()[:, 0]
        places = entries[rows] * PAGE + positions[rows] % PAGE
        return rows.to(self.streams.device), places.to(self.streams.device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """For all that can ever be held at once. On the CPU these are addresses, and memory comes with what is touched."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, dtype=TYPES[dtype])).view(dtype)


def _digest(sequence: Sequence, tokens: list[int]) -> None:
    before = sequence.digests[-1] if sequence.digests else b""
    sequence.digests.append(blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest())


class _Free:
    """Numbers of blocks that nobody holds; those held before come first, because their memory is there already."""

    def __init__(self) -> None:
        self._given: list[int] = []
        self._next = 0

    def take(self, count: int) -> list[int]:
        """`count` of them."""
        again = [self._given.pop() for _ in range(min(count, len(self._given)))]
        new = range(self._next, self._next + count - len(again))
        self._next = new.stop
        return [*again, *new]

    def give(self, blocks: list[int]) -> None:
        self._given += blocks
