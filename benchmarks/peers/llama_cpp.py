"""A peer of benchmarks/serving.py: llama.cpp's server (wheel xllamacpp), base model only, 16 slots.

Run by serving.py in a process of its own: `llama_cpp.py GGUF THREADS VARIANT`; jobs on stdin, see common.take_jobs.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xllamacpp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import peak_mib, take_jobs

SLOTS, CONTEXT = 16, 512  # as many as requests, and tokens for each
FLASH = xllamacpp.llama_flash_attn_type
VARIANTS = {  # flash attention, and one cache for all slots
    "no flash attention": (FLASH.LLAMA_FLASH_ATTN_TYPE_DISABLED, False),
    "flash attention": (FLASH.LLAMA_FLASH_ATTN_TYPE_ENABLED, False),
    "flash attention, one cache": (FLASH.LLAMA_FLASH_ATTN_TYPE_ENABLED, True),
}


def start(gguf: str, threads: int, variant: str) -> xllamacpp.Server:
    """The server, loaded."""
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_parallel, params.n_ctx = SLOTS, SLOTS * CONTEXT
    params.flash_attn_type, params.kv_unified = VARIANTS[variant]
    params.cont_batching = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    return xllamacpp.Server(params)


def main(gguf: str, threads: str, variant: str) -> None:
    server = start(gguf, int(threads), variant)

    def one(request: dict[str, Any], tokens: int, began: float) -> tuple[float, int]:
        """Seconds to the first token, and how many came."""
        first, last = 0.0, {}

        def take(chunk: dict[str, Any]) -> bool:
            nonlocal first, last
            first, last = first or time.perf_counter() - began, chunk
            return False

        wish = {"prompt": request["prompt"], "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        server.handle_completions(wish, take)
        return first, last["usage"]["completion_tokens"]

    def work(job: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        with ThreadPoolExecutor(len(job["requests"])) as pool:
            done = list(pool.map(lambda request: one(request, job["tokens"], began), job["requests"]))
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds, "tokens": sum(n for _, n in done), "first": [first for first, _ in done],
            "peak_mib": peak_mib(),
        }  # fmt: skip

    take_jobs(work)


if __name__ == "__main__":
    main(*sys.argv[1:4])
