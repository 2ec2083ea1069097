"""The engine's cache: texts that begin alike share what was read, trunks are the base's, and no bit changes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.engine import step as native
from coterie.engine.by_torch import TorchStep
from coterie.engine.engine import Engine
from coterie.engine.pages import MOST_CUTS, PAGE, Pages, Part, Sequence
from coterie.engine.request import Adapter, Blend, Generation, Sampling
from coterie.experts.adapter import BottleneckConfig
from coterie.experts.kinds import save
from coterie.experts.library import ExpertFacts, Library
from coterie.experts.lora import LoraConfig
from coterie.experts.prefix import PrefixConfig
from coterie.experts.prompt import PromptConfig
from coterie.model.decoder import Decoder, ModelConfig
from coterie.model.load import BaseModel, load
from support import random_rows, train_tokenizer, trained

needs_c = pytest.mark.skipif(native._library() is None, reason="needs a processor with AVX2 and a C compiler")
Said = tuple[list[int], list[float | None]]  # tokens and their log-probabilities
Answers = Callable[[list[int], str], Said]
LAYERS, CUT = 4, 2
EXPERTS: dict[str, Any] = {
    "branch": LoraConfig(8, 32, first_layer=CUT), "other": LoraConfig(4, 32, first_layer=CUT, dora=True),
    "bottle": BottleneckConfig(16, first_layer=CUT), "high": LoraConfig(8, 32, first_layer=3),
    "whole": LoraConfig(8, 32), "soft": PromptConfig(5), "prefix": PrefixConfig(7),
}  # fmt: skip
WHO: dict[str, Adapter | Blend | None] = {
    "base": None, **{name: (name, 1) for name in EXPERTS},
    "both": Blend(((("branch", 1), 0.6), (("whole", 1), 0.4))),
    "branches": Blend(((("branch", 1), 0.5), (("other", 1), 0.5)), "logits"),
}  # fmt: skip


@pytest.fixture(scope="module", params=["C", "PyTorch", "graphs"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseModel]:
    """A random model of four layers that never ends an answer, by each kind of step. What a graph would replay is only
    called, on a CPU."""
    if request.param == "C" and native._library() is None:
        pytest.skip("needs a processor with AVX2 and a C compiler")
    folder = tmp_path_factory.mktemp("pages") / "base"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=411, hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=96, max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokens = transformers.PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(), eos_token="<|im_end|>")
    tokens.save_pretrained(folder)
    if request.param == "C":
        yield replace(load(folder, native.dtype(), packed=True), eos=frozenset())
        return
    made, in_c = replace(load(folder, torch.float32), eos=frozenset()), native.Step.open

    def opened(decoder: Decoder, *more: Any) -> native.Step | None:
        return None if decoder is made.decoder else in_c(decoder, *more)

    with (
        patch("coterie.engine.engine.Step.open", side_effect=opened),
        patch("coterie.engine.by_torch.replays", return_value=request.param == "graphs"),
    ):
        yield made


def publish(library: Library, base: BaseModel, name: str, config: Any, seed: int) -> None:
    weights = {part: weight.float() for part, weight in base.decoder.weights.items()}
    expert = trained(config, replace(base, decoder=Decoder(base.decoder.config, weights)), seed)
    library.publish(ExpertFacts(name, config.kind), lambda to: save(expert, to, "x", base.decoder.config))


@pytest.fixture(scope="module")
def library(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Library:
    library = Library(tmp_path_factory.mktemp("experts"))
    for seed, (name, config) in enumerate(EXPERTS.items()):
        publish(library, base, name, config, seed)
    return library


@dataclass
class Watched:
    """An engine, and how many tokens each of its layers has computed."""

    engine: Engine
    computed: list[int] = field(default_factory=lambda: [0] * LAYERS)

    def ask(self, prompt: list[int], who: str = "base", tokens: int = 4, **how: Any) -> Generation:
        generation = self.engine.submit(prompt, Sampling(max_tokens=tokens, **how), WHO.get(who, (who, 1)))
        generation.text()
        return generation

    def spent(self) -> list[int]:
        """Tokens computed by each layer since last asked."""
        out, self.computed = self.computed, [0] * LAYERS
        return out


@pytest.fixture
def start(base: BaseModel, library: Library) -> Iterator[Callable[..., Watched]]:
    """Starts engines that are watched, and closes them."""
    begun: list[Engine] = []

    def begin(**options: Any) -> Watched:
        engine = Engine(options.pop("base", base), options.pop("library", library), slots=6, context=400, **options)
        begun.append(engine)
        watched = Watched(engine)
        run = engine.step.run

        def count(*given: Any) -> torch.Tensor:
            for layer in range(LAYERS):
                watched.computed[layer] += int((given[-1] <= layer).sum())
            return run(*given)

        engine.step.run = count  # type: ignore[method-assign]
        return watched

    yield begin
    for engine in begun:
        engine.close()


def held(pages: Pages) -> tuple[int, int]:
    """Blocks, and entries, that are neither free nor idle."""
    idle = sum(len(page.blocks) for page in pages._idle), sum(page.entry >= 0 for page in pages._idle)
    blocks, entries = ((free._next - len(free._given)) for free in (pages._blocks, pages._entries))
    return blocks - idle[0], entries - idle[1]


# Answers


TURNS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(sorted(WHO)), st.integers(1, 60), st.booleans()),
    min_size=1, max_size=8,
)  # fmt: skip


@given(turns=TURNS, memory=st.sampled_from((1, 40_000, 150_000, 1 << 24)), chunk=st.sampled_from((20, 256)))
@settings(max_examples=16)
def test_a_hit_changes_nothing_of_an_answer_whoever_answered_before(
    turns: list[tuple[int, str, int, bool]], memory: int, chunk: int, base: BaseModel, library: Library,
    answers: Answers,
) -> None:  # fmt: skip
    """In C, no bit of it. Three conversations that begin alike change their experts as they go, some at the same time,
    and find what others and they themselves have left, as far as memory held it. Wanted: what an engine that keeps
    nothing answers alone."""
    start = random_rows(base, [PAGE + 9], 5)[0]
    texts = [[*start, *row] for row in random_rows(base, [3, 40, 8], 6)]
    with patch("coterie.engine.engine.CHUNK", chunk):
        engine = Engine(base, library, slots=6, context=400, cache_memory=memory)
        try:
            under_way: list[tuple[int, list[int], str, Generation]] = []
            for number, (which, who, more, waits) in enumerate(turns):
                if any(other == which for other, *_ in under_way) or not waits:
                    finish(engine, under_way, texts, answers)
                prompt = texts[which] + random_rows(base, [more], number)[0]
                want = Sampling(max_tokens=9, logprobs=0 if number % 2 else None)  # without them it guesses too
                asked = engine.submit(prompt[-300:], want, WHO[who])
                under_way.append((which, prompt[-300:], who, asked))
            finish(engine, under_way, texts, answers)
            assert engine.pages.idle <= memory
            assert held(engine.pages) == (0, 0)
        finally:
            engine.close()


def finish(engine: Engine, under_way: list[Any], texts: list[list[int]], answers: Answers) -> None:
    """Wait for the answers, compare them, and put them into their conversations."""
    for which, prompt, who, asked in under_way:
        chances = [choice.logprob for piece in asked for choice in piece.tokens]
        wanted = answers(prompt, who)
        assert asked.generated == wanted[0]
        by_torch = isinstance(engine.step, TorchStep)
        assert chances == (pytest.approx(wanted[1], abs=1e-3) if by_torch else wanted[1]) or not chances
        texts[which] = prompt + asked.generated
    under_way.clear()


@pytest.fixture(scope="module")
def answers(base: BaseModel, library: Library) -> Iterator[Answers]:
    """What an engine says that keeps nothing, alone: tokens and their log-probabilities."""
    engine = Engine(base, library, slots=3, context=400, cache_memory=0)

    def answer(prompt: list[int], who: str) -> Said:
        asked = engine.submit(prompt, Sampling(max_tokens=9, logprobs=0), WHO[who])
        chances = [choice.logprob for piece in asked for choice in piece.tokens]
        assert (asked.cached, asked.trunk) == (0, 0)
        return asked.generated, chances

    yield answer
    engine.close()


@needs_c
@pytest.mark.parametrize("config", [LoraConfig(first_layer=15), LoraConfig()], ids=["branch", "whole"])
def test_smollm2_answers_the_same_after_a_change_of_expert(config: LoraConfig, smol: BaseModel, tmp_path: Path) -> None:
    library = Library(tmp_path)
    publish(library, smol, "tea", config, 0)
    talk = smol.encode(smol.chat([{"role": "user", "content": "Tell me of the tea that grows in the north. " * 8}]))
    said = []
    for memory in (0, 1 << 28):
        engine = Engine(smol, library, slots=2, context=512, cache_memory=memory)
        try:
            prompt, turns = list(talk), []
            for who in (("tea", 1), None, ("tea", 1), None):
                asked = engine.submit(prompt, Sampling(max_tokens=12, logprobs=0), who)
                turns.append((asked.generated, [c.logprob for piece in asked for c in piece.tokens]))
                prompt = [*prompt, *asked.generated, *smol.encode("<|im_end|>\n<|im_start|>user\nAnd then?")]
            said.append(turns)
            assert bool(engine.stats.cached_tokens) == bool(memory)
            assert bool(engine.stats.trunk_tokens) == bool(memory and config.first_layer)
        finally:
            engine.close()
    assert said[0] == said[1]


# What is computed


def test_a_conversation_that_goes_on_reads_only_what_is_new(start: Callable[..., Watched], base: BaseModel) -> None:
    watched = start()
    (prompt,) = random_rows(base, [3 * PAGE + 5])
    for who in ("base", "whole", "branch", "soft", "prefix", "both"):
        ahead = {"soft": 5, "prefix": 7}.get(who, 0)
        first = watched.ask(prompt, who, 40)
        watched.spent()
        later = watched.ask([*prompt, *first.generated, 7], who, 1)
        length = ahead + len(prompt) + 40 + 1
        kept = (length - 2) // PAGE * PAGE  # the last token chosen was never read
        assert (later.cached, later.trunk) == (kept - ahead, 0)
        assert watched.spent() == [length - kept] * LAYERS


@pytest.mark.parametrize(("first", "then", "trunk"), [
    ("branch", "base", CUT), ("base", "branch", CUT), ("branch", "other", CUT), ("bottle", "branch", CUT),
    ("whole", "branch", 0), ("branch", "whole", 0), ("whole", "base", 0), ("soft", "base", 0), ("base", "prefix", 0),
    ("high", "branch", CUT), ("branch", "high", CUT), ("base", "high", 3), ("high", "base", 3),
])  # fmt: skip
def test_a_change_of_expert_recomputes_only_the_layers_above_the_trunk_that_both_share(
    first: str, then: str, trunk: int, start: Callable[..., Watched], base: BaseModel
) -> None:
    watched = start()
    long, short = random_rows(base, [4 * PAGE, PAGE])
    for who in ("branch", "high"):
        watched.ask(short, who)  # where trunks end is known once an expert has answered
    watched.ask(long, first, 1)
    watched.spent()
    asked = watched.ask(long, then, 1)
    assert (asked.cached, asked.trunk) == (0, len(long) if trunk else 0)
    ahead = {"soft": 5, "prefix": 0}.get(then, 0)
    assert watched.spent() == [0] * trunk + [ahead + len(long)] * (LAYERS - trunk)


def test_what_is_alike_is_found_up_to_the_first_token_that_differs(
    start: Callable[..., Watched], base: BaseModel
) -> None:
    watched = start()
    (prompt,) = random_rows(base, [4 * PAGE])
    watched.ask(prompt, tokens=1)
    for differs, cached in ((0, 0), (PAGE - 1, 0), (PAGE, PAGE), (3 * PAGE + 4, 3 * PAGE)):
        other = [*prompt[:differs], (prompt[differs] + 1) % 400, *prompt[differs + 1 :]]
        assert watched.ask(other, tokens=1).cached == cached
    assert watched.ask(prompt, tokens=1).cached == 3 * PAGE  # the last token is read anew: its scores are wanted
    assert watched.ask([*prompt, 5], tokens=1).cached == 4 * PAGE
    assert watched.ask(prompt[PAGE:], tokens=1).cached == 0  # the same tokens at other places


def test_requests_at_the_same_time_share_what_the_first_of_them_has_read(
    start: Callable[..., Watched], base: BaseModel
) -> None:
    watched = start()
    (prompt,) = random_rows(base, [300])
    running = [watched.engine.submit([*prompt, n], Sampling(max_tokens=8)) for n in range(6)]
    for generation in running:
        generation.text()
    assert watched.spent()[0] < 3 * len(prompt)
    assert watched.engine.stats.prompt_tokens == 6 * 301
    assert watched.engine.stats.cached_tokens == sum(g.cached for g in running) > 2 * len(prompt)


def test_a_new_version_never_finds_what_the_old_one_left(
    start: Callable[..., Watched], base: BaseModel, tmp_path: Path
) -> None:
    library, (prompt,) = Library(tmp_path), random_rows(base, [3 * PAGE])
    publish(library, base, "tea", LoraConfig(8, 32), 0)
    watched = start(library=library)
    watched.ask(prompt, "tea", 1)
    assert watched.ask(prompt, "tea", 1).cached == 2 * PAGE
    publish(library, base, "tea", LoraConfig(8, 32), 1)
    asked = watched.engine.submit(prompt, Sampling(max_tokens=1), ("tea", 2))
    assert asked.text() is not None
    assert asked.cached == 0
    library.remove("tea")
    publish(library, base, "tea", LoraConfig(8, 32), 2)
    assert watched.ask(prompt, "tea", 1).cached == 0


def test_an_expert_that_left_memory_finds_its_pages_when_it_is_back(
    start: Callable[..., Watched], base: BaseModel
) -> None:
    watched = start(expert_memory=600_000)
    (prompt,) = random_rows(base, [3 * PAGE])
    first = watched.engine._shelf.open(("whole", 1))
    watched.ask(prompt, "whole", 1)
    for other in ("branch", "other", "high", "bottle"):
        watched.ask(prompt, other, 1)
    if watched.engine._shelf.open(("whole", 1)) is first:
        pytest.fail("the expert never left memory: this proves nothing")
    assert watched.ask(prompt, "whole", 1).cached == 2 * PAGE


def test_prompts_that_are_echoed_or_routed_by_token_neither_find_nor_leave_anything(
    start: Callable[..., Watched], base: BaseModel
) -> None:
    """PyTorch reads them, and need not come to the same bits."""
    watched = start()
    long, other = random_rows(base, [3 * PAGE, 3 * PAGE])
    arrow = Blend(((("branch", 1), 1.0), (("whole", 1), 1.0)), "arrow")
    watched.engine.submit(long, Sampling(max_tokens=40, echo=True)).text()
    watched.engine.submit(long, Sampling(max_tokens=40), arrow).text()
    assert watched.ask(long).cached == 0
    watched.ask(other)
    echoed = watched.engine.submit(other, Sampling(max_tokens=2, echo=True))
    routed = watched.engine.submit(other, Sampling(max_tokens=2), arrow)
    assert echoed.text()
    assert routed.text() is not None
    assert (echoed.cached, routed.cached) == (0, 0)


def test_experts_whose_scores_are_averaged_answer_prompts_longer_than_a_chunk(
    start: Callable[..., Watched], base: BaseModel
) -> None:
    """Each voice has slots and pages of its own, and all read to the end in one step."""
    watched = start()
    (prompt,) = random_rows(base, [300])
    beside = [watched.engine.submit([n, *prompt], Sampling(max_tokens=5)) for n in range(3)]
    assert len(watched.ask(prompt, "branches", 5).generated) == 5
    assert all(len(g.text()) >= 0 and len(g.generated) == 5 for g in beside)


# Memory


def config_of(layers: int = LAYERS) -> ModelConfig:
    return ModelConfig(64, 64, layers, 4, 2, 32, 96, 512)


def page_bytes(layers: int, entry: bool = False) -> int:
    """Of keys and values in bfloat16, and of the residual stream in float32."""
    return layers * 2 * 2 * PAGE * 32 * 2 + entry * PAGE * 64 * 4


class Texts:
    """Sequences over a cache alone: no model computes anything."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages

    def read(self, slot: int, tokens: list[int], owner: str | None = None, first: int = LAYERS) -> Sequence:
        held = self.pages.begin(slot, self.pages.parts(owner, first), tokens)
        self.pages.make_room(held, slot, len(tokens))
        self.pages.offer(held, tokens, len(tokens))
        return held

    def known(self, tokens: list[int], owner: str | None = None, first: int = LAYERS) -> list[int]:
        held = self.pages.begin(0, self.pages.parts(owner, first), [*tokens, 0])
        self.pages.release(held)
        return held.known


def test_the_longest_idle_go_first_and_a_texts_end_before_its_beginning() -> None:
    texts = Texts(Pages(config_of(), 2, 8 * PAGE, torch.bfloat16, 5 * page_bytes(LAYERS)))
    a, b, c = ([n] * 3 * PAGE for n in (1, 2, 3))
    texts.pages.release(texts.read(0, a))
    texts.pages.release(texts.read(0, b))
    assert (texts.known(a), texts.known(b)) == ([2 * PAGE], [3 * PAGE])  # six pages, five fit
    assert texts.known(a) == [2 * PAGE]  # looked at last
    texts.pages.release(texts.read(0, c))
    assert (texts.known(a), texts.known(b), texts.known(c)) == ([2 * PAGE], [0], [3 * PAGE])
    assert texts.pages.idle == 5 * page_bytes(LAYERS)


def test_pages_in_use_are_never_dropped() -> None:
    texts = Texts(Pages(config_of(), 2, 8 * PAGE, torch.bfloat16, page_bytes(LAYERS)))
    a = [1] * 3 * PAGE
    held = texts.read(1, a)
    for n in range(2, 9):
        texts.pages.release(texts.read(0, [n] * 4 * PAGE))
    assert texts.pages.idle <= page_bytes(LAYERS)
    assert texts.known(a) == [3 * PAGE]
    texts.pages.release(held)
    assert texts.known(a) == [PAGE]


def test_nothing_stays_where_nothing_may() -> None:
    texts = Texts(Pages(config_of(), 1, 8 * PAGE, torch.bfloat16, 0))
    texts.pages.release(texts.read(0, [1] * 3 * PAGE))
    assert texts.known([1] * 3 * PAGE) == [0]
    assert texts.pages.idle == 0


def test_experts_of_the_branch_hold_the_trunk_once() -> None:
    texts = Texts(Pages(config_of(), 8, 8 * PAGE, torch.bfloat16, 1 << 20))
    tokens = [1] * 4 * PAGE
    reading = [texts.read(n, tokens, owner, CUT) for n, owner in enumerate(("a", "b", "c"))]
    reading.append(texts.read(3, tokens))
    blocks, entries = held(texts.pages)
    assert blocks == 4 * CUT + 4 * 4 * (LAYERS - CUT)
    assert entries == 4
    for sequence in reading:
        texts.pages.release(sequence)
    assert texts.pages.idle == 4 * (page_bytes(CUT, entry=True) + 4 * page_bytes(LAYERS - CUT))


@pytest.mark.parametrize(("owner", "first", "wanted"), [
    (None, 8, [Part(0, 2), Part(2, 5), Part(5, 8)]), ("a", 5, [Part(0, 2), Part(2, 5), Part(5, 8, "a")]),
    ("a", 2, [Part(0, 2), Part(2, 8, "a")]), ("a", 0, [Part(0, 8, "a")]), 
    ("a", 4, [Part(0, 2), Part(2, 4), Part(4, 8, "a")]),
])  # fmt: skip
def test_layers_are_the_bases_below_an_experts_first(owner: str | None, first: int, wanted: list[Part]) -> None:
    pages = Pages(config_of(8), 1, PAGE, torch.bfloat16)
    for cut in (5, 2):
        pages.parts("x", cut)
    assert list(pages.parts(owner, first)) == wanted


def test_more_ends_of_a_trunk_than_are_kept_share_what_lies_below_the_nearest() -> None:
    pages = Pages(config_of(8), 1, PAGE, torch.bfloat16)
    cuts = list(range(1, MOST_CUTS + 1))
    for cut in cuts:
        pages.parts("x", cut)
    assert pages.parts("a", 7)[-1] == Part(MOST_CUTS, 8, "a")
    assert pages.cuts == cuts


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from((None, "a", "b", "w")), st.booleans()),
                max_size=25), st.integers(0, 12))  # fmt: skip
def test_whatever_comes_and_goes_no_two_pages_in_use_share_memory(
    moves: list[tuple[int, int, str | None, bool]], budget: int
) -> None:
    pages = Pages(config_of(), 4, 6 * PAGE, torch.bfloat16, budget * page_bytes(CUT, entry=True))
    texts, running = Texts(pages), dict[int, Sequence]()
    for slot, text, owner, longer in moves:
        if slot in running:
            pages.release(running.pop(slot))
        tokens = [1] * PAGE + [text] * PAGE * (1 + 3 * longer) + [9] * 3
        first = {None: LAYERS, "w": 0}.get(owner, CUT)
        running[slot] = texts.read(slot, tokens, owner, first)
        alive = {page for s in running.values() for part in s.pages for page in part} | set(pages._idle)
        blocks = [block for page in alive for block in page.blocks]
        entries = [page.entry for page in alive if page.entry >= 0]
        assert len(set(blocks)) == len(blocks) == pages._blocks._next - len(pages._blocks._given)
        assert len(set(entries)) == len(entries) == pages._entries._next - len(pages._entries._given)
        assert max(blocks) < len(pages.keys)
        assert max(entries, default=0) < len(pages.streams)
        assert pages.idle == sum(pages._idle.values()) <= pages.budget
        for s, sequence in running.items():
            for part, held_pages in zip(sequence.parts, sequence.pages, strict=True):
                for number, page in enumerate(held_pages):
                    assert pages.table[s, part.first : part.end, number].tolist() == page.blocks
    for sequence in running.values():
        pages.release(sequence)
    assert held(pages) == (0, 0)


def test_rows_begin_at_the_layer_whose_entry_is_known() -> None:
    held_tokens = Sequence((Part(0, 2), Part(2, 5), Part(5, 8, "a")), [], [96, 64, 32])
    assert held_tokens.spans(32, 110) == [(5, 32, 64), (2, 64, 96), (0, 96, 110)]
    assert held_tokens.spans(70, 80) == [(2, 70, 80)]
    assert held_tokens.spans(100, 101) == [(0, 100, 101)]
