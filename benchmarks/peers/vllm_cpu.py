"""A peer of benchmarks/serving.py: vLLM's CPU build, its LoRA on.

Run by serving.py with the Python of $COTERIE_VLLM, an environment of its own (docs/benchmarks.md says how it is made):
`vllm_cpu.py MODEL EXPERTS THREADS PRECISION`, where EXPERTS holds a folder for each adapter; jobs on stdin, see
common.take_jobs.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

CONTEXT = 512  # tokens of each request, as the other peers


def main(model: str, experts: str, threads: str, dtype: str) -> None:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{int(threads) - 1}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    names = sorted(p.name for p in Path(experts).iterdir())
    engine = LLM(
        model, dtype=dtype, enable_lora=True, max_loras=len(names), max_lora_rank=16, enforce_eager=True,
        max_model_len=CONTEXT, enable_prefix_caching=False, disable_log_stats=False,
    )  # fmt: skip
    loras = {name: LoRARequest(name, n + 1, str(Path(experts) / name)) for n, name in enumerate(names)}

    def work(job: dict[str, Any]) -> dict[str, Any]:
        prompts = [{"prompt_token_ids": request["prompt"]} for request in job["requests"]]
        wish = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=True)
        began = time.perf_counter()
        asked = [loras.get(request["expert"]) for request in job["requests"]]
        found = engine.generate(prompts, wish, use_tqdm=False, lora_request=asked)
        seconds = time.perf_counter() - began
        first = [f.metrics.first_token_latency for f in found if f.metrics]
        return {
            "seconds": seconds, "tokens": sum(len(f.outputs[0].token_ids) for f in found),
            "first": first or [seconds], "peak_mib": peak_mib(),
        }  # fmt: skip

    reset_peak()
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), flush=True)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """As common.peak_mib; this environment lacks what common.py imports."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:5])
