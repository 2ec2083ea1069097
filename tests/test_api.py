"""The HTTP API, as OpenAI's own client and as rude clients see it: a real server in a thread, real connections."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import COLORS
from coterie.answer import Answer, Answerer
from coterie.business import Business
from coterie.experts import lora as loras
from coterie.experts.expert import CONFIG
from coterie.model.load import BaseModel
from coterie.routing import statistics
from coterie.web.app import create_app
from coterie.web.problem import LARGEST_BODY
from support import Gate, greedy, logits_of
from web_support import listening

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = [{"role": "user", "content": "Which color has the grass?"}]
SPEAK = {"model": "base", "messages": ASK}


class Served:
    """A running server: its address, its engine, and clients of it."""

    def __init__(self, answerer: Answerer, url: str) -> None:
        self.answerer, self.engine, self.url = answerer, answerer.engine, url
        self.port = httpx.URL(url).port
        self.openai = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def metrics(self) -> dict[str, float]:
        text = self.http.get("/metrics").text
        return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}

    def connect(self, path: str, body: dict[str, Any]) -> socket.socket:
        """Send a request over a connection that the test may break."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        payload = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + payload)
        return connection


@contextmanager
def serving(answerer: Answerer) -> Iterator[Served]:
    with closing(answerer.engine), listening(create_app(answerer)) as address:
        served = Served(answerer, address)
        with served.http, served.openai:
            yield served


def open_answerer(folder: Path, base: BaseModel, **sizes: int) -> Answerer:
    """As `coterie serve` opens it, on a model that is loaded already."""
    business = Business(folder, Business.open(folder).config, base)
    return Answerer(business, business.engine(**sizes))


@pytest.fixture(scope="module")
def api(fitted_shop: Path, tiny_base: BaseModel) -> Iterator[Served]:
    """The fitted shop in float32, served for all tests of this file that leave it well."""
    with serving(open_answerer(fitted_shop, tiny_base)) as served:
        yield served


@pytest.fixture
def gate(tiny_base: BaseModel) -> Gate:
    return Gate(tiny_base)


@pytest.fixture
def slow(fitted_shop: Path, gate: Gate) -> Iterator[Served]:
    """One slot and a queue of two, behind a gate."""
    with serving(open_answerer(fitted_shop, gate.base, slots=1, queue=2)) as served:
        yield served
        gate.open()


@pytest.fixture
def own_shop(fitted_shop: Path, tmp_path: Path) -> Path:
    """A copy of the fitted shop that a test may damage."""
    return Path(shutil.copytree(fitted_shop, tmp_path / "shop"))


def until(true: Callable[[], bool], meanwhile: Callable[[], Any] = lambda: None) -> None:
    """Wait for what another thread brings about, half a minute at most."""
    for _ in range(3000):
        if true():
            return
        meanwhile()
        time.sleep(0.01)
    pytest.fail("it did not come about")


def plain_answer(base: BaseModel, messages: list[dict[str, str]], count: int) -> str:
    """What the base model says by plain forward passes."""
    return base.tokenizer.decode(greedy(base, base.encode(base.chat(messages)), count)[0])


# Answers


def test_a_chat_answer_is_the_models_own_with_its_counts(api: Served) -> None:
    done = api.openai.chat.completions.create(model="base", messages=ASK, max_tokens=12)
    base = api.engine.base
    assert done.choices[0].message.content == plain_answer(base, ASK, 12)
    assert (done.choices[0].finish_reason, done.choices[0].index, len(done.choices)) == ("length", 0, 1)
    assert (done.object, done.model, done.choices[0].message.role) == ("chat.completion", "base", "assistant")
    assert done.usage.prompt_tokens == len(base.encode(base.chat(ASK)))
    assert (done.usage.completion_tokens, done.usage.total_tokens) == (12, done.usage.prompt_tokens + 12)
    assert done.choices[0].logprobs is None
    assert done.id.startswith("chatcmpl-")
    assert abs(done.created - time.time()) < 600


def test_a_completion_goes_on_from_the_prompt_as_it_stands(api: Served) -> None:
    base = api.engine.base
    done = api.openai.completions.create(model="base", prompt="The sky is")
    assert done.choices[0].text == base.tokenizer.decode(greedy(base, base.encode("The sky is"), 16)[0])
    assert (done.object, done.usage.completion_tokens) == ("text_completion", 16)  # OpenAI's default is 16
    assert done.id.startswith("cmpl-")


@pytest.mark.parametrize("model", ["base", "greet", "colors", "auto"])
def test_a_streamed_answer_is_the_whole_answer_in_parts(model: str, api: Served) -> None:
    whole = api.openai.chat.completions.create(model=model, messages=ASK, max_tokens=20)
    options = {"include_usage": True}
    parts = list(
        api.openai.chat.completions.create(
            model=model, messages=ASK, max_tokens=20, stream=True, stream_options=options
        )
    )
    *chunks, last = parts
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage.model_copy(update={"prompt_tokens_details": whole.usage.prompt_tokens_details}) == whole.usage
    assert len({c.id for c in parts}) == 1
    assert {c.object for c in parts} == {"chat.completion.chunk"}
    assert all(c.coterie == whole.coterie for c in parts)


def test_usage_tells_what_of_a_prompt_had_been_read_before(api: Served) -> None:
    messages: Any = [{"role": "user", "content": "Once upon a time, far away from here, " * 4 + "what then?"}]

    def ask(model: str) -> Any:
        return api.openai.chat.completions.create(model=model, messages=messages, max_tokens=3).usage

    first, again = ask("base"), ask("base")
    pages = (first.prompt_tokens - 1) // 32
    assert pages > 1
    assert again.prompt_tokens_details.cached_tokens == pages * 32
    assert ask("greet").prompt_tokens_details.cached_tokens < 32, "an expert of all layers reads anew"
    assert api.metrics()["coterie_cached_tokens_total"] >= again.prompt_tokens_details.cached_tokens


def test_a_streamed_completion_is_the_whole_completion_in_parts(api: Served) -> None:
    ask = {"model": "base", "prompt": "The sky is", "max_tokens": 20}
    parts = list(api.openai.completions.create(**ask, stream=True))
    assert len(parts) > 2
    assert "".join(p.choices[0].text for p in parts) == api.openai.completions.create(**ask).choices[0].text
    assert parts[-1].choices[0].finish_reason == "length"
    assert not any(p.usage for p in parts)


def test_events_are_written_as_server_sent_events(api: Served) -> None:
    with api.http.stream("POST", CHAT, json={**SPEAK, "stream": True, "max_tokens": 4}) as reply:
        lines = list(reply.iter_lines())
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") or line == "" for line in lines)


def test_log_probabilities_are_those_of_the_model(api: Served) -> None:
    base, prompt = api.engine.base, "The sky is"
    ids = base.encode(prompt)
    answer = greedy(base, ids, 5)[0]
    wanted = logits_of(base, [ids + answer])[0][len(ids) - 1 : -1].log_softmax(-1)
    values = [float(row[token]) for row, token in zip(wanted, answer, strict=True)]

    plain = api.openai.completions.create(model="base", prompt=prompt, max_tokens=5, logprobs=2).choices[0].logprobs
    assert plain.token_logprobs == pytest.approx(values, abs=1e-4)
    assert plain.tokens == [base.tokenizer.decode([t], skip_special_tokens=False) for t in answer]
    assert all(1 <= len(top) <= 2 for top in plain.top_logprobs)

    ask: dict[str, Any] = {"model": "base", "messages": ASK, "max_tokens": 8, "logprobs": True, "top_logprobs": 3}
    whole = api.openai.chat.completions.create(**ask).choices[0]
    entries = whole.logprobs.content
    assert len(entries) == 8
    for entry in entries:
        assert [t.logprob for t in entry.top_logprobs] == sorted((t.logprob for t in entry.top_logprobs), reverse=True)
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 3
    parts = api.openai.chat.completions.create(**ask, stream=True)
    streamed = [e for p in parts if p.choices[0].logprobs for e in p.choices[0].logprobs.content]
    assert streamed == entries


def test_log_probabilities_under_a_constraint_can_be_read_by_everyone(api: Served) -> None:
    """A forbidden token's is minus infinity, which JSON cannot say."""
    more = {"logprobs": True, "top_logprobs": 20, "structured_outputs": {"choice": ["red", "green"]}}
    for stream in (False, True):
        reply = api.http.post(CHAT, json={**SPEAK, **more, "stream": stream})
        assert reply.status_code == 200
        assert '"logprob"' in reply.text
        assert "Infinity" not in reply.text


def test_an_answer_ends_before_its_stop_text(api: Served) -> None:
    whole = plain_answer(api.engine.base, ASK, 30)
    stop = whole[10:13]
    for given in (stop, [stop, "never in it"]):
        done = api.openai.chat.completions.create(model="base", messages=ASK, max_tokens=30, stop=given)
        assert done.choices[0].message.content == whole[: whole.find(stop)]
        assert done.choices[0].finish_reason == "stop"


def test_a_seed_makes_sampling_repeatable_and_no_temperature_means_greedy(api: Served) -> None:
    def ask(**more: Any) -> str:
        done = api.openai.chat.completions.create(model="base", messages=ASK, max_tokens=20, **more)
        return done.choices[0].message.content

    assert ask(seed=1, temperature=1) == ask(seed=1, temperature=1) != ask(seed=2, temperature=1)
    assert ask(seed=-5, temperature=1, top_p=0.9) == ask(seed=-5, temperature=1, top_p=0.9)
    assert ask() == ask(temperature=0) == ask(seed=3) == ask(temperature=1, extra_body={"top_k": 1})
    assert ask(temperature=1) != ask(temperature=1)


def test_null_means_absent(api: Served) -> None:
    fields = (
        "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed",
        "stop", "n", "logprobs", "top_logprobs", "response_format", "structured_outputs",
    )  # fmt: skip
    reply = api.http.post(CHAT, json={**SPEAK, **dict.fromkeys(fields), "max_tokens": 5, "user": "x", "tools": None})
    assert reply.json()["choices"][0]["message"]["content"] == plain_answer(api.engine.base, ASK, 5)
    nulls = {"model": "base", "prompt": "Hi", **dict.fromkeys((*fields, "echo", "suffix"))}
    assert api.http.post(TEXT, json=nulls).json()["usage"]["completion_tokens"] <= 16


def test_content_in_parts_and_the_developer_role_are_understood(api: Served) -> None:
    parts = [{"type": "text", "text": "Which color "}, {"type": "text", "text": "has the grass?"}]
    asked = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    done = api.openai.chat.completions.create(model="base", messages=asked, max_tokens=6)
    wanted = [{"role": "system", "content": "Be brief."}, *ASK]
    assert done.choices[0].message.content == plain_answer(api.engine.base, wanted, 6)


# Who answers


def test_base_auto_and_every_expert_are_models(api: Served) -> None:
    listed = list(api.openai.models.list())
    assert [m.id for m in listed] == ["base", "auto", "colors", "greet"]
    assert {m.object for m in listed} == {"model"}
    for model in listed:
        assert api.openai.models.retrieve(model.id) == model
    assert (listed[3].description, listed[3].version, listed[3].parent) == ("Greets people by name", 1, "base")


@pytest.mark.parametrize(
    ("question", "expert"),
    [("Which color has the grass?", "colors"), ("Hello, I am Kim.", "greet"), ("What time is it?", None)],
)
def test_auto_asks_the_expert_whose_subject_it_is(question: str, expert: str | None, api: Served) -> None:
    done = api.openai.chat.completions.create(
        model="auto", messages=[{"role": "user", "content": question}], max_tokens=3
    )
    assert (done.model, done.coterie["expert"]) == (expert or "base", expert)
    assert (done.coterie["version"], done.coterie["routed"]) == (1 if expert else None, True)
    assert -1 <= done.coterie["similarity"] <= 1


def test_an_expert_asked_by_name_says_so(api: Served) -> None:
    done = api.openai.chat.completions.create(model="greet", messages=ASK, max_tokens=3)
    assert done.model == "greet"
    alone = [{"name": "greet", "version": 1, "weight": 1.0}]
    assert done.coterie == {"expert": "greet", "version": 1, "routed": False, "similarity": None, "experts": alone}
    plain = api.openai.chat.completions.create(model="base", messages=ASK, max_tokens=3)
    nobody = {"expert": None, "version": None, "routed": False, "similarity": None, "experts": []}
    assert plain.coterie == nobody


@pytest.mark.parametrize("model", ["colors", "auto"])
def test_an_expert_of_choices_answers_with_one_of_them_however_hot(model: str, api: Served) -> None:
    answers = {
        api.openai.chat.completions.create(model=model, messages=ASK, temperature=2, seed=seed)
        .choices[0]
        .message.content
        for seed in range(10)
    }
    assert answers <= set(COLORS)
    assert len(answers) > 1


def test_an_expert_brings_its_instruction_unless_the_conversation_has_one(api: Served) -> None:
    def tokens(messages: list[dict[str, str]]) -> int:
        return api.openai.chat.completions.create(model="colors", messages=messages).usage.prompt_tokens

    system = {"role": "system", "content": "Name the color."}
    assert tokens(ASK) == tokens([system, *ASK])
    assert tokens([{"role": "system", "content": "x"}, *ASK]) < tokens(ASK)


def test_requests_for_all_models_at_once_get_what_each_gets_alone(api: Served) -> None:
    asks = [
        {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 12}
        for model in ("base", "greet", "colors", "auto")
        for text in ("Hello, I am Ada.", "Which color has blood?", "Good day, I am Dan.")
    ]

    def ask(body: dict[str, Any]) -> str:
        return api.openai.chat.completions.create(**body).choices[0].message.content

    alone = [ask(body) for body in asks]
    with ThreadPoolExecutor(8) as pool:  # as many as may wait, however slowly the engine takes them
        assert list(pool.map(ask, asks)) == alone


# Structured outputs


def test_an_answer_fits_the_json_schema_of_response_format(api: Served) -> None:
    schema = {
        "type": "object", "properties": {"team": {"enum": ["Orders", "Returns"]}, "urgent": {"type": "boolean"}},
        "required": ["team", "urgent"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "triage", "strict": True, "schema": schema}}
    for how in ({}, {"temperature": 1.5, "seed": 1}):
        done = api.openai.chat.completions.create(model="greet", messages=ASK, response_format=form, **how)
        said = json.loads(done.choices[0].message.content)
        assert said["team"] in ("Orders", "Returns")
        assert type(said["urgent"]) is bool
        assert done.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("extra", "good"),
    [
        ({"choice": ["Paris", "Rom'e", "naïve 🙂"]}, lambda text: text in ("Paris", "Rom'e", "naïve 🙂")),
        ({"regex": "[0-9]{3}-[a-c]{2}"}, lambda text: len(text) == 6 and text[3] == "-"),
        ({"json": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}},
         lambda text: len(json.loads(text)) == 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", ["base", "greet"])
def test_structured_outputs_hold_in_both_routes(
    extra: dict[str, Any], good: Callable[[str], bool], model: str, api: Served
) -> None:
    body = {"structured_outputs": extra}
    chat = api.openai.chat.completions.create(model=model, messages=ASK, extra_body=body)
    assert good(chat.choices[0].message.content)
    text = api.openai.completions.create(model=model, prompt="x", max_tokens=60, extra_body=body)
    assert good(text.choices[0].text)


# Wrong requests

HALF = "a\ud83d"
LONG = [{"role": "user", "content": "word " * 2000}]
WRONG: list[tuple[dict[str, Any], type[openai.APIStatusError], int, str]] = [
    ({"model": "nobody"}, openai.NotFoundError, 404, "there is no expert 'nobody'; in the library: colors, greet"),
    ({"model": "../colors"}, openai.NotFoundError, 404, "no expert"),
    ({"model": ""}, openai.NotFoundError, 404, "no expert"),
    ({"model": 5}, openai.BadRequestError, 400, "model: "),
    ({"messages": []}, openai.BadRequestError, 400, "messages: list should have at least 1 item"),
    ({"messages": "hello"}, openai.BadRequestError, 400, "messages: "),
    ({"messages": [{"role": "tool", "content": "x"}]}, openai.BadRequestError, 400, "messages.0.role: "),
    ({"messages": [{"role": "user"}]}, openai.BadRequestError, 400, "messages.0.content: field required"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     openai.BadRequestError, 400, "messages.0.content"),
    ({"messages": LONG}, openai.BadRequestError, 400, "the context holds 256"),
    ({"max_tokens": -1}, openai.BadRequestError, 400, "max_tokens: "),
    ({"max_tokens": 0}, openai.BadRequestError, 400, "max_tokens: "),
    ({"max_tokens": "many"}, openai.BadRequestError, 400, "max_tokens: "),
    ({"max_tokens": True}, openai.BadRequestError, 400, "max_tokens: "),
    ({"max_tokens": 1.5}, openai.BadRequestError, 400, "max_tokens: "),
    ({"max_completion_tokens": 0}, openai.BadRequestError, 400, "max_completion_tokens: "),
    ({"temperature": 3}, openai.BadRequestError, 400, "temperature must be between 0 and 2"),
    ({"temperature": "hot"}, openai.BadRequestError, 400, "temperature: "),
    ({"temperature": "1"}, openai.BadRequestError, 400, "temperature: "),
    ({"top_p": 0}, openai.BadRequestError, 400, "top_p must be"),
    ({"top_k": -1}, openai.BadRequestError, 400, "top_k must be"),
    ({"seed": "x"}, openai.BadRequestError, 400, "seed: "),
    ({"stop": [""]}, openai.BadRequestError, 400, "stop must be"),
    ({"stop": ["a"] * 17}, openai.BadRequestError, 400, "stop must be"),
    ({"stop": 5}, openai.BadRequestError, 400, "stop"),
    ({"n": 2}, openai.BadRequestError, 400, "n: input should be 1"),
    ({"stream": "yes"}, openai.BadRequestError, 400, "stream: "),
    ({"logprobs": True, "top_logprobs": 21}, openai.BadRequestError, 400, "top_logprobs: "),
    ({"response_format": {"type": "xml"}}, openai.BadRequestError, 400, "response_format.type: "),
    ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, 400, "needs json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "y"}}}},
     openai.BadRequestError, 400, "the constraint cannot be used"),
    ({"structured_outputs": {"regex": "(a"}}, openai.BadRequestError, 400, "the constraint cannot be used"),
    ({"structured_outputs": {"choice": []}}, openai.BadRequestError, 400, "choices must be"),
    ({"structured_outputs": {"choice": [1]}}, openai.BadRequestError, 400, "structured_outputs.choice.0: "),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "kind", "status", "words"), WRONG, ids=[json.dumps(w[0])[:60] for w in WRONG])
def test_a_wrong_request_gets_one_clear_message_and_its_code(
    change: dict[str, Any], kind: type[openai.APIStatusError], status: int, words: str, stream: bool, api: Served
) -> None:
    with pytest.raises(kind) as caught:
        api.openai.chat.completions.create(messages=ASK, model="base", extra_body={"stream": stream, **change})
    error = caught.value
    assert error.status_code == status
    assert words in error.body["message"]
    assert error.body.keys() == {"message", "type", "param", "code"}
    assert error.type == "invalid_request_error"
    assert error.body["param"] is None or error.body["message"].startswith(error.body["param"])
    assert "\n" not in error.body["message"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ["a", 3]}, "prompt: must be"), ({"prompt": []}, "prompt: must be"), ({"prompt": 3}, "prompt: must"),
        ({"prompt": [[]]}, "prompt: must be"), ({"prompt": [1, "a"]}, "prompt: must"),
        ({"prompt": [-1]}, "no token -1"),
        ({"prompt": ["a", [999999]]}, "no token 999999"), ({"prompt": ["a", "b"], "stream": True}, "stream: "),
        ({"prompt": None}, "prompt: field required"),
        ({"max_tokens": -1}, "max_tokens: "), ({"logprobs": 21}, "logprobs: "), ({"logprobs": True}, "logprobs: "),
        ({"prompt": "word " * 2000}, "the context holds 256"),
    ],
)  # fmt: skip
def test_a_wrong_completion_request_is_refused_too(change: dict[str, Any], words: str, api: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.openai.completions.create(model="base", prompt="x", extra_body=change)
    assert words in caught.value.body["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"), (b"", "application/json", 400, "invalid_request"),
        (b"[]", "application/json", 400, "invalid_request"), (b'"x"', "application/json", 400, "invalid_request"),
        (b"null", "application/json", 400, "invalid_request"), (b"\xff\xfe{", "application/json", 400, None),
        (b"[" * 100_000, "application/json", 400, None), (b'{"model": NaN}', "application/json", 400, None),
        (json.dumps(SPEAK).encode(), "text/plain", 400, "invalid_request"),
        (b"model=base", "application/x-www-form-urlencoded", 400, "invalid_request"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_body_that_is_no_request_is_refused(
    content: bytes, kind: str, status: int, code: str | None, path: str, api: Served
) -> None:
    reply = api.http.post(path, content=content, headers={"Content-Type": kind})
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert code in (None, error["code"])
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "change",
    [
        {"model": HALF}, {"stop": HALF}, {"stop": ["a", HALF]}, {"messages": [{"role": "user", "content": HALF}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}, {"user": HALF},
        {"messages": [{"role": HALF, "content": "x"}]}, {"structured_outputs": {"regex": HALF}},
        {"structured_outputs": {"choice": [HALF]}}, {"structured_outputs": {"json": {"enum": [HALF]}}},
        {"structured_outputs": {"json": {HALF: HALF}}},
    ],
)  # fmt: skip
def test_half_a_character_is_refused_wherever_it_matters(change: dict[str, Any], api: Served) -> None:
    """JSON can say it, and clients that cut texts do; UTF-8 cannot."""
    body = json.dumps({**SPEAK, "max_tokens": 2, **change})
    reply = api.http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == (200 if "user" in change else 400)
    assert ("user" in change) or reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"), ("POST", "/v2/chat/completions", 404, "not_found"),
        ("GET", "/static/nothing.js", 404, "not_found"), ("GET", "/static/../app.py", 404, "not_found"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"), ("GET", "/v1/models/..%2Fcolors", 404, None),
        ("GET", CHAT, 405, "method_not_allowed"), ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/healthz", 405, "method_not_allowed"),
    ],
)  # fmt: skip
def test_a_wrong_address_or_method_gets_an_error_in_openais_shape(
    method: str, path: str, status: int, code: str | None, api: Served
) -> None:
    reply = api.http.request(method, path)
    assert reply.status_code == status
    assert reply.json()["error"].keys() == {"message", "type", "param", "code"}
    assert code in (None, reply.json()["error"]["code"])
    assert (status != 405) or reply.headers["allow"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_before_it_is_all_read(chunked: bool, api: Served) -> None:
    body = json.dumps({**SPEAK, "user": "x" * LARGEST_BODY}).encode()
    parts = (body[at : at + (1 << 18)] for at in range(0, len(body), 1 << 18))
    headers = {"Content-Type": "application/json"}
    reply = api.http.post(CHAT, content=parts if chunked else body, headers=headers)
    assert ("content-length" in reply.request.headers) != chunked
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"
    assert "8 MiB" in reply.json()["error"]["message"]
    assert api.http.post(CHAT, json={**SPEAK, "max_tokens": 1, "user": "x" * 100_000}).status_code == 200


@pytest.mark.parametrize("length", ["abc", "-1", "1e3", "", "9" * 30])
def test_a_content_length_that_is_no_length_is_the_clients_fault(length: str, api: Served) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=30) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode() + b"{}")
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(4096):
            answer += part
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


# Many requests, and clients that leave


def test_a_full_queue_answers_429_and_says_when_to_come_back(slow: Served, gate: Gate) -> None:
    connections = [slow.connect(CHAT, SPEAK)]
    gate.begun.acquire()
    connections += [slow.connect(CHAT, {**SPEAK, "max_tokens": 3}) for _ in range(2)]
    until(lambda: slow.engine.load_numbers() == (1, 2))
    with pytest.raises(openai.RateLimitError, match="2 requests wait already") as caught:
        slow.openai.chat.completions.create(model="base", messages=ASK)
    assert int(caught.value.response.headers["retry-after"]) > 0
    assert caught.value.code == "rate_limit_exceeded"
    assert slow.http.post(CHAT, json={**SPEAK, "stream": True}).status_code == 429
    assert slow.metrics()["coterie_rejected_total"] == 2
    health = slow.http.get("/healthz").json()
    assert health == {"status": "ok", "running": 1, "waiting": 2}
    gate.open()
    for connection in connections:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()
    assert slow.openai.chat.completions.create(model="base", messages=ASK, max_tokens=2).choices


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "ask"), [(CHAT, SPEAK), (TEXT, {"model": "base", "prompt": "x"})])
def test_a_client_that_leaves_stops_its_generation(
    stream: bool, path: str, ask: dict[str, Any], slow: Served, gate: Gate
) -> None:
    connection = slow.connect(path, {**ask, "stream": stream, "max_tokens": 200})
    for _ in range(3):  # under way, and a word or two sent
        gate.begun.acquire()
        gate.leave.release()
    if stream:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    connection.close()
    until(lambda: slow.engine.load_numbers() == (0, 0), meanwhile=gate.leave.release)
    assert slow.engine.stats.generated_tokens < 150


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_forgotten(stream: bool, slow: Served, gate: Gate) -> None:
    first = slow.connect(CHAT, {**SPEAK, "max_tokens": 200})
    gate.begun.acquire()
    second = slow.connect(CHAT, {**SPEAK, "stream": stream})
    until(lambda: slow.engine.load_numbers() == (1, 1))
    second.close()
    until(lambda: slow.engine.load_numbers() == (1, 0), meanwhile=gate.leave.release)
    assert slow.engine.stats.generated_tokens < 150  # the first still runs
    first.close()


class Hesitant(Answerer):
    """Lets the client leave before the generation is even submitted."""

    def chat(self, *args: Any) -> Answer:
        assert self.go.acquire(timeout=60)
        return super().chat(*args)

    go = threading.Semaphore(0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_start_leaves_nothing_running(
    stream: bool, fitted_shop: Path, gate: Gate
) -> None:
    quick = open_answerer(fitted_shop, gate.base, slots=1)
    with serving(Hesitant(quick.business, quick.engine)) as served:
        served.connect(CHAT, {**SPEAK, "stream": stream, "max_tokens": 200}).close()
        served.connect(CHAT, {**SPEAK, "stream": stream, "max_tokens": 200}).close()
        time.sleep(0.2)  # the server hears of it
        Hesitant.go.release(2)
        until(lambda: served.engine.stats.requests == 2)
        until(lambda: served.engine.load_numbers() == (0, 0), meanwhile=gate.leave.release)
        assert served.engine.stats.generated_tokens < 150
        gate.open()


# Faults of ours


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_fails_is_an_error_of_the_server_and_the_next_request_is_answered(
    stream: bool, slow: Served, gate: Gate
) -> None:
    gate.open()
    gate.fails = lambda ids: len(ids) == 1  # the prompt passes, the second token fails
    with pytest.raises(openai.APIError, match="the generation failed") as caught:
        list(slow.openai.chat.completions.create(model="base", messages=ASK, stream=stream))
    assert caught.value.type == "server_error"
    assert stream or isinstance(caught.value, openai.InternalServerError)
    gate.fails = lambda _ids: False
    assert slow.openai.chat.completions.create(model="base", messages=ASK, max_tokens=3).choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_stops_says_so(stream: bool, slow: Served, gate: Gate) -> None:
    connection = slow.connect(CHAT, {**SPEAK, "stream": stream})
    gate.begun.acquire()
    closing = threading.Thread(target=slow.engine.close)
    closing.start()
    gate.open()
    closing.join()
    answer = b""
    while b"the engine has stopped" not in answer:
        part = connection.recv(4096)
        assert part, answer
        answer += part
    assert answer.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 503")
    connection.close()
    with pytest.raises(openai.InternalServerError) as caught:
        slow.openai.chat.completions.create(model="base", messages=ASK)
    assert (caught.value.status_code, caught.value.code) == (503, "stopped")
    reply = slow.http.get("/healthz")
    assert (reply.status_code, reply.json()["status"]) == (503, "the engine has stopped")


class Faulty(Answerer):
    def chat(self, *args: Any) -> Answer:
        raise ZeroDivisionError("a secret of ours")


def test_a_fault_of_ours_is_an_error_without_our_secrets(fitted_shop: Path, tiny_base: BaseModel) -> None:
    sound = open_answerer(fitted_shop, tiny_base, slots=1)
    with serving(Faulty(sound.business, sound.engine)) as served:
        reply = served.http.post(CHAT, json=SPEAK)
        assert reply.status_code == 500
        assert reply.json()["error"]["type"] == "server_error"
        assert "secret" not in reply.text
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert served.http.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("1/expert.json", b"{"), ("1/expert.json", None), ("current", b"one"), ("current", b""), ("current", b"7"),
        ("1/" + loras.WEIGHTS, b"cut"), ("1/" + loras.WEIGHTS, None), ("1/" + CONFIG, b"[]"),
        ("1/" + statistics.FILE, b"cut"),
    ],
)  # fmt: skip
def test_one_damaged_expert_takes_nobody_else_down(
    file: str, content: bytes | None, own_shop: Path, tiny_base: BaseModel
) -> None:
    damaged = own_shop / "experts" / "colors" / file
    damaged.unlink() if content is None else damaged.write_bytes(content)
    with serving(open_answerer(own_shop, tiny_base)) as served:
        assert {"base", "auto", "greet"} <= {m.id for m in served.openai.models.list()}
        hello = [{"role": "user", "content": "Hello, I am Kim."}]
        for model in ("greet", "auto"):
            done = served.openai.chat.completions.create(model=model, messages=hello, max_tokens=2)
            assert done.coterie["expert"] == "greet"
        together = served.openai.chat.completions.create(model="arrow", messages=hello, max_tokens=2).coterie["experts"]
        whole = file == "1/" + statistics.FILE
        assert [e["name"] for e in together] == (["colors", "greet"] if whole else ["greet"])
        if file != "1/" + statistics.FILE:  # without it the expert answers those who ask for it by name
            with pytest.raises((openai.InternalServerError, openai.NotFoundError), match="colors"):
                served.openai.chat.completions.create(model="colors", messages=ASK)


def test_experts_come_and_go_while_the_server_runs(own_shop: Path, tiny_base: BaseModel) -> None:
    with serving(open_answerer(own_shop, tiny_base)) as served:

        def ask(model: str) -> str | None:
            return served.openai.chat.completions.create(model=model, messages=ASK, max_tokens=2).coterie["expert"]

        library = served.answerer.business.library
        assert ask("auto") == ask("colors") == "colors"
        shutil.copytree(own_shop / "experts" / "colors", own_shop / "kept")
        library.remove("colors")
        with pytest.raises(openai.NotFoundError):
            ask("colors")
        assert ask("auto") != "colors"
        assert [m.id for m in served.openai.models.list()] == ["base", "auto", "greet"]
        shutil.copytree(own_shop / "kept", own_shop / "experts" / "colors")
        assert ask("auto") == ask("colors") == "colors"


# Watching


def test_metrics_count_what_was_done(api: Served) -> None:
    before = api.metrics()
    done = [api.openai.chat.completions.create(model=m, messages=ASK, max_tokens=7).usage for m in ("base", "greet")]
    after = api.metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["coterie_requests_total"] == 2
    assert grown["coterie_prompt_tokens_total"] == sum(u.prompt_tokens for u in done)
    assert grown["coterie_generated_tokens_total"] == sum(u.completion_tokens for u in done)
    assert grown["coterie_decode_steps_total"] > 0
    assert grown["coterie_busy_seconds_total"] > 0
    assert (after["coterie_requests_running"], after["coterie_requests_waiting"]) == (0, 0)
    assert after["coterie_first_token_seconds_median"] > 0


def test_health_says_how_busy_it_is(api: Served) -> None:
    reply = api.http.get("/healthz")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok", "running": 0, "waiting": 0})


def test_every_answer_carries_the_security_headers(api: Served) -> None:
    stream = api.http.post(CHAT, json={**SPEAK, "stream": True, "max_tokens": 2})
    large = api.http.post(CHAT, content=b"x" * (LARGEST_BODY + 1), headers={"Content-Type": "application/json"})
    for reply in (
        api.http.get("/healthz"), api.http.get("/v1/models"), api.http.get("/nothing"), api.http.get(CHAT), stream,
        large, api.http.post(CHAT, json={}),
    ):  # fmt: skip
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
