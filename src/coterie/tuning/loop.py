"""The training loop: a frozen base, a LoRA expert that learns, and checkpoints a killed run goes on from.

Notable: examples are packed end to end, so no arithmetic goes into padding; only completion tokens reach the
output layer, whose loss and gradient come out of one pass (`completion_loss`), so that the scores over the
vocabulary are never all in memory. A resumed run ends in the same weights as an unbroken one, bit for bit: the
order of the data depends on seed and epoch alone, and the checkpoint holds weights, both moments and the step.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from coterie.data.encode import TokenSet, batches
from coterie.errors import StorageError
from coterie.experts.lora import Lora, training_change
from coterie.model import memory
from coterie.model.decoder import Decoder, attend_packed, packed_positions

CHUNK = 512  # completion tokens scored at once: 512 x 49,152 float32 are 100 MB
SHARED_LEAST = 4  # tokens; below, sharing them costs more than it saves
MICRO_TOKENS = 4096  # tokens in one forward; a larger batch is summed over several


@dataclass(frozen=True)
class Training:
    """How to train. `learning_rate` is the peak, reached after `warmup` (a share of all steps), then cosine to 0."""

    epochs: int = 3
    batch: int = 16
    learning_rate: float = 1e-3
    warmup: float = 0.06
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    checkpoint_every_s: float = 60.0


@dataclass(frozen=True)
class Progress:
    """One step's news. `loss` is the mean over the batch's completion tokens, in nats."""

    step: int
    steps: int
    loss: float
    tokens_per_s: float
    examples_per_s: float
    seconds_left: float
    held_out_loss: float | None = None


@dataclass
class Outcome:
    """What training came to: held-out loss in nats per completion token, at the start and after each epoch."""

    steps: int
    resumed_at: int
    seconds: float
    tokens: int
    examples: int
    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)


class _CompletionLoss(torch.autograd.Function):
    """Summed cross-entropy of hidden (N, width) against targets (N); the gradient is made in the same pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, targets: Tensor, decoder: Decoder) -> Tensor:
        table = decoder.weights["embed" if decoder.config.tied else "head"]
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


def completion_loss(decoder: Decoder, lora: Lora | None, rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, int]:
    """Summed loss in nats over the marked tokens of `rows` (tokens, marks), and how many there are."""
    shared = common_start(rows)
    lengths = [len(tokens) - 1 - shared for tokens, _ in rows]
    start, device = rows[0][0][:shared], decoder.device
    inputs = torch.cat([start, *(tokens[shared:-1] for tokens, _ in rows)]).long().to(device)
    targets = torch.cat([tokens[shared + 1 :] for tokens, _ in rows]).long().to(device)
    marked = torch.cat([marks[shared + 1 :] for _, marks in rows]).to(device)
    positions = packed_positions(lengths, device) + shared
    positions = torch.cat([torch.arange(shared, device=device), positions])
    change = training_change(lora, decoder) if lora else None
    hidden = decoder.forward(inputs, positions, attend_packed(lengths, shared), change)[shared:]
    loss: Tensor = _CompletionLoss.apply(hidden[marked], targets[marked], decoder)  # type: ignore[no-untyped-call]
    return loss, int(marked.sum())


def common_start(rows: list[tuple[Tensor, Tensor]]) -> int:
    """How many tokens all rows begin with: the system prompt, as a rule. They are computed once for the batch.

    The token that follows is not to be learned in any row, since it is foretold from what is shared.
    """
    if len(rows) < 2:
        return 0
    learned = [int(marks.nonzero()[0]) if marks.any() else len(marks) - 1 for _, marks in rows]
    most = max(min(learned) - 1, 0)
    same = torch.stack([tokens[:most] for tokens, _ in rows]) == rows[0][0][:most]
    found = int(same.all(dim=0).long().cumprod(0).sum())
    return found if found >= SHARED_LEAST else 0


def held_out_loss(decoder: Decoder, lora: Lora | None, data: TokenSet, rows: list[int]) -> float:
    """Mean loss in nats per completion token on `rows`, no gradients."""
    total, count = 0.0, 0
    with torch.no_grad():
        for part in _micro_batches(data, np.array(rows)):
            loss, tokens = completion_loss(decoder, lora, part)
            total, count = total + float(loss), count + tokens
    return total / max(count, 1)


def train(
    decoder: Decoder, lora: Lora, data: TokenSet, rows: list[int], held_out: list[int], settings: Training,
    checkpoint: Path, tell: Callable[[Progress], None] = lambda _: None,
) -> Outcome:  # fmt: skip
    """Train `lora` in place on `rows` of `data`, going on from `checkpoint` if that file is there.

    On Ctrl-C the state is saved and KeyboardInterrupt goes on to the caller.
    """
    memory.keep()
    params = {k: v.to(decoder.device).requires_grad_() for k, v in sorted(lora.weights.items())}
    lora.weights = dict(params)
    optimizer = torch.optim.AdamW(
        params.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    lengths = data.lengths()[rows]
    per_epoch = math.ceil(sum(1 for _ in batches(lengths, settings.batch, 0)))
    steps = per_epoch * settings.epochs
    outcome = Outcome(steps, 0, 0.0, 0, 0)
    step = outcome.resumed_at = _restore(checkpoint, params, optimizer, outcome)
    if not step:
        outcome.held_out.append(held_out_loss(decoder, None, data, held_out))
    started = saved = time.monotonic()
    before = (outcome.seconds, step)
    try:
        for epoch in range(step // per_epoch, settings.epochs):
            for n, batch in enumerate(batches(lengths, settings.batch, settings.seed * 1_000_003 + epoch)):
                if epoch * per_epoch + n < step:
                    continue
                chosen = np.array(rows)[batch]
                loss, tokens = _step(decoder, lora, data, chosen, optimizer, settings, step / steps, steps)
                step += 1
                outcome.losses.append(loss)
                outcome.tokens, outcome.examples = outcome.tokens + tokens, outcome.examples + len(batch)
                if step % per_epoch == 0:
                    outcome.held_out.append(held_out_loss(decoder, lora, data, held_out))
                now = time.monotonic()
                outcome.seconds = before[0] + now - started
                pace = outcome.seconds / step
                tell(Progress(step, steps, loss, outcome.tokens / outcome.seconds, outcome.examples / outcome.seconds,
                              (steps - step) * pace, outcome.held_out[-1]))  # fmt: skip
                if now - saved > settings.checkpoint_every_s:
                    _save(checkpoint, params, optimizer, step, outcome)
                    saved = now
    except KeyboardInterrupt:
        _save(checkpoint, params, optimizer, step, outcome)
        raise
    lora.weights = {k: v.detach().cpu() for k, v in params.items()}
    memory.give_back()
    return outcome


def _step(
    decoder: Decoder, lora: Lora, data: TokenSet, batch: np.ndarray[tuple[int], np.dtype[np.int64]],
    optimizer: torch.optim.Optimizer, settings: Training, done: float, steps: int,
) -> tuple[float, int]:  # fmt: skip
    """One update. Returns the mean loss and the number of tokens read."""
    parts = list(_micro_batches(data, batch))
    count = sum(int(marks[1:].sum()) for part in parts for _, marks in part)
    total = 0.0
    for part in parts:
        loss, _ = completion_loss(decoder, lora, part)
        (loss / count).backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(lora.weights.values(), settings.clip)
    warmup = max(settings.warmup, 1 / steps)
    ramp = min((done + 1 / steps) / warmup, 1.0)
    decay = 0.5 * (1 + math.cos(math.pi * max(done - warmup, 0) / max(1 - warmup, 1e-9)))
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * ramp * decay
    optimizer.step()
    optimizer.zero_grad()
    return total / count, sum(len(tokens) for part in parts for tokens, _ in part)


def _micro_batches(
    data: TokenSet, batch: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> list[list[tuple[Tensor, Tensor]]]:
    """The batch's rows, grouped so that no group has more than MICRO_TOKENS tokens (one long row may)."""
    groups: list[list[tuple[Tensor, Tensor]]] = [[]]
    held = 0
    for i in batch:
        tokens, marks = (torch.from_numpy(np.array(x)) for x in data.row(int(i)))
        if groups[-1] and held + len(tokens) > MICRO_TOKENS:
            groups.append([])
            held = 0
        groups[-1].append((tokens, marks))
        held += len(tokens)
    return groups


def _save(file: Path, params: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int, outcome: Outcome) -> None:
    """Weights, moments and counters in one file, put in place by a rename."""
    state = {f"weight:{k}": p.detach().cpu() for k, p in params.items()}
    for k, p in params.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[p]:
                state[f"{moment}:{k}"] = optimizer.state[p][moment].cpu()
    facts = {"step": step, "seconds": outcome.seconds, "tokens": outcome.tokens, "examples": outcome.examples}
    state["losses"] = torch.tensor(outcome.losses, dtype=torch.float64)
    state["held_out"] = torch.tensor(outcome.held_out, dtype=torch.float64)
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    try:
        save_file(state, scratch, {k: str(v) for k, v in facts.items()})
        os.replace(scratch, file)
    except Exception as error:  # safetensors raises its own kind for a full disk
        scratch.unlink(missing_ok=True)
        raise StorageError(f"{file}: the checkpoint cannot be written: {error}") from error


def _restore(file: Path, params: dict[str, Tensor], optimizer: torch.optim.Optimizer, outcome: Outcome) -> int:
    """Bring everything back as `_save` left it; the step to go on from, 0 without a checkpoint."""
    if not file.exists():
        return 0
    with safe_open(file, framework="pt") as f:
        facts = f.metadata()
        step = int(facts["step"])
        with torch.no_grad():
            for k, p in params.items():
                p.copy_(f.get_tensor(f"weight:{k}"))
                if step:
                    optimizer.state[p] = {
                        "step": torch.tensor(float(step)),
                        "exp_avg": f.get_tensor(f"exp_avg:{k}").to(p.device),
                        "exp_avg_sq": f.get_tensor(f"exp_avg_sq:{k}").to(p.device),
                    }
        outcome.losses, outcome.held_out = f.get_tensor("losses").tolist(), f.get_tensor("held_out").tolist()
        outcome.seconds, outcome.tokens = float(facts["seconds"]), int(facts["tokens"])
        outcome.examples = int(facts["examples"])
    return step
