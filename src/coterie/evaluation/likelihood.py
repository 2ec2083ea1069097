"""How likely a model finds given texts: scoring of choices, and perplexity. No sampling, no constraint.

Notable: all choices of a prompt are scored in one forward. The prompt stands once; each choice follows it at the same
positions and sees the prompt and itself (`attend_branches`), so 77 choices cost little more than one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.evaluation.metrics import Perplexity
from coterie.experts.expert import Applied
from coterie.model.decoder import Attend, Decoder
from coterie.model.load import BaseModel
from coterie.tuning.forward import hidden_states

BRANCH_TOKENS = 2048  # of choices scored in one forward: bounds the mask and the scores over the vocabulary
SCORED = 512  # rows of scores over the vocabulary in memory at once
BASE = Applied()  # no expert
NORMS = ("sum", "token", "byte")


def attend_branches(stem: int, lengths: Sequence[int], prefix: Tensor | None = None) -> Attend:
    """Attention of `stem` tokens and of branches of `lengths` that go on from them without seeing each other.

    `prefix` (layers, 2, P, Hkv, D), keys and values of no tokens, is seen by all.
    """
    size = stem + sum(lengths)
    owner = torch.cat([torch.zeros(stem, dtype=torch.long), *(torch.full((n,), i) for i, n in enumerate(lengths, 1))])
    order = torch.arange(size)
    sees = (order[None] <= order[:, None]) & ((owner[None] == owner[:, None]) | (owner[None] == 0))  # (query, key)
    if prefix is not None:
        sees = torch.cat([torch.ones(size, prefix.shape[2], dtype=torch.bool), sees], dim=1)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if prefix is not None:
            k, v = torch.cat([prefix[layer, 0], k]), torch.cat([prefix[layer, 1], v])
        group = q.shape[1] // k.shape[1]
        keys, values = (t.transpose(0, 1).repeat_interleave(group, dim=0)[None] for t in (k, v))
        mask = sees.to(q.device)[None, None]
        mixed = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, attn_mask=mask)
        return mixed[0].transpose(0, 1)

    return attend


@torch.no_grad()
def choice_log_likelihoods(
    base: BaseModel, prompt: list[int], choices: Sequence[list[int]], applied: Applied = BASE
) -> list[float]:
    """Log-probability in nats of each choice's tokens after `prompt`, in the order given.

    Raises ValueError for an empty prompt or choice, or where the longest does not fit the context.
    """
    if not prompt or not choices or not all(choices):
        raise ValueError("a prompt and choices of at least one token each are needed")
    longest = len(prompt) + max(map(len, choices)) - 1
    if longest > base.decoder.config.context:
        raise ValueError(f"prompt and choice have {longest} tokens, the context holds {base.decoder.config.context}")
    out: list[float] = []
    start = 0
    while start < len(choices):
        end, held = start, 0
        while end < len(choices) and (end == start or held + len(choices[end]) <= BRANCH_TOKENS):
            held += len(choices[end])
            end += 1
        out += _score(base, prompt, choices[start:end], applied)
        start = end
    return out


def _score(base: BaseModel, prompt: list[int], choices: Sequence[list[int]], applied: Applied) -> list[float]:
    decoder, device = applied.decoder or base.decoder, base.decoder.device
    lengths = [len(c) - 1 for c in choices]  # a choice's last token is only predicted
    hidden = decoder.embed(torch.tensor(prompt + [t for c in choices for t in c[:-1]], device=device))
    behind, stem = 0 if applied.prefix is None else applied.prefix.shape[2], len(prompt)
    if applied.soft is not None:  # virtual tokens: the prompt begins with them
        hidden, stem = torch.cat([applied.soft, hidden]), stem + len(applied.soft)
    positions = torch.cat([torch.arange(stem), *(torch.arange(stem, stem + n) for n in lengths)]).to(device) + behind
    attend = attend_branches(stem, lengths, applied.prefix)
    hidden = decoder.finish(decoder.run(hidden, positions, attend, applied.change))
    rows, targets, at = [], [], stem
    for choice, n in zip(choices, lengths, strict=True):
        rows += [stem - 1, *range(at, at + n)]
        targets += choice
        at += n
    scores = token_log_probs(decoder, hidden[torch.tensor(rows, device=device)], torch.tensor(targets, device=device))
    return [float(part.double().sum()) for part in scores.split([len(c) for c in choices])]


def token_log_probs(decoder: Decoder, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities (N) in nats of `targets` (N) from normed hidden states (N, width)."""
    parts = [
        torch.log_softmax(decoder.logits(h), dim=-1).gather(1, t[:, None])[:, 0]
        for h, t in zip(hidden.split(SCORED), targets.split(SCORED), strict=True)
    ]
    return torch.cat(parts)


@dataclass(frozen=True)
class Verdict:
    """The likeliest choice and the probability of each, which add up to 1 over the choices."""

    choice: str
    probabilities: dict[str, float]

    @property
    def confidence(self) -> float:
        return self.probabilities[self.choice]


def choose(
    base: BaseModel, prompt: list[int], choices: Sequence[str], applied: Applied = BASE, norm: str = "sum",
    end: str = "",
) -> Verdict:  # fmt: skip
    """The likeliest of `choices` after `prompt`.

    `norm`: "sum" compares the probability of the whole choice, "token" and "byte" its mean per token or byte (lm-eval's
    acc and acc_norm are sum and byte). `end` is put after each choice, so that one that begins another is told apart.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
    encoded = [base.encode(c + end) for c in choices]
    scores = choice_log_likelihoods(base, prompt, encoded, applied)
    if norm != "sum":
        sizes = [len(e) if norm == "token" else len(c.encode()) for e, c in zip(encoded, choices, strict=True)]
        scores = [s / n for s, n in zip(scores, sizes, strict=True)]
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    shares = {c: w / sum(weights) for c, w in zip(choices, weights, strict=True)}
    return Verdict(choices[scores.index(top)], shares)


@torch.no_grad()
def perplexity(
    base: BaseModel, texts: Sequence[str], applied: Applied = BASE, window: int = 1024,
    tell: Callable[[int], None] = lambda _: None,
) -> Perplexity:  # fmt: skip
    """Of whole texts, each after the mark of a text's beginning (the end mark where the model has no other).

    A text longer than `window` tokens is read in windows that overlap by half, so that every token but the first few
    is predicted from at least window / 2 before it. Raises ValueError where no text has anything to predict.
    """
    window = min(window, base.decoder.config.context)
    first = base.encode(base.bos_token or base.eos_token)[:1]
    nats, tokens, size = 0.0, 0, 0
    for number, text in enumerate(texts, 1):
        ids = base.encode(text)
        if not ids:
            continue
        whole, done = first + ids, 1  # done: tokens already predicted, the mark among them
        while done < len(whole):
            start = max(0, done - window // 2) if done > 1 else 0
            part = whole[start : start + window]
            hidden = hidden_states(base.decoder, applied, [torch.tensor(part[:-1])])
            new = len(part) - (done - start)
            wanted = torch.tensor(part[-new:], device=base.decoder.device)
            found = token_log_probs(applied.decoder or base.decoder, hidden[-new:], wanted)
            nats -= float(found.double().sum())
            done += new
        tokens, size = tokens + len(ids), size + len(text.encode())
        tell(number)
    return Perplexity(nats, tokens, size)
