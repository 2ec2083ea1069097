"""The engine's step by PyTorch: on a GPU, and on processors where the one in C (step.py) does not run.

What goes in and comes out, the cache and its pages are the same; only bits may differ from batch to batch, as they do
wherever products of other shapes sum in another order. On a GPU, steps of next tokens are replayed (graphs.py).
"""

from itertools import pairwise

import torch
from torch import Tensor

from coterie.engine.graphs import Graphs
from coterie.engine.pages import Pages
from coterie.experts.expert import Expert
from coterie.experts.mixture import Gates, Groups, Laid, lay, mixed
from coterie.model.decoder import Decoder


def replays(decoder: Decoder) -> bool:
    """Whether steps of next tokens are captured: where launching kernels takes longer than they do."""
    return decoder.device.type == "cuda"


class TorchStep:
    """The step of one base model."""

    in8 = 0  # bytes of matrices that are held in 8 bits

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.graphs = Graphs(decoder) if replays(decoder) else None

    def prepare(self, expert: Expert) -> Laid:
        """`expert` as `run` wants it."""
        return lay(expert, self.decoder)

    def run(
        self, embedded: Tensor, positions: Tensor, slots: Tensor, cache: Pages,
        groups: Groups, wanted: Tensor, starts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As Step.run: scores (wanted, vocab) in float32 after the rows `wanted`. All but `embedded` is on the CPU."""
        starts = torch.zeros_like(positions) if starts is None else starts
        if self.graphs and self.graphs.takes(slots, starts, groups):
            scores = self.graphs.run(embedded, positions, slots, cache, groups)
            return scores[wanted.to(scores.device)]
        hidden = self.hidden(embedded, positions, slots, cache, groups, starts)
        return self.decoder.logits(hidden[wanted.to(hidden.device)])

    def hidden(
        self, embedded: Tensor, positions: Tensor, slots: Tensor, cache: Pages, groups: Groups, starts: Tensor,
        gates: Gates | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states (rows, width), normed for `logits`. `gates` may put other shares in place of the groups'."""
        layers, device, stream = self.decoder.config.layers, self.decoder.device, embedded.clone()
        kept, begun = cache.streams.flatten(0, 1), 0
        for first, end in pairwise(sorted({0, layers, *cache.cuts, *starts.tolist()})):
            rows = int((starts <= first).sum())
            if first and rows > begun:
                places = cache.stream(first, slots[begun:rows], positions[begun:rows])[1]
                stream[begun:rows] = kept[places].to(stream.dtype)
            begun = rows
            if not rows:
                continue
            change = mixed([(e, at, min(n, rows - at), s) for e, at, n, s in groups if at < rows], self.decoder, gates)
            attend = cache.attend(slots[:rows], positions[:rows])
            stream[:rows] = self.decoder.run(
                stream[:rows], positions[:rows].to(device), attend, change, range(first, end)
            )
            if end < layers:
                mine, places = cache.stream(end, slots[:rows], positions[:rows])
                kept[places] = stream[mine].float()
        return self.decoder.finish(stream)
