"""Training examples per second and peak memory: Coterie's LoRA loop against PEFT and transformers' Trainer.

The same rows of Banking77 in the same chat template, the same base weights, rank, alpha, targets, batch, schedule
and threads. Each run is a process of its own, so that neither warms or fills memory for the other, and the runs
take turns. Of the peer's settings (VARIANTS in peers/peft_trainer.py) the fastest is compared. Steps that warm up
are not counted. The adapters are then scored on the same held-out rows by the same code, to show that both learn.
Then the time to the same held-out accuracy (time_to_accuracy.py), where ours learn decisions only, beside LLaMA-Factory
too where it is installed in an environment of its own: python -m venv DIR; DIR/bin/pip install torch==2.13.0
llamafactory, and --llamafactory DIR/bin/python.
Ratios: `vs_peft`, our examples per second over theirs; `time_to_accuracy_vs_peft` and `_vs_llamafactory`, their seconds
over ours.
"""

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import time_to_accuracy
import torch
from peers.peft_trainer import VARIANTS

from coterie.data.encode import TokenSet, batches, encode_all
from coterie.data.read import read
from coterie.experts import lora as loras
from coterie.experts.expert import Applied
from coterie.experts.kinds import apply
from coterie.model.load import load
from coterie.model.pull import DEFAULT, pull
from coterie.tuning.decisions import decisions
from coterie.tuning.loop import Progress, Training, held_out_loss, train
from coterie.tuning.objective import completions
from coterie.tuning.trunk import Trunk

SYSTEM = "Name the intent."
COLUMNS = {"prompt": "text", "completion": "category"}
PEER = Path(__file__).parent / "peers" / "peft_trainer.py"
OURS = "coterie"
UNCOUNTED = 3  # steps at the start of each run; the last is left out too, because ours evaluates in it
HELD_OUT = 64  # rows
LORA = {"rank": 16, "alpha": 32.0, "batch": 16, "learning_rate": 1e-3, "warmup": 0.06}
BRANCH, CUT = "coterie, branch", 15  # the upper half (methods.py compares cuts); all layers are measured beside it
FACTORY = "LLaMA-Factory"


@dataclass(frozen=True)
class Course:
    """Size of part 2: adapters are kept every so many steps; `target` is the accuracy to reach."""

    rows: int
    held_out: int
    epochs: int
    every: int
    target: float
    labels: int | None = None


COURSE, COURSE_QUICK = Course(960, 300, 2, 20, 0.45), Course(256, 100, 1, 4, 0.45, 12)


@dataclass(frozen=True)
class Run:
    """One run of one side: what its counted steps took."""

    seconds: float
    tokens: int
    cpu_ms: float  # per thousand tokens, all threads: what to compare on a busy machine, with --threads 1
    peak_mib: float

    @classmethod
    def of(cls, found: dict[str, Any]) -> "Run":
        seconds, cpu, tokens = (sum(found[key][UNCOUNTED:-1]) for key in ("seconds", "cpu", "tokens"))
        return cls(seconds, tokens, 1e6 * cpu / tokens, found["peak_mib"])

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def prepare(folder: Path, rows: int, file: Path) -> float:
    """Write what both sides read: base weights as a Hugging Face folder, rows as .npz. Returns tokens per row."""
    path = pull(DEFAULT)
    common.hugging_face_copy(path, folder / "base")
    base = load(path)
    examples = list(read(file, COLUMNS, SYSTEM))
    order = np.random.default_rng(0).permutation(len(examples))[: rows + HELD_OUT]
    data, _ = encode_all([examples[i] for i in order], base, folder / "encoded", 1024)
    for name, begin, end in (("train", 0, rows), ("held_out", rows, rows + HELD_OUT)):
        span = slice(data.ends[begin], data.ends[end])
        ends = data.ends[begin : end + 1] - data.ends[begin]
        np.savez(folder / name, tokens=data.tokens[span], learn=data.learn[span], ends=ends)
    return float(data.ends[rows]) / rows


def rows_of(file: Path) -> TokenSet:
    found = np.load(file)
    return TokenSet(found["tokens"], found["learn"], found["ends"])


def our_side(base_dir: str, data_file: str, out: str, job: dict[str, Any]) -> None:
    """Train with Coterie; print what peers/peft_trainer.py prints."""
    torch.set_num_threads(job["threads"])
    base = load(Path(base_dir), packed=True)
    data = rows_of(Path(data_file))
    cut, every, choices = job.get("first_layer", 0), job.get("keep_every", 0), job.get("choices")
    lora = loras.fresh(loras.LoraConfig(job["rank"], job["alpha"], first_layer=cut), base.decoder)
    settings = Training(job.get("epochs", 1), job["batch"], job["learning_rate"], job["warmup"])
    checkpoint = Path(out) / "checkpoint"
    checkpoint.unlink(missing_ok=True)  # an earlier round's: training would go on where that ended

    def tell(p: Progress) -> None:
        if p.step == len(clock.at):  # told again after an epoch, with the loss on held-out rows
            clock.tick()
            if every and p.step % every == 0:
                with clock.stopped():
                    kept = Path(out) / f"step-{p.step}"
                    kept.mkdir(exist_ok=True)
                    loras.save(lora, kept, "base", base.decoder.config)

    clock = common.Clock()
    decided = decisions(base, data, choices) if choices else None
    data = decided.data if decided else data
    trunk = Trunk(base.decoder, data, cut, Path(out) / "trunk") if cut else None
    outcome = train(
        base.decoder, lora, completions(base.decoder, data, trunk, decided), data.lengths(), list(range(len(data))),
        [0], settings, checkpoint, tell,
    )  # fmt: skip
    tokens = [int(data.lengths()[batch].sum()) for batch in batches(data.lengths(), job["batch"], settings.seed)]
    peak = common.peak_mib()
    loras.save(lora, Path(out), "base", base.decoder.config)
    print(json.dumps(clock.steps() | {"tokens": tokens, "peak_mib": peak, "losses": outcome.losses}))


def run_once(who: str, folder: Path, job: dict[str, Any]) -> Run:
    """Train once: `who` is "coterie" or one of the peer's variants; the adapter stays in `folder`/who."""
    out = folder / who
    out.mkdir(exist_ok=True)
    paths = [str(folder / "base"), str(folder / "train.npz"), str(out)]
    command = [__file__, "--side", *paths] if who == OURS else [str(PEER), *paths, who]
    return Run.of(common.run_side([*command, json.dumps(job)], job["threads"]))


def held_out(folder: Path, names: list[str]) -> dict[str, float]:
    """Loss of the base model and of each adapter on the held-out rows, in nats per completion token."""
    base, data = load(folder / "base", torch.float32), rows_of(folder / "held_out.npz")
    rows = list(range(len(data)))
    loss, sizes = completions(base.decoder, data), data.lengths()
    out = {"base": held_out_loss(loss, Applied(), sizes, rows)}
    for name in names:
        expert = loras.load(folder / name, base.decoder.config)
        out[name] = held_out_loss(loss, apply(expert, base.decoder), sizes, rows)
    return out


def speed(report: common.Report, folder: Path, quick: bool, threads: int) -> str:
    """Part 1. Returns the peer's fastest setting."""
    steps, rounds = (8, 1) if quick else (24, 3)
    job = LORA | {"threads": threads}
    per_row = prepare(folder, steps * job["batch"], common.need_data("banking77/train.csv"))
    tried = ["fp32"]  # where bfloat16 is only emulated
    if common.precision() == "bfloat16":
        tried = list(VARIANTS)[:1] if quick else list(VARIANTS)
    trials = {name: run_once(name, folder, job) for name in tried}
    best = max(trials, key=lambda name: trials[name].tokens_per_s)
    runs: dict[str, list[Run]] = {best: [trials[best]] if quick else [], OURS: []}
    for _ in range(rounds):
        for who, done in runs.items():
            if len(done) < rounds:
                done.append(run_once(who, folder, job))
    losses = held_out(folder, [*tried, OURS])
    rows = []
    for who, done in [*((name, [trial]) for name, trial in trials.items() if name != best), *runs.items()]:
        pace = statistics.median(run.tokens_per_s for run in done)
        peak = statistics.median(run.peak_mib for run in done)
        cpu = statistics.median(run.cpu_ms for run in done)
        label = who if who == OURS else f"PEFT + Trainer, {who}"
        rows.append((label, pace / per_row, pace, cpu, peak, losses[who], len(done)))
        key = "coterie" if who == OURS else "peft" if who == best else "peft " + who
        report.figures |= {
            f"{key} examples/s": pace / per_row, f"{key} tokens/s": pace, f"{key} peak MiB": peak,
            f"{key} CPU ms per 1000 tokens": cpu, f"{key} held-out loss": losses[who],
        }  # fmt: skip
    report.figures["base held-out loss"] = losses["base"]
    report.ratios["vs_peft"] = report.figures["coterie examples/s"] / report.figures["peft examples/s"]
    report.say(
        f"LoRA on {steps * job['batch']} rows of Banking77 ({per_row:.1f} tokens each), one pass: rank {job['rank']}, "
        f"alpha {job['alpha']:.0f}, all linear projections, batch {job['batch']}, {threads} threads. Medians of "
        f"{rounds} runs that took turns (the peer's slower settings: one run); the first {UNCOUNTED} steps of a run "
        "are not counted, padding is not counted as tokens. Peak memory is of the training alone, not of loading. "
        f"Loss is on {HELD_OUT} held-out rows, in nats per completion token; the base model's is {losses['base']:.3f}."
    )
    head = ("", "examples/s", "tokens/s", "CPU ms per 1,000 tokens", "peak MiB", "held-out loss", "runs")
    report.table("Fine-tuning", head, rows)
    report.say(f"Coterie trains {report.ratios['vs_peft']:.2f} times as many examples a second (`vs_peft`).")
    return best


def accuracy(report: common.Report, folder: Path, best: str, quick: bool, threads: int, factory: Path | None) -> None:
    """Part 2: time to the same accuracy."""
    size = COURSE_QUICK if quick else COURSE
    file = common.need_data("banking77/train.csv")
    rows = time_to_accuracy.rows_of(file, COLUMNS, SYSTEM, size.rows, size.held_out, size.labels)
    time_to_accuracy.write(rows, load(folder / "base"), folder)
    job = LORA | {"threads": threads, "epochs": size.epochs, "keep_every": size.every}
    found = {}
    for who, cut in ((BRANCH, CUT), (OURS, 0), (best, 0)):
        out = folder / "course" / who
        out.mkdir(parents=True)
        paths = [str(folder / "base"), str(folder / "course.npz"), str(out)]
        command = [str(PEER), *paths, who] if who == best else [__file__, "--side", *paths]
        ours = {"first_layer": cut, "choices": rows.labels}
        found[who] = common.run_side([*command, json.dumps(job | ours)], threads)
    if factory:
        found[FACTORY] = time_to_accuracy.llama_factory(factory, folder, folder / "course" / FACTORY, job)
    grown = time_to_accuracy.courses(rows, folder, found, size.every)
    until = {who: course.until(size.target) for who, course in grown.items()}
    names = {best: f"PEFT + Trainer, {best}", OURS: "coterie, all layers", BRANCH: f"coterie, layers from {CUT}"}
    report.table(
        f"Time to {size.target:.0%}", ("", f"seconds to {size.target:.0%}", "seconds in all", "accuracy at the end"),
        [(names.get(who, who), until[who] or "not reached", c.seconds[-1], 100 * c.accuracy[-1])
         for who, c in grown.items()],
    )  # fmt: skip
    keys = {best: "peft", FACTORY: "llamafactory", OURS: "coterie, all layers", BRANCH: "coterie"}
    for who, course in grown.items():
        report.figures[f"{keys[who]} accuracy at the end"] = course.accuracy[-1]
        if (seconds := until[who]) is not None:
            report.figures[f"{keys[who]} seconds to accuracy"] = seconds
    seconds = until[BRANCH]
    if seconds:
        for name, who in (("peft", best), ("llamafactory", FACTORY)):
            theirs = until.get(who)
            if theirs:
                report.ratios[f"time_to_accuracy_vs_{name}"] = theirs / seconds
    report.say(
        f"Time to {size.target:.0%} of {len(rows.held_out)} held-out questions answered with the right one of "
        f"{len(rows.labels)} intents: {len(rows.train)} rows, {size.epochs} passes, the same rank, batch, learning "
        f"rate and schedule for all; an adapter kept every {size.every} steps, all answering in the same engine, "
        "held to the intents. Ours learn decisions between the intents (coterie/tuning/decisions.py), the peers whole "
        "answers."
    )
    report.table(
        "Accuracy as training goes on", ("step", *(names.get(who, who) for who in grown)),
        [(str(size.every * (n + 1)), *(f"{100 * c.accuracy[n]:.1f} after {c.seconds[n]:.0f} s" for c in grown.values()))
         for n in range(min(len(c.accuracy) for c in grown.values()))],
    )  # fmt: skip


def main() -> None:
    parser = common.options(__doc__ or "")
    parser.add_argument("--llamafactory", type=Path, metavar="PYTHON", help="of an environment with LLaMA-Factory")
    parser.add_argument("--part", type=int, choices=(2,), help="2: time to accuracy in full, pace as in --quick")
    args = parser.parse_args()
    common.need_packages("transformers", "peft")
    common.need_data("banking77/train.csv")
    report = common.Report("Fine-tuning: benchmarks/tuning.py")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        best = speed(report, folder, args.quick or args.part == 2, args.threads)
        accuracy(report, folder, best, args.quick, args.threads, args.llamafactory)
    common.finish(report, args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        our_side(*sys.argv[2:5], json.loads(sys.argv[5]))
    else:
        main()
