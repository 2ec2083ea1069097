"""How long until an expert answers well: the second part of benchmarks/tuning.py.

Each side trains LoRA on the same rows of Banking77 with the same rank, batch, peak learning rate, schedule and passes,
in a process of its own, and keeps its adapter after every so many steps; keeping costs no time, making the trunk's
cache does. All adapters then answer the same held-out rows in our engine, with one of the 77 intents. The time to an
accuracy lies on the straight line between the two kept adapters around it.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from common import precision

from coterie.data.encode import encode_all
from coterie.data.read import Example, read
from coterie.data.split import leaks
from coterie.engine.engine import Engine
from coterie.evaluation.run import evaluate
from coterie.experts import kinds
from coterie.experts.library import ExpertFacts, Library
from coterie.model.load import BaseModel, load


@dataclass(frozen=True)
class Course:
    """How one side's accuracy grew: seconds of training and the accuracy then, of each adapter that was kept."""

    seconds: list[float]
    accuracy: list[float]
    peak_mib: float | None = None

    def until(self, accuracy: float) -> float | None:
        """Seconds until this accuracy; None where it was not reached."""
        before = (0.0, 0.0)
        for now in zip(self.seconds, self.accuracy, strict=True):
            if now[1] >= accuracy:
                share = (accuracy - before[1]) / (now[1] - before[1])
                return before[0] + share * (now[0] - before[0])
            before = now
        return None


@dataclass(frozen=True)
class Rows:
    """What everyone learns from and answers."""

    train: list[Example]
    held_out: list[Example]
    labels: list[str]


def rows_of(
    file: Path, columns: dict[str, str], system: str, train: int, held_out: int, labels: int | None = None
) -> Rows:
    """A fixed draw of the training file (of its first so many labels); rows that nearly repeat a held-out one are not
    learned from."""
    examples = list(read(file, columns, system))
    wanted = set(sorted({e.completion for e in examples})[:labels])
    examples = [e for e in examples if e.completion in wanted]
    order = np.random.default_rng(1).permutation(len(examples))
    held = [examples[i] for i in order[:held_out]]
    rest = [examples[i] for i in order[held_out:]]
    repeated = set(leaks([e.question for e in rest], [e.question for e in held]))
    kept = [e for i, e in enumerate(rest) if i not in repeated]
    return Rows(kept[:train], held, sorted(wanted))


def write(rows: Rows, base: BaseModel, folder: Path) -> None:
    """The rows for every side: tokens as .npz, and as LLaMA-Factory reads them."""
    data, _ = encode_all(rows.train, base, folder / "encoded-course", 1024)
    np.savez(folder / "course", tokens=data.tokens, learn=data.learn, ends=data.ends)
    told = [
        {"system": e.prompt[0]["content"], "instruction": e.prompt[-1]["content"], "input": "", "output": e.completion}
        for e in rows.train
    ]
    (folder / "rows.json").write_text(json.dumps(told))
    columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json", "columns": columns}}))


def llama_factory(python: Path, folder: Path, out: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Train with LLaMA-Factory, in the environment of `python`; what the other sides print."""
    settings = {
        "model_name_or_path": str(folder / "base"), "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": job["rank"], "lora_alpha": int(job["alpha"]), "lora_target": "all", "dataset": "rows",
        "dataset_dir": str(folder), "template": "smollm2", "cutoff_len": 1024, "output_dir": str(out),
        "per_device_train_batch_size": job["batch"], "learning_rate": job["learning_rate"],
        "num_train_epochs": job["epochs"], "lr_scheduler_type": "cosine", "warmup_steps": job["warmup"],
        "optim": "adamw_torch_fused", "train_sampling_strategy": "group_by_length", "use_cpu": True,
        "bf16": precision() == "bfloat16",
        "logging_steps": 1, "save_steps": job["keep_every"], "save_only_model": True, "report_to": "none", "seed": 0,
        "max_grad_norm": 1.0, "overwrite_output_dir": True, "preprocessing_num_workers": 1, "disable_tqdm": True,
        "dataloader_num_workers": 0, "gradient_accumulation_steps": 1, "disable_gradient_checkpointing": True,
    }  # fmt: skip
    (folder / "llama-factory.yaml").write_text(json.dumps(settings))
    command = [str(python.parent / "llamafactory-cli"), "train", str(folder / "llama-factory.yaml")]
    threads = str(job["threads"])
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{(done.stdout + done.stderr)[-3000:]}")
    seconds = [0.0]
    for line in (out / "trainer_log.jsonl").read_text().splitlines():
        said = json.loads(line)
        if "loss" in said:
            hours, minutes, rest = said["elapsed_time"].split(":")
            seconds.append(3600 * float(hours) + 60 * float(minutes) + float(rest))
    for kept in out.glob("checkpoint-*"):
        kept.rename(out / kept.name.replace("checkpoint", "step"))
    return {"seconds": [b - a for a, b in pairwise(seconds)]}


def courses(rows: Rows, folder: Path, sides: dict[str, dict[str, Any]], every: int) -> dict[str, Course]:
    """What the adapters that each side kept in `folder`/SIDE answer. `sides`: what each printed."""
    base, library = load(folder / "base"), Library(folder / "experts")
    choices = tuple(rows.labels)
    engine = Engine(base, library, slots=64, context=512, queue=1024)
    out = {}
    try:
        for side, found in sides.items():
            times, kept = list(accumulate(found["seconds"])), folder / "course" / side
            steps = [n for n in range(every, len(times) + 1, every) if (kept / f"step-{n}").is_dir()]
            accuracy = []
            for step in steps:
                expert = kinds.load(kept / f"step-{step}", base.decoder.config)
                facts = library.publish(
                    ExpertFacts("course", "lora", choices=choices),
                    lambda to, expert=expert: kinds.save(expert, to, "base", base.decoder.config),  # type: ignore[misc]
                )
                figures, _ = evaluate(engine, rows.held_out, (facts.name, facts.version), choices)
                accuracy.append(float(figures["accuracy"]["value"]))
            out[side] = Course([times[n - 1] for n in steps], accuracy, found.get("peak_mib"))
    finally:
        engine.close()
    return out
