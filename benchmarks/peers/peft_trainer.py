"""The peer of benchmarks/tuning.py: LoRA by PEFT and transformers' Trainer, as their documentation shows it.

Run by tuning.py in a process of its own: `peft_trainer.py MODEL DATA OUT VARIANT`. MODEL is a Hugging Face folder,
DATA an .npz with tokens, learn and ends (coterie.data.encode.TokenSet); the adapter is saved in OUT, and the last
line of stdout is a JSON object with the seconds and real tokens of each step. With `keep_every` in the job, the adapter
of every so many steps is kept as OUT/step-N.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import Clock, peak_mib  # noqa: E402

# Name: weights of the base, Trainer's bf16 autocast, adapter kept in float32 (PEFT's default) or in the base's type.
VARIANTS = {
    "bf16": (torch.bfloat16, False, True),
    "bf16, adapter too": (torch.bfloat16, False, False),
    "bf16 autocast": (torch.float32, True, True),
    "fp32": (torch.float32, False, True),
}


class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Token ids, and labels that are -100 wherever nothing is to be learned."""

    def __init__(self, file: Path) -> None:
        data = np.load(file)
        ends = data["ends"]
        self.rows = []
        for begin, end in pairwise(ends):
            ids, learn = data["tokens"][begin:end], data["learn"][begin:end]
            self.rows.append({"input_ids": ids.tolist(), "labels": np.where(learn, ids, -100).tolist()})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return self.rows[i]


class Pad:
    """Pads a batch to its longest row; keeps count of the real tokens of each batch."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        out = {}
        for key, filler in (("input_ids", 0), ("labels", -100)):
            out[key] = torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows])
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        out["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return out


class Ticks(transformers.TrainerCallback):
    """Notes when each step ends; keeps the adapter after every so many steps, which costs no time."""

    clock: Clock

    def __init__(self, out: Path, every: int) -> None:
        self.out, self.every = out, every

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock = Clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.tick()
        if self.every and state.global_step % self.every == 0:
            with self.clock.stopped():
                kwargs["model"].save_pretrained(self.out / f"step-{state.global_step}")


def main(model_dir: str, data: str, out: str, variant: str, job: dict[str, Any]) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(job["threads"])
    dtype, autocast, keep_float = VARIANTS[variant]
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    lora = LoraConfig(
        r=job["rank"], lora_alpha=job["alpha"], target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora, autocast_adapter_dtype=keep_float)
    pad, ticks = Pad(), Ticks(Path(out), job.get("keep_every", 0))
    arguments = transformers.TrainingArguments(
        output_dir=out, num_train_epochs=job.get("epochs", 1), per_device_train_batch_size=job["batch"],
        learning_rate=job["learning_rate"], lr_scheduler_type="cosine",
        warmup_steps=job["warmup"], weight_decay=0.0, max_grad_norm=1.0, seed=0,
        optim="adamw_torch_fused", train_sampling_strategy="group_by_length", bf16=autocast, use_cpu=True,
        save_strategy="no", report_to="none", logging_strategy="steps", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=Rows(Path(data)), data_collator=pad, callbacks=[ticks]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    peak = peak_mib()
    model.save_pretrained(out)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    steps = len(ticks.clock.at) - 1
    print(json.dumps(ticks.clock.steps() | {"tokens": pad.tokens[:steps], "peak_mib": peak, "losses": losses}))


if __name__ == "__main__":
    main(*sys.argv[1:5], json.loads(sys.argv[5]))
