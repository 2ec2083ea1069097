"""What `coterie anatomy` says of a model is what transformers, torch's FLOP counter and the cache itself say."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.engine.pages import PAGE, Pages
from coterie.errors import ModelError
from coterie.model import grouped, moe
from coterie.model.anatomy import BYTES, HARDWARE, Hardware, attention_kind, estimate, examine, probe
from coterie.model.decoder import attend_packed, packed_positions
from coterie.model.load import BaseModel, load
from coterie.model.save import save_model
from coterie.model.upcycle import upcycle
from support import random_rows
from test_model import random_model
from test_moe import MIXTURES

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}), "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}), "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 32}),
}  # fmt: skip
MODELS = DENSE | {k: v for k, v in MIXTURES.items() if "Qwen2" not in k}  # which counts an expert that says nothing


def run(*arguments: object) -> Any:
    """A command's JSON."""
    done = CliRunner().invoke(app, [str(a) for a in arguments] + ["--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(done.stdout)


def counted_flops(base: BaseModel, tokens: int) -> int:
    """FLOPs of reading `tokens` tokens and scoring what follows the last, counted by torch as they are computed."""

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:  # the CPU's, which the counter does not know
        return int(sdpa_flop_count(q, k, v))

    (row,) = random_rows(base, [tokens])
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={kernel: attention})
    with torch.no_grad(), counter:
        hidden = base.decoder.forward(torch.tensor(row), packed_positions([tokens]), attend_packed([tokens]))
        base.decoder.logits(hidden[-1:])
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_flops_are_exact(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "STEP", 1)  # else rows that fill up a kernel's shape, and are thrown away, count too
    monkeypatch.setattr(grouped, "takes", lambda _: False)  # torch does not see what C computes
    family, changes = MODELS[name]
    model = random_model(tmp_path, family, **changes)
    (tmp_path / "only").mkdir()
    shutil.copy(tmp_path / "config.json", tmp_path / "only" / "config.json")
    found = examine(tmp_path / "only")  # no weights needed
    assert found.parameters == model.num_parameters()
    base = load(tmp_path, torch.float32)
    assert found.parameters == sum(w.numel() for w in base.decoder.weights.values())
    for tokens in (1, 40):
        assert found.prefill_flops(tokens) == counted_flops(base, tokens)
    assert found.flops(1) == counted_flops(base, 1)


def test_an_upcycled_model_grows_in_parameters_and_only_by_its_active_experts_in_flops(
    tiny: Path, tmp_path: Path
) -> None:
    base = upcycle(load(tiny, torch.float32), 4, "all", 1)
    save_model(base, tmp_path / "m")
    dense, sparse = examine(tiny), examine(tmp_path / "m")
    ffn, router = 3 * 64 * 128, 4 * 64
    assert sparse.parameters - dense.parameters == 2 * (3 * ffn + router)
    assert sparse.active_parameters - dense.active_parameters == 2 * router
    assert sparse.flops(10) - dense.flops(10) == 2 * 2 * router
    assert sparse.flops(10) > sparse.flops(1)


def test_smollm2_from_its_gguf(smol_path: Path, smol: BaseModel) -> None:
    """The counts of the 135M model, by its file's header, are those of its loaded weights."""
    found = examine(smol_path)
    assert found.parameters == sum(w.numel() for w in smol.decoder.weights.values()) == 134_515_008
    exact = load(smol_path, torch.float32)
    assert found.prefill_flops(24) == counted_flops(exact, 24)


def test_cache_bytes_are_those_of_the_cache(tiny: Path, tiny_base: BaseModel) -> None:
    cache = Pages(tiny_base.decoder.config, 3, 2 * PAGE, torch.bfloat16)
    held = sum(t[:-1].nbytes for t in (cache.keys, cache.values))  # the last block is nobody's
    assert examine(tiny).kv_bytes_per_token * 3 * 2 * PAGE == held


def test_weight_bytes_are_those_of_the_file(tiny: Path) -> None:
    """Of safetensors in float32, to within its header."""
    size = (tiny / "model.safetensors").stat().st_size
    assert 0 < size - examine(tiny).weight_bytes("float32") < 8192


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"num_key_value_heads": 4}, "multi-head"), ({"num_key_value_heads": 2}, "grouped-query"),
        ({"num_key_value_heads": 1}, "multi-query"), ({"sliding_window": 16}, "sliding window of 16"),
        ({"sliding_window": 4096}, "grouped-query (4 heads, 2 of keys)"),
    ],
)  # fmt: skip
def test_kinds_of_attention_are_named(changes: dict[str, Any], kind: str, tmp_path: Path) -> None:
    random_model(tmp_path, "Mistral", **{"sliding_window": None} | changes)
    found = examine(tmp_path)
    assert kind in found.attention
    assert ("sliding" in found.attention) == ("sliding" in kind)
    assert attention_kind(found.config) in found.attention


def test_speed_is_bound_by_memory_for_one_and_by_arithmetic_for_many(tiny: Path) -> None:
    found = examine(tiny)
    slow = Hardware("toy", flops=1e9, bandwidth=1e9, memory=1e9, price=3.6, source="invented")
    one = estimate(found, slow, "bfloat16", 1, 1)
    assert one.decode_tokens_per_s == pytest.approx(0.6e9 / found.step_bytes("bfloat16", 1, 1), rel=0.3)
    quick = Hardware("toy", flops=1e15, bandwidth=1e9, memory=1e9, price=3.6, source="invented")
    bound = estimate(found, quick, "bfloat16", 1, 1)
    assert bound.decode_tokens_per_s == pytest.approx(0.6e9 / found.step_bytes("bfloat16", 1, 1))
    many = estimate(found, slow, "bfloat16", 100, 64)
    assert many.decode_tokens_per_s == pytest.approx(0.6e9 / found.flops(100))
    assert one.dollars_per_million_tokens == pytest.approx(0.001 / (one.decode_tokens_per_s or 0) * 1e6)
    small = Hardware("small", 1e9, 1e9, memory=1000, price=1, source="invented")
    assert estimate(found, small, "bfloat16", 1, 1).decode_tokens_per_s is None


def test_this_machine_is_measured() -> None:
    found = probe(seconds=0.05)
    assert 1e9 < found.flops < 1e16
    assert 1e8 < found.bandwidth < 1e13
    assert found.memory > 1e8


def test_models_stand_side_by_side(tiny: Path, tmp_path: Path) -> None:
    random_model(tmp_path / "mixtral", "Mixtral", num_local_experts=4)
    found = run("anatomy", tiny, tmp_path / "mixtral" / "config.json", "--on", "L4", "--on", "H100", "--price", "2")
    assert [m["model"] for m in found] == ["tiny", "mixtral"]
    assert [m["experts"] for m in found] == [0, 4]
    assert found[1]["active_parameters"] < found[1]["parameters"]
    assert set(found[0]["weight_bytes"]) == set(BYTES)
    assert [s["hardware"] for s in found[0]["speed"]] == ["L4", "H100"]
    text = CliRunner().invoke(app, ["anatomy", str(tiny), str(tmp_path / "mixtral"), "--on", "L4"]).stdout
    for word in ("tiny", "mixtral", "2 of 4", "KV cache per token", "FLOPs per token", "on L4 (estimate)"):
        assert word in text


def test_every_hardware_names_its_source() -> None:
    assert all(h.source and h.flops > h.bandwidth and h.price > 0 for h in HARDWARE.values())


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ("{", "cannot be read"), ("[]", "not the configuration"), ("{}", "model_type"),
        ('{"model_type": "mixtral"}', "max_position_embeddings"), ('{"model_type": "gpt2"}', "known: llama"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_used_is_refused_by_name(config: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=word) as caught:
        examine(tmp_path)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["nowhere"], "nowhere"), (["TINY", "--on", "abacus"], "H100"), (["TINY", "--dtype", "x"], "int4")],
)  # fmt: skip
def test_bad_arguments_get_one_clear_sentence_and_exit_2(
    arguments: list[str], word: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from coterie.cli.main import main

    monkeypatch.setattr("sys.argv", ["coterie", "anatomy", *(str(tiny) if a == "TINY" else a for a in arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert word in capsys.readouterr().err
