"""One forward pass of examples with an expert applied, and the loss of their completions.

Notable: only completion tokens reach the output layer, whose loss and gradient come out of one pass
(`_CompletionLoss`), so that the scores over the vocabulary are never all in memory.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coterie.experts.expert import Applied
from coterie.model.decoder import Decoder, attend_packed, packed_positions

SHARED_LEAST = 4  # tokens; below, sharing them costs more than it saves
CHUNK = 512  # completion tokens scored at once: 512 x 49,152 float32 are 100 MB
Row = tuple[Tensor, Tensor]  # tokens and marks of the tokens to learn, both (tokens of the row)


def hidden_states(
    decoder: Decoder, applied: Applied, rows: list[Tensor], shared: int = 0, start: Tensor | None = None,
    first_layer: int = 0,
) -> Tensor:  # fmt: skip
    """Hidden states of all tokens but the first `shared` of each row, (tokens, width), normed for `logits`.

    All rows begin with the same `shared` tokens, which are computed once. `start`, where given, is the residual
    stream before `first_layer`, (tokens of all rows, width).
    """
    decoder = applied.decoder or decoder
    device, layers = decoder.device, range(first_layer, decoder.config.layers)
    if start is None:
        hidden = decoder.embed(once(rows, shared).long().to(device))
    else:
        hidden = once(start.split([len(row) for row in rows]), shared) if shared else start
    lengths = [len(row) - shared for row in rows]
    if applied.soft is not None:  # virtual tokens stand before every row: they are shared too
        hidden, shared = torch.cat([applied.soft, hidden]), shared + len(applied.soft)
    behind = 0 if applied.prefix is None else applied.prefix.shape[2]
    positions = behind + packed_positions(lengths, device, shared)
    attend = attend_packed(lengths, shared, applied.prefix)
    if applied.decoder is None:
        return decoder.finish(decoder.run(hidden, positions, attend, applied.change, layers)[shared:])
    for layer in layers:  # all weights learn: keep what enters each layer, compute the rest again going back
        hidden = checkpoint(decoder.run, hidden, positions, attend, None, range(layer, layer + 1), use_reentrant=False)
    return decoder.finish(hidden[shared:])


def once(rows: Sequence[Tensor], shared: int) -> Tensor:
    """All rows one after another, what they begin with only once."""
    return torch.cat([rows[0][:shared], *(row[shared:] for row in rows)])


def common_start(rows: list[Row]) -> int:
    """How many tokens all rows begin with: the system prompt, as a rule. They are computed once for the batch.

    The token that follows is not to be learned in any row, since it is foretold from what is shared.
    """
    learned = [int(marks.nonzero()[0]) if marks.any() else len(marks) - 1 for _, marks in rows]
    return same_start([tokens for tokens, _ in rows], max(min(learned) - 1, 0))


def same_start(rows: list[Tensor], most: int) -> int:
    """How many of their first `most` tokens all rows have in common, 0 where sharing them is not worth it."""
    if len(rows) < 2:
        return 0
    same = torch.stack([tokens[:most] for tokens in rows]) == rows[0][:most]
    found = int(same.all(dim=0).long().cumprod(0).sum())
    return found if found >= SHARED_LEAST else 0


class _CompletionLoss(torch.autograd.Function):
    """Summed cross-entropy of hidden (N, width) against targets (N); the gradient is made in the same pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, targets: Tensor, decoder: Decoder) -> Tensor:
        table = decoder.weights[decoder.config.head]
        total = torch.zeros((), device=hidden.device)
        slopes = torch.empty_like(hidden)
        for start in range(0, len(hidden), CHUNK):
            part, wanted = hidden[start : start + CHUNK], targets[start : start + CHUNK]
            log_probs = torch.log_softmax(decoder.logits(part), dim=-1)
            picked = log_probs.gather(1, wanted[:, None])
            total -= picked.sum()
            short = picked.exp() - 1  # of the wanted token's probability; exact before it is rounded
            probs = torch.exp(log_probs, out=torch.empty_like(log_probs, dtype=table.dtype))
            slopes[start : start + CHUNK] = probs.scatter_(1, wanted[:, None], short.to(table.dtype)) @ table
        ctx.save_for_backward(slopes)
        return total

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        (slopes,) = ctx.saved_tensors
        return slopes * grads[0].to(slopes.dtype), None, None


def summed_loss(decoder: Decoder, hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of hidden (N, width) against targets (N); the scores are computed again going back."""
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    none = torch.zeros((), device=hidden.device)
    return sum((checkpoint(_scored, h, t, decoder, use_reentrant=False) for h, t in parts), none)


def _scored(hidden: Tensor, targets: Tensor, decoder: Decoder) -> Tensor:
    return F.cross_entropy(decoder.logits(hidden), targets, reduction="sum")


def completion_loss(
    decoder: Decoder, applied: Applied, rows: list[Row], start: Tensor | None = None, first_layer: int = 0,
    among: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """Summed loss in nats over the marked tokens of `rows`, and how many there are.

    `among`, where given, are tokens (C), and which of them may stand at each marked place, (marked, C): the loss is
    over those alone.
    """
    device, shared = decoder.device, common_start(rows)
    targets = torch.cat([tokens[shared + 1 :] for tokens, _ in rows]).long().to(device)
    marked = torch.cat([marks[shared + 1 :] for _, marks in rows]).to(device)
    hidden = hidden_states(decoder, applied, [tokens[:-1] for tokens, _ in rows], shared, start, first_layer)
    hidden, targets = hidden[marked], targets[marked]
    if among is not None:
        return _loss_among(applied.decoder or decoder, hidden, targets, *among), len(targets)
    if applied.decoder is None:
        loss: Tensor = _CompletionLoss.apply(hidden, targets, decoder)  # type: ignore[no-untyped-call]
    else:
        loss = summed_loss(applied.decoder, hidden, targets)
    return loss, len(targets)


def _loss_among(decoder: Decoder, hidden: Tensor, targets: Tensor, tokens: Tensor, allowed: Tensor) -> Tensor:
    """Summed cross-entropy of hidden (N, width) against targets (N), among those of `tokens` (C, ascending) that are
    `allowed` (N, C)."""
    table = decoder.weights[decoder.config.head][tokens]
    scores = (hidden @ table.T).float().masked_fill(~allowed, float("-inf"))
    return F.cross_entropy(scores, torch.searchsorted(tokens, targets), reduction="sum")


def row_losses(decoder: Decoder, applied: Applied, rows: list[Row]) -> Tensor:
    """Summed log-probability of each row's marked tokens, (rows), differentiable."""
    lengths = [len(tokens) - 1 for tokens, _ in rows]
    of_row = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths)).to(decoder.device)
    targets = torch.cat([tokens[1:] for tokens, _ in rows]).long().to(decoder.device)
    marked = torch.cat([marks[1:] for _, marks in rows]).to(decoder.device)
    hidden = hidden_states(decoder, applied, [tokens[:-1] for tokens, _ in rows])
    scorer = applied.decoder or decoder
    picked = -torch.cat([
        checkpoint(_each, h, t, scorer, use_reentrant=False)
        for h, t in zip(hidden[marked].split(CHUNK), targets[marked].split(CHUNK), strict=True)
    ])  # fmt: skip
    return torch.zeros(len(rows), device=decoder.device).index_add(0, of_row[marked], picked)


def _each(hidden: Tensor, targets: Tensor, decoder: Decoder) -> Tensor:
    return F.cross_entropy(decoder.logits(hidden), targets, reduction="none")
