"""Mixing trained experts: several LoRA experts become the feed-forward experts of one token-routed model.

Each expert's change is merged into the base: attention takes the average of all merged attentions, each feed-forward
becomes one expert of the mixture. Sources: Sukhbaatar et al. 2024 (Branch-Train-MiX); Li et al. 2022
(Branch-Train-Merge).

Notable: the routers need no training to start well. Each is the ridge regression, in closed form, of which expert's
training data a token came from on the hidden state that the router will read; of each expert only sums are kept.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.experts import lora
from coterie.experts.expert import Expert
from coterie.model.decoder import SITES, Decoder, attend_packed, packed_positions
from coterie.model.load import BaseModel
from coterie.model.upcycle import mixture

RIDGE = 0.01  # of the mean square of a feature, added to the diagonal
MARGIN = 3.0  # nats by which a token's own expert leads the mean of the others, on average


def merged(base: BaseModel, expert: Expert, sites: tuple[str, ...] = SITES) -> dict[str, Tensor]:
    """The base's weights with the expert's change at `sites` added; those that it leaves alone are not copied."""
    decoder = base.decoder
    out = dict(decoder.weights)
    for layer in range(decoder.config.layers):
        for site in sites:
            whole = lora.merged(expert, decoder, layer, site)
            if whole is not None:
                out[f"{layer}.{site}"] = whole.to(decoder.dtype)
    return out


@dataclass
class TokenSums:
    """What a router learns of one expert's data: `count` tokens; by layer their sum (width), squares (width, width)."""

    count: int
    sums: dict[int, Tensor]
    squares: dict[int, Tensor]


@torch.no_grad()
def token_sums(base: BaseModel, rows: list[list[int]]) -> TokenSums:
    """Sums over the tokens of `rows` of what enters each layer's feed-forward."""
    out = TokenSums(0, {}, {})

    def watch(layer: int, site: str, x: Tensor, made: Tensor) -> Tensor:
        if site == "gate_up":
            wide = x.float()
            out.sums[layer] = out.sums.get(layer, 0) + wide.sum(0)
            out.squares[layer] = out.squares.get(layer, 0) + wide.T @ wide
        return made

    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        lengths = [len(row) for row in part]
        ids = torch.tensor([t for row in part for t in row], device=base.decoder.device)
        base.decoder.forward(ids, packed_positions(lengths, ids.device), attend_packed(lengths), watch)
        out.count += len(ids)
    return out


def router_of(sums: list[TokenSums], layer: int, with_base: bool) -> Tensor:
    """The router of a layer, (experts, width), and last a row for the base where it is an expert too.

    Every expert's tokens weigh the same in all, however many they are.
    """
    means = torch.stack([s.sums[layer] / s.count for s in sums])  # (E, width)
    square = torch.stack([s.squares[layer] / s.count for s in sums]).sum(0)
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    rows = torch.linalg.solve(square, means.T).T  # (E, width): a logit of about 1 for own tokens, 0 for others
    logits = means @ rows.T
    lead = logits.diagonal() - (logits.sum(1) - logits.diagonal()) / max(len(sums) - 1, 1)
    if with_base:  # above the experts whose data a token does not look like, below the one it does
        rows = torch.cat([rows, rows.sum(0, keepdim=True) / 2])
    scaled: Tensor = rows * (MARGIN / float(lead.mean().clamp(min=1e-3)))
    return scaled


def mix(
    base: BaseModel, loras: list[Expert], sums: list[TokenSums], per_token: int = 2, with_base: bool = True
) -> BaseModel:
    """The mixture of `loras` on `base`, one expert for each and, if `with_base`, one for the base itself."""
    decoder = base.decoder
    experts = [merged(base, e, SITES[2:]) for e in loras] + ([decoder.weights] if with_base else [])
    average = dict(decoder.weights)
    for e in loras:
        for name, weight in merged(base, e, SITES[:2]).items():
            if weight is not decoder.weights[name]:
                average[name] = average[name] + (weight.float() - decoder.weights[name].float()) / len(experts)
    average = {name: w.to(decoder.weights[name].dtype) for name, w in average.items()}
    routers = {n: router_of(sums, n, with_base) for n in range(decoder.config.layers)}
    shell = replace(base, decoder=Decoder(decoder.config, average))
    return mixture(shell, experts, routers, per_token, f"{base.name}-mixed")
