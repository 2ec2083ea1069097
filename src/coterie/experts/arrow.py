"""Arrow: which experts each token wakes, read from the experts' own weights, with nothing to train.

Per layer and projection an expert's prototype is the direction of input that its update B A amplifies most: the top
right singular vector. A token's score for an expert is |prototype . x|; the k highest, through a softmax, are the
shares with which the experts' updates are added up. Source: Ostapenko et al. 2024, section 3.2; the same conventions
as PEFT's `create_arrow_model` (the sign of a singular vector means nothing, hence the absolute value).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.experts.expert import Expert
from coterie.experts.lora import weight_name
from coterie.experts.mixture import Gates
from coterie.model.decoder import SITES, ModelConfig

TEMPERATURE = 1.0  # PEFT's default
Prototypes = dict[tuple[str, int], Tensor]  # (site, projection of the site) -> (layers, in), zeros: left alone


def prototypes(lora: Expert, model: ModelConfig) -> Prototypes:
    """The directions of one expert, of unit length, for all layers at once; float32."""
    found: Prototypes = {}
    for site in SITES:
        for part, (projection, _) in enumerate(model.site_outputs(site)):
            if projection not in lora.config.targets:
                found[site, part] = torch.zeros(model.layers, model.site_input(site))
                continue
            layers = range(lora.config.first_layer, model.layers)
            a, b = (
                torch.stack([lora.weights[weight_name(layer, projection, f"lora_{side}.weight")] for layer in layers])
                for side in "AB"
            )  # (layers, r, in), (layers, out, r)
            # B A and L A, with B'B = L'L, have the same right singular vectors, and L A is small: (r, in).
            small = torch.linalg.qr(b.double()).R @ a.double()
            top = torch.linalg.eigh(small @ small.mT).eigenvectors[:, :, -1:]  # (layers, r, 1)
            direction = (small.mT @ top)[..., 0]
            untouched = torch.zeros(lora.config.first_layer, model.site_input(site))
            found[site, part] = torch.cat([untouched, torch.nn.functional.normalize(direction, dim=-1).float()])
    return found


class Arrow:
    """The prototypes of the experts in a mixture, side by side: (layers, experts, in) for each projection."""

    def __init__(self, directions: Sequence[Prototypes | None], like: Tensor) -> None:
        """`directions` of each expert of the mixture; None for one that no row may wake. In the type of `like`."""
        some = next(d for d in directions if d is not None)
        self.tables = {
            key: torch.stack([torch.zeros_like(some[key]) if d is None else d[key] for d in directions], dim=1).to(like)
            for key in some
        }
        self.idle = {key: ~table.any(dim=-1) for key, table in self.tables.items()}  # (layers, experts) no update there

    def gates(self, rows: Tensor, allowed: Tensor, top_k: Tensor, temperature: float = TEMPERATURE) -> Gates:
        """Shares for the rows that Arrow routes; other rows keep those they have.

        `rows` (n): their places in the batch; `allowed` (n, experts): which experts each may wake; `top_k` (n): how
        many of them a token wakes.
        """

        def shares(layer: int, site: str, x: Tensor, before: Tensor, own: Tensor, part: Tensor) -> Tensor:
            after, routed = before.clone(), x[rows]
            for p in part.unique().tolist():
                scores = (routed @ self.tables[site, p][layer].T).abs().float()  # (n, experts)
                scores = scores.masked_fill(~allowed | self.idle[site, p][layer], -torch.inf)
                place = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
                scores = scores.masked_fill(place >= top_k[:, None], -torch.inf)
                share = torch.nan_to_num((scores / temperature).softmax(dim=1)).to(before.dtype)  # none: zeros
                here = (part == p).nonzero()[:, 0]
                after[rows[:, None], here] = share[:, own[here]]
            return after

        return shares
