"""How far `coterie anatomy`'s estimated speeds are from measured ones, on this machine, with the default model.

    python benchmarks/anatomy.py [--quick] [--json] [--record]       about two minutes

What serves is measured, the engine with all that it does between two products: decoding around 256 tokens of context
for 1 and 16 requests at once, and one new prompt of 256 tokens. The decoder in PyTorch alone, which serves where the
step in C cannot run, stands beside it. `measured_over_estimate` is 1 where the estimate is right; the figure of that
name is the geometric mean of the engine's cases. Weights count as the engine holds them, in 8 bits where it does.
`reached` is the share of the hardware's rates that this comes to: what `REACHED` in model/anatomy.py should be.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import common
import numpy as np
import torch

from coterie.engine.by_torch import TorchStep
from coterie.engine.engine import Engine
from coterie.engine.pages import Pages
from coterie.engine.request import Sampling
from coterie.model.anatomy import REACHED, estimate, examine, probe
from coterie.model.decoder import Decoder, attend_packed, packed_positions
from coterie.model.load import load
from coterie.model.pull import pull

CONTEXT, SAID = 256, 64  # tokens in the middle of an answer, and of the answer


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """Median of `rounds`, after one to warm up."""
    work()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


class Served:
    """The engine, asked for answers of a known length."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self._seeds = engine, itertools.count()

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Texts that nobody has sent before."""
        rng = np.random.default_rng(next(self._seeds))
        return [rng.integers(1000, self.engine.base.decoder.config.vocab, length).tolist() for _ in range(count)]

    def answer(self, prompts: list[list[int]], most: int) -> None:
        """All of them at once. Drawn at random, so that no token can be guessed ahead."""
        asked = [self.engine.submit(p, Sampling(most, temperature=1.0, seed=i)) for i, p in enumerate(prompts)]
        for generation in asked:
            generation.text()
            assert len(generation.generated) == most, "nothing ends an answer here"

    def decode(self, batch: int, rounds: int) -> float:
        """Tokens a second of answers whose prompts the cache knows: longer and shorter answers' difference."""
        prompts = self.prompts(batch, CONTEXT - SAID // 2)
        long = seconds(lambda: self.answer(prompts, 1 + SAID), rounds)
        return batch * SAID / (long - seconds(lambda: self.answer(prompts, 1), rounds))

    def prefill(self, rounds: int) -> float:
        """Tokens a second of prompts that are new."""
        return CONTEXT / seconds(lambda: self.answer(self.prompts(1, CONTEXT), 1), rounds)


@torch.inference_mode()
def by_torch(decoder: Decoder, batch: int, rounds: int) -> float:
    """Tokens a second of steps by PyTorch."""
    cache = Pages(decoder.config, batch, CONTEXT, decoder.dtype, 0, decoder.device)
    for slot in range(batch):
        cache.make_room(cache.begin(slot, cache.parts(None, decoder.config.layers), []), slot, CONTEXT)
    step, slots = TorchStep(decoder), torch.arange(batch)
    embedded, at = decoder.embed(torch.zeros(batch, dtype=torch.long)), torch.full((batch,), CONTEXT - 1)
    return batch / seconds(lambda: step.run(embedded, at, slots, cache, [], slots), rounds)


@torch.inference_mode()
def prompt_by_torch(decoder: Decoder, rounds: int) -> float:
    """Tokens a second of prompts read by the decoder in PyTorch."""
    ids, places = torch.zeros(CONTEXT, dtype=torch.long), packed_positions([CONTEXT])
    return CONTEXT / seconds(
        lambda: decoder.logits(decoder.forward(ids, places, attend_packed([CONTEXT]))[-1:]), rounds
    )


def main() -> None:
    args = common.options(__doc__ or "").parse_args()
    torch.set_num_threads(args.threads)
    rounds = 3 if args.quick else 10
    path = pull()
    base, found = load(path, packed=True), examine(path)
    decoder, computed, here = base.decoder, str(base.decoder.dtype).removeprefix("torch."), probe()
    with closing(Engine(replace(base, eos=frozenset()), slots=16, context=2 * CONTEXT)) as engine:
        served = Served(engine)
        dtype = "int8" if engine.step.in8 else computed
        cases = [(f"decode, batch {batch}", served.decode(batch, rounds), by_torch(decoder, batch, 5 * rounds),
                  estimate(found, here, dtype, CONTEXT, batch).decode_tokens_per_s or 0.0)
                 for batch in (1, 16)]  # fmt: skip
        cases.append(("prompt", served.prefill(rounds), prompt_by_torch(decoder, rounds),
                      estimate(found, here, dtype, CONTEXT, 1).prefill_tokens_per_s or 0.0))  # fmt: skip
        way = "PyTorch" if isinstance(engine.step, TorchStep) else f"the step in C, {dtype}"
    again = probe()
    report = common.Report("Estimated and measured speed: benchmarks/anatomy.py")
    over = {what: measured / guess for what, measured, _, guess in cases}
    report.figures = {f"measured_over_estimate, {what}": value for what, value in over.items()}
    report.figures["measured_over_estimate"] = math.exp(statistics.fmean(math.log(v) for v in over.values()))
    report.figures |= {f"reached, {what}": REACHED * value for what, value in over.items()}
    rows = [[what, measured, plain, guess, over[what], REACHED * over[what]] for what, measured, plain, guess in cases]
    head = ["what", f"engine ({way})", "PyTorch alone", "estimate", "engine over estimate", "share of the rates"]
    report.table("Tokens per second", head, rows)
    report.say(f"SmolLM2-135M-Instruct, weights held in {dtype}, {CONTEXT} tokens of context; this machine by its own "
               f"probe: {here.flops / 1e12:.2f} TFLOPs/s in {computed} and {here.bandwidth / 1e9:.1f} GB/s before, "
               f"{again.flops / 1e12:.2f} and {again.bandwidth / 1e9:.1f} after.")  # fmt: skip
    common.finish(report, args)


if __name__ == "__main__":
    main()
