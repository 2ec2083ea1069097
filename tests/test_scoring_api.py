"""The completions API tells how likely a prompt is (`echo` with `logprobs`), which lm-eval's tasks are scored by."""

import json
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from coterie.answer import Answerer
from coterie.business import Business
from coterie.experts.kinds import apply, load
from coterie.model.load import BaseModel
from coterie.web.app import create_app
from support import logits_of, random_rows
from web_support import listening


@contextmanager
def served(folder: Path, base: BaseModel) -> Iterator[str]:
    """The address of a running server over a business."""
    business = Business.open(folder)
    business._base = base
    answerer = Answerer.open(business)
    with closing(answerer.engine), listening(create_app(answerer)) as address:
        yield address


@pytest.fixture(scope="module")
def url(fitted_shop: Path, tiny_base: BaseModel) -> Iterator[str]:
    with served(fitted_shop, tiny_base) as address:
        yield address


def complete(url: str, **body: Any) -> Any:
    answer = httpx.post(url + "/v1/completions", json={"model": "base", **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("who", ["base", "colors"])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_an_echo_tells_how_likely_each_token_of_the_prompt_was(
    who: str, length: int, url: str, fitted_shop: Path, tiny_base: BaseModel
) -> None:
    (row,) = random_rows(tiny_base, [length], seed=length)
    change = None
    if who != "base":
        folder = Business.open(fitted_shop).library.folder(who)
        change = apply(load(folder, tiny_base.decoder.config), tiny_base.decoder).change
    found = complete(url, model=who, prompt=[row], echo=True, logprobs=1, max_tokens=1, temperature=0)["choices"][0]
    (scores,) = logits_of(tiny_base, [row], change)
    wanted = torch.log_softmax(scores, -1)
    told = found["logprobs"]
    assert len(told["token_logprobs"]) == len(told["tokens"]) == len(told["top_logprobs"]) == length + 1
    assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
    for i in range(1, length):
        assert told["token_logprobs"][i] == pytest.approx(float(wanted[i - 1, row[i]]), abs=1e-3)
        (best,) = told["top_logprobs"][i].values()
        assert best == pytest.approx(float(wanted[i - 1].max()), abs=1e-3)
        assert (best == told["token_logprobs"][i]) == (int(wanted[i - 1].argmax()) == row[i])
    assert told["token_logprobs"][length] == pytest.approx(float(wanted[-1].max()), abs=1e-3)
    assert found["text"].startswith(tiny_base.tokenizer.decode(row, skip_special_tokens=False))


def test_prompts_of_every_form_give_what_they_give_one_by_one(url: str, tiny_base: BaseModel) -> None:
    texts = ["The sky is", "Hello, I am", "Name the"]
    one_by_one = [complete(url, prompt=t, max_tokens=6)["choices"][0]["text"] for t in texts]
    tokens = [tiny_base.encode(t) for t in texts]
    for several in (texts, tokens):
        answer = complete(url, prompt=several, max_tokens=6)
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
        assert [c["text"] for c in answer["choices"]] == one_by_one
        assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens))
    assert complete(url, prompt=tokens[0], max_tokens=6)["choices"][0]["text"] == one_by_one[0]


def test_an_echo_without_logprobs_is_the_prompt_and_its_continuation(url: str) -> None:
    plain = complete(url, prompt="The sky is", max_tokens=6)["choices"][0]
    echoed = complete(url, prompt="The sky is", max_tokens=6, echo=True)["choices"][0]
    assert echoed == {**plain, "text": "The sky is" + plain["text"]}
    streamed = httpx.post(
        url + "/v1/completions",
        json={"model": "base", "prompt": "The sky is", "max_tokens": 6, "echo": True, "stream": True},
    )
    lines = [json.loads(x[6:]) for x in streamed.text.splitlines() if x.startswith("data: {")]
    assert "".join(x["choices"][0]["text"] for x in lines) == echoed["text"]


def test_the_page_gets_an_experts_loss_as_a_picture(url: str) -> None:
    answer = httpx.get(url + "/experts/colors/loss.svg")
    assert answer.headers["content-type"] == "image/svg+xml"
    assert answer.text.startswith("<svg")
    assert "colors, version 1" in answer.text
    assert httpx.get(url + "/experts/nobody/loss.svg").status_code == 404


LM_EVAL_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{ test: "{data}" }}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
"""


@pytest.mark.slow
def test_lm_eval_gets_from_our_api_what_it_gets_from_transformers(
    url: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiple choice (log-likelihoods), perplexity and generation, each by lm-eval itself on both."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'coterie[lm-eval]'")
    pytest.importorskip("tenacity", reason="lm-eval's API models need its extra `api`")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"question": f"Which color has {thing}?", "options": ["red", "dark green", "blue"], "answer": i % 3}
            for i, thing in enumerate(("the sky", "blood", "the grass", "a lemon", "the sea", "a frog"))]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    metrics = "\nmetric_list: [{{metric: {}}}, {{metric: {}}}]"
    choices = 'doc_to_choice: "{{options}}"\ndoc_to_target: answer' + metrics.format("acc", "acc_norm")
    free = (
        'doc_to_target: "{{options[answer]}}"\ngeneration_kwargs: {until: ["?"], max_gen_toks: 6}\n'
        "metric_list: [{metric: exact_match}]"
    )
    rolling = 'doc_to_target: "{{question}} {{question}}"' + metrics.format("word_perplexity", "bits_per_byte")
    for name, kind, more in (
        ("pick", "multiple_choice", choices),
        ("say", "generate_until", free),
        ("flow", "loglikelihood_rolling", rolling),
    ):
        text = LM_EVAL_TASK.format(name=name, data=tmp_path / "rows.jsonl", kind=kind, more=more)
        asks = text.replace('doc_to_text: "{{question}}"', 'doc_to_text: ""') if name == "flow" else text
        (tmp_path / f"{name}.yaml").write_text(asks)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = {}
    for model, arguments in (
        ("local-completions", f"model=base,base_url={url}/v1/completions,tokenizer={tiny},max_length=256,"
                              "tokenizer_backend=huggingface,num_concurrent=1"),
        ("hf", f"pretrained={tiny},dtype=float32,device=cpu,max_length=256"),
    ):  # fmt: skip
        report = lm_eval.simple_evaluate(
            model,
            model_args=arguments,
            tasks=["pick", "say", "flow"],
            task_manager=tasks,
            bootstrap_iters=0,
            batch_size=1,
        )
        found[model] = report
    ours, theirs = found["local-completions"], found["hf"]
    for task in ("pick", "say", "flow"):
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float) and not math.isnan(value):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-3), (task, metric)
        for a, b in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            if task == "say":
                assert a["resps"] == b["resps"]
            else:
                flat = [torch.tensor([float(r[0][0] if isinstance(r[0], (list, tuple)) else r[0]) for r in s["resps"]])
                        for s in (a, b)]  # fmt: skip
                torch.testing.assert_close(*flat, atol=1e-2, rtol=1e-3)
