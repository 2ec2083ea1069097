"""A merged expert is a whole model that computes the same: in transformers, in llama.cpp, and read back by us."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from typer.testing import CliRunner

from coterie.business import Business
from coterie.cli.main import app
from coterie.engine.engine import Engine
from coterie.engine.request import Sampling
from coterie.errors import CoterieError, ModelError
from coterie.experts import lora as loras
from coterie.experts.kinds import apply, save
from coterie.experts.kinds import load as load_expert
from coterie.experts.library import ExpertFacts
from coterie.experts.lora import LoraConfig
from coterie.export import merge_expert
from coterie.model.export import merge, write_gguf
from coterie.model.load import BaseModel, load
from coterie.model.save import save_model
from support import logits_of, random_rows, reference_model

ALL = tuple(loras.BLOCKS)


def expert_of(base: BaseModel, config: LoraConfig) -> Any:
    """A LoRA expert whose matrices are not zero."""
    lora = loras.fresh(config, base.decoder)
    generator = torch.Generator().manual_seed(1)
    for name, w in lora.weights.items():
        if ".lora_B." in name:
            w.copy_(torch.randn(w.shape, generator=generator) * 0.1)
    return lora


@pytest.fixture
def shop_with_expert(shop: Path, tiny_base: BaseModel) -> Business:
    """The shop with a strong expert `bold` in its library."""
    business = Business.open(shop)
    lora = expert_of(tiny_base, LoraConfig(4, 16, ALL))
    business.library.publish(
        ExpertFacts("bold", base="tiny"), lambda to: save(lora, to, "tiny", tiny_base.decoder.config)
    )
    return business


@pytest.mark.parametrize(
    "config",
    [LoraConfig(8, 16, ALL), LoraConfig(4, 8, ("q_proj", "up_proj"), rslora=True), LoraConfig(4, 8, ALL, dora=True)],
)
def test_a_merged_expert_computes_what_base_and_expert_do(config: LoraConfig, tiny_base: BaseModel) -> None:
    change = apply(expert_of(tiny_base, config), tiny_base.decoder).change
    rows = random_rows(tiny_base, [20, 7])
    wanted, found = logits_of(tiny_base, rows, change), logits_of(merge(tiny_base, change), rows)
    assert (wanted[0] - logits_of(tiny_base, rows)[0]).abs().max() > 0.05
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_merging_leaves_biases_and_families_right(families: Callable[[str], Path], tmp_path: Path) -> None:
    """Qwen2 has biases; Qwen3 has norms of q and k."""
    for family in ("qwen2", "qwen3"):
        base = load(families(family), torch.float32)
        change = apply(expert_of(base, LoraConfig(4, 16, ALL)), base.decoder).change
        (row,) = random_rows(base, [30])
        wanted, found = logits_of(base, [row], change)[0], logits_of(merge(base, change), [row])[0]
        assert (wanted - logits_of(base, [row])[0]).abs().max() > 0.05
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_transformers_loads_a_merged_expert_with_the_logits_of_base_and_expert(
    shop_with_expert: Business, tiny_base: BaseModel, tmp_path: Path
) -> None:
    folder = merge_expert(shop_with_expert, "bold", tmp_path / "whole")
    (row,) = random_rows(tiny_base, [30])
    lora = load_expert(shop_with_expert.library.folder("bold"), tiny_base.decoder.config)
    (wanted,) = logits_of(tiny_base, [row], apply(lora, tiny_base.decoder).change)
    with torch.no_grad():
        found = reference_model(folder)(torch.tensor([row])).logits[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hi there, wörld 42"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == tiny_base.chat(
        messages
    )
    assert tokenizer.encode("Hi there, wörld 42", add_special_tokens=False) == tiny_base.encode("Hi there, wörld 42")
    assert "bold" in (folder / "README.md").read_text()


def settings_of(family: str) -> dict[str, Any]:
    return {
        "vocab_size": 392, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 256, "initializer_range": 0.2,
        "tie_word_embeddings": family != "qwen2", "eos_token_id": 1, "bos_token_id": 0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def families(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model of a family, as transformers saves it; biases and stretched positions where it has them."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp("families") / family
        others = {
            "mistral": transformers.MistralConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config
        }  # fmt: skip
        config = others.get(family, transformers.LlamaConfig)(**settings_of(family))
        if family == "llama3":
            config.rope_parameters = {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }  # fmt: skip
        if family == "linear":
            config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, w in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.normal_(w, 1.0 if "norm" in name else 0.0, 0.2)
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (tiny / file).exists():
                (folder / file).write_text((tiny / file).read_text())
        return folder

    return make


FAMILIES = ("llama", "llama3", "linear", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_same_in_transformers_and_here(
    family: str, families: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load(families(family), torch.float32)
    save_model(base, tmp_path / "saved")
    back = load(tmp_path / "saved", torch.float32)
    (row,) = random_rows(base, [150])
    (wanted,) = logits_of(base, [row])
    assert torch.equal(logits_of(back, [row])[0], wanted)
    with torch.no_grad():
        found = reference_model(tmp_path / "saved")(torch.tensor([row])).logits[0]
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)
    assert (back.eos, back.bos_token, back.eos_token, back.template) == (
        base.eos, base.bos_token, base.eos_token, base.template
    )  # fmt: skip


def llama_cpp(model: Path, prompt: str, tokens: int, lora: Path | None = None) -> str:
    """What llama.cpp says after `prompt`, always taking the likeliest token."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's wheel is among the test dependencies")
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, -1
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    answer = xllamacpp.Server(params).handle_completions({"prompt": prompt, "n_predict": tokens, "temperature": 0.0})
    return whole_characters(answer["choices"][0]["text"])


def whole_characters(text: str) -> str:
    """A random model's last token may be half a character, which llama.cpp and we show differently."""
    return text.rstrip("\ufffd")


def greedy(base: BaseModel, prompt: str, tokens: int) -> str:
    """What our engine says after `prompt`, as long as it is sure: up to the first tie, which rounding may decide."""
    engine = Engine(base, slots=1, context=512)
    try:
        generation = engine.submit(base.encode(prompt), Sampling(max_tokens=tokens, logprobs=2))
        said = [token for piece in generation for token in piece.tokens]
    finally:
        engine.close()
    ties = [i for i, t in enumerate(said) if t.top[0][1] - t.top[1][1] < 0.01]
    return whole_characters(base.tokenizer.decode([t.id for t in said][: ties[0] if ties else None]))


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_goes_on_as_we_do_and_we_read_the_file_back(
    family: str, families: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load(families(family), torch.float32)
    write_gguf(base, tmp_path / "m.gguf", "f32")
    prompt = "Which color has the sky? 123 <|im_start|>user\nHello, wörld<|im_end|>\n"
    prompts = [prompt, prompt * 3, "The quick brown"]
    said = [greedy(base, p, 20) for p in prompts]
    assert len("".join(said)) > 20
    for p, ours in zip(prompts, said, strict=True):
        assert llama_cpp(tmp_path / "m.gguf", p, 20).startswith(ours)
    back = load(tmp_path / "m.gguf", torch.float32)
    assert back.encode(prompt) == base.encode(prompt)
    (row,) = random_rows(base, [100])
    torch.testing.assert_close(logits_of(back, [row])[0], logits_of(base, [row])[0], atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_llama_cpp_answers_as_we_do_with_the_real_model(smol_path: Path, tmp_path: Path) -> None:
    base = load(smol_path, torch.float32)
    write_gguf(base, tmp_path / "m.gguf", "f32")
    prompt = base.chat([{"role": "user", "content": "Name three colors of 42 apples."}])
    said = greedy(base, prompt, 40)
    assert len(said) > 20
    assert llama_cpp(tmp_path / "m.gguf", prompt, 40).startswith(said)


@pytest.mark.parametrize(("kind", "close"), [("f32", 0.0), ("f16", 1e-3), ("bf16", 4e-3), ("q8_0", 5e-3)])
def test_each_kind_of_gguf_keeps_the_weights_as_closely_as_it_can(
    kind: str, close: float, tiny_base: BaseModel, tmp_path: Path
) -> None:
    write_gguf(tiny_base, tmp_path / "m.gguf", kind)
    back = load(tmp_path / "m.gguf", torch.float32)
    assert (back.eos, back.bos_token, back.template) == (tiny_base.eos, tiny_base.bos_token, tiny_base.template)
    for name, w in tiny_base.decoder.weights.items():
        found = back.decoder.weights[name]
        assert float((found - w).abs().max()) <= close * float(w.abs().max()), name
    tensors = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert tensors["blk.0.attn_q.weight"] == kind
    assert tensors["output_norm.weight"] == "f32"


def test_llama_cpp_lays_an_exported_adapter_over_the_base_as_we_do(
    shop_with_expert: Business, tiny_base: BaseModel, tmp_path: Path
) -> None:
    write_gguf(tiny_base, tmp_path / "base.gguf", "f32")
    run = CliRunner().invoke(
        app, ["experts", "export", "bold", str(tmp_path / "bold.gguf"), "-f", str(shop_with_expert.folder),
              "--format", "gguf-lora", "--json"],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    lora = load_expert(shop_with_expert.library.folder("bold"), tiny_base.decoder.config)
    whole = merge(tiny_base, apply(lora, tiny_base.decoder).change)
    prompt = "Name the color of a ripe tomato:"
    said = greedy(whole, prompt, 24)
    assert len(said) > 10
    assert not said.startswith(greedy(tiny_base, prompt, 24)[:5])
    assert llama_cpp(tmp_path / "base.gguf", prompt, 24, tmp_path / "bold.gguf").startswith(said)


def test_the_command_merges_into_a_folder_and_into_gguf(
    shop_with_expert: Business, tiny_base: BaseModel, tmp_path: Path
) -> None:
    folder = str(shop_with_expert.folder)
    for target, more in ((tmp_path / "hf", []), (tmp_path / "m.gguf", ["--gguf", "q8_0"])):
        run = CliRunner().invoke(app, ["experts", "merge", "bold", str(target), "-f", folder, "--json", *more])
        assert run.exit_code == 0, run.output
        assert json.loads(run.stdout) == {"path": str(target), "note": ""}
        assert load(target).name in ("hf", "m")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "nobody", "OUT"], "no expert 'nobody'"),
        (["merge", "bold", "OUT", "--gguf", "q2"], "unknown kind of GGUF 'q2'"),
        (["merge", "bold", "."], "already there"),
        (["export", "bold", "OUT", "--format", "pickle"], "--format pickle"),
        (["merge", "wordy", "OUT"], "only LoRA experts"),
    ],
)
def test_a_merge_that_cannot_be_done_is_refused_in_a_sentence(
    arguments: list[str], words: str, shop_with_expert: Business, tmp_path: Path
) -> None:
    shop_with_expert.library.publish(ExpertFacts("wordy", "instruction"), lambda _to: None)
    arguments = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    run = CliRunner().invoke(app, ["experts", *arguments, "-f", str(shop_with_expert.folder)])
    assert isinstance(run.exception, CoterieError)
    assert words in str(run.exception)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(tiny: Path, tmp_path: Path) -> None:
    base = load(tiny, torch.float32)
    base.tokenizer = Tokenizer.from_str(base.tokenizer.to_str())
    base.tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="pre-tokenizer"):
        write_gguf(base, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_blocks_do_not_divide_is_kept_in_float16(tiny_base: BaseModel, tmp_path: Path) -> None:
    from coterie.model.export import _add_tensor, _write

    values = torch.linspace(-1, 1, 2 * 48).view(2, 48)
    _write(tmp_path / "odd.gguf", "llama", lambda writer: _add_tensor(writer, "odd.weight", values, "q8_0"))
    (tensor,) = gguf.GGUFReader(tmp_path / "odd.gguf").tensors
    assert tensor.tensor_type.name == "F16"
    np.testing.assert_allclose(gguf.quants.dequantize(tensor.data, tensor.tensor_type), values.numpy(), atol=1e-3)
