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

from coterie.errors import CoterieError, ModelError
from coterie.knowledge.embed import Endpoint, MiniLM
from coterie.model.pull import EMBEDDER, pull

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
