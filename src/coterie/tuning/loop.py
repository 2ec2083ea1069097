"""The training loop: a frozen base, an expert that learns, and checkpoints a killed run goes on from.

Notable: the loop knows neither the kind of expert (experts/kinds.py) nor what it minimises (objective.py). A
resumed run ends in the same weights as an unbroken one, bit for bit: the order of the data depends on seed and
epoch alone, dropout on seed and step, and the checkpoint holds weights, both moments and the step.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from coterie.data.encode import batches
from coterie.errors import StorageError, TrainingError
from coterie.experts.expert import Applied, Expert
from coterie.experts.kinds import apply
from coterie.model import memory
from coterie.model.decoder import Decoder
from coterie.tuning.objective import Loss

Sizes = NDArray[np.int64]  # tokens of each row, (rows)
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
    seconds_left: float
    held_out_loss: float | None = None


@dataclass
class Outcome:
    """What training came to: mean held-out loss (nats per completion token), at the start and after each epoch."""

    steps: int
    resumed_at: int
    seconds: float
    tokens: int
    examples: int
    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)


def held_out_loss(loss: Loss, applied: Applied, sizes: Sizes, rows: list[int]) -> float:
    """Mean loss on `rows`, no gradients."""
    total, count = 0.0, 0
    with torch.no_grad():
        for part in _micro_batches(sizes, rows):
            value, n = loss(applied, part)
            total, count = total + float(value), count + n
    return total / max(count, 1)


def train(
    decoder: Decoder, expert: Expert, loss: Loss, sizes: Sizes, rows: list[int], held_out: list[int],
    settings: Training, checkpoint: Path, tell: Callable[[Progress], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None, before: Applied | None = None,
) -> Outcome:  # fmt: skip
    """Train `expert` in place on `rows`, going on from `checkpoint` if that file is there.

    `sizes` are the tokens of every row; `before` is what the first held-out loss measures, by default the base model.
    Ctrl-C waits for the end of the step, saves, and goes on to the caller as KeyboardInterrupt. Raises TrainingError
    where the loss is no longer a number, and StorageError where the disk is full.
    """
    memory.keep()
    params = {k: v.to(decoder.device).requires_grad_() for k, v in sorted(expert.weights.items())}
    expert.weights = dict(params)
    optimizer = torch.optim.AdamW(
        params.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    lengths = sizes[rows]
    per_epoch = sum(1 for _ in batches(lengths, settings.batch, 0))
    steps = per_epoch * settings.epochs
    outcome = Outcome(steps, 0, 0.0, 0, 0)
    step = _restore(checkpoint, params, optimizer, outcome, say)
    started = saved = time.monotonic()

    def report() -> None:
        seconds, left = outcome.seconds, (steps - step) * outcome.seconds / step
        tell(Progress(step, steps, outcome.losses[-1], outcome.tokens / seconds, left, outcome.held_out[-1]))

    try:
        if not outcome.held_out:
            outcome.held_out.append(held_out_loss(loss, before or Applied(), sizes, held_out))
        saved = time.monotonic()
        started = saved - outcome.seconds
        for epoch in range(step // per_epoch, settings.epochs + 1):
            if len(outcome.held_out) <= epoch:
                outcome.held_out.append(held_out_loss(loss, apply(expert, decoder), sizes, held_out))
                report()
            if epoch == settings.epochs:
                break
            for n, batch in enumerate(batches(lengths, settings.batch, settings.seed * 1_000_003 + epoch)):
                if epoch * per_epoch + n < step:
                    continue
                chosen = [rows[i] for i in batch]
                with _undisturbed():
                    value = _step(decoder, expert, loss, sizes, chosen, optimizer, settings, step, steps)
                    step += 1
                    outcome.losses.append(value)
                    outcome.tokens += int(sizes[chosen].sum())
                    outcome.examples += len(batch)
                    outcome.seconds = time.monotonic() - started
                report()
                if time.monotonic() - saved > settings.checkpoint_every_s:
                    _save(checkpoint, params, optimizer, step, outcome)
                    saved = time.monotonic()
    except KeyboardInterrupt:
        _save(checkpoint, params, optimizer, step, outcome)
        raise
    _save(checkpoint, params, optimizer, step, outcome)  # what follows may be killed too
    expert.weights = {k: v.detach().cpu() for k, v in params.items()}
    memory.give_back()
    return outcome


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits for the end of this block: weights, moments and counters belong to one step, or to the next."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is interrupted
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _step(
    decoder: Decoder, expert: Expert, loss: Loss, sizes: Sizes, batch: list[int], optimizer: torch.optim.Optimizer,
    settings: Training, step: int, steps: int,
) -> float:  # fmt: skip
    """One update, number `step` of `steps`. Returns the batch's mean loss."""
    torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout
    total, count = 0.0, 0
    for part in _micro_batches(sizes, batch):
        value, n = loss(apply(expert, decoder, training=True), part)
        value.backward()
        total, count = total + float(value.detach()), count + n
    for p in expert.weights.values():
        if p.grad is not None:
            p.grad /= max(count, 1)
    norm = float(torch.nn.utils.clip_grad_norm_(expert.weights.values(), settings.clip))
    if not math.isfinite(total + norm):
        raise TrainingError(
            f"training diverged at step {step + 1} of {steps}: loss {total / max(count, 1):.3g}, "
            f"gradient norm {norm:.3g}; lower training.learning_rate in coterie.toml",
            batch,
        )
    done = step / steps
    warmup = max(settings.warmup, 1 / steps)
    ramp = min((done + 1 / steps) / warmup, 1.0)
    decay = 0.5 * (1 + math.cos(math.pi * max(done - warmup, 0) / max(1 - warmup, 1e-9)))
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * ramp * decay
    optimizer.step()
    optimizer.zero_grad()
    return total / max(count, 1)


def _micro_batches(sizes: Sizes, rows: list[int]) -> list[list[int]]:
    """`rows` grouped so that no group has more than MICRO_TOKENS tokens (one long row may)."""
    groups: list[list[int]] = [[]]
    held = 0
    for i in rows:
        if groups[-1] and held + sizes[i] > MICRO_TOKENS:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += int(sizes[i])
    return groups


def _save(file: Path, params: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int, outcome: Outcome) -> None:
    """Weights, moments and counters in one file, put in place by a rename."""
    state = {f"weight:{k}": p.detach().cpu() for k, p in params.items()}
    for k, p in params.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[p]:
                state[f"{moment}:{k}"] = optimizer.state[p][moment].cpu()
    facts = {"step": step, "steps": outcome.steps, "seconds": outcome.seconds, "tokens": outcome.tokens,
             "examples": outcome.examples}  # fmt: skip
    state["losses"] = torch.tensor(outcome.losses, dtype=torch.float64)
    state["held_out"] = torch.tensor(outcome.held_out, dtype=torch.float64)
    scratch = file.with_suffix(".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, scratch, {k: str(v) for k, v in facts.items()})
        os.replace(scratch, file)
    except Exception as error:  # safetensors raises its own kind for a full disk
        scratch.unlink(missing_ok=True)
        raise StorageError(f"{file}: the checkpoint cannot be written: {error}") from error


def _restore(
    file: Path, params: dict[str, Tensor], optimizer: torch.optim.Optimizer, outcome: Outcome,
    say: Callable[[str], None],
) -> int:  # fmt: skip
    """Bring everything back as `_save` left it. The step to go on from: 0 without a checkpoint that can be used."""
    if not file.exists():
        return 0
    try:
        with safe_open(file, framework="pt") as f:
            facts, state = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        step = int(facts["step"])
        if int(facts["steps"]) != outcome.steps:
            raise ValueError(f"it is of a run of {facts['steps']} steps")
        for k, p in params.items():
            moments = [state[f"{part}:{k}"] for part in ("weight", *(("exp_avg", "exp_avg_sq") if step else ()))]
            if any(m.shape != p.shape for m in moments):
                raise ValueError(f"{k} is of another shape")
        seconds, tokens, examples = float(facts["seconds"]), int(facts["tokens"]), int(facts["examples"])
        losses, held_out = state["losses"].tolist(), state["held_out"].tolist()
    except Exception as error:  # whatever is wrong with it, training can start anew
        say(f"{file}: the checkpoint cannot be used ({error}); training starts anew")
        return 0
    with torch.no_grad():
        for k, p in params.items():
            p.copy_(state[f"weight:{k}"])
            if step:
                optimizer.state[p] = {
                    "step": torch.tensor(float(step), device=p.device),
                    "exp_avg": state[f"exp_avg:{k}"].to(p.device), "exp_avg_sq": state[f"exp_avg_sq:{k}"].to(p.device),
                }  # fmt: skip
    outcome.losses, outcome.held_out = losses, held_out
    outcome.seconds, outcome.tokens, outcome.examples, outcome.resumed_at = seconds, tokens, examples, step
    if step:
        say(f"going on at step {step} of {outcome.steps}")
    return step
