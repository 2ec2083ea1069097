"""Generated tokens per second with 1, 4, 16 and 64 requests at once, spread over the base and 4 LoRA experts.

Coterie's engine against llama.cpp (the same GGUF: base model only, with a LoRA for each request, and in Coterie's own
precision), transformers with PEFT adapters, and vLLM's CPU build with LoRA where $COTERIE_VLLM names the Python of an
environment that has it. The same prompts, each answer exactly as long as asked; each side in a process of its own,
loaded once, and all take turns on the same job. Of a peer's settings (VARIANTS in peers/) the one that is fastest with
16 requests is compared. Ratios:
- `mixed1|4|16|64_vs_best_peer`: our tokens per second with mixed requests over the best of all peers, llama.cpp with
  the base model alone and 4-bit weights included;
- `mixed16_vs_best_lora_peer`: the same over the best of those that serve the experts too;
- `mixed_vs_base`: with 16 requests, mixed over base only;
- `lora16|64_by_1|4|16|64_vs_best_peer`: 16 or 64 requests over so many LoRA experts, over the best peer with them;
- `single_vs_llamacpp`: one request to the base, nothing guessed, over llama.cpp with weights in bfloat16 too.
"""

import asyncio
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import httpx
import torch
import uvicorn

from coterie.answer import Answerer
from coterie.business import Business
from coterie.data.read import read
from coterie.engine import engine as engines
from coterie.engine.request import Sampling
from coterie.experts import adapter, prefix, prompt
from coterie.experts import lora as loras
from coterie.experts.adapter import BottleneckConfig
from coterie.experts.expert import Expert
from coterie.experts.kinds import save
from coterie.experts.library import ExpertFacts, Library
from coterie.experts.prefix import PrefixConfig
from coterie.experts.prompt import PromptConfig
from coterie.model.export import write_gguf, write_gguf_lora
from coterie.model.load import load
from coterie.model.pull import DEFAULT, pull
from coterie.web.app import create_app

PEERS = Path(__file__).parent / "peers"
LEVELS = (1, 4, 16, 64)
EXPERTS = ("", "billing", "cards", "loans", "travel")  # the first is the base model
MANY = 64  # more experts: so many LoRAs, and so many of mixed kinds
SPREADS = tuple((level, experts) for level in (16, 64) for experts in (1, 4, 16, 64) if experts <= level)
KINDS = (loras.LoraConfig(), loras.LoraConfig(8, 16), BottleneckConfig(), PromptConfig(), PrefixConfig())
COLUMNS = {"prompt": "text", "completion": "category"}
OURS, LLAMA = "Coterie", "llama.cpp"
Found = dict[tuple[str, int | tuple[int, int]], list[dict[str, Any]]]  # of a side at a level, or one of SPREADS
Figures = dict[tuple[str, int | tuple[int, int]], float]
Job = dict[str, Any]  # "requests": each with prompt (ids), text, expert ("" for the base); "tokens" to generate


def make_business(folder: Path, loras_too: bool) -> None:
    """A business with four experts and many of mixed kinds, with `loras_too` as many LoRAs. Their weights are random:
    what they cost does not depend on values."""
    base = load(pull(DEFAULT))
    (folder / "coterie.toml").write_text(
        f'[business]\nname = "Benchmark"\nbase = "{pull(DEFAULT)}"\nqueue = 256\nslots = 64\n'
    )
    several, many = EXPERTS[1:], tuple(f"lora{n}" for n in range(MANY if loras_too else 0))
    for seed, name in enumerate((*several, *many)):
        peers = folder / ("several" if name in several else "many")  # what the peers load
        lora = loras.fresh(loras.LoraConfig(), base.decoder, seed)
        generator = torch.Generator().manual_seed(seed)
        for key, weight in lora.weights.items():
            if ".lora_B." in key:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.01)

        def fill(target: Path, lora: Expert = lora) -> None:
            loras.save(lora, target, DEFAULT, base.decoder.config)

        Library(folder / "experts").publish(ExpertFacts(name), fill)
        (peers / "peft" / name).mkdir(parents=True)
        fill(peers / "peft" / name)
        (peers / "gguf").mkdir(exist_ok=True)
        write_gguf_lora(base, lora.weights, lora.config.alpha, peers / "gguf" / f"{name}.gguf")
    for n in range(MANY):
        config = KINDS[n % len(KINDS)]
        module = {"lora": loras, "adapter": adapter, "prompt": prompt, "prefix": prefix}[config.kind]
        start = n if config.kind in ("lora", "adapter") else base.encode("Answer the customer of the bank.")
        expert = module.fresh(config, base.decoder, start)
        for weight in expert.weights.values():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(n)) * 0.01)
        Library(folder / "experts").publish(
            ExpertFacts(f"many{n}", config.kind), partial(save, expert, base=DEFAULT, model=base.decoder.config)
        )
    write_gguf(base, folder / "bf16.gguf", "bf16")


def our_side(folder: str, threads: str) -> None:
    """Coterie's engine through its Python interface, and the same engine over HTTP for jobs that give a port."""
    torch.set_num_threads(int(threads))
    opened = Business.open(Path(folder))
    endless = replace(opened.base(), eos=frozenset())  # every answer runs to the length asked for
    business = Business(opened.folder, opened.config, endless)
    engine, guesses = business.engine(), engines.SPECULATED
    config = uvicorn.Config(create_app(Answerer(business, engine)), port=0, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    port = serve_in_thread(server)

    def work(job: Job) -> dict[str, Any]:
        if job.get("address"):
            return {"port": port}
        engines.SPECULATED = 0 if job.get("guess") is False else guesses
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


def spread(job: Job, level: int, experts: int, kind: str) -> Job:
    """`level` requests of a job, spread over the first `experts` of "lora" or of "many", which are of mixed kinds."""
    requests = [request | {"expert": f"{kind}{n % experts}"} for n, request in enumerate(job["requests"][:level])]
    return {"requests": requests, "tokens": job["tokens"] // 2}


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
    parser = common.options(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=3, help="how often all sides take turns")
    args = parser.parse_args()
    common.need_packages("transformers", "peft", "xllamacpp")
    common.need_data("banking77/train.csv")
    from peers import llama_cpp, peft_generate

    tokens, rounds = (24, 1) if args.quick else (48, args.rounds)
    report = common.Report("Generation: benchmarks/serving.py")
    work = jobs(tokens)
    with tempfile.TemporaryDirectory() as scratch:
        folder, model, vllm = Path(scratch), pull(DEFAULT), os.environ.get("COTERIE_VLLM", "")
        make_business(folder, loras_too=not args.quick)
        common.hugging_face_copy(model, folder / "base")
        threads = str(args.threads)
        gguf = str(next(model.glob("*.gguf"), "")) or common.skip(f"{model} holds no GGUF for llama.cpp")
        llama, peft = str(PEERS / "llama_cpp.py"), str(PEERS / "peft_generate.py")

        def variants(adapters: Path) -> dict[str, dict[str, list[str]]]:
            both, gguf_loras = [str(folder / "base"), str(adapters / "peft")], str(adapters / "gguf")
            return {
                LLAMA: {v: [llama, gguf, threads, v] for v in llama_cpp.VARIANTS},
                f"{LLAMA} with LoRA": {v: [llama, gguf, threads, v, gguf_loras] for v in llama_cpp.VARIANTS},
                f"{LLAMA}, bf16": {v: [llama, str(folder / "bf16.gguf"), threads, v] for v in llama_cpp.VARIANTS},
                "PEFT": {v: [peft, *both, threads, v] for v in peft_generate.VARIANTS},
                "vLLM with LoRA": {"": [str(PEERS / "vllm_cpu.py"), *both, threads, common.precision()]},
            }

        def start(peer: str, command: list[str]) -> common.Side:
            if "vLLM" not in peer:
                return common.Side(command, args.threads)
            preload = next(Path(vllm).parents[1].glob("lib/libiomp5.so"))
            return common.Side(command, args.threads, vllm, LD_PRELOAD=str(preload))

        sides = {OURS: common.Side([__file__, "--side", scratch, threads], args.threads)}
        settings: dict[str, str] = {}
        for peer, commands in variants(folder / "several").items():
            if "vLLM" in peer and not vllm:
                report.say("vLLM is not compared: COTERIE_VLLM names no Python that has it (docs/benchmarks.md).")
                continue
            settings[peer] = settings.get(LLAMA, "") if LLAMA in peer else ""  # found once for llama.cpp
            settings[peer] = settings[peer] or next(iter(commands))
            if not args.quick and peer in (LLAMA, "PEFT"):
                settings[peer], pace = fastest(commands, next(work)[16], args.threads)
                report.figures |= {f"{peer}, {name}, trial tokens/s": value for name, value in pace.items()}
            sides[peer] = start(peer, commands[settings[peer]])
        port = sides[OURS].ask({"address": True})["port"]
        for side in sides.values():
            for job in next(work).values():
                side.ask(job | {"tokens": 8})  # warms up
        found: Found = {}

        def note(name: str, level: int | tuple[int, int], run: dict[str, Any]) -> None:
            found.setdefault((name, level), []).append(run)

        for _ in range(rounds):
            for level, job in next(work).items():
                alike = [request | {"expert": ""} for request in job["requests"]]
                many = [request | {"expert": f"many{n % MANY}"} for n, request in enumerate(job["requests"])]
                for name, side in sides.items():
                    note(name, level, side.ask(job))
                note(f"{OURS}, base only", level, sides[OURS].ask(job | {"requests": alike}))
                note(
                    f"{OURS}, base only, no guesses", level, sides[OURS].ask(job | {"requests": alike, "guess": False})
                )
                note(f"{OURS}, an expert each, of 5 kinds", level, sides[OURS].ask(job | {"requests": many}))
                note(f"{OURS}, over HTTP", level, asyncio.run(over_http(port, job)))
        for name in settings:
            sides.pop(name).close()
        if not args.quick:  # the peers once more, with all LoRAs loaded
            servers = [peer for peer in settings if "LoRA" in peer or peer == "PEFT"]
            sides |= {peer: start(peer, variants(folder / "many")[peer][settings[peer]]) for peer in servers}
            for side in sides.values():  # warms up: all have their experts in memory
                side.ask(spread(next(work)[64], 64, MANY, "lora") | {"tokens": 8})
            sides[OURS].ask(spread(next(work)[64], 64, MANY, "many") | {"tokens": 8})
            for level, experts in SPREADS:
                job = next(work)[64]
                for name, side in sides.items():
                    note(name, (level, experts), side.ask(spread(job, level, experts, "lora")))
                note(f"{OURS}, of 5 kinds", (level, experts), sides[OURS].ask(spread(job, level, experts, "many")))
        for side in sides.values():
            side.close()
    report.say("Settings of the peers: " + "; ".join(f"{k}: {v}" for k, v in settings.items() if v) + ".")
    tell(report, found, tokens, rounds, args.threads)
    common.finish(report, args)


def tell(report: common.Report, found: Found, tokens: int, rounds: int, threads: int) -> None:
    """Medians into the report's table, figures and ratios."""
    names = list(dict.fromkeys(name for name, level in found if isinstance(level, int)))
    pace = {key: statistics.median(run["tokens"] / run["seconds"] for run in runs) for key, runs in found.items()}
    waits = {key: [t * 1e3 for run in runs for t in run["first"]] for key, runs in found.items()}  # ms
    first = {key: statistics.median(ms) for key, ms in waits.items()}
    last = {key: sorted(ms)[int(0.99 * len(ms))] for key, ms in waits.items()}
    peaks = {name: max(run["peak_mib"] for run in found[name, LEVELS[-1]]) for name in names}
    for name in names:
        for level in LEVELS:
            report.figures |= {
                f"{name}, {level} at once, tokens/s": pace[name, level],
                f"{name}, {level} at once, first token p50 ms": first[name, level],
                f"{name}, {level} at once, first token p99 ms": last[name, level],
            }
        report.figures |= {f"{name}, peak MiB": peaks[name]} if peaks[name] else {}
    peers = [name for name in names if not name.startswith(OURS)]
    for level in LEVELS:
        best = max(pace[name, level] for name in peers)
        report.ratios[f"mixed{level}_vs_best_peer"] = pace[OURS, level] / best
    with_lora = max(pace[name, 16] for name in peers if "LoRA" in name or name == "PEFT")
    report.ratios |= {
        "mixed16_vs_best_lora_peer": pace[OURS, 16] / with_lora,
        "mixed_vs_base": pace[OURS, 16] / pace[f"{OURS}, base only", 16],
        "single_vs_llamacpp": pace[f"{OURS}, base only, no guesses", 1] / pace[f"{LLAMA}, bf16", 1],
    }
    report.say(
        f"{', '.join(map(str, LEVELS))} requests at once, spread over the base and 4 LoRA experts of rank 16: prompts "
        f"of Banking77 in the chat template, {tokens} tokens generated for each, {threads} threads. Medians of "
        f"{rounds} rounds; in each, all sides do the same job in turn. llama.cpp computes from the same GGUF (4-bit "
        "weights), the base model for every request but where LoRA is said; Coterie, PEFT and vLLM in "
        f"{common.precision()}. "
        "Guesses: while few requests run, Coterie looks tokens up in what was said before, and the model checks them. "
        "Over HTTP: streamed, the client on the same cores."
    )
    head = ["", *(f"{level} at once" for level in LEVELS)]
    paces = [[name, *(pace[name, level] for level in LEVELS), peaks[name] or "as above"] for name in names]
    report.table("Tokens per second", [*head, "peak MiB"], paces)
    for share, ms in (("p50", first), ("p99", last)):
        rows = [[name, *(ms[name, n] for n in LEVELS)] for name in names]
        report.table(f"Time to the first token, {share}, ms", [share, *head[1:]], rows)
    report.say(
        f"With 16 mixed requests Coterie generates {report.ratios['mixed16_vs_best_peer']:.2f} times the tokens of the "
        "faster peer (`mixed16_vs_best_peer`)."
    )
    if (OURS, SPREADS[0]) in found:
        full = {name: max(run["peak_mib"] for run in runs) for (name, level), runs in found.items() if level in SPREADS}
        tell_spreads(report, pace, {"p50": first, "p99": last}, full)


def tell_spreads(report: common.Report, pace: Figures, waits: dict[str, Figures], peaks: dict[str, float]) -> None:
    """How the number of experts in a batch counts. waits: by share, as in "p50"; peaks: by name."""
    names = list(dict.fromkeys(name for name, level in pace if level in SPREADS))
    for spot in SPREADS:
        best = max(pace[name, spot] for name in names if not name.startswith(OURS))
        report.ratios[f"lora{spot[0]}_by_{spot[1]}_vs_best_peer"] = pace[OURS, spot] / best
        report.figures |= {
            f"{name}, {spot[0]} at once, {spot[1]} experts, tokens/s": pace[name, spot] for name in names
        }
    report.say(
        f"All requests to experts, {MANY} LoRAs of rank 16 known to each side, one round; of 5 kinds: LoRA of rank 16 "
        "and 8, bottleneck adapter, soft prompt, prefix."
    )
    head = ["", *(f"{level} over {experts}" for level, experts in SPREADS)]
    report.table("Tokens per second, requests over experts", head, [[n, *(pace[n, s] for s in SPREADS)] for n in names])
    for share, ms in waits.items():
        rows = [[name, *(ms[name, spot] for spot in SPREADS)] for name in names]
        report.table(f"Time to the first token, {share}, ms, requests over experts", [share, *head[1:]], rows)
    report.table(f"Memory with {MANY} experts", ["", "peak MiB"], [[name, peaks[name]] for name in names])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        our_side(*sys.argv[2:4])
    else:
        main()
