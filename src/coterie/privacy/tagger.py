"""The tagging expert: which words of a text are a name, an address, a date, ... where no rule can tell.

Notable: it stands on the base model's trunk. The lowest layers run as they are; what they make of each word goes,
with the word's letters, through a small head of dilated convolutions that looks both ways (the trunk is causal), and
a linear-chain CRF chooses the best sequence of tags. Only the head is trained: the trunk's states of the training
sentences are computed once. Sources: Strubell et al. 2017 (iterated dilated convolutions for tagging), Lafferty et al.
2001 (CRF).
"""

import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from coterie.data.private import Span
from coterie.errors import CoterieError
from coterie.files import write_atomic
from coterie.model.decoder import attend_packed, packed_positions
from coterie.model.load import BaseModel

WORD = re.compile(r"\w+|[^\w\s]")
LAYERS = 1  # of the trunk; docs/privacy.md has what more of them cost and bring
WIDTH = 128  # of the head
DILATIONS = (1, 2, 4, 1)  # words; together a view of 8 words to either side
GRAMS = 1 << 14  # buckets of letter groups
SHAPES = 12  # see `_look`
WINDOW, OVERLAP = 64, 12  # words looked at together; of long texts, neighbours overlap by this much at either end
LONGEST = 48  # letters of a word that count


@dataclass(frozen=True)
class Words:
    """The words of a text, and where each stands; of a piece of a longer text, `shift` says where it begins there."""

    text: str
    spans: list[tuple[int, int]]
    shift: int = 0

    @classmethod
    def of(cls, text: str) -> "Words":
        return cls(text, [m.span() for m in WORD.finditer(text)])

    def __getitem__(self, i: int) -> str:
        start, end = self.spans[i]
        return self.text[start : min(end, start + LONGEST)]


@lru_cache(1 << 15)
def _look(word: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Buckets of a word's letter groups (of 1 to 4, and all of it), and what it looks like: (SHAPES)."""
    low = f"<{word.casefold()}>"
    grams = {low, *(low[i : i + n] for n in (2, 3, 4) for i in range(len(low) - n + 1))}
    digits = sum(c.isdigit() for c in word)
    shape = (
        word[0].isupper(), word.isupper() and len(word) > 1, word.islower(), digits == len(word),
        0 < digits < len(word), not word[0].isalnum(), not word.isascii(), len(word) == 1, len(word) > 8,
        digits == len(word) == 4, digits == len(word) == 5, digits > 6,
    )  # fmt: skip
    return tuple(sorted(zlib.crc32(g.encode()) % GRAMS for g in grams)), tuple(map(float, shape))


class Head(nn.Module):
    """From the trunk's states of words to scores of tags."""

    def __init__(self, width: int, tags: int) -> None:
        super().__init__()
        self.states = nn.Linear(width, WIDTH)
        self.grams = nn.EmbeddingBag(GRAMS, WIDTH, mode="mean")
        self.shapes = nn.Linear(SHAPES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.looks = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=d, dilation=d) for d in DILATIONS)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in DILATIONS)
        self.out = nn.Linear(WIDTH, tags)
        self.moves = nn.Parameter(torch.zeros(tags, tags))  # from a tag to the next
        self.drop = nn.Dropout(0.3)

    def forward(self, states: Tensor, letters: Tensor, ends: Tensor, shapes: Tensor, mask: Tensor) -> Tensor:
        """states (B, T, width), shapes (B, T, SHAPES), mask (B, T, 1); letters are buckets of the B * T words in one
        row, word by word, beginning at `ends` (B * T). Scores (B, T, tags)."""
        b, t = mask.shape[:2]
        x = self.states(self.drop(states)) + self.shapes(shapes)
        x = x + self.grams(letters, ends).view(b, t, WIDTH)
        x = self.norm(x) * mask
        for look, norm in zip(self.looks, self.norms, strict=True):
            seen = look(self.drop(x).transpose(1, 2)).transpose(1, 2)
            x = (x + F.gelu(norm(seen))) * mask
        scores: Tensor = self.out(self.drop(x))
        return scores


@dataclass(frozen=True)
class Batch:
    """What `Head` wants, of several texts."""

    states: Tensor
    letters: Tensor
    ends: Tensor
    shapes: Tensor
    mask: Tensor


@torch.no_grad()
def states_of(base: BaseModel, texts: list[Words], layers: int = LAYERS) -> list[Tensor]:
    """What the trunk makes of each word: the mean over its tokens, each normed, (words, width) in float32."""
    decoder = base.decoder
    encoded = base.tokenizer.encode_batch([w.text for w in texts], add_special_tokens=False)
    lengths = [len(e.ids) for e in encoded]
    if not sum(lengths):
        return [torch.zeros(0, decoder.config.width) for _ in texts]
    kept = [i for i, n in enumerate(lengths) if n]
    ids = torch.tensor([t for i in kept for t in encoded[i].ids], device=decoder.device)
    sizes = [lengths[i] for i in kept]
    hidden = decoder.embed(ids)
    if layers:
        hidden = decoder.run(
            hidden, packed_positions(sizes, decoder.device), attend_packed(sizes), layers=range(layers)
        )
    hidden = hidden.float().cpu()
    hidden = hidden / hidden.pow(2).mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)
    out: list[Tensor] = [torch.zeros(0, decoder.config.width) for _ in texts]
    for i, part in zip(kept, hidden.split(sizes), strict=True):
        out[i] = _by_word(part, encoded[i].offsets, texts[i].spans)
    return out


def _by_word(hidden: Tensor, offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> Tensor:
    """Mean of the tokens (N, width) that overlap each word; a word that no token overlaps has the one before it."""
    rows, columns, token = list[int](), list[int](), 0
    for row, (start, end) in enumerate(spans):
        while token < len(offsets) - 1 and offsets[token][1] <= start:
            token += 1
        at = token
        while at < len(offsets) and (offsets[at][0] < end or at == token):
            rows.append(row)
            columns.append(at)
            at += 1
    index = torch.tensor(rows, dtype=torch.long)
    total = torch.zeros(len(spans), hidden.shape[1]).index_add_(
        0, index, hidden[torch.tensor(columns, dtype=torch.long)]
    )
    return total / torch.bincount(index, minlength=len(spans)).clamp_min(1)[:, None]


def batch_of(texts: list[Words], states: list[Tensor]) -> Batch:
    """Pad to the longest."""
    longest, width = max(len(w.spans) for w in texts), states[0].shape[1]
    padded = torch.zeros(len(texts), longest, width)
    shapes, mask = torch.zeros(len(texts), longest, SHAPES), torch.zeros(len(texts), longest, 1)
    letters, ends = list[int](), list[int]()
    for b, words in enumerate(texts):
        n = len(words.spans)
        padded[b, :n], mask[b, :n] = states[b], 1
        looks = [_look(words[i]) for i in range(n)]
        shapes[b, :n] = torch.tensor([s for _, s in looks]).view(n, SHAPES)
        for t in range(longest):
            ends.append(len(letters))
            letters.extend(looks[t][0] if t < n else ())
    return Batch(padded, torch.tensor(letters, dtype=torch.long), torch.tensor(ends), shapes, mask)


def tags_of(kinds: list[str]) -> list[str]:
    """O, then B- and I- of each kind."""
    return ["O", *(f"{part}-{kind}" for kind in kinds for part in "BI")]


def allowed(kinds: list[str]) -> NDArray[np.bool_]:
    """(tags, tags) which tag may follow which: I of a kind only B or I of it."""
    tags = tags_of(kinds)
    return np.array([[not b.startswith("I") or (a[2:] == b[2:] and a != "O") for b in tags] for a in tags])


def viterbi(scores: NDArray[np.float32], moves: NDArray[np.float32]) -> list[int]:
    """The best sequence of tags: scores (T, tags), moves (tags, tags)."""
    best, back = scores[0].copy(), list[NDArray[np.int64]]()
    for row in scores[1:]:
        ways = best[:, None] + moves
        back.append(ways.argmax(axis=0))
        best = ways.max(axis=0) + row
    path = [int(best.argmax())]
    for step in reversed(back):
        path.append(int(step[path[-1]]))
    return path[::-1]


class Tagger:
    """Finds the spans of private words. `lean`: added to every tag but O, as what is missed costs more than a word
    masked too many; chosen on held-out sentences while training."""

    def __init__(self, base: BaseModel, head: Head, kinds: list[str], lean: float = 0.0, layers: int = LAYERS) -> None:
        self.base, self.head, self.kinds, self.lean, self.layers = base, head.eval(), kinds, lean, layers
        self.moves = np.where(allowed(kinds), head.moves.detach().numpy(), np.float32(-1e4)).astype(np.float32)

    def find(self, texts: list[str]) -> list[list[Span]]:
        """The spans in each text."""
        windows: list[tuple[int, Words, int, int]] = []  # text, words, and which of them count
        for number, text in enumerate(texts):
            windows += [(number, *w) for w in _windows(Words.of(text))]
        out: list[list[Span]] = [[] for _ in texts]
        if not windows:
            return out
        for (number, words, first, last), scores in zip(
            windows, self._scores([w for _, w, _, _ in windows]), strict=True
        ):
            scores[0, 2::2] = -1e4  # the first word begins whatever it is of
            tags = viterbi(scores, self.moves)
            out[number] += [s for i, s in _spans(words, tags, self.kinds) if first <= i < last]
        return out

    @torch.no_grad()
    def _scores(self, texts: list[Words]) -> list[NDArray[np.float32]]:
        out: list[NDArray[np.float32]] = []
        for at in range(0, len(texts), 32):
            some = texts[at : at + 32]
            b = batch_of(some, states_of(self.base, some, self.layers))
            scores = self.head(b.states, b.letters, b.ends, b.shapes, b.mask)
            scores[..., 1:] += self.lean
            out += [s[: len(w.spans)].numpy() for s, w in zip(scores, some, strict=True)]
        return out

    def save(self, file: Path) -> None:
        """Write the head, atomically."""
        tensors = {name: t.detach().contiguous() for name, t in self.head.state_dict().items()}
        about = {"kinds": " ".join(self.kinds), "lean": repr(self.lean), "layers": str(self.layers)}
        write_atomic(file, save(tensors, about))

    @classmethod
    def load(cls, base: BaseModel, file: Path) -> "Tagger":
        """Read what `save` wrote. Raises CoterieError where the file is damaged or of another base model."""
        try:
            with safe_open(file, "pt") as opened:
                about = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, no mapping
            kinds = about["kinds"].split()
            head = Head(base.decoder.config.width, len(tags_of(kinds)))
            head.load_state_dict(tensors)
            return cls(base, head, kinds, float(about["lean"]), int(about["layers"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            why = "is damaged, or belongs to another base model"
            raise CoterieError(f"{file}: the tagger {why}; delete it, and it is made anew") from error


def _windows(words: Words) -> list[tuple[Words, int, int]]:
    """Pieces of a text that are looked at together, and the range of their words that counts."""
    n = len(words.spans)
    if n <= WINDOW:
        return [(words, 0, n)] if n else []
    out, step = [], WINDOW - 2 * OVERLAP
    for at in range(0, n, step):
        first, last = max(0, at - OVERLAP), min(n, at + step + OVERLAP)
        start, end = words.spans[first][0], words.spans[last - 1][1]
        piece = Words(words.text[start:end], [(a - start, b - start) for a, b in words.spans[first:last]], start)
        out.append((piece, at - first, min(at + step, n) - first))
    return out


def _spans(words: Words, tags: list[int], kinds: list[str]) -> list[tuple[int, Span]]:
    """The tagged spans, each with the number of its first word."""
    out: list[tuple[int, Span]] = []
    for i, tag in enumerate(tags):
        if not tag:
            continue
        (start, end), kind = words.spans[i], kinds[(tag - 1) // 2]
        if tag % 2 == 0 and out and out[-1][1].kind == kind and i and tags[i - 1]:
            first, before = out[-1]
            out[-1] = first, Span(before.start, end + words.shift, kind)
        else:
            out.append((i, Span(start + words.shift, end + words.shift, kind)))
    return out
