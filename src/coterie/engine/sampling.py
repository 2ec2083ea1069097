"""Choose a token from its scores: greedy, or by temperature, top-k and top-p (Holtzman et al. 2019)."""

import numpy as np
import torch
from torch import Tensor

from coterie.engine.request import Sampling

SHORTLIST = 256
COLDEST = 1e-6  # colder would overflow; and this already leaves only tokens that lie within rounding of the best


def sample(scores: Tensor, sampling: Sampling, rng: np.random.Generator) -> int:
    """One token id from scores (vocab), float32. `rng` is drawn from once, unless the choice is greedy."""
    if sampling.temperature == 0:
        return int(scores.argmax())
    probs = torch.softmax((scores - scores.max()) / max(sampling.temperature, COLDEST), dim=-1)
    if sampling.top_k:
        top, ids = probs.topk(min(sampling.top_k, len(probs)))
        top = top / top.sum()
    elif sampling.top_p == 1:
        top, ids = probs, torch.arange(len(probs))
    else:
        # Sorting 49,152 numbers costs more than the model's own step; the head of the list nearly always suffices.
        top, ids = probs.topk(min(SHORTLIST, len(probs)))
        if float(top.sum()) < sampling.top_p:
            top, ids = probs.sort(descending=True)
    if sampling.top_p < 1:
        before = top.cumsum(0) - top
        keep = int((before < sampling.top_p).sum())  # the token that crosses top_p stays in
        top, ids = top[:keep], ids[:keep]
    cumulative = top.double().cumsum(0)
    drawn = rng.random() * float(cumulative[-1])
    place = int(torch.searchsorted(cumulative, torch.tensor(drawn, device=cumulative.device), right=True))
    return int(ids[min(place, len(ids) - 1)])
