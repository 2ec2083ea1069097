"""What training minimises: the loss of completions, or of preferences between two answers."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from coterie.data.encode import TokenSet
from coterie.experts.expert import Applied, Expert
from coterie.experts.kinds import apply
from coterie.model.decoder import Decoder
from coterie.tuning.decisions import Decisions
from coterie.tuning.forward import Row, completion_loss, row_losses
from coterie.tuning.trunk import Trunk

Loss = Callable[[Applied, list[int]], tuple[Tensor, int]]  # of rows by number: the summed loss, and over how many


def _rows(data: TokenSet, rows: list[int]) -> list[Row]:
    out = []
    for i in rows:
        tokens, marks = data.row(i)
        out.append((torch.from_numpy(np.array(tokens)), torch.from_numpy(np.array(marks))))
    return out


def completions(decoder: Decoder, data: TokenSet, trunk: Trunk | None = None, decided: Decisions | None = None) -> Loss:
    """Cross-entropy of the completion tokens of `data`, in nats; from the cached trunk where there is one.

    With `decided`, whose rows `data` must be, of the decisions between choices alone, over the tokens that may come.
    """

    def loss(applied: Applied, rows: list[int]) -> tuple[Tensor, int]:
        start, cut = (trunk.start(rows), trunk.cut) if trunk else (None, 0)
        among = None
        if decided:
            among = decided.tokens.to(decoder.device), decided.allowed[decided.of(rows)].to(decoder.device)
        return completion_loss(decoder, applied, _rows(data, rows), start, cut, among)

    return loss


def preferences(decoder: Decoder, data: TokenSet, reference: Expert | None, beta: float = 0.1) -> Loss:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7). Pair i of `data` is rows 2i (chosen), 2i + 1.

    `reference` is the expert that training starts from (None: the base model). Its log-probabilities are computed
    when a pair is first met, and kept.
    """
    known: NDArray[np.float64] = np.full((len(data) // 2, 2), np.nan)
    frozen = apply(reference, decoder) if reference else Applied()

    def loss(applied: Applied, pairs: list[int]) -> tuple[Tensor, int]:
        rows = _rows(data, [row for i in pairs for row in (2 * i, 2 * i + 1)])
        if np.isnan(known[pairs]).any():
            with torch.no_grad():
                known[pairs] = row_losses(decoder, frozen, rows).view(-1, 2).double().cpu().numpy()
        gained = row_losses(decoder, applied, rows).view(-1, 2) - torch.from_numpy(known[pairs]).to(decoder.device)
        return -F.logsigmoid(beta * (gained[:, 0] - gained[:, 1])).sum(), len(pairs)

    return loss
