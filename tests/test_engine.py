"""The engine gives each request what it would get alone, whoever shares its steps, and nobody can take it down."""

import gc
import json
import math
import re
import shutil
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.engine.engine import SPECULATED, Engine
from coterie.engine.request import Adapter, Blend, Generation, Piece, Sampling
from coterie.engine.shelf import Loaded
from coterie.errors import Busy, ContextTooLong, CoterieError, ModelError, Stopped, UnknownExpert
from coterie.experts import lora as loras
from coterie.experts.adapter import BottleneckConfig
from coterie.experts.expert import Expert
from coterie.experts.kinds import load as load_expert
from coterie.experts.kinds import read
from coterie.experts.kinds import save as save_expert
from coterie.experts.library import ExpertFacts, Library
from coterie.experts.lora import LoraConfig
from coterie.experts.prefix import PrefixConfig
from coterie.experts.prompt import PromptConfig
from coterie.model import constrain
from coterie.model.load import BaseModel
from support import Gate, greedy, logits_with, random_rows, trained

CONTEXT = 256
LONGEST = 24  # tokens of the answers that are compared
SHAPES: tuple[Any, ...] = (
    LoraConfig(8, 32), LoraConfig(4, 32, ("q_proj", "v_proj"), dora=True), LoraConfig(2, 32, ("down_proj",)),
    BottleneckConfig(8, "houlsby"), PromptConfig(5), PrefixConfig(7), PrefixConfig(3),
)  # fmt: skip


def publish(library: Library, base: BaseModel, name: str, seed: int) -> Expert:
    """Put an expert on the shelf that changes a lot, as if it had been trained."""
    expert = trained(SHAPES[seed % len(SHAPES)], base, seed)
    library.publish(
        ExpertFacts(name, expert.config.kind), lambda to: save_expert(expert, to, "tiny", base.decoder.config)
    )
    return expert


@dataclass(frozen=True)
class Case:
    """A prompt, who answers, and the greedy answer that plain forward passes give."""

    prompt: list[int]
    adapter: Adapter | None
    answer: list[int]


@pytest.fixture(scope="module")
def library(tiny_base: BaseModel, fitted_shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The fitted shop's experts, and three that change more."""
    root = tmp_path_factory.mktemp("library") / "experts"
    shutil.copytree(fitted_shop / "experts", root)
    for seed in range(len(SHAPES)):
        publish(Library(root), tiny_base, f"loud{seed}", seed)
    return Library(root)


@pytest.fixture(scope="module")
def engine(tiny_base: BaseModel, library: Library) -> Iterator[Engine]:
    engine = Engine(tiny_base, library, slots=4, context=CONTEXT)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def cases(tiny_base: BaseModel, library: Library) -> list[Case]:
    """Short and long prompts for the base and every expert, as far as each choice is clear of rounding."""
    out = []
    for name in (None, *library.names()):
        expert = load_expert(library.folder(name), tiny_base.decoder.config) if name else None
        for row in random_rows(tiny_base, [1, 20, 60, 100], seed=7):
            answer, lead = greedy(tiny_base, row, LONGEST, expert)
            if lead > 1e-3:
                out.append(Case(row, (name, 1) if name else None, answer))
    assert len(out) > 20
    assert len({tuple(c.answer) for c in out if c.prompt == out[0].prompt}) > 3  # the experts do differ
    return out


@pytest.fixture
def gate(tiny_base: BaseModel) -> Iterator[Gate]:
    gate = Gate(tiny_base)
    yield gate
    gate.open()


@pytest.fixture
def start(gate: Gate, library: Library) -> Iterator[Callable[..., Engine]]:
    """Starts engines behind the gate, and closes them."""
    engines: list[Engine] = []

    def begin(**options: Any) -> Engine:
        engines.append(Engine(gate.base, options.pop("library", library), context=CONTEXT, **options))
        return engines[-1]

    yield begin
    gate.open()
    for engine in engines:
        engine.close()


def text_of(base: BaseModel, tokens: list[int]) -> str:
    return base.tokenizer.decode(tokens)


def check(generation: Generation, case: Case, base: BaseModel, most: int = LONGEST) -> None:
    """The answer is the case's own, cut at `most` tokens."""
    text = generation.text()
    assert generation.generated == case.answer[:most]
    assert text == text_of(base, case.answer[:most])
    assert generation.finish == ("length" if len(case.answer) >= most else "stop")


# Batching


@given(data=st.data())
def test_greedy_answers_are_the_same_alone_and_in_any_batch(
    engine: Engine, cases: list[Case], data: st.DataObject
) -> None:
    """Any mix of prompts, experts, lengths and arrivals, more of them than slots; some leave early."""
    asked = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, len(cases) - 1), st.integers(1, LONGEST),
                st.sampled_from(["at once", "a moment later"]), st.sampled_from(["stays", "stays", "leaves"]),
            ),
            min_size=1, max_size=12,
        )
    )  # fmt: skip
    under_way = []
    for place, most, when, how in asked:
        if when == "a moment later":
            time.sleep(0.002)
        generation = engine.submit(cases[place].prompt, Sampling(max_tokens=most), cases[place].adapter)
        if how == "leaves":
            generation.cancel()
        under_way.append((generation, cases[place], most))
    for generation, case, most in under_way:
        if not generation.cancelled:
            check(generation, case, engine.base, most)
        elif generation.text():
            assert generation.generated == case.answer[: len(generation.generated)]
    assert engine.load_numbers() == (0, 0)


def test_base_and_experts_share_one_step(gate: Gate, start: Callable[..., Engine], cases: list[Case]) -> None:
    mixed = list({case.adapter: case for case in cases}.values())
    engine = start(slots=16)
    first = engine.submit(mixed[0].prompt, Sampling(max_tokens=LONGEST), mixed[0].adapter)
    gate.begun.acquire()  # the first is alone in its prompt's forward; the others come meanwhile
    others = [engine.submit(case.prompt, Sampling(max_tokens=LONGEST), case.adapter) for case in mixed[1:]]
    gate.open()
    for generation, case in zip([first, *others], mixed, strict=True):
        check(generation, case, gate.base)
    assert max(gate.sizes[2:]) >= len(mixed)
    assert engine.stats.steps < 2 * LONGEST  # together, not one after the other


def test_more_experts_than_are_kept_in_memory_all_answer_as_themselves(tiny_base: BaseModel, tmp_path: Path) -> None:
    library, count = Library(tmp_path), 20
    made = {f"e{i}": publish(library, tiny_base, f"e{i}", i) for i in range(count)}
    (prompt,) = random_rows(tiny_base, [9], seed=3)
    wanted = {name: greedy(tiny_base, prompt, 4, lora)[0] for name, lora in made.items()}

    def held() -> int:
        gc.collect()
        return sum(w.nbytes for o in gc.get_objects() if type(o) is Expert for w in o.weights.values())

    before, all_of_them = held(), sum(w.nbytes for lora in made.values() for w in lora.weights.values())
    budget = all_of_them  # each takes twice its weights, as they are laid out for the step too
    engine = Engine(tiny_base, library, slots=12, context=CONTEXT, expert_memory=budget, pinned=frozenset({"e0"}))
    try:
        first = engine._shelf.open(("e0", 1))
        for names in (list(made), list(made)[::-1]):
            asked = {name: engine.submit(prompt, Sampling(max_tokens=4), (name, 1)) for name in names}
            for name, generation in asked.items():
                generation.text()
                assert generation.generated == wanted[name]
        for name in made:
            engine.submit(prompt, Sampling(max_tokens=1), (name, 1)).text()
        assert budget / 4 < held() - before < budget
        assert engine._shelf.open(("e0", 1)) is first  # pinned
    finally:
        engine.close()


def held_tensors(loaded: Loaded) -> int:
    """Bytes of all tensors that an expert in memory refers to, found by Python's collector."""
    seen, todo, found = set[int](), list[object]([loaded]), 0
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type | types.ModuleType | types.FunctionType):
            continue
        seen.add(id(thing))
        found += thing.nbytes if isinstance(thing, torch.Tensor) else 0
        todo += gc.get_referents(thing)
    return found


@pytest.mark.parametrize("seed", range(len(SHAPES)))
def test_the_size_of_an_expert_is_what_it_takes(seed: int, tiny_base: BaseModel, tmp_path: Path) -> None:
    """In every state: as it was read, laid out for PyTorch, with what Arrow asks of it."""
    library = Library(tmp_path)
    publish(library, tiny_base, "e", seed)
    engine = Engine(tiny_base, library, slots=2, context=CONTEXT)
    try:
        shelf, loaded = engine._shelf, engine.open(("e", 1))

        def agree() -> None:
            assert held_tensors(loaded) <= loaded.size <= held_tensors(loaded) + (64 << 10)  # tables of pointers

        agree()
        shelf.laid(loaded)
        agree()
        if loaded.expert.config.kind == "lora":
            shelf.directions(loaded)
            agree()
    finally:
        engine.close()


def test_experts_that_arrow_has_asked_leave_memory_too(tiny_base: BaseModel, tmp_path: Path) -> None:
    library = Library(tmp_path)
    for i in range(6):
        publish(library, tiny_base, f"e{i}", 0)
    engine = Engine(tiny_base, library, slots=2, context=CONTEXT)
    try:
        size = engine.open(("e0", 1)).size
    finally:
        engine.close()
    engine = Engine(tiny_base, library, slots=2, context=CONTEXT, expert_memory=4 * size)

    def alive() -> int:
        gc.collect()
        return sum(type(o) is Loaded for o in gc.get_objects())

    try:
        before = alive()
        for pair in ((0, 1), (2, 3), (4, 5)):
            blend = Blend(tuple(((f"e{i}", 1), 0.5) for i in pair), "arrow")
            assert engine.submit([5, 6, 7], Sampling(max_tokens=2), blend).text() is not None
        for i in (0, 1):
            engine.submit([5, 6, 7], Sampling(max_tokens=2), (f"e{i}", 1)).text()
        assert alive() - before < 6
        everyone = Blend(tuple(((f"e{i}", 1), 1 / 6) for i in range(6)), "arrow")
        with pytest.raises(CoterieError, match=r"6 experts together take .* MiB, and expert_memory"):
            engine.submit([5, 6, 7], Sampling(max_tokens=2), everyone)
    finally:
        engine.close()


def test_one_copy_of_a_pinned_expert_stays_in_memory(tiny_base: BaseModel, tmp_path: Path) -> None:
    """Neither what is written beside the weights nor a new version makes another."""
    library = Library(tmp_path)
    publish(library, tiny_base, "pin", 0)
    engine = Engine(tiny_base, library, slots=2, context=CONTEXT)
    try:
        first = engine.open(("pin", 1))
        library.record("pin", 1, {"accuracy": 1.0})
        assert engine.open(("pin", 1)) is first
        size = first.size
    finally:
        engine.close()
    engine = Engine(tiny_base, library, context=CONTEXT, expert_memory=3 * size // 2, pinned=frozenset({"pin"}))
    try:
        for version in (1, 2, 3):
            if version > 1:
                publish(library, tiny_base, "pin", 0)
            engine.open(("pin", version))
        assert [key[0].name for key in engine._shelf._kept] == ["3"]
    finally:
        engine.close()


@pytest.mark.parametrize("damage", ["cut", "other"])
@pytest.mark.parametrize("seed", range(len(SHAPES)))
def test_an_expert_in_memory_is_not_what_its_file_becomes(
    seed: int, damage: str, tiny_base: BaseModel, tmp_path: Path
) -> None:
    """Cutting a file that is mapped would end the process; writing other weights into it would change the answer."""
    library = Library(tmp_path)
    expert = publish(library, tiny_base, "e", seed)
    (prompt,) = random_rows(tiny_base, [9], seed=3)
    wanted = greedy(tiny_base, prompt, 4, expert)[0]
    engine = Engine(tiny_base, library, slots=2, context=CONTEXT)
    try:
        engine.open(("e", 1))
        for file in library.folder("e").glob("*.safetensors"):
            content = file.read_bytes()
            with file.open("r+b") as opened:  # in place, as `cp` does
                opened.truncate(8) if damage == "cut" else opened.write(content[:-4096] + bytes(4096))
        done = engine.submit(prompt, Sampling(max_tokens=4), ("e", 1))
        done.text()
        assert done.generated == wanted
    finally:
        engine.close()


def test_reading_one_expert_holds_up_nobody_whose_expert_is_in_memory(
    tiny_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(tmp_path)
    for name in ("hot", "cold"):
        publish(library, tiny_base, name, 0)
    engine = Engine(tiny_base, library, slots=2, context=CONTEXT)
    begun, leave, times = threading.Event(), threading.Event(), list[str]()

    def slowly(library: Library, name: str, *more: Any) -> Expert:
        times.append(name)
        if name == "cold":
            begun.set()
            assert leave.wait(60)
        return read(library, name, *more)

    monkeypatch.setattr("coterie.engine.shelf.read", slowly)

    def ask(name: str) -> str:
        return engine.submit([1, 2, 3], Sampling(max_tokens=2), (name, 1)).text()

    try:
        hot = ask("hot")
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(ask, "cold") for _ in range(2)]
            try:
                assert begun.wait(60)
                with ThreadPoolExecutor(1) as other:
                    assert other.submit(ask, "hot").result(timeout=60) == hot
                    assert not any(one.done() for one in both)
            finally:
                leave.set()
            assert both[0].result(60) == both[1].result(60)
        assert times == ["hot", "cold"]  # each once
    finally:
        engine.close()


def test_an_expert_larger_than_all_the_memory_for_experts_is_refused(tiny_base: BaseModel, tmp_path: Path) -> None:
    library = Library(tmp_path)
    publish(library, tiny_base, "large", 0)
    engine = Engine(tiny_base, library, expert_memory=1000)
    try:
        with pytest.raises(CoterieError, match=r"large takes .* MiB, and expert_memory under \[business\] allows"):
            engine.submit([1, 2], Sampling(max_tokens=1), ("large", 1))
        assert engine.submit([1, 2], Sampling(max_tokens=1)).text() is not None
    finally:
        engine.close()


@pytest.mark.parametrize("echo", [False, True])
def test_prompts_beyond_what_one_step_takes_are_answered_in_turn(
    echo: bool, gate: Gate, start: Callable[..., Engine], cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces, beside everyone's next tokens and guesses; whole where the prompt is to be told."""
    most = 64
    monkeypatch.setattr(f"coterie.engine.engine.{'PREFILL_TOKENS' if echo else 'CHUNK'}", most)
    engine = start(slots=6)
    many = [case for case in cases if len(case.prompt) >= 20][:12]
    assert max(len(case.prompt) for case in many) > most
    asked = [engine.submit(c.prompt, Sampling(max_tokens=LONGEST, echo=echo), c.adapter) for c in many]
    gate.open()
    for generation, case in zip(asked, many, strict=True):
        assert generation.text()
        assert generation.generated == case.answer
    alone = {len(case.prompt) for case in many} if echo else set()
    assert all(size <= most + (0 if echo else SPECULATED) or size in alone for size in gate.sizes)


# Limits


@pytest.mark.parametrize("left", [1, 2, 5])
def test_an_answer_ends_where_the_context_does(engine: Engine, left: int) -> None:
    (prompt,) = random_rows(engine.base, [CONTEXT - left], seed=left)
    wanted, lead = greedy(engine.base, prompt, left)
    assert lead > 1e-3
    generation = engine.submit(prompt, Sampling(max_tokens=100))
    generation.text()
    assert generation.generated == wanted
    assert len(prompt) + len(generation.generated) == CONTEXT
    assert generation.finish == "length"


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1, 5000])
def test_a_prompt_that_leaves_no_room_is_refused(engine: Engine, length: int) -> None:
    with pytest.raises(ContextTooLong, match=f"{length} tokens; the context holds {CONTEXT}"):
        engine.submit([5] * length, Sampling())


def test_the_context_is_never_longer_than_the_models_own(tiny_base: BaseModel) -> None:
    engine = Engine(tiny_base, context=10_000, slots=1)
    engine.close()
    assert engine.context == tiny_base.decoder.config.context


def test_an_empty_prompt_goes_on_from_the_start_of_a_text(engine: Engine) -> None:
    begin = engine.base.encode(engine.base.bos_token)
    assert len(begin) == 1
    texts = [engine.submit(prompt, Sampling(max_tokens=5)).text() for prompt in ([], begin)]
    assert texts[0] == texts[1] != ""


# Text


@pytest.mark.parametrize("seed", range(5))
def test_streamed_pieces_add_up_to_the_whole_answer(engine: Engine, seed: int) -> None:
    """A hot random model writes broken characters at will."""
    generation = engine.submit([5, 6, 7], Sampling(max_tokens=60, temperature=2, seed=seed))
    pieces = list(generation)
    assert "".join(p.text for p in pieces) == text_of(engine.base, generation.generated)
    assert [p.finish for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish == generation.finish in ("stop", "length")
    assert len(pieces) > 3


def test_an_answer_stops_before_its_stop_text(engine: Engine, cases: list[Case]) -> None:
    for case in cases[:10]:
        whole = text_of(engine.base, case.answer)
        stop = whole[len(whole) // 2 :][:4]
        sampling = Sampling(max_tokens=LONGEST, stop=("never in it", stop))
        generation = engine.submit(case.prompt, sampling, case.adapter)
        assert generation.text() == whole[: whole.find(stop)]
        assert generation.finish == "stop"
        assert generation.generated == case.answer[: len(generation.generated)]


# Sampling


def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch(engine: Engine) -> None:
    def ask(seed: int | None, prompt: int = 9) -> Generation:
        return engine.submit([prompt, 8], Sampling(max_tokens=20, temperature=1, top_p=0.95, seed=seed), ("loud0", 1))

    seeds = [1, 2, -1, -2, 2**70 + 9, 0]
    alone = [ask(seed).text() for seed in seeds]
    together = [ask(seed) for seed in seeds] + [ask(None, prompt) for prompt in range(10, 20)]
    assert [g.text() for g in together][: len(seeds)] == alone
    assert len(set(alone)) == len(seeds)
    assert ask(None).text() != ask(None).text()


# Log-probabilities


@pytest.mark.parametrize("how", [{}, {"temperature": 1.3, "top_p": 0.9, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", [None, "loud0"])
def test_log_probabilities_are_those_of_a_plain_forward_pass(
    how: dict[str, Any], name: str | None, engine: Engine, library: Library
) -> None:
    base, prompt, top = engine.base, [5, 6, 7, 8], 5
    generation = engine.submit(prompt, Sampling(max_tokens=15, logprobs=top, **how), (name, 1) if name else None)
    found = [token for piece in generation for token in piece.tokens]
    assert [t.id for t in found] == generation.generated
    assert len(found) > 3
    expert = load_expert(library.folder(name), base.decoder.config) if name else None
    scores = logits_with(base, [prompt + generation.generated], expert)[0][len(prompt) - 1 : -1]
    for token, wanted in zip(found, torch.log_softmax(scores, -1), strict=True):
        assert token.logprob == pytest.approx(float(wanted[token.id]), abs=1e-4)
        assert [v for _, v in token.top] == pytest.approx(wanted.topk(top).values.tolist(), abs=1e-4)
        assert token.text == base.tokenizer.decode([token.id], skip_special_tokens=False)


def test_log_probabilities_come_only_when_asked_for(engine: Engine) -> None:
    assert not any(p.tokens for p in engine.submit([5], Sampling(max_tokens=5)))
    assert all(t.top == () for p in engine.submit([5], Sampling(max_tokens=5, logprobs=0)) for t in p.tokens)


def test_alternatives_that_a_constraint_forbids_are_not_reported(engine: Engine) -> None:
    sampling = Sampling(max_tokens=20, logprobs=20, constraint=constrain.choices(["red", "green"]))
    tokens = [t for p in engine.submit([5], sampling) for t in p.tokens]
    assert tokens
    for token in tokens:
        assert 1 <= len(token.top) < 20
        assert all(math.isfinite(v) for _, v in token.top)
        assert sum(math.exp(v) for _, v in token.top) == pytest.approx(1, abs=1e-4)


# Constraints

PATTERNS = [
    r"[0-9]{3}-[0-9]{4}", r"(red|green)( and (red|green)){0,2}", r"[äöü]{2,4}", r"\$[1-9][0-9]{0,3}\.[0-9]{2}", r"a?b?",
    r"(yes|no|你好|🙂)!{1,3}", r'"[^"\\]{0,8}"', r"",
]  # fmt: skip


@given(pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 99), expert=st.sampled_from([None, ("loud1", 1)]))
def test_an_answer_under_a_regex_always_matches_it(
    engine: Engine, pattern: str, seed: int, expert: Adapter | None
) -> None:
    sampling = Sampling(max_tokens=100, temperature=1.5, seed=seed, constraint=constrain.regex(pattern))
    generation = engine.submit([7, 8], sampling, expert)
    text = generation.text()
    assert re.fullmatch(pattern, text), text
    assert generation.finish == "stop"


@given(
    options=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1, max_size=6),
    temperature=st.sampled_from([0, 1.5]), seed=st.integers(0, 99),
)  # fmt: skip
def test_an_answer_under_choices_is_one_of_them(
    engine: Engine, options: list[str], temperature: float, seed: int
) -> None:
    """Quotes, control characters, emoji, one the start of another."""
    sampling = Sampling(max_tokens=100, temperature=temperature, seed=seed, constraint=constrain.choices(options))
    generation = engine.submit([7, 8], sampling)
    assert generation.text() in options
    assert generation.finish == "stop"


LEAVES = st.one_of(
    st.integers(-50, 50).flatmap(
        lambda low: st.integers(low, 60).map(lambda high: {"type": "integer", "minimum": low, "maximum": high})
    ),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.lists(st.text("aé\"\\\n", max_size=4), min_size=1, unique=True).map(lambda some: {"enum": some}),
    st.integers(0, 4).map(lambda most: {"type": "string", "maxLength": most}),
)  # fmt: skip
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 2)).map(lambda x: {"type": "array", "items": x[0], "maxItems": x[1]}),
        st.dictionaries(st.text("abc d", min_size=1, max_size=3), inner, min_size=1, max_size=2).map(
            lambda fields: {
                "type": "object", "properties": fields, "required": sorted(fields), "additionalProperties": False
            }
        ),
    ),
    max_leaves=3,
)  # fmt: skip


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a JSON value fits one of SCHEMAS."""
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    if kind == "array":
        return len(value) <= schema["maxItems"] and all(fits(v, schema["items"]) for v in value)
    if kind == "object":
        return value.keys() == schema["properties"].keys() and all(
            fits(v, schema["properties"][k]) for k, v in value.items()
        )
    return type(value) is (bool if kind == "boolean" else type(None))


@given(schema=SCHEMAS, seed=st.integers(0, 99))
@settings(max_examples=40)
def test_an_answer_under_a_json_schema_always_fits_it(engine: Engine, schema: dict[str, Any], seed: int) -> None:
    sampling = Sampling(max_tokens=240, temperature=1.5, seed=seed, constraint=constrain.json_schema(schema))
    generation = engine.submit([7, 8], sampling)
    text = generation.text()
    assert fits(json.loads(text), schema), text
    plain = json.dumps(json.loads(text), ensure_ascii=False)
    assert len(text) <= len(plain) + text.count("-0") or "\\" in text  # no idle spaces; -0 comes back as 0
    assert generation.finish == "stop"


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: constrain.regex("(a"), "regex"), (lambda: constrain.regex("(?=a)b"), "regex"),
        (lambda: constrain.choices([]), "choices"), (lambda: constrain.choices(["a", ""]), "choices"),
        (lambda: constrain.choices(["\ud800"]), "constraint"),
        (lambda: constrain.json_schema({"type": "nonsense"}), "nonsense"),
        (lambda: constrain.json_schema({"$ref": "#/nowhere"}), "nowhere"),
        (lambda: constrain.json_schema({"$ref": "http://localhost/x"}), "localhost"),
        (lambda: constrain.json_schema({"not": {"type": "string"}}), "not"),
        (lambda: constrain.json_schema({"allOf": [{"type": "string"}, {"type": "null"}]}), "nsatisfiable"),
        (lambda: constrain.json_schema(nested(150)), "schema"),
        (lambda: constrain.json_schema(nested(100_000)), "schema"),
    ],
)  # fmt: skip
def test_a_constraint_that_cannot_be_used_is_refused_before_anything_runs(
    make: Callable[[], constrain.Constraint], word: str, engine: Engine
) -> None:
    with pytest.raises(CoterieError, match=word) as caught:
        engine.submit([5], Sampling(constraint=make()))
    assert "\n" not in str(caught.value)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def test_a_constraint_that_proves_too_complex_ends_its_own_request_with_an_error(smol: BaseModel) -> None:
    """On a real vocabulary some regexes outgrow every limit; the answer so far does not match, so it is no answer."""
    engine = Engine(smol, slots=2, context=CONTEXT)
    try:
        hard = Sampling(max_tokens=60, temperature=1, seed=0, constraint=constrain.regex("(.*[a-m].{30}){5}x"))
        broken, beside = engine.submit([5], hard), engine.submit([5], Sampling(max_tokens=3))
        with pytest.raises(CoterieError, match="constraint"):
            broken.text()
        assert broken.finish == "error"
        assert beside.text()
    finally:
        engine.close()


# Leaving, failing, closing


def test_a_request_that_leaves_frees_its_slot(gate: Gate, start: Callable[..., Engine], cases: list[Case]) -> None:
    engine = start(slots=1)
    leaving = engine.submit(cases[0].prompt, Sampling(max_tokens=200), cases[0].adapter)
    gate.begun.acquire()
    waiting = engine.submit(cases[1].prompt, Sampling(max_tokens=LONGEST), cases[1].adapter)
    leaving.cancel()
    gate.open()
    check(waiting, cases[1], gate.base)
    leaving.text()
    assert leaving.finish == "cancelled"
    assert len(leaving.generated) < 5


def test_a_request_that_leaves_the_queue_never_runs(gate: Gate, start: Callable[..., Engine]) -> None:
    engine = start(slots=1)
    running = engine.submit([5], Sampling(max_tokens=3))
    gate.begun.acquire()
    waiting = [engine.submit([6], Sampling()) for _ in range(3)]
    for generation in waiting:
        generation.cancel()
    gate.open()
    assert running.text()
    assert [(g.text(), g.finish, g.generated) for g in waiting] == [("", "cancelled", [])] * 3
    assert engine.stats.prompt_tokens == 1


def test_a_full_queue_refuses_and_recovers(gate: Gate, start: Callable[..., Engine], cases: list[Case]) -> None:
    engine = start(slots=1, queue=2)
    running = engine.submit(cases[0].prompt, Sampling(max_tokens=LONGEST), cases[0].adapter)
    gate.begun.acquire()
    waiting = [engine.submit(c.prompt, Sampling(max_tokens=LONGEST), c.adapter) for c in cases[1:3]]
    assert engine.load_numbers() == (1, 2)
    for _ in range(3):
        with pytest.raises(Busy, match="2 requests wait already"):
            engine.submit([5], Sampling())
    assert (engine.stats.requests, engine.stats.rejected) == (3, 3)
    gate.open()
    for generation, case in zip([running, *waiting], cases, strict=False):
        check(generation, case, gate.base)
    check(engine.submit(cases[3].prompt, Sampling(max_tokens=LONGEST), cases[3].adapter), cases[3], gate.base)


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(
    gate: Gate, start: Callable[..., Engine], cases: list[Case]
) -> None:
    engine = start(slots=2)
    gate.open()
    gate.fails = lambda _ids: True
    for generation in [engine.submit(case.prompt, Sampling(), case.adapter) for case in cases[:5]]:
        with pytest.raises(RuntimeError, match="as the test asked"):
            generation.text()
        assert generation.finish == "error"
    gate.fails = lambda _ids: False
    check(engine.submit(cases[0].prompt, Sampling(max_tokens=LONGEST), cases[0].adapter), cases[0], gate.base)
    assert engine.load_numbers() == (0, 0)


def test_a_prompt_that_fails_takes_nobody_else_with_it(
    gate: Gate, start: Callable[..., Engine], cases: list[Case]
) -> None:
    engine = start(slots=3)
    poison = 3
    gate.fails = lambda ids: poison in ids.tolist()
    good = [case for case in cases if poison not in case.prompt + case.answer]
    running = [engine.submit(c.prompt, Sampling(max_tokens=LONGEST), c.adapter) for c in good[:2]]
    for _ in range(4):
        gate.begun.acquire()
        gate.leave.release()
    failing = engine.submit([poison, poison], Sampling())
    gate.open()
    with pytest.raises(RuntimeError):
        failing.text()
    for generation, case in zip(running, good, strict=False):
        check(generation, case, gate.base)


def test_a_callback_that_fails_harms_only_its_own_request(engine: Engine, cases: list[Case]) -> None:
    def broken(_piece: Piece) -> None:
        raise RuntimeError("nobody listens")

    broken_one = engine.submit(cases[0].prompt, Sampling(max_tokens=200), cases[0].adapter, broken)
    check(engine.submit(cases[1].prompt, Sampling(max_tokens=LONGEST), cases[1].adapter), cases[1], engine.base)
    ended = [engine.submit([5], Sampling(max_tokens=1)) for _ in range(9)]  # nine requests through four slots
    assert all(g.text() is not None for g in ended)
    assert broken_one.cancelled


def test_closing_ends_everything(gate: Gate, start: Callable[..., Engine]) -> None:
    engine = start(slots=1)
    under_way = [engine.submit([5], Sampling(max_tokens=200)) for _ in range(3)]
    gate.begun.acquire()
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.open()
    closing.join()
    for generation in under_way:
        generation.text()
        assert generation.finish == "cancelled"
    assert not engine.alive
    with pytest.raises(Stopped):
        engine.submit([5], Sampling())
    engine.close()


# Experts that change while the engine runs


def test_an_expert_removed_meanwhile_ends_no_answer_and_takes_no_new_question(
    gate: Gate, start: Callable[..., Engine], tmp_path: Path
) -> None:
    library = Library(tmp_path)
    lora = publish(library, gate.base, "tea", 0)
    engine = start(slots=1, library=library)
    (prompt,) = random_rows(gate.base, [9], seed=3)
    running, waiting = (engine.submit(prompt, Sampling(max_tokens=5), ("tea", 1)) for _ in range(2))
    gate.begun.acquire()
    library.remove("tea")
    with pytest.raises(UnknownExpert, match="tea"):
        engine.submit(prompt, Sampling(), ("tea", 1))
    gate.open()
    running.text(), waiting.text()
    assert running.generated == waiting.generated == greedy(gate.base, prompt, 5, lora)[0]


def test_a_version_number_given_again_serves_the_new_weights(tiny_base: BaseModel, tmp_path: Path) -> None:
    library = Library(tmp_path)
    engine = Engine(tiny_base, library, slots=2, context=CONTEXT)
    (prompt,) = random_rows(tiny_base, [9], seed=3)
    answers = []
    try:
        for seed in (0, 3):
            lora = publish(library, tiny_base, "tea", seed)
            generation = engine.submit(prompt, Sampling(max_tokens=5), ("tea", 1))
            generation.text()
            assert generation.generated == greedy(tiny_base, prompt, 5, lora)[0]
            answers.append(generation.generated)
            library.remove("tea")
    finally:
        engine.close()
    assert answers[0] != answers[1]


def test_versions_of_an_expert_are_served_side_by_side(tiny_base: BaseModel, tmp_path: Path) -> None:
    library = Library(tmp_path)
    made = [publish(library, tiny_base, "tea", seed) for seed in (0, 3)]
    engine = Engine(tiny_base, library, slots=2, context=CONTEXT)
    (prompt,) = random_rows(tiny_base, [9], seed=3)
    try:
        asked = [engine.submit(prompt, Sampling(max_tokens=5), ("tea", version)) for version in (1, 2)]
        for generation, lora in zip(asked, made, strict=True):
            generation.text()
            assert generation.generated == greedy(tiny_base, prompt, 5, lora)[0]
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("adapter", "error"),
    [(("nobody", 1), UnknownExpert), (("loud0", 7), UnknownExpert), (("../loud0", 1), UnknownExpert)],
)
def test_an_expert_that_is_not_there_is_refused(adapter: Adapter, error: type[Exception], engine: Engine) -> None:
    with pytest.raises(error, match=re.escape(adapter[0])):
        engine.submit([5], Sampling(), adapter)


def test_a_damaged_expert_is_refused_and_the_others_answer(
    tiny_base: BaseModel, cases: list[Case], tmp_path: Path
) -> None:
    library = Library(tmp_path)
    publish(library, tiny_base, "tea", 0)
    publish(library, tiny_base, "cake", 1)
    (library.folder("tea") / loras.WEIGHTS).write_bytes(b"cut")
    (library.folder("cake") / loras.WEIGHTS).unlink()
    engine = Engine(tiny_base, library, slots=2, context=CONTEXT)
    try:
        for name in ("tea", "cake"):
            with pytest.raises(ModelError, match=loras.WEIGHTS):
                engine.submit([5], Sampling(), (name, 1))
        plain = next(case for case in cases if case.adapter is None)
        check(engine.submit(plain.prompt, Sampling(max_tokens=LONGEST)), plain, tiny_base)
    finally:
        engine.close()


def test_an_engine_without_a_library_serves_the_base_model_only(tiny_base: BaseModel) -> None:
    engine = Engine(tiny_base, slots=1, context=CONTEXT)
    try:
        with pytest.raises(UnknownExpert, match="base model only"):
            engine.submit([5], Sampling(), ("tea", 1))
        assert engine.submit([5], Sampling(max_tokens=3)).text()
    finally:
        engine.close()
