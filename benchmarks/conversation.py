"""Time to the first token in a conversation that changes its expert at each turn, with and without the shared pages.

Every turn brings a customer's question of Banking77 after all that was said; two LoRA experts answer in turns, once as
branches (layers from 15 up, the trunk below is the base's) and once whole. Both engines take each turn one after the
other, the same words, and must say the same. With the cache a branch computes again only its own layers of what the
other expert answered last; a whole expert finds what it has read itself two turns ago.
Ratio `turn_with_cache_vs_without`: time without over time with, median over the turns after the first, of branches.
"""

import statistics
import tempfile
import time
from pathlib import Path

import common
import torch

from coterie.data.read import read
from coterie.engine.engine import CACHE_MEMORY, Engine
from coterie.engine.request import Sampling
from coterie.experts import lora as loras
from coterie.experts.library import ExpertFacts, Library
from coterie.model.load import BaseModel, load
from coterie.model.pull import DEFAULT, pull

KINDS = {"branch": 15, "whole": 0}  # the first layer that an expert changes
TOKENS = 32  # of each answer
SYSTEM = "You are an assistant of a bank. Answer the customer's question in a few friendly words. " * 6


def publish(library: Library, base: BaseModel) -> None:
    """Two experts of each kind. Their weights are random: what they cost does not depend on values."""
    for seed, name in enumerate(f"{kind}{n}" for kind in KINDS for n in (0, 1)):
        expert = loras.fresh(loras.LoraConfig(first_layer=KINDS[name[:-1]]), base.decoder, seed)
        for key, weight in expert.weights.items():
            if ".lora_B." in key:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.01)
        library.publish(
            ExpertFacts(name),
            lambda folder, expert=expert: loras.save(expert, folder, DEFAULT, base.decoder.config),  # type: ignore[misc]
        )


def converse(engines: dict[str, Engine], base: BaseModel, kind: str, questions: list[str]) -> dict[str, list[float]]:
    """Seconds to the first token of each turn, by engine."""
    first: dict[str, list[float]] = {name: [] for name in engines}
    talk = [{"role": "system", "content": SYSTEM}]
    for turn, question in enumerate(questions):
        talk.append({"role": "user", "content": question})
        prompt, said = base.encode(base.chat(talk)), set[str]()
        for name, engine in engines.items():
            began = time.monotonic()
            answer = engine.submit(prompt, Sampling(max_tokens=TOKENS), (f"{kind}{turn % 2}", 1))
            said.add(answer.text())
            first[name].append((answer.first_at or time.monotonic()) - began)
        if len(said) > 1:
            raise SystemExit(f"{kind}, turn {turn + 1}: the engines differ: {said}")
        talk.append({"role": "assistant", "content": said.pop()})
    return first


def tell(report: common.Report, found: dict[str, list[dict[str, list[float]]]]) -> None:
    """By kind and engine, the median of each turn; the ratios are of the same turn of the same conversation."""
    rows = []
    for kind, runs in found.items():
        later = {name: [s for run in runs for s in run[name][1:]] for name in runs[0]}
        ratio = statistics.median(a / b for a, b in zip(later["without"], later["with"], strict=True))
        into = report.ratios if kind == "branch" else report.figures
        into["turn_with_cache_vs_without" + ("" if kind == "branch" else f", {kind}")] = ratio
        for name, times in later.items():
            report.figures[f"{kind}, {name} cache, first token ms"] = 1e3 * statistics.median(times)
            by_turn = [1e3 * statistics.median(turn) for turn in zip(*(run[name] for run in runs), strict=True)]
            rows.append([f"{kind}, {name} cache", *by_turn])
    head = ["experts", *(f"turn {t + 1}" for t in range(len(rows[0]) - 1))]
    report.table("Time to the first token, p50, ms", head, rows)


def main() -> None:
    args = common.options(__doc__ or "").parse_args()
    torch.set_num_threads(args.threads)
    file = common.need_data("banking77/test.csv")
    rounds, turns = (1, 4) if args.quick else (8, 8)
    texts = [e.question for e in read(file, {"prompt": "text", "completion": "category"})]
    report = common.Report("A conversation that changes its expert: benchmarks/conversation.py")
    base = load(pull(DEFAULT), packed=True)
    found: dict[str, list[dict[str, list[float]]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as scratch:
        library = Library(Path(scratch))
        publish(library, base)
        engines = {
            name: Engine(base, library, slots=1, context=1024, cache_memory=memory)
            for name, memory in (("with", CACHE_MEMORY), ("without", 0))
        }
        if not engines["with"].pages:
            common.skip("the cache is of the step in C, which this processor cannot run")
        try:
            for engine in engines.values():
                for name in library.names():  # reads every expert
                    engine.submit(base.encode("Hello"), Sampling(max_tokens=1), (name, 1)).text()
            for n in range(rounds):
                for kind in KINDS:
                    some = [texts[(997 * (n * len(KINDS) + len(kind)) + 31 * t) % len(texts)] for t in range(turns)]
                    found[kind].append(converse(engines, base, kind, some))
        finally:
            for engine in engines.values():
                engine.close()
    tell(report, found)
    report.say(
        f"{rounds} conversation(s) of {turns} turns with SmolLM2-135M-Instruct and two LoRA experts in turns, {TOKENS} "
        f"tokens to each answer, {args.threads} threads; both engines said the same words."
    )
    common.finish(report, args)


if __name__ == "__main__":
    main()
