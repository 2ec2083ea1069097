"""Our MiniLM is the reference's, packed or not, and an endpoint is asked and mistrusted."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.business import Business
from coterie.errors import CoterieError, ModelError
from coterie.knowledge.embed import Endpoint, MiniLM
from coterie.model.pull import EMBEDDER, pull
from coterie.sources import embedder

TEXTS = [
    "Hello",
    "",
    "Where is my order? It left last week.",
    "x" * 3000,
    "é ü 漢字 🚲",
    " ".join(["long words"] * 300),
]


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return MiniLM(pull(EMBEDDER, what="embedding model", default=EMBEDDER), torch.float32)


def test_it_gives_the_reference_s_vectors(minilm: MiniLM) -> None:
    folder = pull(EMBEDDER)
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    given_ = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(given_["input_ids"], given_["attention_mask"]).last_hidden_state
    mask = given_["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    assert np.abs(minilm.embed(TEXTS) - expected).max() < 1e-5


def test_in_the_precision_of_this_processor_it_lies_close(minilm: MiniLM) -> None:
    fast = MiniLM(pull(EMBEDDER))  # bfloat16 only where oneDNN has it: without AVX-512 it refuses
    assert (fast.embed(TEXTS) * minilm.embed(TEXTS)).sum(axis=1).min() > 0.999


@settings(max_examples=10)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=6))
def test_who_stands_beside_a_text_does_not_matter(minilm: MiniLM, texts: list[str]) -> None:
    together = minilm.embed(texts)
    for vector, text in zip(together, texts, strict=True):
        assert np.abs(minilm.embed([text])[0] - vector).max() < 1e-5


def test_a_folder_without_a_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not an embedding model"):
        MiniLM(tmp_path)


def sentence_folder(at: Path, **files: Any) -> Path:
    """A small BERT of sentence-transformers' kind, with random weights and MiniLM's tokenizer."""
    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                                     max_position_embeddings=64)  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).half().save_pretrained(at)
    (at / "tokenizer.json").write_bytes((pull(EMBEDDER) / "tokenizer.json").read_bytes())
    (at / "1_Pooling").mkdir()
    kinds = ("Transformer", ""), ("Pooling", "1_Pooling")
    whole = {"modules": [{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in kinds], **files}
    for name, content in whole.items():
        file = "1_Pooling/config.json" if name == "pooling" else f"{name}.json"
        (at / file).write_text(json.dumps(content))
    return at


POOLED: dict[str, Any] = {
    "cls": lambda h: h[0], "mean": lambda h: h.mean(0), "max": lambda h: h.amax(0),
}  # fmt: skip


@pytest.mark.parametrize("pooling", POOLED)
def test_another_model_of_its_kind_is_pooled_and_cut_as_its_files_say(tmp_path: Path, pooling: str) -> None:
    key = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"}
    about = {"prompts": {"q": "Query: "}, "default_prompt_name": "q"}
    folder = sentence_folder(tmp_path, pooling={k: name == pooling for name, k in key.items()},
                             sentence_bert_config={"max_seq_length": 20, "do_lower_case": True},
                             config_sentence_transformers=about)  # fmt: skip
    found = MiniLM(folder, torch.float32).embed(TEXTS)
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).float().eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for vector, text in zip(found, TEXTS, strict=True):
        ids = tokenizer(f"Query: {text}".lower(), truncation=True, max_length=20, padding=False)["input_ids"]
        ids = [i for i in ids if i]  # the tokenizer's file asks for padding
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(POOLED[pooling](hidden), dim=0).numpy()
        assert np.abs(vector - expected).max() < 1e-5


MEAN = {"pooling_mode_mean_tokens": True}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another module": (
        {"modules": [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"},
                     {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]},
        "modules.json: the module Dense is not computed here",
    ),
    "another pooling": ({"pooling": {"pooling_mode_lasttoken": True}}, "pooling by lasttoken is not computed here"),
    "two poolings": ({"pooling": {**MEAN, "pooling_mode_cls_token": True}}, "pooling by mean and cls is not"),
    "compared by dot product": ({"config_sentence_transformers": {"similarity_fn_name": "dot"}}, "compared by dot"),
    "another architecture": ({"config": {"model_type": "mpnet", "hidden_act": "gelu"}}, "not 'mpnet'"),
    "relative positions": (
        {"config": {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "relative_key"}},
        "relative_key positions are not computed",
    ),
    "no list of modules": ({"modules": {"a": 1}}, "modules.json: must be a list"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_computed_here_is_refused_by_its_file(tmp_path: Path, files: dict[str, Any], said: str) -> None:
    folder = sentence_folder(tmp_path, **{"pooling": MEAN, **files})
    with pytest.raises(ModelError, match=said):
        MiniLM(folder)


def test_a_business_names_a_folder_as_its_embedding_model(tmp_path: Path) -> None:
    (tmp_path / "coterie.toml").write_text('[knowledge]\nembeddings_model = "ours"\n')
    with pytest.raises(ModelError, match="unknown embedding model 'ours'"):
        embedder(Business.open(tmp_path))
    (tmp_path / "ours").mkdir()
    folder = sentence_folder(tmp_path / "ours", pooling=MEAN)
    first = embedder(Business.open(tmp_path))
    assert (first.width, first.name[:5]) == (32, "ours#")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert embedder(Business.open(tmp_path)).name != first.name, "its vectors cannot be compared with those before"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"data": []}, "0 vectors for 1 texts"),
        ({"error": "no"}, "gives no embeddings"),
        ("text", "gives no embeddings"),
        ({"data": [{"index": 0, "embedding": [1, "a"]}]}, "no vectors of numbers"),
        ({"data": [{"index": 0, "embedding": [float("nan")]}]}, "no vectors of numbers"),
        (None, None),
    ],
)
def test_an_endpoint_is_asked_and_mistrusted(body: Any, why: str | None) -> None:
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers["Authorization"], asked))
            rows = [{"index": i, "embedding": [3.0, 4.0, float(i)]} for i in range(len(asked["input"]))][::-1]
            answer = json.dumps({"data": rows} if body is None else body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        if why:
            with pytest.raises(CoterieError, match=why):
                Endpoint(url, "some-model", str, "key")
        else:
            endpoint = Endpoint(url, "some-model", str, "key")
            found = endpoint.embed(["a", "b"])
            assert endpoint.width == 3
            assert np.allclose(found[0], [0.6, 0.8, 0.0])
            assert seen[-1] == ("/v1/embeddings", "Bearer key", {"model": "some-model", "input": ["a", "b"]})
    finally:
        server.shutdown()
        server.server_close()
