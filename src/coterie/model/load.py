"""Load a base model: a Hugging Face directory (safetensors) or a GGUF file, with its tokenizer and template."""

import json
import re
import struct
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import Template, TemplateRuntimeError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from coterie.errors import DataError, ModelError
from coterie.model import gguf_file, memory
from coterie.model.decoder import Decoder, ModelConfig
from coterie.model.hf import DENSE, Facts, attention_names, config_of, expert_names, null_shared_expert, router_name

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def _compile(template: str) -> Template:
    """With what Hugging Face's templates may use: loop controls, raise_exception, a `tojson` that escapes nothing."""

    def refuse(message: str) -> None:
        raise TemplateRuntimeError(message)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.globals["raise_exception"] = refuse
    sandbox.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    return sandbox.from_string(template)


@dataclass
class BaseModel:
    """A decoder with what turns text into tokens and back."""

    name: str
    decoder: Decoder
    tokenizer: Tokenizer
    template: str
    eos: frozenset[int]
    bos_token: str = ""
    eos_token: str = ""

    def chat(self, messages: list[dict[str, str]], prompt: bool = True) -> str:
        """The conversation as text, by the model's chat template, in a sandbox. Only the template sets marks."""
        said = [{field: self.unmarked(text) for field, text in message.items()} for message in messages]
        try:
            return _compile(self.template).render(
                messages=said, add_generation_prompt=prompt, bos_token=self.bos_token, eos_token=self.eos_token
            )
        except Exception as error:  # a template is a program that came with the model: it may fail in any way
            raise DataError(f"the chat template of {self.name} refuses these messages: {error}") from error

    def unmarked(self, text: str) -> str:
        """`text` with a blank in whatever the tokenizer would read as a mark: `<|im_end|>` would end the message that
        holds it, and what follows would be somebody else's words."""
        return self._mark.sub(r"\1 ", text)

    @cached_property
    def _mark(self) -> re.Pattern[str]:
        """The first character of a special token; of each, where they overlap."""
        special = [re.escape(t.content) for t in self.tokenizer.get_added_tokens_decoder().values() if t.special]
        return re.compile(rf"(?=(?:{'|'.join(special)}))(.)" if special else "()(?!)", re.DOTALL)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def default_dtype() -> torch.dtype:
    """bfloat16 on CUDA and on CPUs with the instructions, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16
    flags = Path("/proc/cpuinfo")
    has = flags.exists() and any(f in flags.read_text() for f in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if has else torch.float32


def load(path: Path, dtype: torch.dtype | None = None, packed: bool = False) -> BaseModel:
    """Read the model at `path` (a directory with config.json, or a .gguf file).

    Raises ModelError, naming the file, when it is missing, truncated or of an unknown family.
    """
    dtype = dtype or default_dtype()
    if path.is_dir() and not (path / "config.json").exists():
        ggufs = sorted(path.glob("*.gguf"))
        if not ggufs:
            raise ModelError(f"{path}: no config.json and no .gguf in this directory")
        path = ggufs[0]
    if not path.exists():
        raise ModelError(f"{path}: no such model; `coterie pull` fetches one")
    base = (_load_gguf if path.suffix == ".gguf" else _load_hf)(path, dtype, packed)
    memory.give_back()
    return base


def _fuse(config: ModelConfig, raw: dict[str, Tensor], dtype: torch.dtype, packed: bool, where: Path) -> Decoder:
    """Hugging Face names to ours, with the projections of a site stacked."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def take(name: str, *shape: int, kind: torch.dtype = dtype) -> Tensor:
        if name not in raw:
            raise ModelError(f"{where}: the weights lack {name}: is the download complete?")
        if shape and tuple(raw[name].shape) != shape:
            raise ModelError(f"{where}: {name} is {tuple(raw[name].shape)}, its configuration says {shape}")
        return raw[name].to(device, kind)

    weights = {
        "embed": take("model.embed_tokens.weight", config.vocab, config.width),
        "final_norm": take("model.norm.weight", config.width),
    }
    if not config.tied:
        weights["head"] = take("lm_head.weight", config.vocab, config.width)
    for n in range(config.layers):
        prefix = f"model.layers.{n}."
        weights[f"{n}.attn_norm"] = take(prefix + "input_layernorm.weight")
        weights[f"{n}.ffn_norm"] = take(prefix + "post_attention_layernorm.weight")
        if config.qk_norm:
            weights[f"{n}.q_norm"] = take(prefix + "self_attn.q_norm.weight")
            weights[f"{n}.k_norm"] = take(prefix + "self_attn.k_norm.weight")
        for site in config.dense_sites(n):
            sizes = {attention_names(n, site) + p: size for p, size in config.site_outputs(site)}
            wide = config.site_input(site)
            weights[f"{n}.{site}"] = torch.cat([take(x + ".weight", size, wide) for x, size in sizes.items()])
            if next(iter(sizes)) + ".bias" in raw:
                weights[f"{n}.{site}.bias"] = torch.cat([take(x + ".bias", size) for x, size in sizes.items()])
        if n in config.sparse:
            if not null_shared_expert(raw, n):
                raise ModelError(f"{where}: layer {n} has an expert shared by all tokens, which is not computed")
            inner = config.expert_ffn or config.ffn
            names = [expert_names(config.family, n, e) for e in range(config.experts)]
            pairs = [torch.cat([take(x, inner, config.width) for x in halves]) for *halves, _ in names]
            weights[f"{n}.experts.gate_up"] = torch.stack(pairs)
            weights[f"{n}.experts.down"] = torch.stack([take(down, config.width, inner) for *_, down in names])
            router = take(router_name(config.family, n), config.experts, config.width, kind=torch.float32)
            weights[f"{n}.router"] = router
    return Decoder(config, weights, packed)


def _load_hf(path: Path, dtype: torch.dtype, packed: bool) -> BaseModel:
    try:
        hf = Facts(json.loads((path / "config.json").read_text("utf-8")), path / "config.json")
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        extra = path / "tokenizer_config.json"
        settings = json.loads(extra.read_text("utf-8")) if extra.exists() else {}
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(
            f"{path}: config.json, tokenizer.json or tokenizer_config.json cannot be read: {error}"
        ) from error
    config = config_of(hf)
    raw: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as f:
                raw.update({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ModelError(f"{file}: truncated or not safetensors ({error}); pull it again") from error
    if not raw:
        raise ModelError(f"{path}: no .safetensors here; weights in pickle files (.bin, .pt) are not opened, because "
                         "they can run programs: convert them")  # fmt: skip
    decoder = _fuse(config, raw, dtype, packed, path)
    mapped = {w.data_ptr() for w in raw.values()}  # a file that changes later must not change what answers
    decoder.weights.update({name: w.clone() for name, w in decoder.weights.items() if w.data_ptr() in mapped})
    jinja = path / "chat_template.jinja"
    template = jinja.read_text() if jinja.exists() else settings.get("chat_template", CHATML)
    eos_ids = hf.get("eos_token_id")
    ends = set(eos_ids if isinstance(eos_ids, list) else [eos_ids])
    eos_token = _text(settings.get("eos_token"))
    ends |= {tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id(eos_token)}
    return BaseModel(
        path.name, decoder, tokenizer, template, frozenset(ends - {None}),
        bos_token=_text(settings.get("bos_token")), eos_token=eos_token,
    )  # fmt: skip


def _text(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""


GGUF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip


def gguf_config(path: Path) -> tuple[ModelConfig, Facts, dict[str, gguf_file.GgufTensor]]:
    """The decoder that a GGUF file describes, all its facts, and its tensors by name, not read yet."""
    try:
        facts, tensors = gguf_file.read(path)
        meta = Facts(facts, path)
    except (ValueError, KeyError, OSError, MemoryError, struct.error) as error:
        raise ModelError(f"{path}: truncated or not GGUF ({error}); pull it again") from error
    family = meta["general.architecture"]
    if family not in DENSE:
        raise ModelError(f"{path}: architecture {family!r}; known: {', '.join(DENSE)}")

    def fact(key: str, *default: Any) -> Any:
        return meta.get(f"{family}.{key}", *default) if default else meta[f"{family}.{key}"]

    heads, width, context = fact("attention.head_count"), fact("embedding_length"), fact("context_length")
    scaling: dict[str, Any] = {}
    if fact("rope.scaling.type", "none") not in ("none", "linear"):
        raise ModelError(f"{path}: rope scaling {fact('rope.scaling.type')!r}; known: linear")
    if fact("rope.scaling.type", "none") == "linear":
        scaling = {"rope_type": "linear", "factor": fact("rope.scaling.factor")}
    elif "rope_freqs.weight" in tensors:  # how a converter writes Llama 3's stretched positions
        scaling = {"rope_type": "divided", "by": tensors["rope_freqs.weight"].numbers().tolist()}
    config = ModelConfig(
        vocab=len(meta["tokenizer.ggml.tokens"]), width=width, layers=fact("block_count"), heads=heads,
        kv_heads=fact("attention.head_count_kv", heads), head_dim=fact("attention.key_length", width // heads),
        ffn=fact("feed_forward_length"), context=min(context, fact("attention.sliding_window", context)),
        eps=fact("attention.layer_norm_rms_epsilon", 1e-5), rope_theta=fact("rope.freq_base", 10000.0),
        rope_scaling=scaling, tied="output.weight" not in tensors, qk_norm=family == "qwen3", family=family,
    )  # fmt: skip
    return config, meta, tensors


def _load_gguf(path: Path, dtype: torch.dtype, packed: bool) -> BaseModel:
    config, meta, tensors = gguf_config(path)
    raw: dict[str, Tensor] = {}
    for name, t in tensors.items():
        stem, _, suffix = name.rpartition(".")
        parts = stem.split(".")
        known = GGUF_NAMES.get(parts[-1])
        if known is None:
            continue
        layer = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        layer, known = (layer + known, "") if layer else (known, "")
        try:
            value = torch.from_numpy(t.numbers())
        except NotImplementedError as error:
            raise ModelError(f"{path}: {name} is of type {t.kind.name}, which cannot be read") from error
        if config.family == "llama" and parts[-1] in ("attn_q", "attn_k"):
            # llama.cpp interleaves the rotary halves of q and k; put them back.
            n = config.heads if parts[-1] == "attn_q" else config.kv_heads
            value = value.view(n, value.shape[0] // n // 2, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
        raw[f"{layer}.{suffix}"] = value
    tokens = meta["tokenizer.ggml.tokens"]
    eos = meta.get("tokenizer.ggml.eos_token_id", 2)
    bos = meta.get("tokenizer.ggml.bos_token_id", 1)
    return BaseModel(
        path.stem, _fuse(config, raw, dtype, packed, path), _gguf_tokenizer(meta, path),
        meta.get("tokenizer.chat_template", CHATML), frozenset({eos}), tokens[bos], tokens[eos],
    )  # fmt: skip


def _gguf_tokenizer(meta: Facts, path: Path) -> Tokenizer:
    """The byte-level BPE tokenizer a GGUF file describes; `gpt2` is the kind of SmolLM2, Llama 3 and Qwen."""
    if meta.get("tokenizer.ggml.model") != "gpt2":
        raise ModelError(f"{path}: tokenizer {meta.get('tokenizer.ggml.model')!r} in GGUF is not byte-level BPE; "
                         "use the Hugging Face directory of this model")  # fmt: skip
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if meta.get("tokenizer.ggml.pre") == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif meta.get("tokenizer.ggml.pre") in ("llama-bpe", "qwen2"):
        digits = "{1,3}" if meta["tokenizer.ggml.pre"] == "llama-bpe" else ""
        pattern = Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            + digits
            + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, k in zip(tokens, kinds, strict=True) if k == 3])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == 4])
    return tokenizer
