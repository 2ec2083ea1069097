"""Documents that name the same fields and tools lead to each other; never through what a reader may not see."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.knowledge.links import LONGEST, MOST, lend, names_of
from test_documents import Source

NAMES = {
    "a field": ("Ask for the account_id first.", ["account_id"]),
    "a tool, called": ("Use `close_card_4721(card_id)`.", ["close_card_4721", "card_id"]),
    "in capitals": ("It says ERR_NO_CARD, err_no_card again", ["err_no_card"]),
    "emphasis is none": ("_never_ say so, __ever__", []),
    "plain words": ("The account id of a card", []),
    "one too long": ("a_" + "b" * LONGEST, []),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_are_words_that_software_joins(case: str) -> None:
    text, expected = NAMES[case]
    assert names_of([text]) == expected


def test_a_document_of_nothing_but_names_is_cut_off() -> None:
    assert len(names_of([" ".join(f"name_{n}" for n in range(10 * MOST))])) == MOST


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), unique=True, max_size=20),
    st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6),
)
def test_what_is_lent_is_the_sum_of_cosines_times_scores(pairs: list[tuple[int, int]], scores: list[float]) -> None:
    held = np.zeros((6, 5))
    for document, name in pairs:
        held[document, name] = 1
    counts = held.sum(axis=0)
    weighed = held * np.where(counts > 1, np.log(6 / np.maximum(counts, 1)), 0)
    weighed /= np.maximum(np.linalg.norm(weighed, axis=1, keepdims=True), 1e-9)
    alike = weighed @ weighed.T
    np.fill_diagonal(alike, 0)
    documents, names = np.array(pairs, np.int64).reshape(-1, 2).T
    own = np.array(scores, np.float32)
    assert lend(documents, names, own) == pytest.approx(alike @ np.maximum(own, 0), abs=1e-5)


QUESTION = "My card is lost. Can I have a new card?"


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A procedure for lost cards, that asks for a token_ref; two documents that differ only in which reference is
    looked up; and notes on gardens and cards."""
    made = Source(tmp_path)
    made.write("lost.md", "# Lost cards\nA lost card is blocked by its token_ref, and a new card is sent.")
    for name, field in (("other", "parcel_ref"), ("wanted", "token_ref")):
        made.write(f"registry-{name}.md", f"# Registry {name}\nOpen the registry of cards and copy the {field}.")
    for n in range(20):
        made.write(f"note{n:02}.md", f"# Note\nGardens, lakes and hills, and a card for day {n}.")
    return made


def leads(source: Source, *groups: str) -> bool:
    """Whether the registry that the procedure needs comes before the other one, which is first where all is equal."""
    found = source.ask(QUESTION, groups, 25)
    return found.index("registry-wanted.md") < found.index("registry-other.md")


def test_a_procedure_brings_what_says_how_its_fields_are_found(source: Source) -> None:
    source.learn()
    assert source.ask(QUESTION)[0] == "lost.md"
    assert leads(source)


def test_a_document_that_was_dropped_links_nothing(source: Source) -> None:
    source.learn()
    (source.root / "lost.md").unlink()
    source.learn()
    assert not leads(source)


def test_a_name_in_what_one_may_not_read_links_nothing(source: Source) -> None:
    source.declare(permissions=[{"files": "lost.md", "readers": ["staff"]}])
    source.learn()
    assert not leads(source)
    assert leads(source, "staff", "*")


def test_a_question_of_function_words_alone_is_still_searched_by_words(source: Source) -> None:
    source.write("who.md", "Who are we, and why?")
    source.learn()
    assert source.ask("who are we?")[0] == "who.md"
