"""A peer of benchmarks/serving.py: llama.cpp's server (wheel xllamacpp), with 16 or 64 slots.

Run by serving.py in a process of its own: `llama_cpp.py GGUF THREADS VARIANT [LORAS]`, where LORAS is a folder of GGUF
adapters named as the experts; without it the base model answers everything. Jobs on stdin, see common.take_jobs.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xllamacpp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import peak_mib, take_jobs

CONTEXT = 512  # tokens for each slot
FLASH = xllamacpp.llama_flash_attn_type
VARIANTS = {  # flash attention, one cache for all slots, slots
    "flash attention": (FLASH.LLAMA_FLASH_ATTN_TYPE_ENABLED, False, 16),
    "no flash attention": (FLASH.LLAMA_FLASH_ATTN_TYPE_DISABLED, False, 16),
    "flash attention, one cache": (FLASH.LLAMA_FLASH_ATTN_TYPE_ENABLED, True, 16),
    "flash attention, 64 slots": (FLASH.LLAMA_FLASH_ATTN_TYPE_ENABLED, False, 64),
}


def start(gguf: str, threads: int, variant: str, loras: list[Path]) -> xllamacpp.Server:
    """The server, loaded; no adapter is on but where a request asks for it."""
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.flash_attn_type, params.kv_unified, params.n_parallel = VARIANTS[variant]
    params.n_ctx = params.n_parallel * CONTEXT
    params.cont_batching = True
    if loras:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), 1.0) for file in loras]
        params.lora_init_without_apply = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    return xllamacpp.Server(params)


def main(gguf: str, threads: str, variant: str, folder: str = "") -> None:
    loras = sorted(Path(folder).glob("*.gguf")) if folder else []
    server = start(gguf, int(threads), variant, loras)
    place = {file.stem: n for n, file in enumerate(loras)}

    def one(request: dict[str, Any], tokens: int, began: float) -> tuple[float, int]:
        """Seconds to the first token, and how many came."""
        first, last = 0.0, {}

        def take(chunk: dict[str, Any]) -> bool:
            nonlocal first, last
            first, last = first or time.perf_counter() - began, chunk
            return False

        wish = {"prompt": request["prompt"], "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        if request["expert"] in place:
            wish["lora"] = [{"id": place[request["expert"]], "scale": 1.0}]
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
    main(*sys.argv[1:5])
