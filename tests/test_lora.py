"""LoRA experts compute what `peft` computes, travel to and from it, and share a batch without touching each other."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from coterie.errors import ModelError
from coterie.experts import lora as loras
from coterie.experts.lora import Lora, LoraConfig, LoraStack, training_change
from coterie.model.load import BaseModel, load
from support import logits_of, random_rows

ALL = tuple(loras.BLOCKS)
CONFIGS = {
    "all projections": LoraConfig(8, 16, ALL),
    "rank-stabilised": LoraConfig(4, 16, ALL, rslora=True),
    "attention only": LoraConfig(4, 8, ("q_proj", "v_proj")),
    "o and down": LoraConfig(2, 8, ("o_proj", "down_proj")),
    "one half of a fused site": LoraConfig(4, 8, ("k_proj", "up_proj")),
}


def trained(config: LoraConfig, base: BaseModel, seed: int = 0) -> Lora:
    """An expert as if it had been trained: no matrix is zero."""
    lora = loras.fresh(config, base.decoder.config, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, w in lora.weights.items():
        if ".lora_B." in name:
            w.copy_(torch.randn(w.shape, generator=generator) * 0.1)
    return lora


def peft_logits(tiny: Path, adapter: Path, row: list[int]) -> torch.Tensor:
    model = transformers.LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, adapter).eval()(torch.tensor([row])).logits[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_expert_of_ours_computes_the_same_in_peft(
    name: str, tiny: Path, tiny_base: BaseModel, tmp_path: Path
) -> None:
    lora = trained(CONFIGS[name], tiny_base)
    loras.save(lora, tmp_path, str(tiny))
    (row,) = random_rows(tiny_base, [30])
    (found,) = logits_of(tiny_base, [row], training_change(lora, tiny_base.decoder))
    assert (found - logits_of(tiny_base, [row])[0]).abs().max() > 0.05
    torch.testing.assert_close(found, peft_logits(tiny, tmp_path, row), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("targets", [list(ALL), ["q_proj", "v_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_an_expert_made_by_peft_computes_the_same_here(
    targets: list[str] | str, rslora: bool, tiny: Path, tiny_base: BaseModel, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=targets, use_rslora=rslora, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    (row,) = random_rows(tiny_base, [30])
    lora = loras.load(tmp_path, tiny_base.decoder.config)
    (found,) = logits_of(tiny_base, [row], training_change(lora, tiny_base.decoder))
    assert (found - logits_of(tiny_base, [row])[0]).abs().max() > 0.05
    torch.testing.assert_close(found, peft_logits(tiny, tmp_path, row), atol=1e-4, rtol=1e-4)


def test_an_expert_comes_back_from_disk_as_it_was_saved(tiny_base: BaseModel, tmp_path: Path) -> None:
    for config in CONFIGS.values():
        lora = trained(config, tiny_base)
        loras.save(lora, tmp_path, "tiny")
        back = loras.load(tmp_path, tiny_base.decoder.config)
        assert back.config == config
        assert back.weights.keys() == lora.weights.keys()
        assert all(torch.equal(back.weights[k], w) for k, w in lora.weights.items())


@given(owners=st.lists(st.integers(-1, len(CONFIGS) - 1), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_a_mixed_batch_gives_each_row_what_its_own_expert_gives_alone(
    tiny_base: BaseModel, owners: list[int], seed: int
) -> None:
    """Experts of different ranks and targets, and rows of the base model (-1), side by side."""
    experts = [trained(config, tiny_base, i) for i, config in enumerate(CONFIGS.values())]
    rows = random_rows(tiny_base, [5 + i for i in range(len(owners))], seed)
    of_tokens = torch.tensor(owners).repeat_interleave(torch.tensor([len(r) for r in rows]))
    mixed = logits_of(tiny_base, rows, LoraStack(experts, tiny_base.decoder).change(of_tokens))
    for row, owner, found in zip(rows, owners, mixed, strict=True):
        alone = training_change(experts[owner], tiny_base.decoder) if owner >= 0 else None
        torch.testing.assert_close(found, logits_of(tiny_base, [row], alone)[0], atol=1e-4, rtol=1e-4)


def test_a_mixed_batch_in_the_products_own_precision_is_close_to_float32(tiny: Path, tiny_base: BaseModel) -> None:
    """As the engine serves: weights packed, bfloat16 where the machine has it."""
    base = load(tiny, packed=True)
    experts = [trained(config, tiny_base, i) for i, config in enumerate(CONFIGS.values())]
    rows = random_rows(base, [20, 20, 20])
    owners = torch.tensor([1, -1, 4]).repeat_interleave(20)
    found = torch.cat(logits_of(base, rows, LoraStack(experts, base.decoder).change(owners)))
    exact = torch.cat(logits_of(tiny_base, rows, LoraStack(experts, tiny_base.decoder).change(owners)))
    plain = torch.cat(logits_of(tiny_base, rows))
    changed = owners >= 0
    assert (found - exact).abs().mean() < 0.1 * (exact - plain)[changed].abs().mean()


def test_a_fresh_expert_changes_nothing(tiny_base: BaseModel) -> None:
    rows = random_rows(tiny_base, [20])
    lora = loras.fresh(CONFIGS["all projections"], tiny_base.decoder.config)
    assert torch.equal(
        logits_of(tiny_base, rows, training_change(lora, tiny_base.decoder))[0], logits_of(tiny_base, rows)[0]
    )


@pytest.fixture(scope="module")
def saved(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    loras.save(trained(CONFIGS["attention only"], tiny_base), folder, "tiny")
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias='all'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"target_modules": ["c_attn"]}, "c_attn"),
        ({"target_modules": ".*_proj"}, "target_modules"),
        ({"target_modules": ["q_proj", "k_proj"]}, "lacks.*k_proj"),
        ({"target_modules": ["q_proj"]}, "v_proj.*not a weight"),
        ({"r": 8}, r"is \(4, 64\), this base needs \(8, 64\)"),
        ({"r": "absent"}, "'r'"),
        ({"lora_alpha": "much"}, "lora_alpha"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_an_adapter_that_cannot_be_served_is_refused_by_name(
    change: dict[str, Any], words: str, saved: Path, tiny_base: BaseModel, tmp_path: Path
) -> None:
    facts = json.loads((saved / loras.CONFIG).read_text()) | change
    shutil.copy(saved / loras.WEIGHTS, tmp_path)
    (tmp_path / loras.CONFIG).write_text(json.dumps({k: v for k, v in facts.items() if v != "absent"}))
    with pytest.raises(ModelError, match=words) as caught:
        loras.load(tmp_path, tiny_base.decoder.config)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (loras.CONFIG, None), (loras.CONFIG, b"{"), (loras.CONFIG, b"[]"), (loras.CONFIG, b"\xff\xfe"),
        (loras.WEIGHTS, None), (loras.WEIGHTS, b""), (loras.WEIGHTS, b"cut"), (loras.WEIGHTS, b"\x00" * 100),
    ],
)  # fmt: skip
def test_a_damaged_adapter_is_refused_by_name(
    file: str, content: bytes | None, saved: Path, tiny_base: BaseModel, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelError, match=file):
        loras.load(tmp_path, tiny_base.decoder.config)


def test_an_expert_of_another_base_model_is_refused(saved: Path, tiny_base: BaseModel, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    weights = load_file(saved / loras.WEIGHTS)
    save_file(
        {k: w[:, :48].contiguous() if ".lora_A." in k else w for k, w in weights.items()}, tmp_path / loras.WEIGHTS
    )
    with pytest.raises(ModelError, match="this base needs"):
        loras.load(tmp_path, tiny_base.decoder.config)
    save_file({k: w for k, w in weights.items() if "layers.1" not in k}, tmp_path / loras.WEIGHTS)
    with pytest.raises(ModelError, match="trained for another base model"):
        loras.load(tmp_path, tiny_base.decoder.config)
