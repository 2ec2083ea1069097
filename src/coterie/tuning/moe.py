"""Tuning a mixture of experts further: its routers, or routers and experts, on conversations; all else is frozen.

Notable: beside the loss of the answers stand the balance loss and the z-loss of every router (Fedus et al. 2021;
Zoph et al. 2022). Nothing is dropped: an expert takes every token that chooses it, as when it serves.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.data.encode import TokenSet, batches
from coterie.errors import CoterieError
from coterie.model import moe
from coterie.model.decoder import Decoder, attend_packed, packed_positions
from coterie.tuning.forward import summed_loss

WHAT = {"router": (".router",), "experts": (".router", ".experts.gate_up", ".experts.down")}


@dataclass(frozen=True)
class MoeTuning:
    """How to tune. `what` is a key of WHAT; `learning_rate` is the experts' peak, the routers' is `router_rate`."""

    steps: int = 200
    batch: int = 8
    what: str = "router"
    learning_rate: float = 5e-5
    router_rate: float = 1e-3
    balance: float = 0.01
    z: float = 0.001
    jitter: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class MoeStep:
    """One step's news: losses in nats; `balance` is 1 when all experts are chosen alike."""

    step: int
    loss: float
    balance: float
    seconds_left: float


@dataclass(frozen=True)
class MoeOutcome:
    """Held-out loss in nats per answer token before and after, and each expert's share of choices, (layers, E)."""

    before: float
    after: float
    shares: list[list[float]]
    seconds: float


def tune(
    decoder: Decoder, data: TokenSet, rows: list[int], held_out: list[int], settings: MoeTuning,
    tell: Callable[[MoeStep], None] = lambda _: None,
) -> MoeOutcome:  # fmt: skip
    """Train the chosen weights of `decoder` in place; load it in float32 and not packed."""
    if not decoder.config.experts:
        raise CoterieError("this model has no mixture of experts to tune; `coterie moe upcycle` makes one")
    if settings.what not in WHAT:
        raise CoterieError(f"what to tune: {settings.what!r}; known: {', '.join(WHAT)}")
    chosen = {k: w.requires_grad_() for k, w in decoder.weights.items() if k.endswith(WHAT[settings.what])}
    routers = [w for k, w in chosen.items() if k.endswith(".router")]
    experts = [w for k, w in chosen.items() if not k.endswith(".router")]
    groups = [{"params": routers, "peak": settings.router_rate}, {"params": experts, "peak": settings.learning_rate}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, weight_decay=0.0)
    before, _ = held_out_loss(decoder, data, held_out)
    started, step, epoch = time.monotonic(), 0, 0
    while step < settings.steps:
        for batch in batches(data.lengths()[rows], settings.batch, settings.seed * 1_000_003 + epoch):
            watched: dict[int, Tensor] = {}
            loss = answer_loss(decoder, data, [rows[i] for i in batch], watched, settings.jitter)
            balance = torch.stack([moe.balance_loss(x, decoder.config.experts_per_token) for x in watched.values()])
            z = torch.stack([moe.z_loss(x) for x in watched.values()])
            (loss + settings.balance * balance.mean() + settings.z * z.mean()).backward()
            torch.nn.utils.clip_grad_norm_(chosen.values(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _pace(step, settings.steps)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            left = (time.monotonic() - started) / step * (settings.steps - step)
            tell(MoeStep(step, float(loss.detach()), float(balance.detach().mean()), left))
            if step == settings.steps:
                break
        epoch += 1
    for weight in chosen.values():
        weight.requires_grad_(False)
    after, shares = held_out_loss(decoder, data, held_out)
    return MoeOutcome(before, after, shares, time.monotonic() - started)


def _pace(step: int, steps: int) -> float:
    """Share of the peak learning rate: up over the first 5%, then cosine to 0."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def answer_loss(
    decoder: Decoder, data: TokenSet, rows: list[int], watched: dict[int, Tensor] | None = None, jitter: float = 0.0
) -> Tensor:
    """Mean loss in nats over the answer tokens of `rows`; the routers' logits (N, E) go into `watched` by layer."""
    pairs = [tuple(torch.from_numpy(part.copy()) for part in data.row(i)) for i in rows]
    lengths = [len(tokens) - 1 for tokens, _ in pairs]
    inputs, targets, marked = (
        torch.cat(parts).to(decoder.device)
        for parts in zip(*((tokens[:-1].long(), tokens[1:].long(), marks[1:]) for tokens, marks in pairs), strict=True)
    )

    def change(layer: int, site: str, x: Tensor, out: Tensor) -> Tensor:
        if site == "router" and watched is not None:
            watched[layer] = moe.score(x, decoder.weights[f"{layer}.router"], jitter) if jitter else out
            return watched[layer]
        return out

    positions = packed_positions(lengths, decoder.device)
    hidden = decoder.forward(inputs, positions, attend_packed(lengths), change)[marked]
    loss: Tensor = summed_loss(decoder, hidden, targets[marked]) / max(int(marked.sum()), 1)
    return loss


@torch.no_grad()
def held_out_loss(decoder: Decoder, data: TokenSet, rows: list[int]) -> tuple[float, list[list[float]]]:
    """Mean over rows of the loss of their answers, and each expert's share of the choices, (sparse layers, E)."""
    c = decoder.config
    losses: list[float] = []
    counts = torch.zeros(len(c.sparse), c.experts)
    for row in rows:
        watched: dict[int, Tensor] = {}
        losses.append(float(answer_loss(decoder, data, [row], watched)))
        for i, logits in enumerate(watched.values()):
            chosen = logits.topk(c.experts_per_token).indices.reshape(-1)
            counts[i] += torch.bincount(chosen, minlength=c.experts).cpu()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return sum(losses) / max(len(losses), 1), [[round(v, 4) for v in row] for row in shares.tolist()]
