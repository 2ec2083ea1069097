"""Train the tagging expert's head: the trunk's states of the sentences once, then epochs over the head alone."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coterie.data.private import Span
from coterie.errors import CoterieError
from coterie.model.load import BaseModel
from coterie.privacy.tagger import Head, Tagger, Words, allowed, batch_of, states_of, tags_of

LONGEST = 128  # words; longer sentences are left out
BATCH, LEARNING_RATE = 32, 3e-3
LEANS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Sentence:
    """A text in which every private span is known."""

    text: str
    spans: tuple[Span, ...]


def gold(words: Words, spans: Iterable[Span], kinds: list[str]) -> list[int]:
    """The tag of each word: 0 outside, then B and I of each kind."""
    tags = [0] * len(words.spans)
    for span in spans:
        if span.kind in kinds:
            inside = [i for i, (start, end) in enumerate(words.spans) if start < span.end and end > span.start]
            for i in inside:
                tags[i] = 1 + 2 * kinds.index(span.kind) + (i != inside[0])
    return tags


def teach(
    base: BaseModel, sentences: list[Sentence], held_out: list[Sentence], epochs: int = 12, seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Tagger:  # fmt: skip
    """A tagger of the kinds in `sentences`; how far it leans to masking is chosen on `held_out` (F2).

    Raises CoterieError where nothing can be learned.
    """
    kinds = sorted({s.kind for sentence in sentences for s in sentence.spans})
    rows = [(words, gold(words, s.spans, kinds)) for s in sentences if (words := Words.of(s.text)).spans]
    if not kinds:
        raise CoterieError("no sentence to learn from has private data in it")
    cut = [(words, tags) for words, tags in rows if len(tags) <= LONGEST]
    texts = [words for words, _ in cut]
    states = [s.half() for at in range(0, len(texts), 64) for s in states_of(base, texts[at : at + 64])]
    rng = np.random.default_rng(seed)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        head = Head(base.decoder.config.width, len(tags_of(kinds)))
        bar = torch.from_numpy(np.where(allowed(kinds), 0, -1e4).astype(np.float32))
        optimiser = torch.optim.AdamW(head.parameters(), LEARNING_RATE, weight_decay=0.01)
        steps = epochs * -(-len(cut) // BATCH)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps + 1)
        head.train()
        done = 0
        for _ in range(epochs):
            order = _alike([len(t) for _, t in cut], BATCH, rng)
            for chosen in order:
                b = batch_of([texts[i] for i in chosen], [states[i].float() for i in chosen])
                scores = head(b.states, b.letters, b.ends, b.shapes, b.mask)
                loss = _loss(scores, [cut[i][1] for i in chosen], head.moves + bar)
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
                optimiser.step()
                rate.step()
                done += 1
                progress(done, steps)
    finally:
        torch.random.set_rng_state(generator_state)
    return lean(Tagger(base, head, kinds), held_out)


def lean(tagger: Tagger, held_out: list[Sentence]) -> Tagger:
    """The same tagger with the `lean` of the best F2 on the words of `held_out`."""
    best, chosen = -1.0, 0.0
    for value in LEANS if held_out else ():
        tagger.lean = value
        hit = missed = false = 0
        for s, found in zip(held_out, tagger.find([s.text for s in held_out]), strict=True):
            want, got = (_covered(s.text, spans) for spans in (s.spans, found))
            hit, missed, false = hit + len(want & got), missed + len(want - got), false + len(got - want)
        f2 = 5 * hit / max(1, 5 * hit + 4 * missed + false)
        if f2 > best + 1e-4:
            best, chosen = f2, value
    tagger.lean = chosen
    return tagger


def _covered(text: str, spans: Iterable[Span]) -> set[tuple[int, str]]:
    """Which words the spans touch, with the kind."""
    words = Words.of(text).spans
    return {(i, s.kind) for s in spans for i, (start, end) in enumerate(words) if start < s.end and end > s.start}


def _alike(lengths: list[int], batch: int, rng: np.random.Generator) -> list[list[int]]:
    """Batches in random order, each of rows of about one length."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] + rng.random() * 4)
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _loss(scores: Tensor, tags: list[list[int]], moves: Tensor) -> Tensor:
    """Mean negative log-likelihood of the tags, (B, T, tags) scores: all paths' score less the right one's."""
    b, longest, count = scores.shape
    lengths = torch.tensor([len(t) for t in tags])
    right = torch.zeros(b, longest, dtype=torch.long)
    for i, row in enumerate(tags):
        right[i, : len(row)] = torch.tensor(row)
    mask = (torch.arange(longest) < lengths[:, None]).float()
    first = torch.ones(count)
    first[2::2] = 0  # no text begins inside something
    score = scores[:, 0] + (first - 1) * 1e4
    for t in range(1, longest):
        ahead = torch.logsumexp(score[:, :, None] + moves, dim=1) + scores[:, t]
        score = torch.where(mask[:, t, None] > 0, ahead, score)
    every = torch.logsumexp(score, dim=1)
    emitted = (scores.gather(2, right[..., None]).squeeze(2) * mask).sum(dim=1)
    moved = (moves[right[:, :-1], right[:, 1:]] * mask[:, 1:]).sum(dim=1)
    loss: Tensor = ((every - emitted - moved) / lengths).mean()
    return loss
