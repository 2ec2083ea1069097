"""Sparse upcycling: a dense model's feed-forward layers become mixtures of copies, to be tuned apart further on.

Source: Komatsuzaki et al. 2023. With gate weights that sum to 1, as here, the new model says at first exactly what
the dense one said, whatever its routers choose.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from coterie.errors import CoterieError
from coterie.model.decoder import Decoder
from coterie.model.load import BaseModel

ROUTER_STD = 0.02  # of the fresh routers' weights, as in the paper's code


def layers_named(which: str, count: int) -> tuple[int, ...]:
    """Layers meant by "all", "every-other" (the 2nd, 4th, ...), "last-half", or numbers such as "3,5,7" (from 0)."""
    named = {"all": range(count), "every-other": range(1, count, 2), "last-half": range(count // 2, count)}
    if which in named:
        return tuple(named[which])
    try:
        chosen = sorted({int(n) for n in which.split(",")})
    except ValueError:
        chosen = []
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise CoterieError(
            f"layers {which!r}: use {', '.join(named)}, or numbers from 0 to {count - 1} with commas between"
        )
    return tuple(chosen)


def mixture(
    base: BaseModel, experts: Sequence[dict[str, Tensor]], routers: dict[int, Tensor], per_token: int, name: str
) -> BaseModel:
    """`base` with the layers of `routers` (E, width) turned into mixtures.

    `experts` are the dense weights, by our names, that each expert takes its feed-forward from.
    """
    config = base.decoder.config
    _check(base, len(experts), per_token)
    weights = dict(base.decoder.weights)
    for n, router in routers.items():
        for site in ("gate_up", "down"):
            weights.pop(f"{n}.{site}")
            weights[f"{n}.experts.{site}"] = torch.stack([dense[f"{n}.{site}"] for dense in experts])
        weights[f"{n}.router"] = router.float().to(base.decoder.device)
    sparse = tuple(sorted(routers))
    changed = replace(config, experts=len(experts), experts_per_token=per_token, sparse=sparse, gate_normed=True)
    return replace(base, name=name, decoder=Decoder(changed, weights))


def upcycle(base: BaseModel, experts: int, layers: str = "every-other", per_token: int = 2, seed: int = 0) -> BaseModel:
    """The dense `base` with `experts` copies of the feed-forward in `layers`. Raises CoterieError."""
    _check(base, experts, per_token)
    config = base.decoder.config
    generator = torch.Generator().manual_seed(seed)
    routers = {
        n: torch.randn(experts, config.width, generator=generator) * ROUTER_STD
        for n in layers_named(layers, config.layers)
    }
    return mixture(base, [base.decoder.weights] * experts, routers, per_token, f"{base.name}-{experts}x")


def _check(base: BaseModel, experts: int, per_token: int) -> None:
    if base.decoder.config.experts:
        raise CoterieError(f"{base.name} is a mixture of experts already; start from a dense model")
    if experts < 2 or not 1 <= per_token <= experts:
        raise CoterieError(f"{per_token} of {experts} experts per token: use 2 experts or more, and 1 to all per token")
    if any(name.endswith((".gate_up.bias", ".down.bias")) for name in base.decoder.weights):
        raise CoterieError(f"{base.name} has biases in its feed-forward, which mixtures of experts do not keep")
