"""Answers that are one of some choices: learned as decisions, and said without a step where one is left."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.data.encode import TokenSet, encode_all
from coterie.data.read import Example
from coterie.engine.engine import Engine
from coterie.engine.request import Sampling
from coterie.experts.expert import Applied
from coterie.experts.library import Library
from coterie.model import constrain
from coterie.model.decoder import attend_packed, packed_positions
from coterie.model.load import BaseModel
from coterie.tuning.decisions import Decisions, decisions
from coterie.tuning.objective import completions
from coterie.tuning.trunk import Trunk

INTENTS = ("card_lost", "card_lost_abroad", "card_arrival", "top_up_by_card", "top_up_by_cash", "refund")


def encoded(base: BaseModel, answers: list[str], folder: Path) -> TokenSet:
    examples = [
        Example(({"role": "user", "content": f"Question {i}"}, {"role": "assistant", "content": answer}), f"row {i}")
        for i, answer in enumerate(answers)
    ]
    return encode_all(examples, base, folder, 1024)[0]


def scores_after(base: BaseModel, tokens: list[int]) -> torch.Tensor:
    """Scores (vocab) of what follows `tokens`."""
    with torch.no_grad():
        n = [len(tokens)]
        return base.decoder.logits(
            base.decoder.forward(torch.tensor(tokens), packed_positions(n), attend_packed(n))[-1:]
        )[0]


def found(base: BaseModel, answers: list[str], folder: Path, options: tuple[str, ...] = INTENTS) -> Decisions:
    out = decisions(base, encoded(base, answers, folder), options)
    assert out
    return out


def test_a_row_ends_with_the_token_that_decides(smol: BaseModel, tmp_path: Path) -> None:
    made = found(smol, ["refund", "top_up_by_cash", "card_lost"], tmp_path)

    def told(i: int) -> tuple[str, list[str]]:
        tokens, marks = made.data.row(i)
        text = smol.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        return text.rpartition("assistant\n")[2], [
            smol.tokenizer.decode([t], skip_special_tokens=False) for t in tokens[marks].tolist()
        ]

    assert told(0) == ("ref", ["ref"])
    assert told(1) == ("top_up_by_cash", ["top", "cash"])  # what lies between is the same in both
    assert told(2)[0] == "card_lost<|im_end|>"  # only its end tells it from card_lost_abroad
    assert told(2)[1][-1] == "<|im_end|>"


@settings(max_examples=8)
@given(seed=st.integers(0, 99))
def test_the_loss_is_over_what_the_constraint_permits(
    seed: int, tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = random.Random(seed)
    answers = rng.choices(INTENTS, k=3)
    made = found(tiny_base, answers, tmp_path_factory.mktemp("rows"))
    total, count = completions(tiny_base.decoder, made.data, None, made)(Applied(), [0, 1, 2])
    grammars, wanted, places = constrain.Grammars(tiny_base), 0.0, 0
    for i in range(3):
        tokens, marks = (part.tolist() for part in made.data.row(i))
        begin = len(tiny_base.encode(tiny_base.chat([{"role": "user", "content": f"Question {i}"}])))
        matcher = grammars.matcher(constrain.choices(INTENTS))
        for at in range(begin, len(tokens)):
            if marks[at]:
                scores = scores_after(tiny_base, tokens[:at]).float()
                grammars.mask(matcher, scores)
                wanted -= float(torch.log_softmax(scores, -1)[tokens[at]])
                places += 1
            matcher.consume_token(tokens[at])
    assert count == places == made.data.learn.sum()
    assert float(total) == pytest.approx(wanted, rel=1e-3)


def test_from_a_cached_trunk_it_is_the_same(smol: BaseModel, tmp_path: Path) -> None:
    made = found(smol, list(INTENTS), tmp_path)
    trunk = Trunk(smol.decoder, made.data, 15, tmp_path / "trunk")
    rows = [4, 0, 2]
    whole, cut = (completions(smol.decoder, made.data, t, made)(Applied(), rows) for t in (None, trunk))
    assert float(cut[0]) == pytest.approx(float(whole[0]), rel=0.02)
    assert cut[1] == whole[1]


def test_answers_outside_the_choices_are_learned_as_text(smol: BaseModel, tmp_path: Path) -> None:
    assert decisions(smol, encoded(smol, ["refund", "something else"], tmp_path / "a"), INTENTS) is None
    assert decisions(smol, encoded(smol, ["refund"], tmp_path / "b"), ("refund",)) is None


@pytest.fixture(scope="module")
def engine(smol: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine(smol, Library(tmp_path_factory.mktemp("none")), slots=8, context=256)
    yield engine
    engine.close()


def test_what_a_constraint_leaves_no_choice_about_takes_no_step(engine: Engine) -> None:
    """Alone and beside others; as a token by token reference says it."""
    base, grammars = engine.base, constrain.Grammars(engine.base)
    wished = {"intent": {"enum": list(INTENTS)}, "sure": {"type": "boolean"}}
    shape = {"type": "object", "properties": wished, "required": list(wished), "additionalProperties": False}
    schema = constrain.json_schema(shape)
    asked = [
        (base.encode(f"{n} cards, and a refund:"), limit)
        for n in range(3)
        for limit in (constrain.choices(INTENTS), schema)
    ]

    def reference(prompt: list[int], limit: constrain.Constraint) -> list[int]:
        matcher, said = grammars.matcher(limit), list[int]()
        while not matcher.is_stopped():
            forced = matcher.compute_ff_tokens() if said else []
            if not forced:
                scores = scores_after(base, prompt + said)
                grammars.mask(matcher, scores)
                forced = [int(scores.argmax())]
                if forced[0] in base.eos:
                    break
            assert matcher.consume_tokens(forced), (matcher.get_error(), said, forced)
            said += forced
        return said

    before = engine.stats.steps
    running = [engine.submit(prompt, Sampling(60, constraint=limit)) for prompt, limit in asked]
    texts = [g.text() for g in running]
    assert engine.stats.steps - before < max(len(g.generated) for g in running)
    for (prompt, limit), generation, text in zip(asked, running, texts, strict=True):
        assert base.tokenizer.decode(reference(prompt, limit)) == text
        alone = engine.submit(prompt, Sampling(60, constraint=limit))
        assert alone.text() == text
        assert alone.generated == generation.generated
    assert all(json.loads(text)["intent"] in INTENTS for text in texts[1::2])


@pytest.mark.parametrize("most", [1, 3, 5])
def test_what_is_forced_counts_towards_the_limit(engine: Engine, most: int) -> None:
    limit = constrain.choices(["top_up_by_a_bank_transfer", "x"])
    generation = engine.submit(engine.base.encode("Cash:"), Sampling(most, constraint=limit))
    text = generation.text()
    assert len(generation.generated) <= most
    assert "top_up_by_a_bank_transfer".startswith(text) or text == "x"
    assert (generation.finish == "stop") == (text in ("x", "top_up_by_a_bank_transfer"))


def test_log_probabilities_are_told_of_every_token(engine: Engine) -> None:
    sampling = Sampling(40, logprobs=0, constraint=constrain.choices(["top_up_by_a_bank_transfer", "x"]))
    generation = engine.submit(engine.base.encode("Cash:"), sampling)
    told = [t.id for piece in generation for t in piece.tokens]
    assert told[: len(generation.generated)] == generation.generated


def test_rows_of_decisions_hold_nothing_behind_the_last(smol: BaseModel, tmp_path: Path) -> None:
    made = found(smol, list(INTENTS) * 3, tmp_path)
    assert made.data.ends[-1] == len(made.data.tokens) == len(made.nodes)
    assert np.array_equal(made.nodes >= 0, made.data.learn)
    assert all(made.data.row(i)[1][-1] for i in range(len(made.data)))
    assert bool(made.allowed.any(1).all())
