"""A mixed batch: rows of different experts, of different kinds, and of the base model, in one forward pass.

Notable: the base's products run once for all rows; each expert's own small products run over its own rows, so that
the cost grows with the experts that a batch wakes, not with those in memory or in the library. Soft prompts and
prefixes change no product at all: they are rows of the cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.experts import adapter, lora
from coterie.experts.adapter import BottleneckConfig
from coterie.experts.expert import Expert
from coterie.model.decoder import BLOCKS, Change, Decoder

# layer, site, x (N, in), shares (N, R), expert and projection of each column (R) -> shares (N, R)
Gates = Callable[[int, str, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LowRank:
    """A LoRA expert at one site: packed A (R, in) and B (out, R), gain (out) of DoRA or None, and `parts` (R), which
    projection of the site each column belongs to."""

    down: Tensor
    up: Tensor
    gain: Tensor | None
    parts: Tensor


@dataclass(frozen=True)
class Bottleneck:
    """An adapter at one block: packed down (S, width) and up (width, S), already scaled, and their biases."""

    config: BottleneckConfig
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor


@dataclass(frozen=True, eq=False)
class Laid:
    """An expert laid out for a decoder, by layer and site, or layer and block."""

    low_rank: dict[tuple[int, str], LowRank]
    bottlenecks: dict[tuple[int, str], Bottleneck]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        held = [t for x in self.low_rank.values() for t in (x.down, x.up, x.gain, x.parts)]
        held += [t for b in self.bottlenecks.values() for t in (b.down, b.down_bias, b.up, b.up_bias)]
        return sum(t.nbytes for t in held if t is not None)


def lay(expert: Expert, decoder: Decoder) -> Laid:
    """`expert` in the base's precision, its matrices packed. Soft prompts and prefixes have none."""
    laid, config = Laid({}, {}), expert.config
    for (layer, site), found in lora.sites_of(expert, decoder).items():
        parts = torch.tensor(lora.columns(config, decoder.config, site), device=decoder.device)
        laid.low_rank[layer, site] = LowRank(decoder.pack(found.down), decoder.pack(found.up), found.gain, parts)
    for layer in range(config.first_layer, decoder.config.layers) if config.kind == "adapter" else ():
        for block in adapter.PLACES[config.placement]:

            def part(name: str, layer: int = layer, block: str = block) -> Tensor:
                return expert.weights[adapter.weight_name(layer, block, name)].to(decoder.weights["final_norm"])

            laid.bottlenecks[layer, block] = Bottleneck(
                config, decoder.pack(part("adapter_down.0.weight")), part("adapter_down.0.bias"),
                decoder.pack(part("adapter_up.weight") * config.scaling), part("adapter_up.bias") * config.scaling,
            )  # fmt: skip
    return laid


Groups = Sequence[tuple[Laid, int, int, float]]  # expert, first row, rows, share of its update


@dataclass(frozen=True)
class _Group:
    """The rows of one expert: a slice where they lie together, else their places; `shares` (rows, 1) of its update."""

    laid: Laid
    number: int
    rows: slice | Tensor
    shares: Tensor | None


def mixed(groups: Groups, decoder: Decoder, gates: Gates | None = None) -> Change | None:
    """The change for a batch of which `groups` have experts; all other rows are the base model's.

    Rows may be of several groups, of plain LoRA experts: each update is multiplied by its share, which is the weighted
    sum of them, exactly, without building it. `gates` may put other shares in their place, for each hidden column,
    read from a projection's input; experts are numbered by their first groups. Best where the rows of one lie together.
    """
    found: dict[Laid, list[tuple[int, int, float]]] = {}
    for laid, first, count, share in groups:
        found.setdefault(laid, []).append((first, count, share))
    merged = [_group(laid, number, parts, decoder) for number, (laid, parts) in enumerate(found.items())]
    if not merged:
        return None

    def change(layer: int, site: str, x: Tensor, out: Tensor) -> Tensor:
        if site in BLOCKS:
            for group in merged:
                bottleneck = group.laid.bottlenecks.get((layer, site))
                if bottleneck is not None:
                    out[group.rows] = _adapt(decoder, bottleneck, x[group.rows], out[group.rows])
            return out
        here = [(group, low) for group in merged if (low := group.laid.low_rank.get((layer, site))) is not None]
        chosen = _gated(gates, layer, site, x, here) if gates is not None and here else [g.shares for g, _ in here]
        for (group, low), weights in zip(here, chosen, strict=True):
            inner = decoder.apply(x[group.rows], low.down)
            added = decoder.apply(inner if weights is None else inner * weights, low.up)
            if low.gain is None:
                out[group.rows] += added
                continue
            bias = decoder.weights.get(f"{layer}.{site}.bias")
            plain = out[group.rows] if bias is None else out[group.rows] - bias
            grown = (plain + added) * low.gain
            out[group.rows] = grown if bias is None else grown + bias
        return out

    return change


def _group(laid: Laid, number: int, parts: list[tuple[int, int, float]], decoder: Decoder) -> _Group:
    """The rows of an expert, from its parts: first row, rows, share."""
    share_of: dict[int, float] = {}
    for first, count, share in parts:
        for row in range(first, first + count):
            share_of[row] = share_of.get(row, 0.0) + share
    rows = sorted(share_of)
    together = rows[-1] - rows[0] + 1 == len(rows)
    shares = None
    if any(share != 1 for share in share_of.values()):
        shares = torch.tensor([[share_of[row]] for row in rows]).to(decoder.device, decoder.dtype)
    places = slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows, device=decoder.device)
    return _Group(laid, number, places, shares)


def _adapt(decoder: Decoder, bottleneck: Bottleneck, x: Tensor, out: Tensor) -> Tensor:
    read = x + out if bottleneck.config.reads_sum else out
    inner = adapter.ACTIVATIONS[bottleneck.config.activation](
        decoder.apply(read, bottleneck.down) + bottleneck.down_bias
    )
    return out + decoder.apply(inner, bottleneck.up) + bottleneck.up_bias


def _gated(gates: Gates, layer: int, site: str, x: Tensor, here: list[tuple[_Group, LowRank]]) -> list[Tensor]:
    """The shares (rows, R) that `gates` gives the columns of each group at a site."""
    ranks = [len(low.parts) for _, low in here]
    before = x.new_zeros(len(x), sum(ranks))
    for (group, _), columns in zip(here, before.split(ranks, dim=1), strict=True):
        columns[group.rows] = 1.0 if group.shares is None else group.shares
    own = torch.cat([torch.full_like(low.parts, group.number) for group, low in here])
    after = gates(layer, site, x, before, own, torch.cat([low.parts for _, low in here]))
    return [columns[group.rows] for (group, _), columns in zip(here, after.split(ranks, dim=1), strict=True)]
