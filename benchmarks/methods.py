"""Ways of tuning, side by side, on real tasks: what each gains over the base model, and what it costs.

Each task's training rows go into a business of its own, each method is one `coterie fit` there, in a process of its own
(so that its peak of memory is its own), and all models answer the same held-out rows: published test splits, from which
no training row repeats (evaluation/tasks/). Settings are the defaults of each kind; nothing is chosen by test rows.
Figure: `mean_gain`, points that the best expert of each task gains over the base model, meant over the tasks of
classification and SQL. `--tasks` and `--methods` take some only, and what is measured already is kept in `--keep`.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

from coterie.business import Business, fit
from coterie.evaluation.suite import measure
from coterie.evaluation.task import Splits, Task, find
from coterie.optimise import optimise

TASKS = {  # where the data lies; rows to learn from, rows to answer
    "banking77": ("banking77", 2400, 500), "clinc150": ("clinc150", 2000, 500),
    "multidogo": ("multidogo/finance", 800, 500), "geoquery": ("text2sql", 600, 280),
    "wikisql": ("text2sql", 600, 300), "gsm8k": ("gsm8k", 200, 200), "nottingham": ("nottingham", 120, 60),
}  # fmt: skip
GAINING = ("banking77", "clinc150", "multidogo", "geoquery", "wikisql")
METHODS = {  # of 30 layers: a branch "from 15" leaves the 15 below it as they are
    "base": "", "LoRA": 'kind = "lora"',
    **{f"LoRA from {cut}": f'kind = "lora"\ntraining.first_layer = {cut}' for cut in (10, 15, 20)},
    "adapter": 'kind = "adapter"', "prompt": 'kind = "prompt"', "prefix": 'kind = "prefix"', "full": 'kind = "full"',
    "searched prompt": "",
}  # fmt: skip
USUAL = ["base", "LoRA", "LoRA from 15", "adapter", "prompt", "full", "searched prompt"]
EPOCHS = 2


def splits_of(name: str, rows: int, answers: int) -> tuple[Task, Path, Splits]:
    """A task with its data: at most so many rows to learn from and to answer."""
    task, path = find(name), common.need_data(TASKS[name][0])
    whole = task.splits(path)
    return task, path, Splits(whole.train[:rows], whole.test[:answers])


def one(name: str, method: str, rows: int, answers: int, epochs: int, threads: int) -> dict[str, Any]:
    """Train by one method and answer the task's rows."""
    import torch

    torch.set_num_threads(threads)
    task, path, splits = splits_of(name, rows, answers)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with (folder / "train.jsonl").open("w") as f:
            for example in splits.train:
                f.write(json.dumps({"messages": list(example.messages)}) + "\n")
        settings = METHODS[method] or 'kind = "lora"'
        toml = [f'[business]\nname = "{name}"\ncontext = 1024\n[experts.it]\ntrain = "train.jsonl"',
                f"system = {json.dumps(task.system)}\nchoices = {str(task.choices).lower()}\n{settings}",
                f"training.epochs = {epochs}\n"]  # fmt: skip
        (folder / "coterie.toml").write_text("\n".join(toml))
        business = Business.open(folder)
        business.base()
        common.reset_peak()
        began, worked = time.perf_counter(), time.process_time()
        trained: dict[str, Any] = {}
        facts, loss = None, None
        if method == "searched prompt":
            facts = optimise(business, "it", budget=300).published  # none where nothing beats the instruction as it is
        elif method != "base":
            (fitted,) = fit(business)
            facts, trained, loss = fitted.facts, fitted.facts.training, fitted.evaluation["held_out_loss"]
        minutes, peak = (time.perf_counter() - began) / 60, common.peak_mib()
        worked = time.process_time() - worked
        own = business.own_engine(facts, slots=32, queue=1024) if facts else None
        engine = own or business.engine(slots=32, queue=1024)
        try:
            measured = measure(engine, task, splits, task.score(path), facts)
        finally:
            engine.close()
        size = sum(f.stat().st_size for f in business.library.folder("it").rglob("*") if f.is_file()) \
            if facts and method != "searched prompt" else 0  # fmt: skip
    figures = measured.figures
    value = figures[figures["metric"]]
    return {
        "score": value["value"], "low": value["low"], "high": value["high"], "metric": figures["metric"],
        "perplexity": figures.get("perplexity", {}).get("per_token"), "rows": len(splits.train),
        "answered": len(splits.test), "parameters": trained.get("parameters", 0), "minutes": minutes,
        "cpu_minutes": worked / 60, "training_minutes": trained.get("seconds", 0) / 60, "peak_mib": peak,
        "mib_on_disk": size / 2**20, "held_out_loss": loss,
    }  # fmt: skip


def main() -> None:
    parser = common.options(__doc__ or "")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=USUAL)
    parser.add_argument("--keep", type=Path, help="a JSON file of what is measured: done pairs are not done again")
    args = parser.parse_args()
    tasks, methods = (["banking77", "geoquery"], ["base", "LoRA"]) if args.quick else (args.tasks, args.methods)
    for name in tasks:
        common.need_data(TASKS[name][0])
    report = common.Report("Ways of tuning: benchmarks/methods.py")
    found: dict[str, dict[str, Any]] = json.loads(args.keep.read_text()) if args.keep and args.keep.exists() else {}
    for method in methods:
        for name in tasks:
            _, rows, answers = TASKS[name]
            epochs = EPOCHS
            if args.quick:
                rows, answers, epochs = 400, 60, 1
            if method in found.get(name, {}):
                continue
            wanted = [__file__, "--one", name, method, str(rows), str(answers), str(epochs), str(args.threads)]
            found.setdefault(name, {})[method] = common.run_side(wanted, args.threads)
            common.screen.print(f"{name}, {method}: {found[name][method]['score']:.3f}", highlight=False)
            if args.keep:
                args.keep.write_text(json.dumps(found, indent=1))
    tell(report, {name: found[name] for name in tasks}, args.quick)
    common.finish(report, args)


def tell(report: common.Report, found: dict[str, dict[str, Any]], quick: bool) -> None:
    """Gains, and a table of every task and method."""
    gains, plain = {}, {}
    for name, methods in found.items():
        others = {m: r["score"] for m, r in methods.items() if m != "base"}
        if "base" in methods and others:
            best = max(others, key=lambda m: others[m])
            gains[name] = 100 * (others[best] - methods["base"]["score"])
            report.figures[f"{name}, gain of {best}, points"] = gains[name]
            if "LoRA" in others:
                plain[name] = 100 * (others["LoRA"] - methods["base"]["score"])
    counted = [gains[name] for name in GAINING if name in gains]
    if counted:
        report.figures["mean_gain"] = statistics.mean(counted)
    rows = [
        [name, method, 100 * r["score"], f"{100 * r['low']:.1f} to {100 * r['high']:.1f}", r["metric"],
         f"{r['parameters']:,}", r["cpu_minutes"], r["peak_mib"], r["mib_on_disk"]]
        for name, methods in found.items() for method, r in methods.items()
    ]  # fmt: skip
    head = ["task", "method", "score, %", "95% interval", "metric", "trained parameters", "CPU minutes", "peak MiB",
            "MiB on disk"]  # fmt: skip
    report.table("Tasks by method", head, rows)
    sizes = "; ".join(f"{n}: {next(iter(m.values()))['rows']} and {next(iter(m.values()))['answered']}"
                      for n, m in found.items())  # fmt: skip
    report.say(
        f"SmolLM2-135M-Instruct; rows to learn from and to answer: {sizes}. {1 if quick else EPOCHS} epochs, batch 16, "
        "the default learning rate of each kind. CPU minutes are of both cores together, training with its evaluation "
        "on held-out rows; peak memory is of the whole process. Tasks of choices are answered with one of the choices "
        "by all, the base model too."
    )
    for name, methods in found.items():
        known = {m: r["perplexity"] for m, r in methods.items() if r["perplexity"]}
        if known:
            each = ", ".join(f"{m} {value:.2f}" for m, value in known.items())
            report.say(f"Perplexity of {name}'s wanted answers, per token: {each}.")
    missing = [n for n in GAINING if n not in gains]
    note = f" ({', '.join(missing)} not measured)" if missing else ""
    if counted:
        report.say(f"Mean gain of the best expert over classification and SQL{note}: {report.figures['mean_gain']:.1f} "
                   "points (`mean_gain`).")  # fmt: skip
    always = [plain[name] for name in GAINING if name in plain]
    if always:
        report.figures["mean_gain_lora"] = statistics.mean(always)
        report.say(f"Of LoRA in all layers, without choosing by the outcome: {statistics.mean(always):.1f} points.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        name, method, *numbers = sys.argv[2:8]
        print(json.dumps(one(name, method, *map(int, numbers))))
    else:
        main()
