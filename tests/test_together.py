"""Several experts chosen for one request: those that can answer together do, in shares that sum to 1, and are named."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from coterie.answer import Answerer
from coterie.business import Business, fit
from coterie.choose import Choice
from coterie.engine.engine import Engine
from coterie.engine.request import Blend, Generation, Piece, Sampling
from coterie.errors import Stopped
from coterie.experts import kinds
from coterie.experts.adapter import BottleneckConfig
from coterie.experts.expert import Expert
from coterie.experts.full import FullConfig
from coterie.experts.instruction import KIND, frame
from coterie.experts.library import ExpertFacts
from coterie.experts.lora import LoraConfig
from coterie.experts.merge import merge
from coterie.experts.prompt import PromptConfig
from coterie.learn import save_expert
from coterie.model.load import BaseModel
from coterie.own import OwnEngines
from coterie.routing.router import Decision
from coterie.routing.statistics import learn
from coterie.web.app import create_app
from support import greedy, logits_with, trained

ASK = [{"role": "user", "content": "Which color has the sea?"}]
SOME, OTHERS = [f"Which color has the {t}?" for t in ("sea", "sky", "sun")], ["Hello, I am Ada.", "Good day, I am Ben."]
COUNT = 6
CONFIGS = {
    "a": LoraConfig(4, 8.0), "b": LoraConfig(2, 8.0, ("q_proj", "down_proj")), "dora": LoraConfig(4, 8.0, dora=True),
    "bottle": BottleneckConfig(8), "soft": PromptConfig(4), "whole": FullConfig(),
}  # fmt: skip


def publish(business: Business, base: BaseModel, name: str, seed: int = 0) -> Expert:
    """An expert as if it had been trained, which the router knows by some inputs."""
    config, inputs = CONFIGS[name], SOME + OTHERS if name in "ab" else SOME
    if config.kind == "full":
        generator = torch.Generator().manual_seed(seed)
        made = kinds.KINDS["full"].fresh(config, base.decoder)
        for w in made.weights.values():
            w.add_(torch.randn(w.shape, generator=generator) * 0.02)
    else:
        made = trained(config, base, seed + sorted(CONFIGS).index(name))

    def fill(folder: Path) -> None:
        save_expert(base, made, folder, "tiny")
        learn(base, inputs, [f"{name}.csv:{i}" for i in range(len(inputs))]).save(folder)

    business.library.publish(ExpertFacts(name, config.kind), fill)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Path, tiny_base: BaseModel) -> Path:
    """A business with an expert of each kind; rules force pairs of them by channel. Tests do not change it."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "colors.csv").write_text("prompt,completion\n" + "".join(f"{q},{'blue' * (i % 2) or 'red'}\n"
                                                                       for i, q in enumerate(SOME * 4)))  # fmt: skip
    (folder / "coterie.toml").write_text(
        f'[business]\nbase = "{tiny}"\ncontext = 256\nslots = 3\nqueue = 16\n[routing]\ntop_k = 2\n'
        + "".join(f'[[routing.rules]]\nchannel = "{one}-{two}"\nuse = ["{one}", "{two}"]\n'
                  for one, two in (("a", "b"), ("bottle", "dora")))
        + '[experts.sorter]\nkind = "classifier"\ntrain = "colors.csv"\n'
    )  # fmt: skip
    business = Business(folder, Business.open(folder).config, tiny_base)
    list(fit(business))
    for name in CONFIGS:
        publish(business, tiny_base, name)
    shots = (("What is this?", "A test."),)
    business.library.publish(ExpertFacts("words", KIND, system="Answer briefly.", examples=shots), lambda _to: None)
    return folder


def open_answerer(folder: Path, base: BaseModel, combine: str = "merge") -> Answerer:
    config = Business.open(folder).config
    config = config.model_copy(update={"routing": config.routing.model_copy(update={"combine": combine})})
    business = Business(folder, config, base)
    return Answerer(business, business.engine())


@pytest.fixture(scope="module")
def answerers(folder: Path, tiny_base: BaseModel) -> Iterator[dict[str, Answerer]]:
    """One for each way to combine."""
    made = {how: open_answerer(folder, tiny_base, how) for how in ("merge", "logits", "arrow")}
    yield made
    for answerer in made.values():
        answerer.close()


def chosen(**shares: float) -> Choice:
    """As the router decides, who is nearest first."""
    return Choice("", Decision(tuple(shares.items()), ()), True, {})


def averaged(base: BaseModel, prompt: list[int], experts: list[tuple[Expert, float]]) -> list[int]:
    """What greedy decoding of the weighted mean of several experts' scores comes to."""
    said: list[int] = []
    while len(said) < COUNT:
        scores = sum(share * logits_with(base, [prompt + said], expert)[0][-1] for expert, share in experts)
        token = int(scores.argmax())  # type: ignore[union-attr]
        if token in base.eos:
            break
        said.append(token)
    return said


def wanted(business: Business, base: BaseModel, how: str, shares: dict[str, float]) -> list[int]:
    """What these experts in these shares say, by plain forward passes."""
    library, (first, *_) = business.library, shares
    prompt = base.encode(base.chat(frame(library.facts(first), ASK)))
    if first == "words":
        return greedy(base, prompt, COUNT)[0]
    experts = {name: kinds.read(library, name, 1, base.decoder) for name in shares}
    if len(experts) == 1:
        return greedy(base, prompt, COUNT, experts[first])[0]
    if how == "logits":
        return averaged(base, prompt, [(experts[name], share) for name, share in shares.items()])
    return greedy(base, prompt, COUNT, merge(list(experts.values()), list(shares.values()), base.decoder.config))[0]


@pytest.mark.parametrize(
    ("how", "choice", "answers"),
    [
        ("merge", {"a": 0.4, "b": 0.3, "soft": 0.3}, {"a": 4 / 7, "b": 3 / 7}),
        ("merge", {"a": 0.4, "whole": 0.3, "b": 0.2, "sorter": 0.1}, {"a": 2 / 3, "b": 1 / 3}),
        ("merge", {"a": 0.6, "dora": 0.4}, {"a": 1.0}),
        ("merge", {"dora": 0.6, "a": 0.4}, {"dora": 1.0}),
        ("merge", {"bottle": 0.5, "a": 0.3, "b": 0.2}, {"bottle": 1.0}),
        ("merge", {"soft": 0.6, "bottle": 0.4}, {"soft": 1.0}),
        ("merge", {"words": 0.6, "a": 0.4}, {"words": 1.0}),
        ("merge", {"a": 0.6, "words": 0.4}, {"a": 1.0}),
        ("logits", {"bottle": 0.5, "dora": 0.3, "whole": 0.2}, {"bottle": 0.625, "dora": 0.375}),
        ("logits", {"soft": 0.6, "words": 0.2, "a": 0.2}, {"soft": 0.75, "a": 0.25}),
        ("logits", {"a": 0.4, "b": 0.3, "dora": 0.1, "bottle": 0.2}, {"a": 0.5, "b": 0.375, "dora": 0.125}),  # 3 slots
    ],
)
def test_who_can_answer_together_does_in_shares_of_1_and_nobody_else_is_named(
    how: str, choice: dict[str, float], answers: dict[str, float], answerers: dict[str, Answerer], tiny_base: BaseModel
) -> None:
    answerer = answerers[how]
    answer = answerer.chat(chosen(**choice), ASK, Sampling(max_tokens=COUNT))
    answer.generation.text()
    assert {name: share for name, _, share in answer.experts} == pytest.approx(answers)
    assert answer.expert == next(iter(answers))
    assert answer.generation.generated == wanted(answerer.business, tiny_base, how, answers)


@pytest.mark.parametrize("how", ["merge", "logits", "arrow"])
@pytest.mark.parametrize("first", ["whole", "sorter"])
def test_a_model_of_its_own_and_a_classifier_answer_alone(how: str, first: str, answerers: dict[str, Answerer]) -> None:
    answerer = answerers[how]
    alone = answerer.chat(first, ASK, Sampling(max_tokens=COUNT))
    together = answerer.chat(chosen(**{first: 0.5, "a": 0.3, "b": 0.2}), ASK, Sampling(max_tokens=COUNT))
    assert together.experts == alone.experts == ((first, 1, 1.0),)
    assert together.generation.text() == alone.generation.text()
    assert (together.verdict is not None) == (first == "sorter")


def test_arrow_takes_the_loras_that_can_be_added_up_whatever_else_is_there(answerers: dict[str, Answerer]) -> None:
    asked = answerers["arrow"].chat("arrow", ASK, Sampling(max_tokens=COUNT))
    said = asked.generation.text()
    assert (asked.expert, [name for name, *_ in asked.experts]) == ("arrow", ["a", "b"])
    routed = answerers["arrow"].chat(chosen(a=0.5, dora=0.3, b=0.2), ASK, Sampling(max_tokens=COUNT))
    assert routed.generation.text() == said
    assert [name for name, *_ in routed.experts] == ["a", "b"]


@pytest.fixture
def ask(answerers: dict[str, Answerer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Ask the API for "auto", on a channel whose rule says which experts answer."""
    (tmp_path / "static").mkdir()
    monkeypatch.setattr("coterie.web.app.HERE", tmp_path)  # the pages play no part
    clients = {how: TestClient(create_app(answerer)) for how, answerer in answerers.items()}

    def post(how: str, path: str, channel: str, **body: Any) -> Any:
        body = {"model": "auto", "max_tokens": COUNT, **body}
        reply = clients[how].post(path, json=body, headers={"X-Coterie-Channel": channel})
        assert reply.status_code == 200, reply.text
        return reply

    return post


def weights(header: str) -> dict[str, float]:
    """Names and weights of the header."""
    parts = [part.split(";") for part in header.split(", ")]
    return {name.strip('"'): float(more[-1].removeprefix("weight=")) for name, *more in parts if more}


@pytest.mark.parametrize(
    ("how", "channel", "names"),
    [("merge", "a-b", {"a", "b"}), ("logits", "a-b", {"a", "b"}), ("arrow", "a-b", {"a", "b"}),
     ("logits", "bottle-dora", {"bottle", "dora"}), ("merge", "bottle-dora", None)],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_auto_with_several_experts_says_who_answered_and_says_what_they_say(
    how: str, channel: str, names: set[str] | None, stream: bool, ask: Callable[..., Any],
    answerers: dict[str, Answerer], tiny_base: BaseModel,
) -> None:  # fmt: skip
    reply = ask(how, "/v1/chat/completions", channel, messages=ASK, stream=stream)
    if stream:
        events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        body, said = events[0], "".join(e["choices"][0]["delta"].get("content", "") for e in events)
    else:
        body = reply.json()
        said = body["choices"][0]["message"]["content"]
    told = {e["name"]: e["weight"] for e in body["coterie"]["experts"]}
    assert sum(told.values()) == pytest.approx(1, abs=1e-3)
    assert weights(reply.headers["X-Coterie-Experts"]) == pytest.approx(told, abs=1e-3)
    assert body["model"] == next(iter(told))
    answerer = answerers[how]
    decided = dict(answerer.chooser.choose(ASK[0]["content"], channel).decision.chosen)
    assert decided.keys() == set(channel.split("-"))
    exact = decided if names else {next(iter(decided)): 1.0}  # what cannot be merged: the nearest alone
    assert told == pytest.approx(exact, abs=1e-3)
    if how == "arrow":
        blend = Blend(tuple(((name, 1), share) for name, share in exact.items()), "arrow")
        prompt = tiny_base.encode(tiny_base.chat(ASK))
        assert said == answerer.engine.submit(prompt, Sampling(max_tokens=COUNT), blend).text()
    else:
        assert said == tiny_base.tokenizer.decode(wanted(answerer.business, tiny_base, how, exact))


def test_several_prompts_each_say_who_answered_and_the_header_says_all_of_it(
    folder: Path, ask: Callable[..., Any]
) -> None:
    both = ask("merge", "/v1/completions", "a-b", prompt=[SOME[0], OTHERS[0]])
    body = both.json()
    for choice in body["choices"]:
        assert {e["name"] for e in choice["coterie"]["experts"]} == {"a", "b"}
        assert choice["coterie"]["expert"] in ("a", "b")
    told = [{e["name"]: e["weight"] for e in choice["coterie"]["experts"]} for choice in body["choices"]]
    mean = {name: sum(t[name] for t in told) / 2 for name in ("a", "b")}
    assert weights(both.headers["X-Coterie-Experts"]) == pytest.approx(mean, abs=1e-3)
    named = {choice["coterie"]["expert"] for choice in body["choices"]}
    assert body["model"] == (named.pop() if len(named) == 1 else "auto")
    base = ask("merge", "/v1/completions", "", model="base", prompt=["Hello", "Good day"])
    assert (base.headers["X-Coterie-Experts"], base.json()["model"]) == ('"base"', "base")
    assert [c["coterie"]["experts"] for c in base.json()["choices"]] == [[], []]


# Experts that are models of their own


def until(true: Callable[[], bool]) -> None:
    """Wait for what another thread brings about, half a minute at most."""
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    pytest.fail("it did not come about")


class Fulls:
    """A library of full experts, and what has been opened of them."""

    def __init__(self, folder: Path, base: BaseModel, budget: int) -> None:
        self.business = Business(folder, Business.open(folder).config, base)
        self.opened: list[Engine] = []
        self.engines = OwnEngines(self._start, self.business.library, budget)

    def _start(self, facts: ExpertFacts) -> Engine | None:
        engine = self.business.own_engine(facts)
        assert engine
        self.opened.append(engine)
        return engine

    def ask(
        self, name: str, say: Callable[[Piece], None] | None = None, version: int | None = None, most: int = 2
    ) -> Generation:
        self.engines.tidy()
        facts = self.business.library.facts(name, version)
        return self.engines.submit(facts, [1, 2, 3], Sampling(max_tokens=most, logprobs=0), say)

    @property
    def alive(self) -> list[bool]:
        return [engine.alive for engine in self.opened]


@pytest.fixture
def fulls(folder: Path, tiny_base: BaseModel, tmp_path: Path) -> Iterator[Fulls]:
    """Two full experts, in a budget that holds neither."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.copytree(copy / "experts" / "whole", copy / "experts" / "other")
    facts = copy / "experts" / "other" / "1" / "expert.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "name": "other"}))
    fulls = Fulls(copy, tiny_base, 1)
    yield fulls
    fulls.engines.close()


def test_a_model_of_its_own_gives_way_to_its_next_version_and_to_others_beyond_the_budget(
    fulls: Fulls, tiny_base: BaseModel
) -> None:
    for _ in range(2):
        fulls.ask("whole").text()
    assert fulls.alive == [True]  # the latest stays, whatever it takes
    fulls.ask("other").text()
    assert fulls.alive == [False, True]
    publish(fulls.business, tiny_base, "whole", seed=1)
    fulls.ask("whole").text()
    assert fulls.alive == [False, False, True]
    fulls.ask("whole", version=1).text()  # a choice that was made just before the new version came
    assert fulls.alive[2:] == [False, True]
    fulls.business.library.remove("whole")
    fulls.engines.tidy()
    assert not any(fulls.alive)


def test_a_model_that_answers_ends_its_answer_before_it_goes(fulls: Fulls, tiny_base: BaseModel) -> None:
    begun, leave, said = threading.Event(), threading.Event(), list[Piece]()

    def slowly(piece: Piece) -> None:
        said.append(piece)
        begun.set()
        assert leave.wait(60)

    running = fulls.ask("whole", slowly, most=20)
    assert begun.wait(60)
    publish(fulls.business, tiny_base, "whole", seed=1)
    fulls.ask("whole").text()
    assert fulls.alive == [True, True]
    leave.set()
    until(lambda: fulls.opened[0].load_numbers() == (0, 0))
    until(lambda: said[-1].finish is not None)
    assert said[-1].finish in ("length", "stop")
    assert len(running.generated) > 1
    fulls.ask("whole").text()
    assert fulls.alive == [False, True]


def test_a_stopped_answerer_says_so_of_its_models_too(fulls: Fulls) -> None:
    fulls.ask("whole").text()
    fulls.engines.close()
    with pytest.raises(Stopped):
        fulls.ask("whole")
