"""A step of next tokens on a GPU as one CUDA graph: captured for a size when that is first met, then only replayed.

Notable: on a GPU a step of a small model is hundreds of kernels that take longer to launch than to run. A graph
launches them all at once, but always the same ones at the same addresses. So nothing in a step may depend on a value:
batches are filled up to a power of two, and so are the pages that rows see; experts lie in a bank, stacked by site, and
each row has the numbers of its own, whatever kinds they are of (as in Punica, Chen et al. 2023). What fills up writes
to a block of the cache that is nobody's.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.engine.pages import APART, PAGE, Pages
from coterie.experts import adapter
from coterie.experts.mixture import Bottleneck, Groups, Laid
from coterie.model.decoder import BLOCKS, Change, Decoder

MOST_ROWS = 256
SHARED = 4  # experts of one row, at most
WARM_UP = 2  # runs before a capture: libraries choose their kernels and workspaces


class Bank:
    """Experts of a decoder, stacked by site, each under its number; number 0 changes nothing."""

    def __init__(self, decoder: Decoder, room: int) -> None:
        self.decoder, self.room = decoder, room
        self.stacks: dict[tuple[int, str, str], Tensor] = {}  # layer, site, part: (room + 1, ...)
        self.shape = 0  # grows when a stack comes or is made larger: what was captured before is worth nothing
        self._numbers: dict[Laid, int] = {}  # the latest used last

    def numbers(self, experts: Sequence[Laid]) -> list[int]:
        """The numbers of at most `room` experts, put in where they are not there, the longest idle making room."""
        for laid in experts:
            number = self._numbers.pop(laid, 0)
            if not number:
                free = set(range(1, self.room + 1)) - set(self._numbers.values())
                idle = (known for known in self._numbers if known not in experts)
                number = min(free) if free else self._numbers.pop(next(idle))
                self._put(laid, number)
            self._numbers[laid] = number
        return [self._numbers[laid] for laid in experts]

    def _put(self, laid: Laid, number: int) -> None:
        for (_, _, part), stack in self.stacks.items():
            stack[number] = float(part == "gain")
        for (layer, site), low in laid.low_rank.items():
            self._set(layer, site, "a", number, low.down)
            self._set(layer, site, "b", number, low.up)
            if low.gain is not None:
                self._set(layer, site, "gain", number, low.gain)
        for (layer, block), found in laid.bottlenecks.items():
            self._put_bottleneck(layer, block, number, found)

    def _put_bottleneck(self, layer: int, block: str, number: int, found: Bottleneck) -> None:
        self._set(layer, block, "down", number, found.down)
        self._set(layer, block, "down_bias", number, found.down_bias)
        self._set(layer, block, "up", number, found.up)
        self._set(layer, block, "up_bias", number, found.up_bias)
        one = found.up_bias.new_ones(1)
        self._set(layer, block, "reads_sum", number, one * found.config.reads_sum)
        self._set(layer, block, f"is {found.config.activation}", number, one)

    def _set(self, layer: int, site: str, part: str, number: int, given: Tensor) -> None:
        """Put `given` into the corner of its place in a stack, which is made, or made larger, where it does not fit."""
        key = layer, site, part
        old = self.stacks.get(key)
        if old is None or any(have < want for have, want in zip(old.shape[1:], given.shape, strict=True)):
            sizes = given.shape if old is None else map(max, old.shape[1:], given.shape)
            stack = given.new_full((self.room + 1, *sizes), float(part == "gain"))
            if old is not None:
                stack[tuple(slice(n) for n in old.shape)] = old
            self.stacks[key] = stack
            self.shape += 1
        self.stacks[key][number][tuple(slice(n) for n in given.shape)] = given

    def change(self, numbers: Tensor, shares: Tensor) -> Change:
        """The change for rows of which each has the experts `numbers` (N, K), in `shares` (N, K)."""

        def change(layer: int, site: str, x: Tensor, out: Tensor) -> Tensor:
            if site in BLOCKS:
                return self._adapted(layer, site, x, out, numbers[:, 0])
            if (layer, site, "a") not in self.stacks:
                return out
            for k in range(numbers.shape[1]):
                inner = self._by(layer, site, "a", numbers[:, k], x) * shares[:, k : k + 1]
                out = out + self._by(layer, site, "b", numbers[:, k], inner)
            gain = self.stacks.get((layer, site, "gain"))
            if gain is None:
                return out
            bias = self.decoder.weights.get(f"{layer}.{site}.bias")
            grown = out if bias is None else out - bias
            grown = grown * gain[numbers[:, 0]]
            changed = (gain[numbers[:, 0]] != 1).any(1, keepdim=True)  # others keep their bits
            return torch.where(changed, grown if bias is None else grown + bias, out)

        return change

    def _by(self, layer: int, site: str, part: str, numbers: Tensor, x: Tensor) -> Tensor:
        """Each row of x (N, in) by its own matrix of a stack (room + 1, out, in)."""
        return torch.bmm(self.stacks[layer, site, part][numbers], x[:, :, None])[:, :, 0]

    def _adapted(self, layer: int, block: str, x: Tensor, out: Tensor, numbers: Tensor) -> Tensor:
        if (layer, block, "down") not in self.stacks:
            return out

        def part(name: str) -> Tensor:
            return self.stacks[layer, block, name][numbers]

        inner = self._by(layer, block, "down", numbers, out + part("reads_sum") * x) + part("down_bias")
        made = torch.zeros_like(inner)
        for name, activate in adapter.ACTIVATIONS.items():
            if (layer, block, f"is {name}") in self.stacks:
                made = made + part(f"is {name}") * activate(inner)
        return out + self._by(layer, block, "up", numbers, made) + part("up_bias")


class Captured:
    """A function of tensors of fixed shapes as a CUDA graph. On another device it is only called, which tests use."""

    pool = None  # of memory, for all: what one has made is copied before the next runs

    def __init__(self, run: Callable[..., Tensor], given: tuple[Tensor, ...]) -> None:
        self._run, self._given = run, tuple(t.clone() for t in given)
        self._graph = None
        if given[0].is_cuda:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    run(*self._given)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            Captured.pool = Captured.pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(self._graph, pool=Captured.pool):
                self._out = run(*self._given)

    def __call__(self, given: tuple[Tensor, ...]) -> Tensor:
        if self._graph is None:
            return self._run(*given)
        for mine, new in zip(self._given, given, strict=True):
            mine.copy_(new, non_blocking=True)
        self._graph.replay()
        return self._out


class Graphs:
    """The steps of next tokens of one decoder, captured by their sizes."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._bank: Bank | None = None
        self._captured: dict[tuple[int, ...], Captured] = {}

    def takes(self, slots: Tensor, starts: Tensor, groups: Groups) -> bool:
        """Whether a batch is one that can be replayed: not too large, without a stretch of a prompt, and every row
        begins at the first layer."""
        rows = len(slots)
        most = [0] * rows
        for _, first, count, _ in groups:
            for n in range(first, first + count):
                most[n] += 1
        apart = int(slots.bincount().max()) <= APART
        fits = rows <= MOST_ROWS and max(most) <= SHARED and not bool(starts.any())
        return apart and fits and not self.decoder.config.sparse and not self.decoder.prepack

    def run(self, embedded: Tensor, positions: Tensor, slots: Tensor, cache: Pages, groups: Groups) -> Tensor:
        """Scores (rows, vocab) in float32 after every row, each of which attends for itself."""
        device, rows = self.decoder.device, len(embedded)
        experts = list(dict.fromkeys(laid for laid, *_ in groups))
        if self._bank is None or self._bank.room < len(experts):
            self._bank = Bank(self.decoder, max(len(cache.table), len(experts)))
            self._captured.clear()
        bank, before = self._bank, self._bank.shape
        number = dict(zip(experts, bank.numbers(experts), strict=True))
        if bank.shape != before:
            self._captured.clear()
        mine: list[list[tuple[int, float]]] = [[] for _ in range(rows)]
        for laid, first, count, share in groups:
            for n in range(first, first + count):
                mine[n].append((number[laid], share))
        size, wide = _power(rows), max((len(each) for each in mine), default=0) or 1
        numbers, shares = torch.zeros(size, wide, dtype=torch.long), torch.zeros(size, wide)
        for n, each in enumerate(mine):
            for k, (which, share) in enumerate(each):
                numbers[n, k], shares[n, k] = which, share
        known = cache.pages_of(slots, positions)
        pages = known.new_full((size, known.shape[1], _power(known.shape[2])), cache.nowhere[0])
        pages[:rows, :, : known.shape[2]] = known
        cuts = list(cache.cuts)
        kept = torch.full((len(cuts), size), cache.nowhere[1] * PAGE)
        for place, cut in zip(kept, cuts, strict=True):
            who, where = cache.stream(cut, slots, positions)
            place[who.cpu()] = where.cpu()
        fill = (0, size - rows)
        given = (
            F.pad(embedded, (0, 0, *fill)), F.pad(positions, fill).to(device), pages, numbers.to(device),
            shares.to(device, self.decoder.dtype), kept.to(device),
        )  # fmt: skip
        key = (*pages.shape, wide, *cuts)

        def step(*given: Tensor) -> Tensor:
            return self._step(cache, bank, cuts, *given)

        if key not in self._captured:
            self._captured[key] = Captured(step, given)
        return self._captured[key](given)[:rows].clone()

    def _step(
        self, cache: Pages, bank: Bank, cuts: list[int], embedded: Tensor, positions: Tensor, pages: Tensor,
        numbers: Tensor, shares: Tensor, kept: Tensor,
    ) -> Tensor:  # fmt: skip
        """kept (cuts, N): where each row's residual stream goes before the layers `cuts`."""
        decoder, stream = self.decoder, embedded
        attend, change = cache.attend_each(pages, positions), bank.change(numbers, shares)
        for place, (first, end) in enumerate(pairwise([0, *cuts, decoder.config.layers])):
            stream = decoder.run(stream, positions, attend, change, range(first, end))
            if place < len(cuts):
                cache.streams.flatten(0, 1)[kept[place]] = stream.float()
        return decoder.logits(decoder.finish(stream))


def _power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
