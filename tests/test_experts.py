"""Experts of every kind compute what `peft` computes, travel to and from it, and share a batch untouched."""

import copy
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
from coterie.experts import lora
from coterie.experts.adapter import BottleneckConfig
from coterie.experts.expert import CONFIG, Expert
from coterie.experts.kinds import apply, save
from coterie.experts.kinds import load as load_expert
from coterie.experts.lora import LoraConfig
from coterie.experts.mixture import lay, mixed
from coterie.experts.prefix import PrefixConfig
from coterie.experts.prompt import PromptConfig
from coterie.model.load import BaseModel, load
from coterie.tuning.forward import completion_loss
from support import fresh, groups_of, logits_of, logits_with, random_rows, trained

ALL = tuple(lora.BLOCKS)
CONFIGS: dict[str, Any] = {
    "all projections": LoraConfig(8, 16, ALL),
    "rank-stabilised": LoraConfig(4, 16, ALL, rslora=True),
    "attention only": LoraConfig(4, 8, ("q_proj", "v_proj")),
    "o and down": LoraConfig(2, 8, ("o_proj", "down_proj")),
    "one half of a fused site": LoraConfig(4, 8, ("k_proj", "up_proj")),
    "DoRA": LoraConfig(4, 8, ALL, dora=True),
    "DoRA on one half of a fused site": LoraConfig(4, 8, ("v_proj", "gate_proj"), dora=True),
    "upper layer only": LoraConfig(4, 8, ALL, first_layer=1),
    "soft prompt": PromptConfig(5),
    "prefix": PrefixConfig(5),
    "Houlsby adapter": BottleneckConfig(8, "houlsby", "swish"),
    "Pfeiffer adapter": BottleneckConfig(6, "pfeiffer", "relu", scaling=2.0),
    "adapter on the upper layer": BottleneckConfig(6, "houlsby", "gelu", first_layer=1),
}
PEFT = [name for name, config in CONFIGS.items() if config.kind != "adapter"]
ROWS = [name for name, config in CONFIGS.items() if config.kind in ("lora", "adapter")]  # those that change products


def peft_logits(tiny: Path, adapter: Path, row: list[int]) -> torch.Tensor:
    model = transformers.LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, adapter).eval()(torch.tensor([row])).logits[0, -len(row) :]


@pytest.mark.parametrize("name", PEFT)
def test_an_expert_of_ours_computes_the_same_in_peft(
    name: str, tiny: Path, tiny_base: BaseModel, tmp_path: Path
) -> None:
    expert = trained(CONFIGS[name], tiny_base)
    save(expert, tmp_path, str(tiny), tiny_base.decoder.config)
    (row,) = random_rows(tiny_base, [30])
    (found,) = logits_with(tiny_base, [row], expert)
    assert (found - logits_of(tiny_base, [row])[0]).abs().max() > 0.05
    torch.testing.assert_close(found, peft_logits(tiny, tmp_path, row), atol=1e-4, rtol=1e-4)


PEFT_MADE = {
    "all targets": peft.LoraConfig(r=4, lora_alpha=10, target_modules=list(ALL), init_lora_weights=False),
    "all-linear": peft.LoraConfig(r=4, lora_alpha=10, target_modules="all-linear", init_lora_weights=False),
    "rslora": peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=["q_proj", "v_proj"], use_rslora=True, init_lora_weights=False
    ),
    "dora": peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=["q_proj", "up_proj"], use_dora=True, init_lora_weights=False
    ),
    "upper layers": peft.LoraConfig(
        r=4, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers", init_lora_weights=False
    ),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=6),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=6),
}  # fmt: skip


@pytest.mark.parametrize("name", PEFT_MADE)
def test_an_expert_made_by_peft_computes_the_same_here(
    name: str, tiny: Path, tiny_base: BaseModel, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    config = copy.deepcopy(PEFT_MADE[name])
    config.task_type = "CAUSAL_LM"
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    (row,) = random_rows(tiny_base, [30])
    (found,) = logits_with(tiny_base, [row], load_expert(tmp_path, tiny_base.decoder.config))
    assert (found - logits_of(tiny_base, [row])[0]).abs().max() > 0.05
    torch.testing.assert_close(found, peft_logits(tiny, tmp_path, row), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_expert_comes_back_from_disk_as_it_was_saved(name: str, tiny_base: BaseModel, tmp_path: Path) -> None:
    expert = trained(CONFIGS[name], tiny_base)
    save(expert, tmp_path, "tiny", tiny_base.decoder.config)
    back = load_expert(tmp_path, tiny_base.decoder.config)
    assert back.config == expert.config
    assert back.weights.keys() == expert.weights.keys()
    assert all(torch.equal(back.weights[k], w) for k, w in expert.weights.items())


@given(owners=st.lists(st.integers(-1, len(ROWS) - 1), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_a_mixed_batch_gives_each_row_what_its_own_expert_gives_alone(
    tiny_base: BaseModel, owners: list[int], seed: int
) -> None:
    """Experts of different kinds, sizes and places, and rows of the base model (-1), side by side."""
    experts = [trained(CONFIGS[name], tiny_base, i) for i, name in enumerate(ROWS)]
    rows = random_rows(tiny_base, [5 + i for i in range(len(owners))], seed)
    of_tokens = torch.tensor(owners).repeat_interleave(torch.tensor([len(r) for r in rows]))
    laid = [lay(e, tiny_base.decoder) for e in experts]
    together = logits_of(tiny_base, rows, mixed(groups_of(of_tokens, None, laid), tiny_base.decoder))
    for row, owner, found in zip(rows, owners, together, strict=True):
        alone = logits_with(tiny_base, [row], experts[owner] if owner >= 0 else None)
        torch.testing.assert_close(found, alone[0], atol=1e-4, rtol=1e-4)


def test_a_mixed_batch_in_the_products_own_precision_is_close_to_float32(tiny: Path, tiny_base: BaseModel) -> None:
    """As the engine serves: weights packed, bfloat16 where the machine has it."""
    base = load(tiny, packed=True)
    experts = [trained(CONFIGS[name], tiny_base, i) for i, name in enumerate(ROWS)]
    rows = random_rows(base, [20, 20, 20, 20])
    owners = torch.tensor([1, -1, 4, 8]).repeat_interleave(20)
    found, exact = (
        torch.cat(logits_of(b, rows, mixed(groups_of(owners, None, [lay(e, b.decoder) for e in experts]), b.decoder)))
        for b in (base, tiny_base)
    )
    plain = torch.cat(logits_of(tiny_base, rows))
    changed = owners >= 0
    assert (found - exact).abs().mean() < 0.1 * (exact - plain)[changed].abs().mean()


@pytest.mark.parametrize("name", ROWS)
def test_a_fresh_expert_changes_nothing(name: str, tiny_base: BaseModel) -> None:
    rows = random_rows(tiny_base, [20])
    expert = fresh(CONFIGS[name], tiny_base)
    torch.testing.assert_close(logits_with(tiny_base, rows, expert)[0], logits_of(tiny_base, rows)[0])


@pytest.mark.parametrize("name", ["soft prompt", "prefix"])
def test_a_fresh_soft_prompt_or_prefix_is_the_words_it_starts_from(name: str, tiny_base: BaseModel) -> None:
    (row,) = random_rows(tiny_base, [20])
    words = (tiny_base.encode("Hello, Ada") * 5)[:5]
    (found,) = logits_with(tiny_base, [row], fresh(CONFIGS[name], tiny_base))
    torch.testing.assert_close(found, logits_of(tiny_base, [words + row])[0][5:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_of_an_expert_learns(name: str, tiny_base: BaseModel) -> None:
    """Gradients reach all of them, as differences of the loss say they should."""
    expert = trained(CONFIGS[name], tiny_base)
    rows = [(torch.tensor(r), torch.arange(len(r)) > 8) for r in random_rows(tiny_base, [20, 31])]
    for w in expert.weights.values():
        w.requires_grad_()
    loss, count = completion_loss(tiny_base.decoder, apply(expert, tiny_base.decoder), rows)
    assert count == 11 + 22
    loss.backward()
    assert all(w.grad is not None and float(w.grad.abs().sum()) > 0 for w in expert.weights.values())
    down = {k: w.detach() - 1e-3 * w.grad / w.grad.norm() for k, w in expert.weights.items()}  # type: ignore[operator]
    less, _ = completion_loss(tiny_base.decoder, apply(Expert(expert.config, down), tiny_base.decoder), rows)
    wanted = -1e-3 * sum(float(w.grad.norm()) for w in expert.weights.values() if w.grad is not None)
    if not getattr(expert.config, "dora", False):  # whose norms count as constants
        assert float(less.detach() - loss.detach()) == pytest.approx(wanted, rel=0.2)


@pytest.fixture(scope="module")
def saved(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(trained(CONFIGS["attention only"], tiny_base), folder, "tiny", tiny_base.decoder.config)
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "lacks.*lora_magnitude_vector"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
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
    facts = json.loads((saved / CONFIG).read_text()) | change
    shutil.copy(saved / lora.WEIGHTS, tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({k: v for k, v in facts.items() if v != "absent"}))
    with pytest.raises(ModelError, match=words) as caught:
        load_expert(tmp_path, tiny_base.decoder.config)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (CONFIG, None), (CONFIG, b"{"), (CONFIG, b"[]"), (CONFIG, b"\xff\xfe"),
        (lora.WEIGHTS, None), (lora.WEIGHTS, b""), (lora.WEIGHTS, b"cut"), (lora.WEIGHTS, b"\x00" * 100),
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
        load_expert(tmp_path, tiny_base.decoder.config)


def test_an_expert_of_another_base_model_is_refused(saved: Path, tiny_base: BaseModel, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    weights = load_file(saved / lora.WEIGHTS)
    save_file(
        {k: w[:, :48].contiguous() if ".lora_A." in k else w for k, w in weights.items()}, tmp_path / lora.WEIGHTS
    )
    with pytest.raises(ModelError, match="this base needs"):
        load_expert(tmp_path, tiny_base.decoder.config)
    save_file({k: w for k, w in weights.items() if "layers.1" not in k}, tmp_path / lora.WEIGHTS)
    with pytest.raises(ModelError, match="trained for another base model"):
        load_expert(tmp_path, tiny_base.decoder.config)
