"""The router: whose subject a question is, or nobody's; experts come and go without touching each other."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_shop
from coterie.answer import Answerer
from coterie.business import Business, fit
from coterie.choose import Chooser, question
from coterie.cli.main import main
from coterie.errors import CoterieError, DataError, ModelError
from coterie.experts import lora as loras
from coterie.experts.library import ExpertFacts, Library
from coterie.model.load import BaseModel
from coterie.routing.router import FITTED, POOLED, SHORTLIST, Router, rank
from coterie.routing.rules import Rule, rule
from coterie.routing.space import COMMON, Background, _words, background, embed, locate
from coterie.routing.statistics import FILE, Statistics, Summary, learn, load_statistics, load_summary
from coterie.web.app import create_app

WIDTH = 24
SUBJECTS = {
    "gardening": ["When do I plant tulips?", "How much water does a tomato plant need?", "My roses have black spots.",
                  "Which fertiliser is good for lettuce?", "Can I prune the apple tree in March?",
                  "How do I get rid of slugs in the vegetable bed?", "What grows in the shade of a hedge?",
                  "Is it too late to sow carrots?"],
    "travel": ["Book me a flight to Madrid on Friday.", "Is breakfast included at the hotel?",
               "I need a window seat on the train to Rome.", "How long is the layover in Frankfurt?",
               "Can I bring two suitcases on the plane?", "Rent a car at the airport for three days.",
               "My flight was cancelled, what now?", "Find me a hotel near the beach."],
    "code": ["Write a Python function that reverses a list.", "Why does this loop raise an IndexError?",
             "def parse(text): return text.split(',')", "How do I sort a dictionary by value?",
             "What does async def do in Python?", "Explain the difference between a list and a tuple.",
             "import json; json.loads(text)", "How can I read a file line by line in Python?"],
}  # fmt: skip


def synthetic(seed: int, count: int = 12) -> Statistics:
    """An expert around a direction of its own in a small space."""
    rng = np.random.default_rng(seed)
    centre = np.random.default_rng(seed).normal(size=WIDTH) * 3
    inputs = (centre + rng.normal(size=(count, WIDTH))).astype(np.float32)
    scatter = np.cov(inputs, rowvar=False, bias=True).astype(np.float32)
    where = tuple(f"{seed}.csv:{i}" for i in range(count))
    return Statistics("here", count, inputs.mean(axis=0), scatter, inputs.astype(np.float16), where)


def flat() -> Background:
    return Background("here", np.zeros(WIDTH, np.float32), np.eye(WIDTH, dtype=np.float32))


def router_of(seeds: list[int]) -> Router:
    router = Router(flat())
    for seed in seeds:
        router.add(f"e{seed}", synthetic(seed))
    return router


def inputs_of(seed: int) -> np.ndarray:
    return synthetic(seed, 40).sample[20:].astype(np.float32)


@given(
    changes=st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=24),
    text=st.integers(0, 9),
)
def test_a_router_knows_only_which_experts_there_are_and_not_how_they_came(
    changes: list[tuple[bool, int]], text: int
) -> None:
    router, there = Router(flat()), set[int]()
    for add, seed in changes:
        if add:
            router.add(f"e{seed}", synthetic(seed))
            there.add(seed)
        elif seed in there:
            router.remove(f"e{seed}")
            there.remove(seed)
        if seed % 3 == 0 and there:  # deciding between changes leaves derived numbers behind; they must not stay
            router.route(inputs_of(seed)[0])
    vector = inputs_of(text)[0]
    found, wanted = router.route(vector, 3), router_of(sorted(there)).route(vector, 3)
    assert len(router) == len(there)
    assert [n for n, _ in found.chosen] == [n for n, _ in wanted.chosen]
    assert [s.name for s in found.scored] == [s.name for s in wanted.scored]
    np.testing.assert_allclose([s.similarity for s in found.scored], [s.similarity for s in wanted.scored], atol=1e-4)


@given(seeds=st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True), top_k=st.integers(1, 20),
       abstain=st.floats(0, 0.5))  # fmt: skip
def test_shares_are_positive_sum_to_one_and_never_name_an_expert_below_its_threshold(
    seeds: list[int], top_k: int, abstain: float
) -> None:
    decision = router_of(seeds).route(inputs_of(seeds[0])[1], top_k, abstain)
    shares = [share for _, share in decision.chosen]
    assert len(shares) <= min(top_k, len(seeds))
    assert all(share > 0 for share in shares)
    assert shares == sorted(shares, reverse=True)
    assert not shares or sum(shares) == pytest.approx(1)
    near = {s.name for s in decision.scored if s.similarity >= s.threshold}
    assert {name for name, _ in decision.chosen} <= near
    assert sum(s.probability for s in decision.scored) == pytest.approx(1)


def test_ten_thousand_experts_are_told_apart_and_one_more_touches_no_other() -> None:
    router = Router(flat())
    seeds = range(10_000)
    for seed in seeds:
        router.add(f"e{seed}", synthetic(seed, 4), lambda seed=seed: synthetic(seed))  # type: ignore[misc]
    asked = list(range(0, 10_000, 97))
    right = [router.route(inputs_of(seed)[0], abstain=0.0).scored[0].name == f"e{seed}" for seed in asked]
    assert np.mean(right) > 0.97
    means = router._means[: len(router)].copy()
    router.add("one-more", synthetic(77_777))
    assert router._means[:10_000].tobytes() == means.tobytes()
    assert router.route(inputs_of(77_777)[0]).chosen[0][0] == "one-more"
    router.remove("one-more")
    assert router._means[:10_000].tobytes() == means.tobytes()
    assert router.route(inputs_of(77_777)[0]).scored[0].name != "one-more"
    assert router._means.nbytes <= 2 * 10_000 * WIDTH * 4
    assert len(router._samples) <= 256


def test_what_is_far_from_every_expert_goes_to_none_unless_someone_must_answer() -> None:
    router = router_of([1, 2, 3])
    far = np.full(WIDTH, -9, np.float32)
    assert router.route(far).chosen == ()
    assert router.route(far).similarity is not None
    assert len(router.route(far, sure=True).chosen) == 1
    assert [n for n, _ in router.route(far, 5, only=["e2"], sure=True).chosen] == ["e2"]
    assert router.route(inputs_of(1)[0], only=["e2", "e3"]).chosen == ()
    assert Router(flat()).route(far).chosen == ()


def test_more_than_a_short_list_answer_together_where_top_k_allows_it() -> None:
    router = router_of(list(range(30)))
    assert len(router.route(inputs_of(1)[0], 24, sure=True).scored) == 24
    assert len(router.route(inputs_of(1)[0], 2, sure=True).scored) == SHORTLIST


def test_forbidding_an_expert_looks_at_the_others_once() -> None:
    class Names(list[str]):
        def __contains__(self, name: object) -> bool:
            raise AssertionError("looked through for each expert")

    router = router_of([1, 2, 3])
    assert [n for n, _ in router.route(inputs_of(1)[0], 5, only=Names(["e2", "e3"]), sure=True).chosen] == ["e2", "e3"]


def ring(name: str, radius: float, seed: int, count: int = 200) -> Statistics:
    """Inputs on a circle of this radius around the same point as every other ring: their means say nothing."""
    rng = np.random.default_rng(seed)
    angle, inputs = rng.uniform(0, 2 * np.pi, count), 0.1 * rng.normal(size=(count, WIDTH))
    inputs[:, 0] += 5
    inputs[:, 1:3] += radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    scatter = np.cov(inputs, rowvar=False, bias=True).astype(np.float32)
    return Statistics(
        "here", count, inputs.mean(axis=0).astype(np.float32), scatter, inputs.astype(np.float16),
        tuple(f"{name}:{i}" for i in range(count)),
    )  # fmt: skip


def test_close_experts_are_told_apart_by_their_own_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router(flat())
    for name, radius in (("inner", 2.0), ("outer", 2.5)):
        router.add(name, ring(name, radius, len(name) + int(radius)))

    def right() -> float:
        asked = [("inner", ring("", 2.0, 50)), ("outer", ring("", 2.5, 51))]
        rows = [(name, router.route(v.astype(np.float32))) for name, made in asked for v in made.sample]
        assert all(sum(s.probability for s in d.scored) == pytest.approx(1) for _, d in rows)
        return float(np.mean([d.scored[0].name == name for name, d in rows]))

    compared = right()
    assert len(router._duels) == 1
    monkeypatch.setattr("coterie.routing.router.CLOSE", -1.0)
    assert compared > right() + 0.02
    router.remove("inner")
    assert not router._duels


def test_an_expert_of_another_base_model_is_refused() -> None:
    other = Background("elsewhere", np.zeros(WIDTH, np.float32), np.eye(WIDTH, dtype=np.float32))
    with pytest.raises(ModelError, match=r"e1: its routing statistics are of another base model or version; .*learn"):
        Router(other).add("e1", synthetic(1))


def test_statistics_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    made = synthetic(5)
    made.save(tmp_path)
    found = load_statistics(tmp_path)
    assert found is not None
    assert (found.space, found.count, found.where) == (made.space, made.count, made.where)
    for part in ("mean", "scatter", "sample"):
        np.testing.assert_array_equal(getattr(found, part), getattr(made, part))
    assert load_statistics(tmp_path / "nothing here") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"not safetensors at all",
        lambda data: data.replace(b"space", b"spice"),
        lambda data: data[:-4] + b"\xff\xff\xff\x7f",
    ],
    ids=["truncated", "empty", "other format", "no space named", "not a number"],
)
def test_damaged_statistics_say_so(damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    synthetic(5).save(tmp_path)
    (tmp_path / FILE).write_bytes(damage((tmp_path / FILE).read_bytes()))
    with pytest.raises(ModelError, match=r"damaged .*learn-route"):
        load_statistics(tmp_path)


def test_an_expert_whose_file_goes_bad_while_it_serves_is_left_out_and_the_others_go_on() -> None:
    def gone() -> Statistics:
        raise ModelError("e2: the file is gone")

    router = router_of([1, 3])
    router.add("e2", synthetic(2), gone)
    assert router.route(inputs_of(1)[0]).chosen[0][0] == "e1"
    assert "e2" not in router
    assert router.lost == {"e2": "e2: the file is gone"}
    assert {s.name for s in router.route(inputs_of(3)[0]).scored} == {"e1", "e3"}


def test_statistics_that_cannot_be_read_leave_the_router_as_it_was() -> None:
    def gone() -> Statistics:
        raise ModelError("e2: the file is gone")

    router, known = router_of([1, 3]), synthetic(2)
    before = router.route(inputs_of(1)[0])
    with pytest.raises(ModelError, match="gone"):
        router.add("e2", Summary(known.space, known.count, known.mean), gone)
    assert ("e2" in router, len(router), router.route(inputs_of(1)[0])) == (False, 2, before)


@pytest.fixture
def many(tmp_path: Path, tiny_base: BaseModel) -> Business:
    """A business with more experts than are pooled, which have statistics and nothing else."""
    (tmp_path / "coterie.toml").write_text("[routing]\nabstain = 0.0\n")
    business = Business(tmp_path, Business.open(tmp_path).config, tiny_base)
    for number in range(POOLED + 24):
        shelve(business, f"e{number}", number)
    return business


def shelve(business: Business, name: str, seed: int) -> None:
    """An expert of invented inputs in the space of the business's base."""
    space, rng = background(business.base(), business.folder / ".coterie"), np.random.default_rng(seed)
    inputs = (space.centre + rng.normal(size=(6, len(space.centre)))).astype(np.float32)
    made = Statistics(
        space.space, len(inputs), inputs.mean(axis=0), np.cov(inputs, rowvar=False, bias=True).astype(np.float32),
        inputs.astype(np.float16), tuple(f"{name}:{i}" for i in range(len(inputs))),
    )  # fmt: skip
    business.library.publish(ExpertFacts(name, "instruction"), made.save)


@dataclass
class Read:
    """Whose statistics have been read, in part and as a whole, and how many means were whitened."""

    parts: list[str] = field(default_factory=list)
    wholes: list[str] = field(default_factory=list)
    whitened: int = 0


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """Counts the work of every chooser from now on."""
    read, see = Read(), Router._see

    def noting(names: list[str], load):  # type: ignore[no-untyped-def]
        def noted(folder: Path):  # type: ignore[no-untyped-def]
            names.append(folder.parent.name)
            return load(folder)

        return noted

    def seeing(router: Router, vectors: np.ndarray) -> np.ndarray:
        read.whitened += len(vectors)
        return see(router, vectors)

    monkeypatch.setattr("coterie.choose.load_summary", noting(read.parts, load_summary))
    monkeypatch.setattr("coterie.choose.load_statistics", noting(read.wholes, load_statistics))
    monkeypatch.setattr(Router, "_see", seeing)
    return read


def test_the_first_decision_reads_whole_statistics_of_few_experts(many: Business, read: Read) -> None:
    choice = Chooser(many, many.base()).choose("Which color has the grass?")
    assert len(choice.decision.scored) == SHORTLIST
    assert sorted(read.parts) == sorted(many.library.names())
    # Those that are pooled, those on the shortlist, and those that the temperature is fitted to.
    assert len(read.wholes) <= POOLED + SHORTLIST + 2 * FITTED


@pytest.mark.parametrize("pooled", [False, True])
def test_one_expert_that_comes_or_goes_among_many_touches_no_other_and_costs_the_same_few_reads(
    many: Business, read: Read, pooled: bool
) -> None:
    library, chooser = many.library, Chooser(many, many.base())
    chooser.choose("Which color has the grass?")
    others = {name: (library.folder(name) / FILE).read_bytes() for name in library.names()}
    stands = sorted(map(rank, others))[POOLED - 1]  # the last that is pooled
    name = next(n for n in (f"new{i}" for i in range(1000)) if (rank(n) < stands) == pooled)

    def turn(change: Callable[[], None]) -> Read:
        change()
        before = Read(list(read.parts), list(read.wholes), read.whitened)
        chooser.choose("Which color has the grass?")
        assert {n: (library.folder(n) / FILE).read_bytes() for n in others} == others
        return Read(read.parts[len(before.parts) :], read.wholes[len(before.wholes) :], read.whitened - before.whitened)

    few = SHORTLIST + 2 * FITTED  # inputs looked at closely: not more for a larger library
    came = turn(lambda: shelve(many, name, 999))
    assert came.parts == [name]
    if pooled:  # what whitens has changed: all means are whitened anew, from memory, in one product
        assert len(came.wholes) <= 1 + few
    else:
        assert set(came.wholes) <= {name}
        assert came.whitened <= 1 + 1 + 6  # the text, the new mean, and the new sample where it is on the shortlist
    went = turn(lambda: library.remove(name))
    assert went.parts == []
    assert len(went.wholes) <= (1 + few if pooled else 1)
    assert pooled or went.whitened <= 1 + 1 + 6  # the text, and at most the sample that takes the place on the list


def test_a_text_has_the_same_vector_alone_and_among_others(tiny_base: BaseModel) -> None:
    texts = ["Hello, I am Ada.", "", "Which color has the sky? " * 40, "x"]
    together = embed(tiny_base, texts)
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_allclose(embed(tiny_base, [text])[0], row, atol=1e-5)
    assert np.isfinite(together).all()


@given(texts=st.lists(st.text(max_size=40), max_size=6))
def test_a_place_is_a_meaning_and_the_words_of_the_text_alone(tiny_base: BaseModel, texts: list[str]) -> None:
    width = tiny_base.decoder.config.width
    found = locate(tiny_base, texts)
    assert found.shape == (len(texts), 2 * width)
    np.testing.assert_allclose(found[:, :width], embed(tiny_base, texts), atol=1e-5)
    for text, row in zip(texts, found, strict=True):
        np.testing.assert_allclose(locate(tiny_base, [text])[0, width:], row[width:], atol=1e-5)
        assert row[width:].any() == bool(text)
    # In which order the words came is for the other half to know.
    tokens = tiny_base.encode("the sea and a ship")
    np.testing.assert_allclose(_words(tiny_base, [tokens]), _words(tiny_base, [tokens[::-1]]), atol=1e-5)


def test_the_rarer_word_says_more(tiny_base: BaseModel) -> None:
    common, rare = 5, tiny_base.decoder.config.vocab - 1
    alone, other, both = _words(tiny_base, [[common], [rare], [common, rare]])
    share = float((both - alone) @ (other - alone) / ((other - alone) @ (other - alone)))
    weights = [(i + 1) / (i + 1 + COMMON) for i in (common, rare)]
    assert share == pytest.approx(weights[1] / sum(weights), abs=1e-3)
    assert share > 0.9


def test_statistics_from_before_are_refused_by_their_space_and_the_others_go_on(
    shop: Path, tiny_base: BaseModel, caplog: pytest.LogCaptureFixture
) -> None:
    business = Business.open(shop)
    list(fit(business))
    folder = business.library.folder("greet")
    now = load_statistics(folder)
    assert now is not None
    narrow = len(now.mean) - 8
    replace(
        now, space="0123456789abcdef", mean=now.mean[:narrow], scatter=now.scatter[:narrow, :narrow],
        sample=now.sample[:, :narrow],
    ).save(folder)  # fmt: skip
    choice = Chooser(business, tiny_base).choose("Which color has the grass?")
    assert [n for n, _ in choice.decision.chosen] == ["colors"]
    assert "`coterie experts learn-route greet --inputs FILE`, makes them anew" in choice.why_not()["greet"]
    assert sum("left out of routing" in record.message for record in caplog.records) == 1


def test_real_subjects_are_told_apart_on_the_real_model(smol: BaseModel, tmp_path: Path) -> None:
    router = Router(background(smol, tmp_path))
    for name, inputs in SUBJECTS.items():
        router.add(name, learn(smol, inputs, [f"{name}:{i}" for i in range(len(inputs))]))
    for text, wanted in (
        ("How often should I water my cucumbers?", "gardening"),
        ("I want to fly to Lisbon next week.", "travel"),
        ("Write a function that counts words in a string.", "code"),
    ):
        scored = router.route(locate(smol, [text])[0]).scored
        assert scored[0].name == wanted
        assert scored[0].nearest[0][0].startswith(f"{wanted}:")
    again = background(smol, tmp_path)
    np.testing.assert_allclose(again.centre, router.background.centre, atol=1e-6)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([("user", "Where is my order, please?")], "Where is my order, please?"),
        ([("user", "Where is my order, please?"), ("assistant", "Which?"), ("user", "the last")],
         "Where is my order, please?\nthe last"),
        ([("user", "Hi"), ("assistant", "Hello"), ("user", "Which color has the sea today?")],
         "Which color has the sea today?"),
        ([("system", "Be kind.")], ""),
    ],
    ids=["one question", "a short answer", "a long one", "no question"],
)  # fmt: skip
def test_a_short_message_is_routed_with_the_one_before_it(messages: list[tuple[str, str]], text: str) -> None:
    assert question([{"role": role, "content": content} for role, content in messages]) == text


RULES = [
    Rule(channel="email", use=("letters",)),
    Rule(words=("refund", "money back"), use=("billing", "letters")),
    Rule(channel="Phone", forbid=("letters",)),
    Rule(words=("poem",), forbid=("billing",)),
]


@pytest.mark.parametrize(
    ("channel", "text", "use", "refused"),
    [
        ("", "What is new?", (), set()),
        ("email", "What is new?", ("letters",), {"billing", "code"}),
        ("web", "I want a Refund!", ("billing", "letters"), {"code"}),
        ("web", "refunded and unmoneyed", (), set()),
        ("phone", "My money back.", ("billing",), {"letters", "code"}),
        ("email", "a poem about a refund", ("letters",), {"billing", "code"}),
    ],
)
def test_rules_force_and_forbid(channel: str, text: str, use: tuple[str, ...], refused: set[str]) -> None:
    ruling = rule(RULES, channel, text, {"letters", "billing", "code"})
    assert ruling.use == use
    assert set(ruling.refused) == refused


def test_a_rule_that_leaves_nobody_says_so() -> None:
    with pytest.raises(CoterieError, match="rule 1 wants letters used, of which none is in the library"):
        rule(RULES, "email", "hello", {"billing"})


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("[routing]\ntop_k = 0", "routing.top_k"),
        ('[routing]\ncombine = "vote"', "routing.combine"),
        ("[routing]\nabstain = 1.5", "routing.abstain"),
        ('[[routing.rules]]\nchanel = "web"', "routing.rules.0.chanel"),
    ],
)
def test_a_slip_in_the_routing_table_is_named(toml: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "coterie.toml").write_text(toml)
    with pytest.raises(CoterieError, match=says):
        Business.open(tmp_path)


@pytest.fixture(scope="module")
def routed_shop(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """The shop with rules, and an imported expert that has no statistics. Tests put back what they change."""
    folder = make_shop(tmp_path_factory.mktemp("routed"), tiny)
    (folder / "coterie.toml").write_text(
        (folder / "coterie.toml").read_text()
        + '\n[routing]\ntop_k = 3\n[[routing.rules]]\nchannel = "lobby"\nuse = ["greet"]\n'
        '[[routing.rules]]\nchannel = "phone"\nforbid = ["colors"]\n'
        '[[routing.rules]]\nwords = ["stranger"]\nuse = ["stranger"]\n'
    )
    business = Business.open(folder)
    list(fit(business))
    decoder = business.base().decoder
    expert = loras.fresh(loras.LoraConfig(2, 4), decoder)
    business.library.publish(ExpertFacts("stranger"), lambda to: loras.save(expert, to, "tiny", decoder.config))
    return folder


@pytest.mark.parametrize(
    ("text", "channel", "experts"),
    [
        ("Which color has the grass?", "", ["colors"]),
        ("Hello, I am Kim.", "", ["greet"]),
        ("Which color has the grass?", "lobby", ["greet"]),
        ("Which color has the grass?", "phone", []),
        ("Ask the stranger.", "", ["stranger"]),
    ],
)
def test_who_answers_in_the_shop(text: str, channel: str, experts: list[str], routed_shop: Path) -> None:
    business = Business.open(routed_shop)
    choice = Chooser(business, business.base()).choose(text, channel)
    assert [n for n, _ in choice.decision.chosen] == experts
    reasons = choice.why_not()
    assert set(reasons) == {"colors", "greet", "stranger"} - set(experts)
    assert all(reasons.values())


def test_the_api_names_the_experts_that_answered(
    routed_shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "static").mkdir()
    monkeypatch.setattr("coterie.web.app.HERE", tmp_path)  # the pages play no part
    answerer = Answerer.open(Business.open(routed_shop))
    try:
        client = TestClient(create_app(answerer))

        def ask(model: str, **headers: str):  # type: ignore[no-untyped-def]
            body = {"model": model, "messages": [{"role": "user", "content": "Which color has the grass?"}],
                    "max_tokens": 3}  # fmt: skip
            return client.post("/v1/chat/completions", json=body, headers=headers)

        routed = ask("auto")
        assert routed.headers["X-Coterie-Experts"] == '"colors";version=1;weight=1.000'
        assert routed.json()["coterie"]["experts"] == [{"name": "colors", "version": 1, "weight": 1.0}]
        assert ask("auto", **{"X-Coterie-Channel": "phone"}).headers["X-Coterie-Experts"] == '"base"'
        assert ask("auto", **{"X-Coterie-Channel": "lobby"}).json()["model"] == "greet"
        assert ask("base").json()["coterie"]["experts"] == []
        arrow = ask("arrow").json()
        assert arrow["model"] == "arrow"
        assert [e["name"] for e in arrow["coterie"]["experts"]] == ["colors", "greet", "stranger"]
        ruled = ask("arrow", **{"X-Coterie-Channel": "phone"}).json()
        assert [e["name"] for e in ruled["coterie"]["experts"]] == ["greet", "stranger"]
        streamed = client.post("/v1/completions", json={"model": "auto", "prompt": "Hello, I am Kim.", "stream": True})
        assert streamed.headers["X-Coterie-Experts"].startswith('"greet";version=1')
    finally:
        answerer.engine.close()


def test_route_explains_its_decision(routed_shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_with("route", "Which color has the grass?", "--folder", str(routed_shop), "--json")
    said = json.loads(capsys.readouterr().out)
    assert said["experts"] == [{"name": "colors", "weight": 1.0}]
    best = said["scores"][0]
    assert best["name"] == "colors"
    assert best["similarity"] >= best["threshold"]
    assert best["nearest"][0]["where"].startswith("colors.csv:")
    assert "Which color has" in best["nearest"][0]["text"]
    assert "not near enough" in said["why_not"]["greet"]
    assert "learn-route stranger --inputs" in said["why_not"]["stranger"]
    main_with("route", "zzz 17 ??? //", "--folder", str(routed_shop))
    text = capsys.readouterr()
    assert "base model" in text.out
    assert "colors.csv:" in text.err


def test_the_api_explains_its_decision_as_the_command_line_does(
    routed_shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "static").mkdir()
    monkeypatch.setattr("coterie.web.app.HERE", tmp_path)  # the pages play no part
    answerer = Answerer.open(Business.open(routed_shop))
    try:
        client = TestClient(create_app(answerer), base_url="http://localhost", client=("127.0.0.1", 1))

        def ask(text: object, **headers: str):  # type: ignore[no-untyped-def]
            return client.post("/v1/route", json={"text": text}, headers=headers)

        for channel in ("", "lobby"):
            asked = ("Which color has the grass?", "--folder", str(routed_shop), "--json", "--channel", channel)
            main_with("route", *asked)
            told = json.loads(capsys.readouterr().out)
            found = ask("Which color has the grass?", **{"X-Coterie-Channel": channel}).json()
            assert found["experts"] == told["experts"]
            assert found["why_not"].keys() == told["why_not"].keys()
            for here, there in zip(found["scores"], told["scores"], strict=True):
                assert [n["text"] for n in here["nearest"]] == [n["text"] for n in there["nearest"]]
        assert ask(7).status_code == 400
        assert ask("x").status_code == 200
        assert TestClient(create_app(answerer)).post("/v1/route", json={"text": "x"}).status_code == 401
    finally:
        answerer.close()


def test_a_version_that_becomes_current_is_seen_at_once(
    fitted_shop: Path, tmp_path: Path, tiny_base: BaseModel
) -> None:
    """Also within one tick of the file system's clock; a folder that has not changed for long is not read again."""
    shutil.copytree(fitted_shop, tmp_path / "shop")
    business = Business.open(tmp_path / "shop")
    chooser, library = Chooser(business, tiny_base), business.library
    folder = library.folder("colors")
    for version in range(2, 6):
        shutil.copytree(folder, folder.parent / str(version))
        library.promote("colors", version)
        chooser.choose("Which color has the grass?")
        assert chooser._versions["colors"][0] == version
    library.promote("colors", 1)
    for name in library.names():
        os.utime(library.root / name, ns=(0, 0))  # long ago
    chooser.choose("Which color has the grass?")
    library.touch()
    with patch.object(Library, "current", side_effect=AssertionError):
        chooser.choose("Which color has the grass?")
    assert chooser._versions["colors"][0] == 1


def test_an_imported_expert_can_be_learned_and_forgotten(
    shop: Path, tmp_path: Path, tiny_base: BaseModel, capsys: pytest.CaptureFixture[str]
) -> None:
    business = Business.open(shop)
    business.library.publish(
        ExpertFacts("sums"),
        lambda to: loras.save(
            loras.fresh(loras.LoraConfig(2, 4), tiny_base.decoder), to, "tiny", tiny_base.decoder.config
        ),
    )
    chooser = Chooser(business, tiny_base)
    assert chooser.choose("What is 3 plus 4?").decision.chosen == ()
    inputs = tmp_path / "sums.txt"
    inputs.write_text("\n".join(f"What is {a} plus {b}?" for a in range(2, 8) for b in range(3, 9)))
    main_with("experts", "learn-route", "sums", "--inputs", str(inputs), "--folder", str(shop), "--json")
    assert json.loads(capsys.readouterr().out) == {"expert": "sums", "version": 1, "inputs": 36}
    assert chooser.choose("What is 3 plus 4?").decision.chosen == (("sums", 1.0),)
    business.library.remove("sums")
    assert chooser.choose("What is 3 plus 4?").decision.chosen == ()


def test_the_api_lets_the_router_know_an_expert(
    routed_shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: BaseModel
) -> None:
    (tmp_path / "static").mkdir()
    monkeypatch.setattr("coterie.web.app.HERE", tmp_path)  # the pages play no part
    folder = Path(shutil.copytree(routed_shop, tmp_path / "shop"))
    business = Business(folder, Business.open(folder).config, tiny_base)
    answerer = Answerer(business, business.engine())
    try:
        client = TestClient(create_app(answerer), base_url="http://localhost", client=("127.0.0.1", 1))
        sums = [f"What is {a} plus {b}?" for a in range(2, 8) for b in range(3, 9)]
        reply = client.put("/v1/route/stranger", json={"inputs": sums})
        assert reply.json() == {"expert": "stranger", "version": 1, "inputs": 36}
        said = client.post("/v1/route", json={"text": "What is 3 plus 4?"}).json()
        assert said["experts"][0]["name"] == "stranger"
        assert said["scores"][0]["nearest"][0] == {**said["scores"][0]["nearest"][0], "text": None}  # no words are kept
        parcels = [f"Where is parcel {n} of mine?" for n in range(30)]
        assert client.put("/v1/route/stranger", json={"inputs": parcels}).status_code == 200  # in place of the sums
        texts = ("Where is parcel 7 of mine?", "What is 3 plus 4?")
        now = [client.post("/v1/route", json={"text": text}).json()["experts"] for text in texts]
        assert (now[0][0]["name"], now[1]) == ("stranger", [])
        assert client.put("/v1/route/nobody", json={"inputs": sums}).status_code == 404
        assert client.put("/v1/route/stranger", json={"inputs": []}).status_code == 400
        assert TestClient(create_app(answerer)).put("/v1/route/stranger", json={"inputs": sums}).status_code == 401
    finally:
        answerer.close()


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [("", "none.txt", "at least one training input"), ('{"text": "x"}\n', "other.jsonl", "no column 'prompt'"),
     (None, "absent.txt", "no such file")],
)  # fmt: skip
def test_inputs_that_teach_nothing_are_refused(
    content: str | None, name: str, says: str, routed_shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main_with("experts", "learn-route", "stranger", "--inputs", str(tmp_path / name), "--folder", str(routed_shop))
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_damaged_statistics_leave_one_expert_out_and_the_others_in(
    shop: Path, caplog: pytest.LogCaptureFixture
) -> None:
    business = Business.open(shop)
    list(fit(business))
    (business.library.folder("greet") / FILE).write_bytes(b"damaged")
    chooser = Chooser(business, business.base())
    choice = chooser.choose("Which color has the grass?")
    assert [n for n, _ in choice.decision.chosen] == ["colors"]
    assert "learn-route" in choice.why_not()["greet"]
    assert any("left out of routing" in record.message for record in caplog.records)


def test_fitting_one_expert_leaves_the_statistics_of_the_others_as_they_are(shop: Path) -> None:
    business = Business.open(shop)
    list(fit(business, ["colors"]))
    before = (business.library.folder("colors") / FILE).read_bytes()
    list(fit(business, ["greet"]))
    assert (business.library.folder("colors") / FILE).read_bytes() == before
    assert business.library.current("colors") == 1
    business.library.remove("greet")
    assert (business.library.folder("colors") / FILE).read_bytes() == before


def test_no_inputs_no_statistics(tiny_base: BaseModel) -> None:
    with pytest.raises(DataError, match="at least one training input"):
        learn(tiny_base, [], [])


def main_with(*args: str) -> None:
    """The command line as a user calls it; an exit code of 0 is returned from."""
    import sys
    from unittest.mock import patch

    with patch.object(sys, "argv", ["coterie", *args]):
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                raise
