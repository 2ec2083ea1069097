"""Full fine-tuning: all weights of the base learn. The expert is a model of its own, not a part beside others.

Notable: the weights that learn are float32 masters; each forward casts them to the base's precision, and the
gradients come back in float32 (Micikevicius et al. 2018, mixed precision).
"""

from dataclasses import dataclass

from coterie.experts.expert import Applied, Expert
from coterie.model.decoder import Decoder


@dataclass(frozen=True)
class FullConfig:
    """Nothing to set."""

    kind: str = "full"


def fresh(config: FullConfig, decoder: Decoder) -> Expert:
    """A copy of the base's weights, by the decoder's names."""
    return Expert(config, {name: w.float().cpu().clone() for name, w in decoder.weights.items()})


def apply(expert: Expert, decoder: Decoder, training: bool = False) -> Applied:
    """A decoder of the expert's weights, differentiable."""
    weights = {name: w.to(decoder.device, decoder.dtype) for name, w in expert.weights.items()}
    return Applied(decoder=Decoder(decoder.config, weights))
