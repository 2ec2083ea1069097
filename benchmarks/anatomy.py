"""How far `coterie anatomy`'s estimated speeds are from measured ones, on this machine, with the default model.

    python benchmarks/anatomy.py [--quick] [--json] [--record]       about a minute

Decoding steps at 256 tokens in the cache, 1 and 16 sequences at once, and one prompt of 256 tokens, by the decoder
alone (no sampling, no HTTP). `measured_over_estimate` is 1 where the estimate is right; the figure of that name is the
geometric mean of the cases.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import torch

from coterie.model.anatomy import estimate, examine, probe
from coterie.model.decoder import KVCache, attend_packed, packed_positions
from coterie.model.load import load
from coterie.model.pull import pull

CONTEXT = 256


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """Median of `rounds`, after one to warm up."""
    work()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


@torch.inference_mode()
def main() -> None:
    args = common.options(__doc__ or "").parse_args()
    torch.set_num_threads(args.threads)
    rounds = 5 if args.quick else 30
    path = pull()
    base, found, here = load(path, packed=True), examine(path), probe()
    decoder, dtype = base.decoder, str(base.decoder.dtype).removeprefix("torch.")
    cases: list[dict[str, Any]] = []
    for batch in (1, 16):
        cache = KVCache(decoder.config, batch, CONTEXT, decoder.dtype, decoder.device)
        ids, slots = torch.zeros(batch, dtype=torch.long), torch.arange(batch)
        at = torch.full((batch,), CONTEXT - 1)

        def step(ids: Any = ids, slots: Any = slots, at: Any = at, cache: Any = cache) -> Any:
            return decoder.logits(decoder.forward(ids, at, cache.attend_decode(slots, at)))

        guess = estimate(found, here, dtype, CONTEXT, batch).decode_tokens_per_s or 0.0
        cases.append({"what": f"decode, batch {batch}", "measured": batch / seconds(step, rounds), "estimate": guess})

    def prefill() -> Any:
        ids, places = torch.zeros(CONTEXT, dtype=torch.long), packed_positions([CONTEXT])
        return decoder.logits(decoder.forward(ids, places, attend_packed([CONTEXT]))[-1:])

    guess = estimate(found, here, dtype, CONTEXT, 1).prefill_tokens_per_s or 0.0
    cases.append({"what": "prompt", "measured": CONTEXT / seconds(prefill, rounds // 3 + 1), "estimate": guess})
    report = common.Report("Estimated and measured speed: benchmarks/anatomy.py")
    over = {case["what"]: case["measured"] / case["estimate"] for case in cases}
    report.figures = {f"measured_over_estimate, {what}": value for what, value in over.items()}
    report.figures["measured_over_estimate"] = math.exp(statistics.fmean(math.log(v) for v in over.values()))
    rows = [[c["what"], c["measured"], c["estimate"], over[c["what"]]] for c in cases]
    report.table("Tokens per second", ["what", "measured", "estimate", "measured over estimate"], rows)
    report.say(f"SmolLM2-135M-Instruct in {dtype}, {CONTEXT} tokens of context; this machine by its own probe: "
               f"{here.flops / 1e12:.2f} TFLOPs/s in bfloat16, {here.bandwidth / 1e9:.1f} GB/s.")  # fmt: skip
    common.finish(report, args)


if __name__ == "__main__":
    main()
