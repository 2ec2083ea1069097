"""Learning to choose: of an answer that is one of some choices, only the tokens that decide between them are learned.

Notable: constrained decoding lets an expert with choices say nothing else, so this is the loss of what it will be
asked: the cross-entropy over the tokens that may come next. Where one choice is left, every token leads to it: there is
nothing to learn, and the row ends before it. So no arithmetic goes into the other 49,000 scores of a place, and no
weight into learning to spell what the constraint spells.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.data.encode import TokenSet
from coterie.model.constrain import Constraint, Grammars, choices
from coterie.model.load import BaseModel


@dataclass(frozen=True)
class Decisions:
    """Rows cut after their last decision, with only decisions marked; and what may come at each.

    `nodes` (tokens of `data`) says for a marked token which row of `allowed` (nodes, C) tells the tokens that may stand
    there; these are among `tokens` (C).
    """

    data: TokenSet
    nodes: NDArray[np.int32]
    tokens: Tensor
    allowed: Tensor

    def of(self, rows: Sequence[int]) -> Tensor:
        """The nodes of the marked tokens of these rows, in their order."""
        ends = self.data.ends
        spans = [slice(ends[i], ends[i + 1]) for i in rows]
        found = np.concatenate([self.nodes[span][self.data.learn[span]] for span in spans])
        return torch.from_numpy(found.astype(np.int64))


def decisions(base: BaseModel, data: TokenSet, options: Sequence[str]) -> Decisions | None:
    """The decisions in the answers of `data`; None where one is none of `options`, or nothing is to be decided."""
    grammars, constraint = Grammars(base), choices(options)
    permitted = list[NDArray[np.int64]]()  # tokens that may stand at each node
    tree = dict[tuple[int, ...], int]()  # by what was said: the node, -1 where there is nothing to choose
    kept, marks, nodes, ends = list[NDArray[np.int32]](), list[NDArray[np.bool_]](), list[NDArray[np.int32]](), [0]
    for i in range(len(data)):
        tokens, learn = data.row(i)
        node, last = np.full(len(tokens), -1, np.int32), 0
        for start, end in _runs(learn):
            for at in range(start, end):
                said = tuple(tokens[start:at].tolist())
                if said not in tree:
                    following = _following(base, grammars, constraint, options, said)
                    tree[said] = -1
                    if len(following) > 1:
                        tree[said] = len(permitted)
                        permitted.append(following)
                if tree[said] < 0:
                    continue
                if tokens[at] not in permitted[tree[said]]:
                    return None
                node[at], last = tree[said], at + 1
            if base.tokenizer.decode(tokens[start:end].tolist()) not in options:
                return None
        cut = last or len(tokens)
        kept.append(tokens[:cut])
        nodes.append(node[:cut])
        marks.append(node[:cut] >= 0)
        ends.append(ends[-1] + cut)
    if not permitted:
        return None
    union = np.unique(np.concatenate(permitted))
    allowed = np.stack([np.isin(union, p) for p in permitted])
    cut_data = TokenSet(np.concatenate(kept), np.concatenate(marks), np.array(ends))
    return Decisions(cut_data, np.concatenate(nodes), torch.from_numpy(union), torch.from_numpy(allowed))


def _runs(learn: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where marked stretches begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learn.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _following(
    base: BaseModel, grammars: Grammars, constraint: Constraint, options: Sequence[str], said: tuple[int, ...]
) -> NDArray[np.int64]:
    """The tokens that may follow what was `said` of an answer; none where that leaves a single choice."""
    none: NDArray[np.int64] = np.zeros(0, np.int64)
    text = base.tokenizer.decode(list(said), skip_special_tokens=False)
    if sum(option.startswith(text) for option in options) < 2:
        return none
    matcher = grammars.matcher(constraint)
    if not matcher.consume_tokens(list(said)):
        return none
    scores = torch.zeros(base.decoder.config.vocab)
    grammars.mask(matcher, scores)
    return np.flatnonzero(scores.numpy() == 0)
