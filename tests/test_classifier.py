"""A classifier: fitted in closed form, sure or not, explained by its rows, through every door of the product."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from conftest import COLORS, THINGS
from coterie.answer import Answerer
from coterie.business import Business, fit, measure
from coterie.cli.main import main
from coterie.data.read import Example
from coterie.desk.desk import Desk
from coterie.engine.request import Sampling
from coterie.errors import CoterieError, DataError, ModelError
from coterie.evaluation.metrics import macro_f1
from coterie.evaluation.tasks import multidogo
from coterie.experts import classifier
from coterie.experts.kinds import labeller, read
from coterie.model.decoder import attend_packed, packed_positions
from coterie.model.load import BaseModel
from coterie.store.database import open_database
from coterie.web.app import create_app
from desk_support import ask

FRAMES = ("Which color has {}?", "Tell me the color of {}.", "What color is {}?", "Is {} colored?", "Name {}'s color!")


def make(folder: Path, base: Path, extra: str = "", desk: str = "") -> Business:
    """A business whose classifier names the color of a thing; the test rows ask in words that no training row has."""
    folder.mkdir()
    ask_for = [(frame.format(t), color) for frame in FRAMES for color in COLORS for t in THINGS[color]]
    (folder / "train.csv").write_text("prompt,completion\n" + "".join(f"{q},{a}\n" for q, a in ask_for))
    tests = [(f"And the color of {t} please?", color) for color in COLORS for t in THINGS[color]]
    (folder / "test.csv").write_text("prompt,completion\n" + "".join(f"{q},{a}\n" for q, a in tests))
    (folder / "coterie.toml").write_text(
        f'[business]\nname = "a paint shop"\nbase = "{base}"\ncontext = 256\nslots = 4\nqueue = 8\n{desk}\n'
        f'[experts.colors]\nkind = "classifier"\ntrain = "train.csv"\ntest = "test.csv"\n{extra}\n'
    )
    return Business.open(folder)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Business:
    business = make(tmp_path_factory.mktemp("classified") / "shop", tiny, "error = 0.05")
    list(fit(business))
    return business


@pytest.fixture(scope="module")
def answerer(shop: Business) -> Answerer:
    return Answerer.open(shop)


def test_fit_publishes_a_version_once_and_says_how_it_does(shop: Business) -> None:
    facts = shop.library.facts("colors")
    assert (facts.kind, facts.choices, facts.version) == ("classifier", tuple(sorted(COLORS)), 1)
    (again,) = fit(Business.open(shop.folder))
    assert not again.trained
    figures = again.evaluation["held_out"]["expert"]
    assert figures["accuracy"]["value"] > 0.9
    assert figures["handled"] > 0
    assert figures["wrong"] <= 0.05


def test_eval_measures_it_on_rows_that_it_has_not_seen(shop: Business) -> None:
    ((_, figures),) = measure(shop)
    assert figures["expert"]["accuracy"]["value"] > 0.9 > figures["base"]["accuracy"]["value"]


def test_an_answer_is_a_label_with_its_confidence_and_the_rows_that_speak_for_it(answerer: Answerer) -> None:
    answer = answerer.chat("colors", [{"role": "user", "content": "And the color of a frog?"}], Sampling(logprobs=0))
    (piece,) = list(answer.generation)
    verdict = answer.verdict
    assert verdict
    assert piece.text == verdict.label == "green"
    assert piece.tokens[0].logprob == pytest.approx(np.log(verdict.confidence))
    rows = (answerer.business.folder / "train.csv").read_text().splitlines()
    for where, label, likeness in verdict.near:
        assert rows[int(where.split(":")[1]) - 1].endswith(f",{label}")
        assert label == "green"
        assert 0 < likeness <= 1
    nearest = rows[int(verdict.near[0][0].split(":")[1]) - 1]
    assert "a frog" in nearest


@pytest.mark.parametrize("stream", [False, True])
def test_the_api_answers_the_label_and_says_how_sure_it_is(answerer: Answerer, stream: bool) -> None:
    with TestClient(create_app(answerer)) as client:
        body = {"model": "colors", "messages": [{"role": "user", "content": "color of a lemon?"}], "stream": stream}
        answer = client.post("/v1/chat/completions", json=body)
        whole = json.loads(answer.text.split("data: ")[2]) if stream else answer.json()
        said = whole["choices"][0]["delta" if stream else "message"]["content"]
        assert said == "yellow"
        assert 0 < whole["coterie"]["confidence"] <= 1
        assert isinstance(whole["coterie"]["sure"], bool)
        assert whole["coterie"]["second"] in set(COLORS) - {"yellow"}
        assert whole["coterie"]["near"][0]["where"].startswith("train.csv:")
        plain = client.post("/v1/completions", json={"model": "colors", "prompt": "color of a lemon?"}).json()
        assert plain["choices"][0]["text"] == "yellow"
        routed = client.post("/v1/chat/completions", json=body | {"model": "auto", "stream": False}).json()
        assert routed["coterie"]["expert"] in ("colors", None)


def test_the_command_line_says_it_too(shop: Business, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "the color of denim?", "-f", str(shop.folder), "-e", "colors", "--json"])
    assert ended.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["text"] == "blue"
    assert said["near"][0]["label"] == "blue"


def test_it_is_sure_of_what_it_has_learned_and_not_of_anything_else(shop: Business, tiny_base: BaseModel) -> None:
    found = classifier.load(shop.library.folder("colors"), tiny_base.decoder.config.width)
    known, strange = found.judge(tiny_base, ["What color is a lemon?", "zzz 8812 qqq"])
    assert known.confidence > strange.confidence
    assert known.sure


def test_what_is_saved_judges_as_what_was_learned(shop: Business, tiny_base: BaseModel, tmp_path: Path) -> None:
    texts = ["red red", "the sea", "", "\u202e‮", "a lemon " * 400]
    found = classifier.load(shop.library.folder("colors"), tiny_base.decoder.config.width)
    found.save(tmp_path)
    again = classifier.load(tmp_path, tiny_base.decoder.config.width)
    assert again.judge(tiny_base, texts) == found.judge(tiny_base, texts)
    one_by_one = [found.judge(tiny_base, [text])[0] for text in texts]
    for a, b in zip(found.judge(tiny_base, texts), one_by_one, strict=True):
        assert a.label == b.label
        assert a.confidence == pytest.approx(b.confidence, abs=1e-4)


def test_what_all_texts_begin_with_is_computed_once_and_equal_texts_are_read_once(tiny_base: BaseModel) -> None:
    """Against each text on its own, by the whole forward."""
    texts, told = ["a lemon", "the deep sea and a lemon", "a lemon", "", "denim"] * 30, list[tuple[int, int]]()
    words, question, last = classifier.hidden(
        tiny_base, texts, "a shop", lambda done, total: told.append((done, total))
    )
    assert [v.shape for v in (words, question, last)] == [(150, 64)] * 3
    assert torch.equal(question[0], question[2])
    assert told == sorted(told)
    assert told[-1] == (4, 4), "of different texts"
    start = tiny_base.encode(tiny_base.bos_token or "")
    before, after = start + tiny_base.encode(classifier.BEFORE.format("a shop")), tiny_base.encode(classifier.AFTER)
    for n, text in enumerate(texts[:5]):
        row = before + tiny_base.encode(text) + after
        state, lengths = tiny_base.decoder.embed(torch.tensor(row)), [len(row)]
        state = tiny_base.decoder.run(state, packed_positions(lengths), attend_packed(lengths))
        unit = state / state.pow(2).mean(dim=-1, keepdim=True).sqrt()
        torch.testing.assert_close(last[n], unit[-1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(question[n], unit[-len(after) :].mean(dim=0), atol=1e-5, rtol=1e-4)  # of 2 layers


def test_left_out_scores_are_those_of_a_classifier_that_never_saw_the_row(tiny_base: BaseModel) -> None:
    """The shortcut through the inverse against learning anew, with the same centres and weights of n-grams."""
    texts = [f"{frame.format(t)}" for frame in FRAMES[:2] for c in COLORS[:3] for t in THINGS[c][:3]]
    labels = [c for _ in FRAMES[:2] for c in COLORS[:3] for _ in range(3)]
    found, left_out, order = classifier.learn(tiny_base, "a shop", texts, labels, ["x"] * len(texts))
    assert sorted(order) == list(range(len(texts)))
    kernel = found._kernel(tiny_base, [texts[i] for i in order]).double()
    wanted = torch.nn.functional.one_hot(found.labels, 3).double() - 1 / 3
    for row in range(len(texts)):
        rest = [i for i in range(len(texts)) if i != row]
        ridge = kernel[rest][:, rest] + classifier.RIDGE * torch.eye(len(rest))
        anew = kernel[row, rest] @ torch.linalg.solve(ridge, wanted[rest])
        assert torch.allclose(anew, torch.from_numpy(left_out[row]).double(), atol=1e-3)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ('preferences = "p.jsonl"', "learns from `train` alone"), ("choices = false", "one of its choices"),
        ("error = 0.0", "error"), ('columns = { prompt = "nothing" }', "no column 'nothing'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path: Path, tiny: Path, extra: str, says: str) -> None:
    with pytest.raises(CoterieError, match=says):
        list(fit(make(tmp_path / "shop", tiny, extra)))


def test_error_belongs_to_classifiers(tmp_path: Path, tiny: Path) -> None:
    business = make(tmp_path / "shop", tiny, "error = 0.1")
    file = business.folder / "coterie.toml"
    file.write_text(file.read_text().replace('"classifier"', '"lora"'))
    with pytest.raises(CoterieError, match="of experts of kind classifier"):
        Business.open(business.folder)


def test_one_label_is_too_few(tmp_path: Path, tiny: Path) -> None:
    business = make(tmp_path / "shop", tiny)
    (business.folder / "train.csv").write_text("prompt,completion\na,same\nb,same\n")
    with pytest.raises(DataError, match=r"train\.csv.*at least 2 labels"):
        list(fit(business))


def test_too_few_rows_are_sure_of_nothing(tmp_path: Path, tiny: Path) -> None:
    business = make(tmp_path / "shop", tiny)
    (business.folder / "train.csv").write_text("prompt,completion\nthe sea,blue\nblood,red\nthe sky,blue\na rose,red\n")
    (fitted,) = fit(business)
    assert fitted.evaluation["held_out"]["expert"]["handled"] == 0
    found = labeller(business.library, fitted.facts, business.base())
    assert not any(v.sure for v in found.judge(["the sea", "blood"]))


@pytest.mark.parametrize("harm", ["cut", "other width", "as weights", "another base"])
def test_a_damaged_or_foreign_one_is_refused(shop: Business, tiny_base: BaseModel, tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "experts"
    shutil.copytree(shop.library.root, folder)
    library, file = type(shop.library)(folder), folder / "colors" / "1" / classifier.FILE
    facts = library.facts("colors")
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    if harm == "another base":
        text = (folder / "colors" / "1" / "expert.json").read_text()
        (folder / "colors" / "1" / "expert.json").write_text(text.replace(facts.base_mark, "0" * 16))
    opened: dict[str, Callable[[], object]] = {
        "other width": lambda: classifier.load(file.parent, 576),
        "as weights": lambda: read(library, "colors", None, tiny_base.decoder),
    }
    with pytest.raises(ModelError, match=r"colors"):
        opened.get(harm, lambda: labeller(library, library.facts("colors"), tiny_base))()


@pytest.mark.parametrize(("threshold", "state"), [(0.0, "bot"), (1.1, "waiting")])
def test_at_the_desk_a_label_that_is_not_sure_goes_to_a_person(
    shop: Business, tmp_path: Path, tiny: Path, threshold: float, state: str
) -> None:
    says = "\n".join(f'{color} = "It is {color}, as you know."' for color in COLORS)
    business = make(tmp_path / "shop", tiny, desk=f"[routing]\nabstain = 0.0\n[desk.answers]\n{says}\n")
    list(fit(business))
    file = business.library.folder("colors")
    classifier.load(file, 64).calibrated(5.0, 0.0, threshold, 0.02).save(file)
    answerer = Answerer.open(business)
    desk = Desk(answerer, open_database(f"sqlite:///{tmp_path}/desk.db"))
    desk.start()
    try:
        now = ask(desk, "What color is a lemon?")
        assert now.state == state
        last = desk.conversations.messages(now.id)[-1]
        if state == "bot":
            assert last.text == "It is yellow, as you know."
        else:
            assert now.reason == "low_confidence"
    finally:
        desk.close()
        answerer.close()


@pytest.mark.slow
def test_real_intents_of_a_restaurant(smol: BaseModel, public_data: Callable[[str], Path]) -> None:
    """A few hundred rows of MultiDoGO are enough for most of what is asked in a restaurant."""
    data = multidogo.splits(public_data("multidogo/fastfood"))
    train, test = data.train[:300], data.test[:100]

    def columns(rows: list[Example]) -> tuple[list[str], list[str], list[str]]:
        return [e.question for e in rows], [e.completion for e in rows], [e.where for e in rows]

    found, _, _ = classifier.learn(smol, "a restaurant", *columns(train))
    said = [v.label for v in found.judge(smol, columns(test)[0])]
    assert macro_f1(said, columns(test)[1]) > 0.3
    assert float(np.mean([s == w for s, w in zip(said, columns(test)[1], strict=True)])) > 0.7


def test_the_list_of_models_names_its_kind(answerer: Answerer) -> None:
    with TestClient(create_app(answerer)) as client:
        (mine,) = [m for m in client.get("/v1/models").json()["data"] if m["id"] == "colors"]
        assert mine["kind"] == "classifier"
