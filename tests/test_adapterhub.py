"""Bottleneck adapters travel to AdapterHub's `adapters` library and back, with equal scores.

It needs an older transformers than ours, so it runs in a process of its own, on packages that `make test-all` puts
into .venv/adapters.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coterie.experts.adapter import BottleneckConfig, fresh
from coterie.experts.expert import Expert
from coterie.experts.kinds import apply, load, save
from coterie.model.load import BaseModel
from coterie.tuning.forward import hidden_states
from support import random_rows

SITE = Path(sys.prefix) / "adapters"
# adapters 1.2.0 transposes the output of Llama's attention once more than transformers 4.51 does, with or without an
# adapter (its `init` alone changes the scores); handing it over transposed undoes that.
THEIRS = """
import json, sys
import adapters, torch, transformers
import adapters.models.llama.modeling_llama as llama
from transformers.integrations.sdpa_attention import sdpa_attention_forward

def attention(*args, **kwargs):
    out, weights = sdpa_attention_forward(*args, **kwargs)
    return out.transpose(1, 2), weights

llama.ALL_ATTENTION_FUNCTIONS = {"sdpa": attention}
model_folder, job, row = sys.argv[1], json.loads(sys.argv[2]), torch.tensor([json.loads(sys.argv[3])])
model = transformers.LlamaForCausalLM.from_pretrained(model_folder, torch_dtype=torch.float32).eval()
with torch.no_grad():
    plain = model(row).logits[0]
    adapters.init(model)
    assert (model(row).logits[0] - plain).abs().max() < 1e-4
    if "load" in job:
        name = model.load_adapter(job["load"], use_safetensors=True)
    else:
        name, kind = "theirs", getattr(adapters, job["kind"])
        model.add_adapter(name, config=kind(**job["options"]))
        torch.manual_seed(1)
        for key, p in model.named_parameters():
            if f".adapters.{name}." in key:
                p.add_(torch.randn_like(p) * 0.1)
        model.save_adapter(job["save"], name, use_safetensors=True)
    model.set_active_adapters(name)
    print(json.dumps(model(row).logits[0].tolist()))
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SITE.exists(), reason=f"{SITE} is not here: `make test-all` installs `adapters` there"),
]


def theirs(tiny: Path, job: dict[str, object], row: list[int]) -> torch.Tensor:
    done = subprocess.run(
        [sys.executable, "-c", THEIRS, str(tiny), json.dumps(job), json.dumps(row)],
        env={**os.environ, "PYTHONPATH": str(SITE), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


def ours(base: BaseModel, expert: Expert, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return base.decoder.logits(hidden_states(base.decoder, apply(expert, base.decoder), [torch.tensor(row)]))


@pytest.mark.parametrize(
    "config",
    [
        BottleneckConfig(8, "houlsby", "swish", scaling=2.0),
        BottleneckConfig(8, "pfeiffer", "relu"),
        BottleneckConfig(16, "houlsby", "gelu", first_layer=1),
    ],
    ids=str,
)
def test_an_adapter_of_ours_computes_the_same_in_adapterhub(
    config: BottleneckConfig, tiny: Path, tiny_base: BaseModel, tmp_path: Path
) -> None:
    expert = fresh(config, tiny_base.decoder)
    for w in expert.weights.values():
        w.add_(torch.randn(w.shape, generator=torch.Generator().manual_seed(w.numel())) * 0.1)
    save(expert, tmp_path, "tiny", tiny_base.decoder.config)
    (row,) = random_rows(tiny_base, [30])
    found = theirs(tiny, {"load": str(tmp_path)}, row)
    torch.testing.assert_close(found, ours(tiny_base, expert, row), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("DoubleSeqBnConfig", {"reduction_factor": 8}), ("SeqBnConfig", {"reduction_factor": 4, "leave_out": [0]})],
)
def test_an_adapter_made_by_adapterhub_computes_the_same_here(
    kind: str, options: dict[str, object], tiny: Path, tiny_base: BaseModel, tmp_path: Path
) -> None:
    (row,) = random_rows(tiny_base, [30])
    found = theirs(tiny, {"kind": kind, "options": options, "save": str(tmp_path)}, row)
    expert = load(tmp_path, tiny_base.decoder.config)
    torch.testing.assert_close(found, ours(tiny_base, expert, row), atol=1e-4, rtol=1e-4)
