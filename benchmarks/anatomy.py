"""How far `coterie anatomy`'s estimated speeds are from measured ones, on this machine, with the default model.

    python benchmarks/anatomy.py [--quick] [--json]       about a minute

Decoding steps at 256 tokens in the cache, 1 and 16 sequences at once, and one prompt of 256 tokens, by the decoder
alone (no sampling, no HTTP). `measured_over_estimate` is 1 where the estimate is right.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
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
    for case in cases:
        case["measured_over_estimate"] = round(case["measured"] / case["estimate"], 2)
    result = {"benchmark": "anatomy", "dtype": dtype, "flops": here.flops, "bandwidth": here.bandwidth, "cases": cases}
    if args.json:
        print(json.dumps(result))
        return
    print(f"here: {here.flops / 1e12:.2f} TFLOPs/s in bfloat16, {here.bandwidth / 1e9:.1f} GB/s")
    for case in cases:
        print("{what:16} measured {measured:8.1f} tokens/s, estimate {estimate:8.1f}: {measured_over_estimate:.2f}"
              .format(**case))  # fmt: skip


if __name__ == "__main__":
    main()
