"""Training: cached trunks, preferences and full fine-tuning learn what they should, and caches never lie."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coterie.data.encode import TokenSet
from coterie.experts import full, lora
from coterie.experts.expert import Applied
from coterie.experts.kinds import apply
from coterie.experts.lora import LoraConfig
from coterie.model.load import BaseModel
from coterie.tuning.forward import completion_loss, row_losses
from coterie.tuning.loop import Training, train
from coterie.tuning.objective import completions, preferences
from coterie.tuning.trunk import Trunk
from support import random_rows

UPPER = LoraConfig(4, 8, first_layer=1)


def token_set(base: BaseModel, lengths: list[int], seed: int = 0) -> TokenSet:
    """Random rows whose last third is to be learned."""
    rows = random_rows(base, lengths, seed)
    marks = [np.arange(n) >= n - max(1, n // 3) for n in lengths]
    return TokenSet(
        np.concatenate([np.array(r, np.int32) for r in rows]), np.concatenate(marks), np.cumsum([0, *lengths])
    )


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=8), chosen=st.data())
def test_training_from_a_cached_trunk_computes_the_loss_of_the_whole_model(
    lengths: list[int], chosen: st.DataObject, tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = token_set(tiny_base, lengths)
    rows = chosen.draw(st.permutations(range(len(lengths))))[:4]
    expert = lora.fresh(UPPER, tiny_base.decoder)
    trunk = Trunk(tiny_base.decoder, data, 1, tmp_path_factory.mktemp("trunk"))
    applied = apply(expert, tiny_base.decoder)
    found = completions(tiny_base.decoder, data, trunk)(applied, rows)
    wanted = completions(tiny_base.decoder, data)(applied, rows)
    assert found[1] == wanted[1]
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-4)


def counted(trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of each batch that `trunk` computes from now on."""
    calls, compute = list[list[int]](), trunk._compute

    def call(rows: list[int]) -> Tensor:
        calls.append(rows)
        return compute(rows)

    monkeypatch.setattr(trunk, "_compute", call)
    return calls


def test_a_trunk_is_computed_once_and_never_used_for_other_weights_or_data(
    tiny_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = token_set(tiny_base, [10, 20, 30])

    def computed(base: BaseModel, what: TokenSet, cut: int = 1) -> list[list[int]]:
        trunk = Trunk(base.decoder, what, cut, tmp_path)
        calls = counted(trunk, monkeypatch)
        for rows in ([2, 0], [0, 1, 2]):
            trunk.start(rows)
        return calls

    assert computed(tiny_base, data) == [[2, 0], [1]]
    assert computed(tiny_base, data) == []
    assert computed(tiny_base, token_set(tiny_base, [10, 20, 30], seed=1)) == [[2, 0], [1]]
    assert computed(tiny_base, data, cut=2) == [[2, 0], [1]]
    weight = tiny_base.decoder.weights["0.o"]
    weight[0, 0] += 1
    try:
        assert computed(tiny_base, data) == [[2, 0], [1]]
    finally:
        weight[0, 0] -= 1


def test_a_trunk_killed_before_a_batch_was_noted_computes_the_whole_batch_again(
    tiny_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, batches = token_set(tiny_base, [30] * 6), ([0, 4], [3, 1], [5, 2])
    unbroken = Trunk(tiny_base.decoder, data, 1, tmp_path / "a")
    wanted = [unbroken.start(rows) for rows in batches]
    broken = Trunk(tiny_base.decoder, data, 1, tmp_path / "b")
    broken.start(batches[0])
    noted = broken.marks.read_bytes()
    broken.start(batches[1])
    broken.marks.write_bytes(noted)  # the values are on disk, the mark is not
    again = Trunk(tiny_base.decoder, data, 1, tmp_path / "b")
    calls = counted(again, monkeypatch)
    assert all(torch.equal(again.start(rows), each) for rows, each in zip(batches, wanted, strict=True))
    assert calls == [batches[1], batches[2]]


def test_a_trunk_over_its_budget_or_on_a_full_disk_is_computed_anew_with_a_warning(
    tiny_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, said = token_set(tiny_base, [10, 20]), list[str]()
    kept = Trunk(tiny_base.decoder, data, 1, tmp_path / "kept").start([1, 0])
    over = Trunk(tiny_base.decoder, data, 1, tmp_path / "over", budget=10, tell=said.append)
    later = Trunk(tiny_base.decoder, data, 1, tmp_path / "later", tell=said.append)
    later.marks.unlink()
    later.marks.symlink_to("/dev/full")
    torch.testing.assert_close(later.start([1, 0]), kept)
    assert "No space left" in said.pop()

    def full_disk(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full_disk)
    none = Trunk(tiny_base.decoder, data, 1, tmp_path / "none", tell=said.append)
    for trunk in (over, none):
        torch.testing.assert_close(trunk.start([1, 0]), kept)
    assert "budget" in said[0]
    assert "No space left" in said[1]
    assert not list((tmp_path / "none").glob("*.trunk"))


def test_old_trunks_make_room_for_new_ones(tiny_base: BaseModel, tmp_path: Path) -> None:
    one = 60 * tiny_base.decoder.config.width * 4
    for seed in range(4):
        Trunk(tiny_base.decoder, token_set(tiny_base, [60], seed), 1, tmp_path, budget=2 * one)
        assert sum(f.stat().st_size for f in tmp_path.glob("*.trunk")) <= 2 * one
    assert len(list(tmp_path.glob("*.rows"))) == 2


def test_preferences_raise_the_chosen_answers_over_the_rejected(tiny_base: BaseModel, tmp_path: Path) -> None:
    data = token_set(tiny_base, [12] * 16)
    expert = lora.fresh(LoraConfig(4, 8), tiny_base.decoder)
    loss = preferences(tiny_base.decoder, data, None)
    value, count = loss(Applied(), [0, 1])
    assert count == 2
    assert float(value) == pytest.approx(2 * np.log(2), rel=1e-5)  # no better than its reference yet
    sizes = data.lengths().reshape(-1, 2).sum(axis=1)
    settings = Training(epochs=8, batch=4, learning_rate=5e-3)
    outcome = train(tiny_base.decoder, expert, loss, sizes, list(range(8)), [0], settings, tmp_path / "state")
    assert outcome.losses[-1] < 0.5 * outcome.losses[0]
    final, _ = loss(apply(expert, tiny_base.decoder), list(range(8)))
    assert float(final.detach()) / 8 < 0.4


def test_row_losses_are_the_log_probabilities_of_each_rows_completion(tiny_base: BaseModel) -> None:
    rows = [(torch.tensor(r), torch.arange(len(r)) > 4) for r in random_rows(tiny_base, [9, 14])]
    found = row_losses(tiny_base.decoder, Applied(), rows)
    for value, row in zip(found, rows, strict=True):
        loss, _ = completion_loss(tiny_base.decoder, Applied(), [row])
        assert float(value) == pytest.approx(-float(loss), rel=1e-4)


def test_full_fine_tuning_starts_as_the_base_and_all_weights_learn(tiny_base: BaseModel, tmp_path: Path) -> None:
    data = token_set(tiny_base, [12] * 8)
    expert = full.fresh(full.FullConfig(), tiny_base.decoder)
    loss = completions(tiny_base.decoder, data)
    assert float(loss(apply(expert, tiny_base.decoder), [0, 1])[0]) == pytest.approx(
        float(loss(Applied(), [0, 1])[0]), rel=1e-5
    )
    before = {k: w.clone() for k, w in expert.weights.items()}
    settings = Training(epochs=6, batch=4, learning_rate=1e-3)
    outcome = train(tiny_base.decoder, expert, loss, data.lengths(), list(range(8)), [0], settings, tmp_path / "state")
    assert outcome.losses[-1] < outcome.losses[0]
    assert all(not torch.equal(before[k], w) for k, w in expert.weights.items())
