"""Texts to vectors: MiniLM, or another BERT of sentence-transformers' kind, by our own forward; or any
OpenAI-compatible embeddings endpoint.

Notable: texts are packed end to end, (tokens, width), with no padding: what is computed by row never sees where a text
ends, and attention runs over all texts of one length at once. Vectors are normed, so that a dot product is the cosine.
Sources: Devlin et al. 2019 (BERT); Wang et al. 2020 (MiniLM); Reimers and Gurevych 2019 (mean over tokens).
"""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol

import httpx
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from coterie.errors import CoterieError, ModelError, Unreachable
from coterie.knowledge.names import FUNCTION_WORDS
from coterie.model.load import default_dtype
from coterie.model.pull import EMBEDDER, pull

Floats = NDArray[np.float32]
LONGEST = 256  # tokens of a text that count, as all-MiniLM-L6-v2 was trained
BATCH_TOKENS = 4096  # packed in one forward
ENDPOINT_BATCH = 64  # texts asked for at once
PREFIX = "encoder.layer."
POOLINGS = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"
}  # fmt: skip


class Embedder(Protocol):
    """What turns texts into vectors. `name` tells apart spaces whose vectors cannot be compared."""

    name: str
    width: int

    def embed(self, texts: Sequence[str]) -> Floats:
        """Vectors (texts, width), each of length 1."""
        ...


class ByWords:
    """What compares texts where no model can be used: by the words that they share, but for those like "the"."""

    name, width = "", 4096

    def embed(self, texts: Sequence[str]) -> Floats:
        out = np.zeros((len(texts), self.width), np.float32)
        for row, text in zip(out, texts, strict=True):
            words = set(re.findall(r"[^\W_]+", text.lower())) - FUNCTION_WORDS
            row[[zlib.crc32(word.encode()) % self.width for word in words]] = 1
        return np.asarray(out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12), np.float32)


@dataclass(frozen=True)
class Recipe:
    """What a folder of sentence-transformers says beside its weights. encoder: where these lie; tokens: of a text that
    count, None for all that it has places for."""

    encoder: Path
    pooling: Literal["mean", "cls", "max"] = "mean"
    tokens: int | None = LONGEST
    lower: bool = False
    prompt: str = ""  # before every text


def recipe_of(folder: Path) -> Recipe:
    """How the vectors of a model are made; without a modules.json, as MiniLM's. Raises ModelError for what is not
    computed here: another module, another way of pooling, vectors that are not compared by their cosine."""
    listed = _read(folder / "modules.json", [])
    if not listed:
        return Recipe(folder)
    parts = {str(m["type"]).rpartition(".")[2]: folder / m["path"] for m in listed}
    if unknown := parts.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ModelError(f"{folder}/modules.json: the module {min(unknown)} is not computed here; serve this model "
                         "by an OpenAI-compatible server, and name that in `embeddings`")  # fmt: skip
    if "Transformer" not in parts or "Pooling" not in parts:
        raise ModelError(f"{folder}/modules.json: needs a Transformer and a Pooling")
    size = _read(parts["Transformer"] / "sentence_bert_config.json", {})
    said = _read(parts["Pooling"] / "config.json", {})
    about = _read(folder / "config_sentence_transformers.json", {})
    on = [said["pooling_mode"]] if "pooling_mode" in said else [
        POOLINGS.get(k, k.removeprefix("pooling_mode_")) for k, v in said.items() if k.startswith("pooling_mode_") and v
    ]  # fmt: skip
    if len(on) != 1 or on[0] not in POOLINGS.values():
        raise ModelError(f"{parts['Pooling']}/config.json: pooling by {' and '.join(on) or 'nothing'} is not computed "
                         f"here; {', '.join(POOLINGS.values())} are")  # fmt: skip
    compared = about.get("similarity_fn_name") or "cosine"
    if compared != "cosine" and "Normalize" not in parts:
        raise ModelError(f"{folder}: its vectors are compared by {compared}, and here by cosine")
    prompt = (about.get("prompts") or {}).get(about.get("default_prompt_name") or "", "")
    if prompt and said.get("include_prompt") is False:
        raise ModelError(f"{folder}: pooling without the prompt is not computed here")
    tokens = size.get("max_seq_length")
    return Recipe(parts["Transformer"], on[0], tokens and int(tokens), bool(size.get("do_lower_case")), prompt)


def _read(file: Path, absent: Any) -> Any:
    """The JSON in a file. Raises OSError, ValueError."""
    found = json.loads(file.read_text()) if file.exists() else absent
    if not isinstance(found, type(absent)):
        raise ValueError(f"{file}: must be a {'list' if absent == [] else 'table'}")
    return found


class MiniLM:
    """A BERT encoder of sentence-transformers' kind: the mean over the tokens of the last layer, normed; or their
    greatest, or the first, as the model's folder says."""

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, name: str = EMBEDDER) -> None:
        """`dtype`: None for what this processor computes fast. Raises ModelError where the folder holds no such
        model."""
        try:
            self.recipe = recipe_of(folder)
            at = self.recipe.encoder
            config = json.loads((at / "config.json").read_text())
            if config["model_type"] != "bert" or config["hidden_act"] != "gelu":
                kind = f"{config['model_type']!r} with {config.get('hidden_act')!r}"
                raise ModelError(f"{at}: embeddings come from a BERT model with gelu, not {kind}")
            if config.get("position_embedding_type", "absolute") != "absolute":
                raise ModelError(f"{at}: {config['position_embedding_type']} positions are not computed here")
            weights = load_file(at / "model.safetensors")
            own = folder / "tokenizer.json"
            self.tokenizer = Tokenizer.from_file(str(own if own.exists() else at / "tokenizer.json"))
            self.layers, self.heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
            self.width, self.eps = int(config["hidden_size"]), float(config["layer_norm_eps"])
            places = int(config["max_position_embeddings"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(f"{folder}: not an embedding model that can be read ({error})") from error
        except Exception as error:  # tokenizers raises Exception itself
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{folder}/tokenizer.json: cannot be read ({error})") from error
        self.name, self.dtype = name, dtype or default_dtype()
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(min(self.recipe.tokens or places, places))
        try:
            self._take({key.removeprefix("bert."): value.float() for key, value in weights.items()})
        except (KeyError, RuntimeError) as error:
            raise ModelError(f"{folder}: its weights are not those of a BERT encoder ({error})") from error

    def _take(self, w: dict[str, Tensor]) -> None:
        """Keep the weights as they are computed with."""
        self.words, self.positions = w["embeddings.word_embeddings.weight"], w["embeddings.position_embeddings.weight"]
        self.kind = w["embeddings.token_type_embeddings.weight"][0]
        self.norms = {k: v for k, v in w.items() if "LayerNorm" in k}
        self.matrices: dict[str, tuple[Tensor, Tensor]] = {}
        for i in range(self.layers):
            at = f"{PREFIX}{i}."
            parts = [f"{at}attention.self.{part}" for part in ("query", "key", "value")]
            self._pack(
                f"{i}.qkv", torch.cat([w[p + ".weight"] for p in parts]), torch.cat([w[p + ".bias"] for p in parts])
            )
            for name_, path in (("out", "attention.output"), ("up", "intermediate"), ("down", "output")):
                self._pack(f"{i}.{name_}", w[f"{at}{path}.dense.weight"], w[f"{at}{path}.dense.bias"])

    def _pack(self, name: str, weight: Tensor, bias: Tensor) -> None:
        weight, bias = weight.to(self.dtype), bias.to(self.dtype)
        if self.dtype == torch.bfloat16:  # oneDNN's blocked layout, as in the decoder
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), BATCH_TOKENS)
        self.matrices[name] = weight, bias

    def _linear(self, x: Tensor, name: str, then: str = "none") -> Tensor:
        weight, bias = self.matrices[name]
        if self.dtype == torch.bfloat16:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, weight, bias, then, [], "none" if then == "gelu" else ""
            )
            return out
        y = F.linear(x, weight, bias)
        return F.gelu(y) if then == "gelu" else y

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = (self.norms[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x.float(), (self.width,), weight, bias, self.eps)

    @torch.no_grad()
    def _forward(self, rows: list[list[int]]) -> Floats:
        """Vectors (rows, width) of token rows in order of length."""
        lengths = [len(row) for row in rows]
        ids = torch.tensor([t for row in rows for t in row])
        at = torch.cat([torch.arange(n) for n in lengths])
        x = self._norm(self.words[ids] + self.positions[at] + self.kind, "embeddings")
        alike = [(n, len(list(same))) for n, same in groupby(lengths)]
        for i in range(self.layers):
            qkv = self._linear(x.to(self.dtype), f"{i}.qkv")
            mixed, start = [], 0
            for n, count in alike:
                part = qkv[start : start + n * count].view(count, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
                mixed.append(
                    F.scaled_dot_product_attention(part[0], part[1], part[2]).transpose(1, 2).reshape(n * count, -1)
                )
                start += n * count
            x = self._norm(x + self._linear(torch.cat(mixed), f"{i}.out"), f"{PREFIX}{i}.attention.output")
            fed = self._linear(self._linear(x.to(self.dtype), f"{i}.up", "gelu"), f"{i}.down")
            x = self._norm(x + fed, f"{PREFIX}{i}.output")
        pooled = torch.stack([self._pool(part) for part in x.split(lengths)])
        return np.asarray(F.normalize(pooled, dim=-1).numpy(), np.float32)

    def _pool(self, hidden: Tensor) -> Tensor:
        """One vector (width) of a text's (tokens, width)."""
        if self.recipe.pooling == "cls":
            return hidden[0]
        return hidden.amax(dim=0) if self.recipe.pooling == "max" else hidden.mean(dim=0)

    def embed(self, texts: Sequence[str]) -> Floats:
        """Vectors (texts, width). What is beyond the model's longest text does not count."""
        said = [self.recipe.prompt + text for text in texts] if self.recipe.prompt else list(texts)
        given = [text.lower() for text in said] if self.recipe.lower else said
        rows = [e.ids for e in self.tokenizer.encode_batch_fast(given)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        out = np.zeros((len(rows), self.width), np.float32)
        for chosen in _batches(order, rows):
            out[chosen] = self._forward([rows[i] for i in chosen])
        return out


def _batches(order: list[int], rows: list[list[int]]) -> Iterator[list[int]]:
    """`order` cut where a batch would hold over BATCH_TOKENS."""
    batch: list[int] = []
    held = 0
    for i in order:
        if batch and held + len(rows[i]) > BATCH_TOKENS:
            yield batch
            batch, held = [], 0
        batch.append(i)
        held += len(rows[i])
    if batch:
        yield batch


class Endpoint:
    """An OpenAI-compatible server's POST /embeddings, asked ENDPOINT_BATCH texts at a time.

    hide: what masks each text before it leaves. Nothing is sent where it fails: a remote model only ever sees masked
    text.
    """

    def __init__(
        self, url: str, model: str, hide: Callable[[str], str], key: str = "", timeout_s: float = 60.0
    ) -> None:  # fmt: skip
        self.url, self.model, self.hide = url.rstrip("/") + "/embeddings", model, hide
        self.client = httpx.Client(timeout=timeout_s, headers={"Authorization": f"Bearer {key}"} if key else {})
        self.name = f"{url}#{model}#masked"  # what was indexed before texts were masked is indexed anew
        self.width = self.embed(["width"]).shape[1]

    def embed(self, texts: Sequence[str]) -> Floats:
        """Vectors (texts, width). Raises MaskingFailed; CoterieError where the server does not give them."""
        found: list[list[float]] = []
        for start in range(0, len(texts), ENDPOINT_BATCH):
            part = [self.hide(text) for text in texts[start : start + ENDPOINT_BATCH]]
            try:
                answer = self.client.post(self.url, json={"model": self.model, "input": part})
                answer.raise_for_status()
                rows = sorted(answer.json()["data"], key=lambda row: row["index"])
                if len(rows) != len(part):
                    raise ValueError(f"{len(rows)} vectors for {len(part)} texts")
                found += [row["embedding"] for row in rows]
            except httpx.TransportError as error:
                raise Unreachable(f"{self.url}: gives no embeddings ({error or type(error).__name__})") from error
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                raise CoterieError(f"{self.url}: gives no embeddings ({error or type(error).__name__})") from error
        if not found:
            return np.zeros((0, getattr(self, "width", 0)), np.float32)
        try:
            out = np.asarray(found, np.float32)
        except (ValueError, TypeError):
            out = np.zeros(0, np.float32)
        if out.ndim != 2 or not np.isfinite(out).all():
            raise CoterieError(f"{self.url}: gives embeddings that are no vectors of numbers")
        return np.asarray(out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12), np.float32)


def minilm(dtype: torch.dtype | None = None, tell: Callable[[str], None] = lambda _: None) -> MiniLM:
    """all-MiniLM-L6-v2, pulled where it is absent. Raises ModelError."""
    return MiniLM(pull(EMBEDDER, tell, "embedding model", EMBEDDER), dtype)


def sentence_model(folder: Path, model: str) -> MiniLM:
    """The model in a folder, called `model`. Weights or pooling that change give vectors that are told apart. Raises
    ModelError."""
    made = MiniLM(folder)
    with (made.recipe.encoder / "model.safetensors").open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256")
    digest.update(repr((made.recipe.pooling, made.recipe.tokens, made.recipe.lower, made.recipe.prompt)).encode())
    made.name = f"{model}#{digest.hexdigest()[:16]}"
    return made
