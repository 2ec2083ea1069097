"""A peer of benchmarks/serving.py: transformers' generate with PEFT adapters.

Run by serving.py in a process of its own: `peft_generate.py MODEL EXPERTS THREADS VARIANT`, where EXPERTS holds a
folder for each adapter; jobs on stdin, see common.take_jobs.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import peak_mib, precision, take_jobs

VARIANTS = {"mixed batch": True, "switching": False}  # whether one call takes all requests, or one adapter's


class Ticks(transformers.StoppingCriteria):
    """Never stops; notes when the first token was there."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.first = self.first or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def main(model_dir: str, experts: str, threads: str, variant: str) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(int(threads))
    dtype, mixed = getattr(torch, precision()), VARIANTS[variant]
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    names = sorted(p.name for p in Path(experts).iterdir())
    model = PeftModel.from_pretrained(base, Path(experts) / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(Path(experts) / name, adapter_name=name)
    model.to(dtype).eval()

    def generate(requests: list[dict[str, Any]], tokens: int, **options: Any) -> tuple[int, float]:
        """How many tokens came, and when the first was there."""
        longest = max(len(r["prompt"]) for r in requests)
        ids = torch.tensor([[0] * (longest - len(r["prompt"])) + r["prompt"] for r in requests])
        lengths = torch.tensor([len(r["prompt"]) for r in requests])
        mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
        ticks = Ticks()
        out = model.generate(
            input_ids=ids, attention_mask=mask, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False,
            pad_token_id=0, stopping_criteria=transformers.StoppingCriteriaList([ticks]), **options,
        )  # fmt: skip
        return (out.shape[1] - longest) * len(requests), ticks.first

    @torch.inference_mode()
    def work(job: dict[str, Any]) -> dict[str, Any]:
        began, count, first = time.perf_counter(), 0, []
        if mixed:
            names = [request["expert"] or "__base__" for request in job["requests"]]
            count, at = generate(job["requests"], job["tokens"], adapter_names=names)
            first = [at - began] * len(names)
        else:
            for name in dict.fromkeys(request["expert"] for request in job["requests"]):
                group = [request for request in job["requests"] if request["expert"] == name]
                if name:
                    model.set_adapter(name)
                    more, at = generate(group, job["tokens"])
                else:
                    with model.disable_adapter():
                        more, at = generate(group, job["tokens"])
                count += more
                first += [at - began] * len(group)
        return {"seconds": time.perf_counter() - began, "tokens": count, "first": first, "peak_mib": peak_mib()}

    take_jobs(work)


if __name__ == "__main__":
    main(*sys.argv[1:5])
