"""Documents that stand together: which do, and what they lend each other; never what a reader may not see."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.knowledge.names import pairs, series_of
from coterie.knowledge.series import BEST, MOST, Series
from test_documents import Source

TOGETHER = {
    "numbered": ("ledger_001.md", "ledger_002.md", True),
    "numbered, whatever the ending": ("ledger_1.md", "ledger_2.pdf", True),
    "numbered, in one folder": ("books/ledger (1).md", "books/ledger (2).md", True),
    "numbered, in two folders": ("a/ledger_1.md", "b/ledger_1.md", False),
    "other names": ("ledger_1.md", "guide_1.md", False),
    "one folder": ("cards/lost.md", "cards/fees.md", True),
    "two folders": ("cards/lost.md", "loans/fees.md", False),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_files_of_one_name_or_folder_are_a_series(case: str) -> None:
    one, other, together = TOGETHER[case]
    assert (series_of(one)[0] == series_of(other)[0]) is together


@pytest.mark.parametrize(
    ("path", "part"),
    [("ledger_007.md", 7), ("cards/README.md", 0), ("cards/lost.md", -1), ("lost.md", -1), ("2024.md", -1)],
)
def test_a_part_is_the_number_of_a_file_or_0_for_what_introduces_a_folder(path: str, part: int) -> None:
    assert series_of(path)[1] == part


@pytest.mark.parametrize("path", ["lost.md", "2024.md", "index.md"])
def test_files_side_by_side_in_the_source_itself_are_no_series(path: str) -> None:
    assert series_of(path)[0] == 0


def test_pairs_are_of_words_that_name_something() -> None:
    assert pairs("The Light Blue account: fees of the bank") == ["light_blue", "blue_account", "account_fees"]


def lent(marks: list[int], parts: list[int], scores: list[float], may: list[bool] | None = None) -> list[list[float]]:
    may = [True] * len(marks) if may is None else may
    series = Series(np.array(marks), np.array(parts), np.array(may, np.bool_))
    asked = np.flatnonzero(may)
    every, first = series.weigh(asked, np.array(scores, np.float32)[asked])
    return [every.tolist(), first.tolist()]


def test_a_series_lends_the_mean_of_its_best_and_once_more_to_its_introduction() -> None:
    every, first = lent([7, 7, 7, 9, 0], [1, 2, 3, 1, -1], [-1.0, 2.0, 1.0, 5.0, 5.0])
    assert every == pytest.approx([3 / BEST] * 3 + [0, 0]), "a document that stands alone is lent nothing"
    assert first == pytest.approx([3 / BEST, 0, 0, 0, 0])


def test_a_heap_is_no_series() -> None:
    assert lent([7] * (MOST + 1), [-1] * (MOST + 1), [1.0] * (MOST + 1))[0] == [0.0] * (MOST + 1)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3), st.floats(-3, 3, width=32), st.booleans()), max_size=12)
)
def test_what_a_reader_may_not_see_changes_nothing(rows: list[tuple[int, int, float, bool]]) -> None:
    seen = [row for row in rows if row[3]]
    columns = [[row[i] for row in rows] for i in range(4)]
    only = [[row[i] for row in seen] for i in range(3)]
    assert lent(columns[0], columns[1], columns[2], columns[3]) == lent(only[0], only[1], only[2])  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def test_a_series_that_answers_brings_its_introduction(source: Source) -> None:
    """Which says nothing in the words of the question."""
    for name in ("amber", "cobalt"):
        source.write(f"{name}_account_001.md", f"# {name.title()} Account\nKey figures and terms in one table.")
        for n, what in enumerate(("withdrawals abroad", "a stolen card", "cash machines", "transfers"), 2):
            source.write(f"{name}_account_{n:03}.md", f"# {what.title()} with {name.title()}\nFees for {what}: {n}.")
    for n in range(30):
        source.write(f"other/{'abcdefghijklmnopqrstuvwxyzäöüß'[n]}.md", f"# Note\nGardens, lakes and hills, day {n}.")
    source.learn()
    found = source.ask("Which fees has my amber account for withdrawals abroad, cash machines and transfers?", limit=6)
    assert "amber_account_001.md" in found
    assert "cobalt_account_001.md" not in found[: found.index("amber_account_001.md")]


def test_an_introduction_that_may_not_be_read_is_not_brought(source: Source) -> None:
    source.declare(permissions=[{"files": "amber_account_001.md", "readers": ["staff"]}])
    for n, what in enumerate(("terms", "withdrawals abroad", "cash machines"), 1):
        source.write(f"amber_account_{n:03}.md", f"# Amber Account\nFees for {what}: {n}.")
    source.learn()
    assert "amber_account_001.md" not in source.ask("fees of the amber account")
    assert "amber_account_001.md" in source.ask("fees of the amber account", ["staff"])
