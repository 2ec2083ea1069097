"""`fit` learns what it should and nothing else, survives being stopped anywhere, and loses nothing published."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from coterie import business as room
from coterie.business import Business, Fitted, fit, measure
from coterie.cli.main import main
from coterie.data.encode import TokenSet, encode_all
from coterie.data.read import Example
from coterie.errors import CoterieError, DataError, ModelError, StorageError, TrainingError
from coterie.experts import adapter, full, kinds, prefix, prompt
from coterie.experts import lora as loras
from coterie.experts.expert import Applied, Expert
from coterie.experts.kinds import apply
from coterie.experts.lora import LoraConfig
from coterie.model.load import BaseModel, load
from coterie.routing import statistics
from coterie.routing.space import RECIPE
from coterie.tuning import forward, loop, objective
from coterie.tuning.loop import Progress, Training, held_out_loss, train
from coterie.tuning.objective import completions

FAST = Training(epochs=3, batch=4, checkpoint_every_s=-1)  # a checkpoint after every step
SHAPE = LoraConfig(4, 8)
KINDS: dict[str, Callable[[BaseModel], Expert]] = {
    "lora": lambda base: loras.fresh(SHAPE, base.decoder, seed=1),
    "dora with dropout": lambda base: loras.fresh(LoraConfig(4, 8, dora=True, dropout=0.2), base.decoder),
    "adapter": lambda base: adapter.fresh(adapter.BottleneckConfig(8), base.decoder),
    "prompt": lambda base: prompt.fresh(prompt.PromptConfig(4), base.decoder, base.encode("Be kind.")),
    "prefix": lambda base: prefix.fresh(prefix.PrefixConfig(4), base.decoder, base.encode("Be kind.")),
    "full": lambda base: full.fresh(full.FullConfig(), base.decoder),
}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def data(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    """24 short conversations, encoded."""

    def example(i: int) -> Example:
        turns = ("user", f"Hello number {i}"), ("assistant", f"Good day, {i}!" * (1 + i % 3))
        return Example(tuple({"role": role, "content": text} for role, text in turns), f"row {i}")

    return encode_all(map(example, range(24)), tiny_base, tmp_path_factory.mktemp("tokens"), 500)[0]


ROWS, HELD = list(range(3, 24)), [0, 1, 2]


def learn(
    base: BaseModel, data: TokenSet, checkpoint: Path, settings: Training = FAST,
    tell: Callable[[Progress], None] = lambda _: None, say: Callable[[str], None] = lambda _: None,
    kind: str = "lora",
) -> tuple[Expert, loop.Outcome]:  # fmt: skip
    expert, loss = KINDS[kind](base), completions(base.decoder, data)
    return expert, train(base.decoder, expert, loss, data.lengths(), ROWS, HELD, settings, checkpoint, tell, say)


@pytest.fixture(scope="module")
def unbroken(
    tiny_base: BaseModel, data: TokenSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Expert, loop.Outcome]:
    """What training gives when nothing disturbs it."""
    return learn(tiny_base, data, tmp_path_factory.mktemp("unbroken") / "checkpoint")


def assert_same(found: tuple[Expert, loop.Outcome], wanted: tuple[Expert, loop.Outcome]) -> None:
    assert found[0].weights.keys() == wanted[0].weights.keys()
    for name, weight in wanted[0].weights.items():
        assert torch.equal(found[0].weights[name], weight), name
    for field in ("steps", "tokens", "examples", "losses", "held_out"):
        assert getattr(found[1], field) == getattr(wanted[1], field), field


# What is learned


def trained_a_little(base: BaseModel, data: TokenSet) -> Expert:
    lora = loras.fresh(SHAPE, base.decoder)
    generator = torch.Generator().manual_seed(0)
    for name, w in lora.weights.items():
        if ".lora_B." in name:
            w.copy_(torch.randn(w.shape, generator=generator) * 0.1)
    return lora


def plain_loss(
    folder: Path, adapter: Path, rows: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients by transformers and peft, one row at a time, of cross-entropy on the marked tokens."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expert = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
    total = torch.zeros(())
    for tokens, marks in rows:
        scores = expert(tokens[None].long()).logits[0, :-1]
        wanted = torch.where(marks, tokens, torch.tensor(-100)).long()[1:]
        total = total + torch.nn.functional.cross_entropy(scores, wanted, ignore_index=-100, reduction="sum")
    total.backward()
    slopes = {k.replace(".default", ""): p.grad for k, p in expert.named_parameters() if p.requires_grad}
    return total.detach(), slopes


def rows_of(data: TokenSet, numbers: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.tensor(tokens), torch.tensor(marks)) for tokens, marks in map(data.row, numbers)]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_loss_and_gradients_are_those_of_cross_entropy_on_the_marked_tokens(
    dtype: torch.dtype, close: float, tiny: Path, tiny_base: BaseModel, data: TokenSet, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(forward, "CHUNK", 5)
    base = load(tiny, dtype, packed=True)
    lora = trained_a_little(base, data)
    loras.save(lora, tmp_path, str(tiny), base.decoder.config)
    rows = rows_of(data, [0, 5, 7, 20])
    wanted, slopes = plain_loss(tiny, tmp_path, rows)
    for w in lora.weights.values():
        w.requires_grad_()
    loss, count = forward.completion_loss(base.decoder, apply(lora, base.decoder), rows)
    loss.backward()
    assert count == sum(int(marks.sum()) for _, marks in rows)
    torch.testing.assert_close(loss.detach().float(), wanted, rtol=close, atol=close)
    assert slopes.keys() == lora.weights.keys()
    for name, slope in slopes.items():
        found = lora.weights[name].grad
        assert found is not None
        assert (found.float() - slope).norm() <= close * slope.norm() + 1e-6, name


def test_a_batch_in_several_forwards_is_the_same_batch(
    tiny_base: BaseModel, data: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Any
) -> None:
    monkeypatch.setattr(loop, "MICRO_TOKENS", 40)
    lora, outcome = learn(tiny_base, data, tmp_path / "checkpoint")
    assert outcome.losses == pytest.approx(unbroken[1].losses, abs=2e-3)
    assert held_out_loss(
        completions(tiny_base.decoder, data), apply(lora, tiny_base.decoder), data.lengths(), HELD
    ) == pytest.approx(outcome.held_out[-1], abs=1e-5)


def test_training_lowers_the_loss_and_says_how_far_it_is(tiny_base: BaseModel, data: TokenSet, tmp_path: Path) -> None:
    news: list[Progress] = []
    _, outcome = learn(tiny_base, data, tmp_path / "checkpoint", tell=news.append)
    per_epoch = -(-len(ROWS) // 4)
    assert outcome.steps == len(outcome.losses) == 3 * per_epoch
    assert outcome.examples == 3 * len(ROWS)
    assert outcome.tokens == 3 * data.lengths()[ROWS].sum()
    assert outcome.held_out[0] == pytest.approx(
        held_out_loss(completions(tiny_base.decoder, data), Applied(), data.lengths(), HELD)
    )
    assert outcome.held_out[-1] < outcome.held_out[0] - 0.3
    assert len(outcome.held_out) == 1 + 3
    assert [p.step for p in news] == sorted(p.step for p in news)
    assert {p.steps for p in news} == {outcome.steps}
    assert (news[-1].step, news[-1].seconds_left, news[-1].held_out_loss) == (outcome.steps, 0, outcome.held_out[-1])


def test_the_learning_rate_rises_then_falls_to_nothing(
    tiny_base: BaseModel, data: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    learn(tiny_base, data, tmp_path / "checkpoint", replace(FAST, warmup=0.25, learning_rate=0.01))
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == pytest.approx(0.01, rel=0.03)
    assert peak == pytest.approx(0.25 * len(rates), abs=1)
    assert 0 < rates[-1] < 0.0002


# Stopped and gone on


@given(stops=st.lists(st.integers(1, 18), max_size=3, unique=True).map(sorted))
@settings(max_examples=8)
def test_a_run_stopped_at_any_steps_ends_in_the_same_weights(
    stops: list[int], tiny_base: BaseModel, data: TokenSet, unbroken: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = tmp_path_factory.mktemp("run") / "checkpoint"
    rare = replace(FAST, checkpoint_every_s=1e9)
    said: list[str] = []
    for stop in stops:

        def press(p: Progress, stop: int = stop) -> None:
            if p.step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            learn(tiny_base, data, checkpoint, rare, press, said.append)
    found = learn(tiny_base, data, checkpoint, rare, say=said.append)
    assert_same(found, unbroken)
    assert said == [f"going on at step {stop} of 18" for stop in stops]
    assert found[1].resumed_at == (stops[-1] if stops else 0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_every_kind_of_expert_goes_on_to_the_same_weights(
    kind: str, tiny_base: BaseModel, data: TokenSet, tmp_path: Path
) -> None:
    def press(p: Progress) -> None:
        if p.step == 4:
            raise KeyboardInterrupt

    short = replace(FAST, epochs=1, checkpoint_every_s=1e9)
    wanted = learn(tiny_base, data, tmp_path / "unbroken", short, kind=kind)
    with pytest.raises(KeyboardInterrupt):
        learn(tiny_base, data, tmp_path / "broken", short, press, kind=kind)
    found = learn(tiny_base, data, tmp_path / "broken", short, kind=kind)
    assert_same(found, wanted)
    assert found[1].resumed_at == 4
    assert found[1].losses[0] > found[1].losses[-1]


@pytest.mark.parametrize("stop", [1, 7, 18])
def test_ctrl_c_in_the_middle_of_an_update_waits_for_its_end(
    stop: int, tiny_base: BaseModel, data: TokenSet, unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, updates = torch.optim.AdamW.step, 0

    def press_after(self: torch.optim.AdamW) -> None:
        nonlocal updates
        update(self)
        updates += 1
        if updates == stop:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch.optim.AdamW, "step", press_after)
    with pytest.raises(KeyboardInterrupt):
        learn(tiny_base, data, tmp_path / "checkpoint", replace(FAST, checkpoint_every_s=1e9))
    found = learn(tiny_base, data, tmp_path / "checkpoint")
    assert_same(found, unbroken)
    assert (found[1].resumed_at, updates) == (stop, 18)


@given(delays_ms=st.lists(st.floats(1, 150), min_size=1, max_size=3))
@settings(max_examples=5)
def test_ctrl_c_at_any_moment_never_leaves_half_a_step(
    delays_ms: list[float], tiny_base: BaseModel, data: TokenSet, unbroken: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    checkpoint = tmp_path_factory.mktemp("run") / "checkpoint"
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell put us aside
    try:
        for delay in delays_ms:
            with suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, delay / 1000)
                learn(tiny_base, data, checkpoint, replace(FAST, checkpoint_every_s=1e9))
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        handler = signal.signal(signal.SIGINT, ignored)
    assert handler is signal.default_int_handler
    assert_same(learn(tiny_base, data, checkpoint), unbroken)


def test_training_in_another_thread_works(tiny_base: BaseModel, data: TokenSet, unbroken: Any, tmp_path: Path) -> None:
    import threading

    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(learn(tiny_base, data, tmp_path / "checkpoint")))
    thread.start()
    thread.join()
    assert_same(found[0], unbroken)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def of_another_shape(file: Path) -> None:
    tensors = load_file(file)
    name = next(n for n in tensors if n.startswith("exp_avg:"))
    loop.save_file(
        {**tensors, name: torch.zeros(1)},
        file,
        {"step": "18", "steps": "18", "seconds": "1", "tokens": "1", "examples": "1"},
    )


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": cut,
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("not a checkpoint " * 100),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "without its counters": lambda file: loop.save_file(load_file(file), file),
    "of another run": lambda file: loop.save_file(load_file(file), file, {"step": "2", "steps": "99"}),
    "of another shape": of_another_shape,
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_training_starts_anew(
    damage: str, tiny_base: BaseModel, data: TokenSet, unbroken: Any, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    learn(tiny_base, data, checkpoint)
    DAMAGES[damage](checkpoint)
    said: list[str] = []
    assert_same(learn(tiny_base, data, checkpoint, say=said.append), unbroken)
    assert len(said) == 1
    assert said[0].startswith(f"{checkpoint}: the checkpoint cannot be used (")
    assert said[0].endswith("training starts anew")


@pytest.mark.parametrize("rate", [1e30, float("inf")])
def test_training_that_diverges_stops_before_it_spoils_the_checkpoint(
    rate: float, tiny_base: BaseModel, data: TokenSet, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    done: list[int] = []
    with pytest.raises(
        TrainingError, match=r"diverged at step (\d+) of 18: loss .*; lower training\.learning_rate"
    ) as e:
        learn(tiny_base, data, checkpoint, replace(FAST, learning_rate=rate, clip=1e9), lambda p: done.append(p.step))
    assert f"at step {done[-1] + 1} of" in str(e.value)
    if rate == 1e30:
        kept = load_file(checkpoint)
        assert all(bool(t.isfinite().all()) for t in kept.values())
        assert len(kept["losses"]) == done[-1]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """A full disk, as far as files larger than `size` bytes are concerned."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_at_a_checkpoint_keeps_the_last_one(
    tiny_base: BaseModel, data: TokenSet, unbroken: Any, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"

    def stop(p: Progress) -> None:
        if p.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(tiny_base, data, checkpoint, tell=stop)
    kept = checkpoint.read_bytes()
    with files_up_to(1000), pytest.raises(StorageError, match="checkpoint: the checkpoint cannot be written"):
        learn(tiny_base, data, checkpoint)
    assert checkpoint.read_bytes() == kept
    assert list(tmp_path.iterdir()) == [checkpoint]
    assert_same(learn(tiny_base, data, checkpoint), unbroken)


# A whole business


def fitted(folder: Path, *names: str) -> dict[str, Fitted]:
    return {f.facts.name: f for f in fit(Business.open(folder), list(names))}


def weights(folder: Path) -> dict[str, bytes]:
    """The weights that answer, by expert."""
    library = Business.open(folder).library
    return {name: (library.folder(name) / WEIGHTS).read_bytes() for name in library.names()}


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of the library: when it was written, and what it holds."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in (folder / "experts").rglob("*") if p.is_file()}


def edit(folder: Path, old: str, new: str) -> None:
    file = folder / "coterie.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_fit_trains_measures_and_publishes_every_expert(fitted_shop: Path) -> None:
    library = Business.open(fitted_shop).library
    assert library.names() == ["colors", "greet"]
    for name, choices in (("colors", ("blue", "green", "red", "yellow")), ("greet", ())):
        facts, figures = library.facts(name), library.evaluation(name)
        assert (facts.version, facts.choices, facts.training["rows"]) == (1, choices, 23)
        assert figures["held_out_rows"] == 1
        losses = json.loads((library.folder(name) / "losses.json").read_text())["losses"]
        assert losses[-1] < losses[0]
        for who in ("base", "expert"):
            assert figures["held_out"][who]["rows"] == 1
            assert ("accuracy" in figures["held_out"][who]) == bool(choices)
    assert not list((fitted_shop / ".coterie" / "runs").rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["adapter", "prompt", "prefix", "full"])
def test_every_kind_is_published_whole_and_for_all_to_read(kind: str, shop: Path) -> None:
    edit(shop, "[experts.greet]\n", f'[experts.greet]\nkind = "{kind}"\n')
    found = fitted(shop, "greet")["greet"]
    assert found.facts.kind == kind
    assert found.evaluation["held_out"]["expert"]["rows"] == 1
    version = Business.open(shop).library.folder("greet")
    files = [f for f in version.rglob("*") if f.is_file()]
    assert len([f for f in files if f.suffix == ".safetensors"]) == 2  # the expert, and what the router knows of it
    assert {f.stat().st_mode & 0o777 for f in files} == {0o644}
    assert not fitted(shop, "greet")["greet"].trained
    ((_, figures),) = measure(Business.open(shop), ["greet"], shop / "greet.jsonl", limit=3)
    assert figures["expert"]["rows"] == 3
    if kind == "full":
        with pytest.raises(ModelError, match=r"a model of its own .* base = .*greet/1/model"):
            kinds.load(version, Business.open(shop).base().decoder.config)
        assert load(version / "model").decoder.config.layers == 2


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(shop: Path, fitted_shop: Path) -> None:
    fitted(shop)
    assert weights(shop) == weights(fitted_shop)
    edit(shop, "batch = 8 }", "batch = 8, seed = 1 }")
    again = fitted(shop)
    assert all(f.trained and f.facts.version == 2 for f in again.values())
    assert all(weights(shop)[name] != w for name, w in weights(fitted_shop).items())


@pytest.mark.parametrize("found", ["of an earlier router", "damaged", "gone"])
def test_fit_teaches_the_router_again_what_it_cannot_read_now(found: str, shop: Path) -> None:
    fitted(shop, "greet")
    folder = Business.open(shop).library.folder("greet")
    file, content = folder / statistics.FILE, (folder / statistics.FILE).read_bytes()
    file.write_bytes(content.replace(RECIPE.encode(), b"9" * len(RECIPE)) if found == "of an earlier router" else b"no")
    if found == "gone":
        file.unlink()
    assert not statistics.up_to_date(folder)
    assert not fitted(shop, "greet")["greet"].trained
    known = statistics.load_statistics(folder)
    assert statistics.up_to_date(folder)
    assert known
    assert set(known.where) == {f"greet.jsonl:{n}" for n in range(1, known.count + 1)}
    renewed = file.stat().st_mtime_ns
    assert not fitted(shop, "greet")["greet"].trained
    assert file.stat().st_mtime_ns == renewed, "once"


def test_fit_trains_only_what_changed(shop: Path) -> None:
    assert all(f.trained for f in fitted(shop).values())
    before = snapshot(shop)
    assert not any(f.trained for f in fitted(shop).values())
    assert snapshot(shop) == before

    with (shop / "greet.jsonl").open("a") as f:
        f.write('{"prompt": "Hey, I am Zoe.", "completion": "Welcome, Zoe!"}\n')
    again = fitted(shop)
    assert {name: (f.trained, f.facts.version) for name, f in again.items()} == {
        "colors": (False, 1),
        "greet": (True, 2),
    }
    assert {k: v for k, v in snapshot(shop).items() if k in before and not k.endswith("current")} == {
        k: v for k, v in before.items() if not k.endswith("current")
    }
    edit(shop, "rank = 4, alpha = 8 }\n\n", "rank = 2, alpha = 8 }\n\n")
    assert {name: f.trained for name, f in fitted(shop, "greet").items()} == {"greet": False}
    assert {name: f.trained for name, f in fitted(shop).items()} == {"colors": True, "greet": False}


def test_a_new_description_is_taken_over_without_training(shop: Path) -> None:
    fitted(shop, "greet")
    edit(shop, "Greets people by name", "Says hello")
    found = fitted(shop, "greet")["greet"]
    assert (found.trained, found.facts.version, found.facts.description) == (False, 1, "Says hello")
    library = Business.open(shop).library
    assert library.facts("greet").description == "Says hello"
    assert "Says hello" in (library.folder("greet") / "README.md").read_text()


def test_what_was_rolled_back_stays_rolled_back_until_something_changes(shop: Path) -> None:
    fitted(shop, "greet")
    edit(shop, "alpha = 8", "alpha = 9")
    assert fitted(shop, "greet")["greet"].facts.version == 2
    library = Business.open(shop).library
    library.promote("greet", 1)
    assert not fitted(shop, "greet")["greet"].trained
    assert library.current("greet") == 1
    edit(shop, "alpha = 9", "alpha = 10")
    assert (fitted(shop, "greet")["greet"].facts.version, library.current("greet")) == (3, 3)
    edit(shop, "alpha = 10", "alpha = 8")
    found = fitted(shop, "greet")["greet"]
    assert (found.trained, found.facts.version, library.current("greet")) == (False, 1, 1)


def test_a_damaged_version_is_replaced_by_a_new_one(shop: Path) -> None:
    fitted(shop, "greet")
    library = Business.open(shop).library
    (library.folder("greet") / "expert.json").write_text("{")
    assert fitted(shop, "greet")["greet"].facts.version == 2
    assert library.facts("greet").version == 2


def test_held_out_rows_and_test_rows_are_never_learned(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shop / "test.jsonl").write_text('{"prompt": "HELLO: I am Ada", "completion": "Welcome, Ada!"}\n')
    edit(shop, 'train = "greet.jsonl"\n', 'train = "greet.jsonl"\ntest = "test.jsonl"\n')
    edit(shop, "batch = 8 }", "batch = 8, held_out = 0.3 }")
    business = Business.open(shop)
    learned: set[str] = set()
    measured: set[str] = set()

    def watch(decoder: Any, applied: Any, rows: list[tuple[torch.Tensor, torch.Tensor]], *rest: Any) -> Any:
        seen = {business.base().tokenizer.decode(tokens.tolist(), skip_special_tokens=True) for tokens, _ in rows}
        (learned if torch.is_grad_enabled() else measured).update(seen)
        return forward.completion_loss(decoder, applied, rows, *rest)

    monkeypatch.setattr(objective, "completion_loss", watch)
    found = next(fit(business, ["greet"]))
    training, held = found.facts.training, found.evaluation["held_out_rows"]
    assert (training["left_out_as_test_rows"], training["rows"], held) == (1, 16, 7)
    assert not learned & measured
    assert (len(learned), len(measured)) == (16, 7)
    assert not [text for text in learned | measured if "Hello, I am Ada." in text]
    assert [text for text in learned | measured if "Good day, I am Ada." in text]


@given(first=st.integers(1, 3), second=st.integers(1, 3))  # an epoch of 23 rows in batches of 8 has 3 steps
@settings(max_examples=3)
def test_a_stopped_fit_goes_on_where_it_stopped(
    first: int, second: int, fitted_shop: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = shutil.copytree(
        fitted_shop, tmp_path_factory.mktemp("again") / "shop", ignore=shutil.ignore_patterns("experts")
    )
    business, wanted = Business.open(folder), weights(fitted_shop)
    steps: list[tuple[str, int]] = []
    for stop in (("colors", first), ("greet", second)):

        def press(name: str, p: Progress, stop: tuple[str, int] = stop) -> None:
            steps.append((name, p.step))
            if (name, p.step) == stop and steps.count(stop) == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(fit(business, progress=press))
    list(fit(business))
    assert weights(folder) == wanted
    assert {name: business.library.versions(name) for name in wanted} == {"colors": [1], "greet": [1]}
    assert not [(name, step) for name, step in steps if step != 3 and steps.count((name, step)) > 1], "learned twice"


def test_a_fit_stopped_while_it_learns_preferences_goes_on_where_it_stopped(shop: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"Hello, I am {n}.", "chosen": f"Welcome, {n}!", "rejected": "Go away."} for n in "ABCDEFGHIJ"]
    (shop / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    edit(shop, 'train = "greet.jsonl"\n', 'train = "greet.jsonl"\npreferences = "pairs.jsonl"\n')
    again = shutil.copytree(shop, tmp_path / "again")
    assert fitted(shop, "greet")["greet"].evaluation["preference_pairs"] == 9
    steps: list[tuple[str, int]] = []

    def press(name: str, p: Progress) -> None:
        steps.append((name, p.step))
        if name == "greet, preferences":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(fit(Business.open(again), ["greet"], progress=press))
    list(fit(Business.open(again), ["greet"], progress=lambda name, p: steps.append((name, p.step))))
    assert weights(again)["greet"] == weights(shop)["greet"]
    assert [step for _, step in steps if step == 1] == [1, 1], "neither rows nor pairs are learned twice"


KILLED = """
    import functools, os, random, signal, sys, time
    from pathlib import Path
    from coterie import learn
    from coterie.business import Business
    from coterie.cli.main import main
    from coterie.experts.library import Library
    from coterie.tuning import forward, loop, objective

    folder, moments = sys.argv[1], sys.argv[2].split(",")
    learn.Training = functools.partial(learn.Training, checkpoint_every_s=-1)

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def fit(moment):
        promote, step = Library.promote, loop._step
        if moment == "in a checkpoint":
            os.replace = die
        if moment == "in a step":
            loop._step = lambda *a: step(*a) if a[-2] == 0 else die()
        if moment == "before publishing":
            Library.publish = lambda self, *a: die() if self.root.name == "experts" else publish(self, *a)
        if moment == "in a rename":
            os.rename = die
        if moment == "before promoting":
            Library.promote = lambda self, *a: die() if self.root.name == "experts" else promote(self, *a)
        if moment == "after promoting":
            Library.sweep = lambda self, name: die() if self.root.name == "experts" else None
        main(["fit", folder])

    publish = Library.publish
    for moment in [*moments, "never"]:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            fit(moment)
        try:
            time.sleep(float(moment))
            os.kill(child, signal.SIGKILL)
        except ValueError:
            pass
        _, status = os.waitpid(child, 0)
        library = Business.open(Path(folder)).library
        shelf = {name: [library.facts(name).version, library.evaluation(name) != {}] for name in library.names()}
        print(moment, os.waitstatus_to_exitcode(status), shelf, flush=True)
"""


def test_a_fit_killed_anywhere_ends_in_the_same_weights(shop: Path, fitted_shop: Path) -> None:
    soon, later = (f"{random.uniform(0.02, 0.25):.3f}" for _ in range(2))  # seconds; one expert takes about 0.3
    moments = [soon, "in a checkpoint", "in a step", "before publishing", "before promoting", later, "in a rename",
               "after promoting"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(shop), ",".join(moments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert sum(" -9 {" in line for line in said) >= 4, done.stdout + done.stderr
    assert all(" -9 {" in line or " 0 {" in line for line in said), done.stdout + done.stderr
    assert said[-1] == "never 0 {'colors': [1, True], 'greet': [1, True]}"
    assert "Traceback" not in done.stderr
    assert weights(shop) == weights(fitted_shop)
    library = Business.open(shop).library
    assert [library.versions(n) for n in library.names()] == [[1], [1]]
    assert not list((shop / "experts").glob("*/.*"))
    assert not (shop / ".coterie" / "runs" / "greet").exists()


@pytest.mark.parametrize("moment", ["encoding", "checkpoint", "trial", "publishing"])
def test_a_full_disk_stops_fit_and_loses_nothing(
    moment: str, shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted(shop, "greet")
    before = snapshot(shop)
    edit(shop, "alpha = 8", "alpha = 9")

    def before_that_the_disk_fills_up(name: str, size: int) -> None:
        verb = getattr(room, name)

        def filled(*args: Any) -> Any:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            return verb(*args)

        patch.setattr(room, name, filled)

    with files_up_to(10**9), monkeypatch.context() as patch:  # both are put back when the block ends
        before_that_the_disk_fills_up(
            *{"encoding": ("prepare", 100), "checkpoint": ("tune", 5000), "trial": ("route_statistics", 5000),
              "publishing": ("compare", 100)}[moment]
        )  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            main(["fit", str(shop), "-e", "greet"])
    assert stopped.value.code == 3
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ")
    assert "cannot be written" in said[-1]
    assert snapshot(shop) == before
    assert fitted(shop, "greet")["greet"].facts.version == 2


def test_a_second_fit_at_the_same_time_is_refused(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Business.open(shop).alone(), pytest.raises(SystemExit) as stopped:
        main(["fit", str(shop)])
    assert stopped.value.code == 2
    assert f"{shop}: another `coterie fit` is at work here" in capsys.readouterr().err
    assert fitted(shop, "greet")["greet"].trained


def test_what_other_runs_left_is_gone_once_the_expert_is_published(shop: Path) -> None:
    for run in ("greet/0123456789abcdef", "colors/0123456789abcdef"):
        (shop / ".coterie" / "runs" / run).mkdir(parents=True)
        (shop / ".coterie" / "runs" / run / "checkpoint.safetensors").write_text("old")
    fitted(shop, "greet")
    assert [p.name for p in (shop / ".coterie" / "runs").iterdir()] == ["colors"]


def test_a_base_model_may_lie_in_the_folder(
    shop: Path, tiny: Path, fitted_shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny, shop / "models" / "tiny")
    edit(shop, f'base = "{tiny}"', 'base = "models/tiny"')
    monkeypatch.chdir(tmp_path)
    assert fitted(Path("shop"), "greet")["greet"].facts.base == "models/tiny"
    assert weights(shop)["greet"] == weights(fitted_shop)["greet"]


def test_prompts_longer_than_the_context_count_as_unanswered(shop: Path) -> None:
    edit(shop, "context = 256", "context = 64")
    long = [{"prompt": f"{'very ' * 60} long {i}", "completion": "yes"} for i in range(3)]
    short = [{"prompt": f"Is {i} red?", "completion": "yes"} for i in range(2)]
    (shop / "greet.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long + short))
    (shop / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*long[:1], *short]))
    edit(shop, "batch = 8 }", "batch = 8, held_out = 0.5 }")
    figures = fitted(shop, "greet")["greet"].evaluation["held_out"]
    assert 0 < figures["base"]["too_long"] <= figures["base"]["rows"] == 2
    ((_, measured),) = measure(Business.open(shop), ["greet"], shop / "test.jsonl")
    for who in ("base", "expert"):
        assert (measured[who]["rows"], measured[who]["too_long"]) == (3, 1)
        assert measured[who]["exact_match"]["value"] <= 2 / 3


ROW = '{"prompt": "Hi", "completion": "Hello"}\n'
TOO_FEW: dict[str, tuple[str, str, str]] = {
    "no row": ("", "", r"greet\.jsonl: 0 row\(s\).* 0 different prompt\(s\) are left, and at least 2 are needed"),
    "one row": (ROW, "", r"greet\.jsonl: 1 row\(s\)"),
    "one question": (ROW * 5, "", r"greet\.jsonl: 5 row\(s\).* 1 different prompt\(s\) are left"),
    "all in the test": (ROW + ROW.replace("Hi", "Hey"), ROW + ROW.replace("Hi", "hey"), "of which 2 repeat test rows"),
    "all too long": (ROW.replace("Hi", "Hi " * 600) + ROW, "", "and 1 are over 512 tokens"),
    "bad row": (ROW + "{\n", "", r"greet\.jsonl:2: not valid JSON"),
    "bad test row": (ROW + ROW.replace("Hi", "Hey"), "{\n", r"test\.jsonl:1: not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOO_FEW)
def test_data_that_cannot_be_learned_from_is_refused(case: str, shop: Path) -> None:
    rows, tests, says = TOO_FEW[case]
    (shop / "greet.jsonl").write_text(rows)
    (shop / "test.jsonl").write_text(tests)
    edit(shop, 'train = "greet.jsonl"\n', 'train = "greet.jsonl"\ntest = "test.jsonl"\n')
    with pytest.raises(DataError, match=says):
        fitted(shop, "greet")
    assert Business.open(shop).library.names() == []


def test_everything_declared_is_looked_at_before_anything_is_trained(shop: Path) -> None:
    edit(shop, 'train = "greet.jsonl"', 'train = ["greet.jsonl", "more.csv"]')
    with pytest.raises(DataError, match=r"more\.csv: no such file"):
        next(fit(Business.open(shop)))
    with pytest.raises(CoterieError, match="declares no expert 'tea'; declared: colors, greet"):
        next(fit(Business.open(shop), ["colors", "tea"]))
    assert Business.open(shop).library.names() == []
    assert not (shop / ".coterie" / "runs").exists()


def test_several_files_are_read_as_one(shop: Path, fitted_shop: Path) -> None:
    lines = (shop / "greet.jsonl").read_text().splitlines(keepends=True)
    (shop / "greet.jsonl").write_text("".join(lines[:10]))
    (shop / "more.jsonl").write_text("".join(lines[10:]))
    edit(shop, 'train = "greet.jsonl"', 'train = ["greet.jsonl", "more.jsonl"]')
    fitted(shop, "greet")
    assert weights(shop)["greet"] == weights(fitted_shop)["greet"]
