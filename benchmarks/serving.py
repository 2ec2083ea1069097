"""Generated tokens per second with 1, 4 and 16 requests at once, spread over the base and 4 LoRA experts.

Coterie's engine against llama.cpp (the same GGUF, base model only) and against transformers with PEFT adapters.
The same prompts, each answer exactly as long as asked; each side in a process of its own, loaded once, and all take
turns on the same job. Of a peer's settings (VARIANTS in peers/) the one that is fastest with 16 requests is compared.
Ratio: `mixed16_vs_best_peer`, our tokens per second with 16 mixed requests over the faster peer's.
"""

import asyncio
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import httpx
import torch
import uvicorn

from coterie.answer import Answerer
from coterie.business import Business
from coterie.data.read import read
from coterie.engine.request import Sampling
from coterie.experts import lora as loras
from coterie.experts.expert import Expert
from coterie.experts.library import ExpertFacts, Library
from coterie.model.load import load
from coterie.model.pull import DEFAULT, pull
from coterie.web.app import create_app

PEERS = Path(__file__).parent / "peers"
LEVELS = (1, 4, 16)
EXPERTS = ("", "billing", "cards", "loans", "travel")  # the first is the base model
COLUMNS = {"prompt": "text", "completion": "category"}
Job = dict[str, Any]  # "requests": each with prompt (ids), text, expert ("" for the base); "tokens" to generate


def make_business(folder: Path) -> None:
    """A business with four experts. Their weights are random: what they cost does not depend on values."""
    base = load(pull(DEFAULT))
    (folder / "coterie.toml").write_text(f'[business]\nname = "Benchmark"\nbase = "{pull(DEFAULT)}"\nqueue = 256\n')
    (folder / "adapters").mkdir()
    for seed, name in enumerate(EXPERTS[1:]):
        lora = loras.fresh(loras.LoraConfig(), base.decoder, seed)
        generator = torch.Generator().manual_seed(seed)
        for key, weight in lora.weights.items():
            if ".lora_B." in key:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.01)

        def fill(target: Path, lora: Expert = lora) -> None:
            loras.save(lora, target, DEFAULT, base.decoder.config)

        Library(folder / "experts").publish(ExpertFacts(name), fill)
        (folder / "adapters" / name).mkdir()
        fill(folder / "adapters" / name)


def our_side(folder: str, threads: str) -> None:
    """Coterie's engine through its Python interface, and the same engine over HTTP for jobs that give a port."""
    torch.set_num_threads(int(threads))
    opened = Business.open(Path(folder))
    endless = replace(opened.base(), eos=frozenset())  # every answer runs to the length asked for
    business = Business(opened.folder, opened.config, endless)
    engine = business.engine()
    config = uvicorn.Config(create_app(Answerer(business, engine)), port=0, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    port = serve_in_thread(server)

    def work(job: Job) -> dict[str, Any]:
        if job.get("address"):
            return {"port": port}
        began = time.monotonic()
        sampling = Sampling(max_tokens=job["tokens"])
        running = [
            engine.submit(r["prompt"], sampling, (r["expert"], 1) if r["expert"] else None) for r in job["requests"]
        ]
        for generation in running:
            generation.text()
        seconds = time.monotonic() - began
        return {
            "seconds": seconds, "tokens": sum(len(g.generated) for g in running),
            "first": [(g.first_at or 0) - began for g in running], "peak_mib": common.peak_mib(),
        }  # fmt: skip

    common.take_jobs(work)
    server.should_exit = True
    engine.close()


def serve_in_thread(server: uvicorn.Server) -> int:
    """Start `server` on a free port, and give the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    port: int = listener.getsockname()[1]
    return port


async def over_http(port: int, job: Job) -> dict[str, Any]:
    """The same job through the HTTP API, streamed."""

    async def one(client: httpx.AsyncClient, request: Job) -> float:
        body = {"model": request["expert"] or "base", "prompt": request["text"], "max_tokens": job["tokens"]}
        first = 0.0
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter() - began
        return first

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
        began = time.perf_counter()
        first = await asyncio.gather(*(one(client, request) for request in job["requests"]))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": job["tokens"] * len(first), "first": first, "peak_mib": 0.0}


def jobs(tokens: int) -> Iterator[dict[int, Job]]:
    """Round after round, one job for each level, of prompts that no job before had."""
    base = load(pull(DEFAULT))
    texts = (example.prompt for example in read(common.need_data("banking77/train.csv"), COLUMNS, ""))
    while True:
        found: dict[int, Job] = {}
        for level in LEVELS:
            requests = []
            for i in range(level):
                text = base.chat(next(texts))
                expert = EXPERTS[(i + 1) % len(EXPERTS)]  # a request alone asks an expert, the harder case for us
                requests.append({"prompt": base.encode(text), "text": text, "expert": expert})
            found[level] = {"requests": requests, "tokens": tokens}
        yield found


def fastest(commands: dict[str, list[str]], job: Job, threads: int) -> tuple[str, dict[str, float]]:
    """The variant of a peer that gives most tokens a second on `job`, and what each gave."""
    pace = {}
    for name, command in commands.items():
        side = common.Side(command, threads)
        side.ask(job | {"tokens": 8})  # warms up
        found = side.ask(job)
        pace[name] = found["tokens"] / found["seconds"]
        side.close()
    return max(pace, key=lambda name: pace[name]), pace


def main() -> None:
    args = common.options(__doc__ or "").parse_args()
    common.need_packages("transformers", "peft", "xllamacpp")
    common.need_data("banking77/train.csv")
    from peers import llama_cpp, peft_generate

    tokens, rounds = (24, 1) if args.quick else (48, 3)
    report = common.Report("Generation: benchmarks/serving.py")
    work = jobs(tokens)
    with tempfile.TemporaryDirectory() as scratch:
        folder, model = Path(scratch), pull(DEFAULT)
        make_business(folder)
        common.hugging_face_copy(model, folder / "base")
        ours, threads = "Coterie", str(args.threads)
        gguf = str(next(model.glob("*.gguf"), "")) or common.skip(f"{model} holds no GGUF for llama.cpp")
        variants = {
            "llama.cpp": {v: [str(PEERS / "llama_cpp.py"), str(gguf), threads, v] for v in llama_cpp.VARIANTS},
            "PEFT": {
                v: [str(PEERS / "peft_generate.py"), str(folder / "base"), str(folder / "adapters"), threads, v]
                for v in peft_generate.VARIANTS
            },
        }
        sides = {ours: common.Side([__file__, "--side", scratch, threads], args.threads)}
        for peer, commands in variants.items():
            trials = dict(list(commands.items())[:1]) if args.quick else commands
            best, pace = fastest(trials, next(work)[16], args.threads)
            report.figures |= {f"{peer}, {name}, trial tokens/s": value for name, value in pace.items()}
            sides[f"{peer}, {best}"] = common.Side(commands[best], args.threads)
        port = sides[ours].ask({"address": True})["port"]
        for side in sides.values():
            for job in next(work).values():
                side.ask(job | {"tokens": 8})  # warms up
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for _ in range(rounds):
            for level, job in next(work).items():
                for name, side in sides.items():
                    found.setdefault((name, level), []).append(side.ask(job))
                alike = [request | {"expert": ""} for request in job["requests"]]
                found.setdefault((f"{ours}, base only", level), []).append(sides[ours].ask(job | {"requests": alike}))
                found.setdefault((f"{ours}, over HTTP", level), []).append(asyncio.run(over_http(port, job)))
        for side in sides.values():
            side.close()
    tell(report, found, tokens, rounds, args.threads)
    common.finish(report, args)


def tell(
    report: common.Report, found: dict[tuple[str, int], list[dict[str, Any]]], tokens: int, rounds: int, threads: int
) -> None:
    """Medians into the report's table, figures and ratios."""
    names = list(dict.fromkeys(name for name, _ in found))
    pace = {key: statistics.median(run["tokens"] / run["seconds"] for run in runs) for key, runs in found.items()}
    first = {key: statistics.median(t for run in runs for t in run["first"]) for key, runs in found.items()}
    peaks = {name: max(run["peak_mib"] for run in found[name, LEVELS[-1]]) for name in names}
    for name in names:
        for level in LEVELS:
            report.figures |= {
                f"{name}, {level} at once, tokens/s": pace[name, level],
                f"{name}, {level} at once, first token p50 ms": first[name, level] * 1e3,
            }
        report.figures |= {f"{name}, peak MiB": peaks[name]} if peaks[name] else {}
    peers = [name for name in names if not name.startswith("Coterie")]
    for level in LEVELS:
        best = max(pace[name, level] for name in peers)
        report.ratios[f"mixed{level}_vs_best_peer"] = pace["Coterie", level] / best
    report.say(
        f"{', '.join(map(str, LEVELS))} requests at once, spread over the base and 4 LoRA experts: prompts of "
        f"Banking77 in the chat template, {tokens} tokens generated for each, {threads} threads. Medians of "
        f"{rounds} rounds; in each, all sides do the same job in turn. llama.cpp serves the base model only, from the "
        "same GGUF (4-bit weights); Coterie computes in bfloat16 where the processor has it. Over HTTP: streamed, the "
        "client on the same cores."
    )
    head = ["", *(f"{level} at once" for level in LEVELS)]
    paces = [[name, *(pace[name, level] for level in LEVELS), peaks[name] or "as above"] for name in names]
    report.table("Tokens per second", [*head, "peak MiB"], paces)
    report.table(
        "Time to the first token, p50, ms", head, [[name, *(first[name, n] * 1e3 for n in LEVELS)] for name in names]
    )
    report.say(
        f"With 16 mixed requests Coterie generates {report.ratios['mixed16_vs_best_peer']:.2f} times the tokens of the "
        "faster peer (`mixed16_vs_best_peer`)."
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        our_side(*sys.argv[2:4])
    else:
        main()
