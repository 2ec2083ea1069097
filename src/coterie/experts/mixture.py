"""A mixed batch: rows of different experts, of different kinds, and of the base model, in the same matrix products.

Notable: at each site the A of all LoRA experts are stacked, the columns that belong to other experts set to zero,
and the B stand side by side, so that a site costs two products however many experts the batch has. Bottleneck
adapters are stacked the same way. Soft prompts and prefixes change no product at all: they are rows of the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.experts import adapter, lora
from coterie.experts.adapter import BottleneckConfig
from coterie.experts.expert import Expert
from coterie.model.decoder import BLOCKS, SITES, Change, Decoder

# layer, site, x (N, in), shares (N, R), expert and projection of each column (R) -> shares (N, R)
Gates = Callable[[int, str, Tensor, Tensor, Tensor, Tensor], Tensor]


class Mixture:
    """Several experts laid side by side, to serve a batch whose rows belong to any of them or to none."""

    def __init__(self, experts: list[Expert], decoder: Decoder) -> None:
        self.decoder = decoder
        self.columns: list[Tensor] = []  # each another layout: the expert of every stacked column
        self.low_rank = _stack_loras(experts, decoder, self)
        self.bottlenecks = _stack_adapters(experts, decoder, self)

    def layout(self, owners: list[tuple[int, int]]) -> int:
        """The number of the layout with so many columns for each expert, (expert, columns)."""
        wanted = torch.cat([torch.full((n,), i) for i, n in owners]).to(self.decoder.device)
        for number, known in enumerate(self.columns):
            if torch.equal(known, wanted):
                return number
        self.columns.append(wanted)
        return len(self.columns) - 1

    def change(self, owners: Tensor, shares: Tensor | None = None, gates: Gates | None = None) -> Change | None:
        """The change for rows `owners` (N), each an index into the experts, or -1 for the base model.

        A row of -1 may have `shares` (N, experts) of several plain LoRA experts: the hidden columns of each are
        multiplied by its share, which is the weighted sum of their updates, exactly, without building it. `gates`
        may put other shares in their place, read from a projection's input.
        """
        if not self.columns or (bool((owners < 0).all()) and shares is None):
            return None
        owners, dtype = owners.to(self.decoder.device), self.decoder.dtype
        masks = [(columns == owners[:, None]).to(dtype) for columns in self.columns]  # each (N, R)
        if shares is not None:
            shares = shares.to(self.decoder.device, dtype)
            masks = [mask + shares[:, columns] for mask, columns in zip(masks, self.columns, strict=True)]

        def change(layer: int, site: str, x: Tensor, out: Tensor) -> Tensor:
            if site in BLOCKS:
                for bottleneck in self.bottlenecks.get((layer, site), ()):
                    out = bottleneck.apply(self.decoder, x, out, masks, owners)
                return out
            stacked = self.low_rank.get((layer, site))
            if stacked is None:
                return out
            mask, columns = masks[stacked.layout], self.columns[stacked.layout]
            if gates is not None:
                mask = gates(layer, site, x, mask, columns, stacked.parts)
            return stacked.apply(self.decoder, f"{layer}.{site}", x, out, mask, owners)

        return change


@dataclass(frozen=True)
class _LowRank:
    """LoRA experts at one site: packed A of all (R, in) and B of all (out, R); gains (experts + 1, out) of DoRA.

    `parts` (R): which projection of the site each column belongs to.
    """

    down: Tensor
    up: Tensor
    gains: Tensor | None
    layout: int
    parts: Tensor

    def apply(self, decoder: Decoder, name: str, x: Tensor, out: Tensor, mask: Tensor, owners: Tensor) -> Tensor:
        added = decoder.apply(decoder.apply(x, self.down).mul_(mask), self.up)
        if self.gains is None:
            return out + added
        bias = decoder.weights.get(f"{name}.bias")
        plain = out if bias is None else out - bias
        grown = (plain + added) * self.gains[owners]  # -1, the base model, takes the last row: ones
        return grown if bias is None else grown + bias


def _stack_loras(experts: list[Expert], decoder: Decoder, mixture: Mixture) -> dict[tuple[int, str], _LowRank]:
    out: dict[tuple[int, str], _LowRank] = {}
    found = [i for i, e in enumerate(experts) if e.config.kind == "lora"]
    for layer in range(decoder.config.layers) if found else ():
        for site in SITES:
            parts = [(i, s) for i in found if (s := lora.site_of(experts[i], decoder, layer, site)) is not None]
            if not parts:
                continue
            down, up = torch.cat([s.down for _, s in parts]), torch.cat([s.up for _, s in parts], dim=1)
            gains = None
            if any(s.gain is not None for _, s in parts):
                gains = up.new_ones(len(experts) + 1, len(up))
                for i, s in parts:
                    gains[i] = 1.0 if s.gain is None else s.gain
            layout = mixture.layout([(i, len(s.down)) for i, s in parts])
            owned = [i for e, _ in parts for i in lora.columns(experts[e].config, decoder.config, site)]
            kinds = torch.tensor(owned, device=down.device)
            out[layer, site] = _LowRank(decoder.pack(down), decoder.pack(up), gains, layout, kinds)
    return out


@dataclass(frozen=True)
class _Bottleneck:
    """Adapters of like placement and activation at one block, stacked: packed down (S, width) and up (width, S)."""

    config: BottleneckConfig
    down: Tensor
    down_bias: Tensor  # (S)
    up: Tensor
    up_bias: Tensor  # (experts + 1, width), the last row zero for the base model
    layout: int

    def apply(self, decoder: Decoder, x: Tensor, out: Tensor, masks: list[Tensor], owners: Tensor) -> Tensor:
        read = x + out if self.config.reads_sum else out
        inner = adapter.ACTIVATIONS[self.config.activation](decoder.apply(read, self.down) + self.down_bias)
        return out + decoder.apply(inner * masks[self.layout], self.up) + self.up_bias[owners]


def _stack_adapters(
    experts: list[Expert], decoder: Decoder, mixture: Mixture
) -> dict[tuple[int, str], list[_Bottleneck]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for i, e in enumerate(experts):
        if isinstance(e.config, BottleneckConfig):
            groups.setdefault((e.config.placement, e.config.activation), []).append(i)
    out: dict[tuple[int, str], list[_Bottleneck]] = {}
    like = decoder.weights["final_norm"]
    for (placement, _), members in groups.items():
        for layer in range(decoder.config.layers):
            for block in adapter.PLACES[placement]:
                here = [i for i in members if layer >= experts[i].config.first_layer]
                if not here:
                    continue

                def part(i: int, name: str, layer: int = layer, block: str = block) -> Tensor:
                    return experts[i].weights[adapter.weight_name(layer, block, name)].to(like)

                up_bias = like.new_zeros(len(experts) + 1, decoder.config.width)
                ups = []
                for i in here:
                    scaling: float = experts[i].config.scaling
                    up_bias[i] = part(i, "adapter_up.bias") * scaling
                    ups.append(part(i, "adapter_up.weight") * scaling)
                out.setdefault((layer, block), []).append(_Bottleneck(
                    experts[here[0]].config, decoder.pack(torch.cat([part(i, "adapter_down.0.weight") for i in here])),
                    torch.cat([part(i, "adapter_down.0.bias") for i in here]), decoder.pack(torch.cat(ups, dim=1)),
                    up_bias, mixture.layout([(i, experts[i].config.size) for i in here]),
                ))  # fmt: skip
    return out
