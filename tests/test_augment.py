"""Made rows are marked, new, free of test rows, and keep their label; rewording does what it says."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.business import Business
from coterie.cli.main import main
from coterie.curation import paraphraser
from coterie.data.augment import METHODS, Made, augment
from coterie.data.lexicon import NAMES, PAIRS
from coterie.data.read import Example, Row, Source, read
from coterie.data.reword import Carriers, Swaps, edit, mistype
from coterie.data.split import leaks, normalise
from coterie.errors import CoterieError

OPENINGS = ("can you tell me where", "i would like to know where", "where")
THINGS = (
    "kettle", "lamp", "carpet", "mirror", "bicycle", "violin", "sofa", "helmet", "tent", "printer", "boiler", "camera",
    "drill", "mattress", "fridge", "tractor",
)  # fmt: skip
LABELS = {"delivery": "my {} is now", "refund": "my money for the {} is", "repair": "you mend a broken {}"}


def rows() -> list[dict[str, Any]]:
    """Most openings with most labels and things, so that some are left to make; one row names a person."""
    made = [
        {"prompt": f"{opening} {rest.format(thing)}", "completion": label, "source": "shop"}
        for label, rest in LABELS.items() for i, opening in enumerate(OPENINGS) for j, thing in enumerate(THINGS)
        if (i + j) % 4
    ]  # fmt: skip
    return [*made, {"prompt": "Sarah says she never got her sofa", "completion": "delivery", "source": "shop"}]


def source(folder: Path, lines: Sequence[dict[str, Any]], name: str = "train.jsonl") -> Source:
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in lines))
    return Source((folder / name,))


def shuffle(alike: Sequence[str], wanted: int) -> list[str]:
    """Stands for a model: the words of the question turned about."""
    words = alike[0].split()
    return [" ".join(words[i:] + words[:i]) for i in range(1, wanted + 1)]


def make(train: Source, tests: Sequence[Example], methods: Sequence[str], made: Made, **options: Any) -> list[Row]:
    return list(augment(list(train.rows()), train.columns, tests, methods, 2, made, paraphrase=shuffle, **options))


@given(seed=st.integers(0, 1000), methods=st.sets(st.sampled_from(METHODS), min_size=1))
def test_every_made_row_is_marked_new_and_absent_from_the_test_data(
    tmp_path_factory: pytest.TempPathFactory, seed: int, methods: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("made")
    train = source(folder, rows())
    tests = list(source(folder, [{**r, "prompt": f"{r['prompt']} !"} for r in rows()[::5]], "test.jsonl").examples())
    made = Made()
    out = make(train, tests, sorted(methods), made, seed=seed)
    assert (len(out), sum(made.methods.values())) == (made.rows, made.rows)
    origin = {e.where: e for e in train.examples()}
    for row in out:
        mark = row["synthetic"]
        assert mark["method"] in methods
        assert row["source"] == "shop"
        if mark["method"] != "swap":
            assert row["completion"] == origin[mark["from"]].completion
    keys = [normalise(r["prompt"]) for r in out]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & {normalise(e.question) for e in origin.values()}
    assert leaks([r["prompt"] for r in out], [t.question for t in tests]) == []
    if methods != {"swap"}:
        assert out
    assert out == make(train, tests, sorted(methods), Made(), seed=seed)  # the seed decides


def test_a_made_row_is_read_like_the_row_it_came_from_and_carries_its_mark(tmp_path: Path) -> None:
    named = {"prompt": "text", "completion": "label"}
    shapes: dict[str, tuple[list[dict[str, Any]], dict[str, str]]] = {
        "columns": ([{"text": r["prompt"], "label": r["completion"]} for r in rows()], named),
        "messages": ([{"messages": [{"role": "system", "content": "Sort."}, {"role": "user", "content": r["prompt"]},
                                    {"role": "assistant", "content": r["completion"]}]} for r in rows()], {}),
    }  # fmt: skip
    for name, (lines, columns) in shapes.items():
        train = Source(source(tmp_path, lines, f"{name}.jsonl").paths, columns)
        out = make(train, [], ["edit"], Made())
        new = Source(source(tmp_path, out, f"{name}-made.jsonl").paths, columns)
        examples = list(new.examples())
        assert len(examples) == len(out)
        assert all(e.facts["synthetic"]["method"] == "edit" for e in examples)
        assert {e.completion for e in examples} == set(LABELS)
        assert [m["role"] for m in examples[0].messages] == [m["role"] for m in next(train.examples()).messages]


def test_made_rows_are_not_reworded_again(tmp_path: Path) -> None:
    marked = [{**r, "synthetic": {"method": "edit", "from": "x:1"}} for r in rows()]
    assert make(source(tmp_path, marked), [], ["edit", "model"], Made()) == []


def test_wordings_that_read_like_another_label_are_thrown_away(tmp_path: Path) -> None:
    """The model answers every question with one about repairs."""
    train, made = source(tmp_path, rows()), Made()

    def repairs(alike: Sequence[str], wanted: int) -> list[str]:
        return [f"{alike[0].split()[-1]}: would you mend a broken thing or repair it"]

    many = augment(list(train.rows()), {}, [], ["model"], 1, made, paraphrase=repairs)
    labels = Counter(r["completion"] for r in many)
    assert labels["delivery"] == labels["refund"] == 0
    assert labels["repair"] >= 1
    assert made.off_label > 30


def test_unknown_methods_and_a_missing_model_are_refused(tmp_path: Path) -> None:
    train = source(tmp_path, rows())
    for method, says in (("magic", "no such method"), ("model", "needs a base model")):
        with pytest.raises(CoterieError, match=says):
            list(augment(list(train.rows()), {}, [], [method], 1, Made()))


# Rewording


@given(st.text("abcdefgh XYZ123[].,?", min_size=1, max_size=60), st.integers(0, 99))
def test_an_edit_changes_few_words_and_no_numbers_or_masks(text: str, seed: int) -> None:
    words, new = text.split(), edit(text, np.random.default_rng(seed)).split()
    budget = max(1, round(len(words) / 10))
    assert len(words) - budget <= len(new) <= len(words)
    kept = Counter(w for w in words if not w.isalpha())
    assert Counter(w for w in new if not w.isalpha()) == kept


@given(st.text("abcdefghijklmnopqrstuvwxyzABC", min_size=1, max_size=15), st.integers(0, 99))
def test_a_typing_error_is_one_error(word: str, seed: int) -> None:
    new = mistype(word, np.random.default_rng(seed))
    assert abs(len(new) - len(word)) <= 1
    if len(new) == len(word):
        assert sum(a != b for a, b in zip(word, new, strict=True)) <= 2


def test_carriers_are_openings_of_many_labels_put_where_the_data_has_seen_them() -> None:
    texts, labels = [r["prompt"] for r in rows()], [r["completion"] for r in rows()]
    carriers = Carriers.learn(texts, labels)
    assert "can you tell me" in carriers.phrases
    assert not any("kettle" in p or "mend" in p for p in carriers.phrases)
    new = carriers.others("can you tell me where my kettle is now", 1, np.random.default_rng(0))
    assert new == ["i would like to know where my kettle is now"]
    assert carriers.others("Sarah says nothing", 1, np.random.default_rng(0)) == []


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("He said that he lost his card", "She said that she lost her card"),
        ("I gave her the card and she gave him hers", "I gave him the card and he gave her his"),
        ("Her husband MR Brown is with her.", "His wife MRS Brown is with him."),
        ("Is it his?", "Is it hers?"),
        ("where is the shepherd", None),
        ("May I pay in June?", None),
    ],
)
def test_gendered_words_are_swapped_in_their_form(text: str, swapped: str | None) -> None:
    both = Swaps().swap(text, "Thank you.")
    assert (both[0] if both else None) == swapped


@given(st.lists(st.sampled_from([w for pair in PAIRS for w in pair]), min_size=1, max_size=8))
def test_swapping_twice_gives_the_text_back(words: list[str]) -> None:
    text = " ".join(words)
    once = Swaps().swap(text, "")
    assert once
    again = Swaps().swap(once[0], "")
    assert again
    assert again[0] == text


def test_question_and_answer_name_the_same_person_and_all_groups_come_equally_often() -> None:
    swaps, seen = Swaps(), Counter[str]()
    group = {name: g for g, names in NAMES.items() for name in names}
    for _ in range(90):
        both = swaps.swap("I am Oliver, ask Priya", "Hello Oliver!")
        assert both
        first = both[0].split()[2].strip(",")
        assert both[1] == f"Hello {first}!"
        assert first != both[0].split()[-1]
        assert group[first] != "men, English"
        seen.update([group[first], group[both[0].split()[-1]]])
    assert max(seen.values()) - min(seen.values()) <= 2
    assert len(seen) == len(NAMES)


# With a model, and from the command line


def test_a_model_gives_single_lines_and_the_seed_decides(shop: Path) -> None:
    engine = Business.open(shop).engine(slots=4)
    try:
        a, b, c = (paraphraser(engine, seed=s)(["where is my order", "has it come"], 4) for s in (1, 1, 2))
    finally:
        engine.close()
    assert a == b
    assert all("\n" not in t and t.strip() == t for t in [*a, *c])


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object) -> Any:
    """What `coterie data ARGS --json` prints."""
    monkeypatch.setattr("sys.argv", ["coterie", "data", *map(str, args), "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    out = capsys.readouterr()
    assert left.value.code in (0, None), out.err
    return json.loads(out.out)


def test_data_is_measured_augmented_and_measured_again_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, new = source(tmp_path, rows()).paths[0], tmp_path / "more.jsonl"
    asked = [("do you know where my tent is", "delivery"), ("mend a broken tent?", "repair")]
    (test,) = source(tmp_path, [{"prompt": q, "completion": a} for q, a in asked], "test.jsonl").paths
    made = run(capsys, monkeypatch, "augment", train, "--out", new, "--test", test)
    assert made["rows"] == len(list(read(new))) > 50
    effect = run(capsys, monkeypatch, "effect", train, "--with", new, "--test", test)
    assert (effect["rows"], effect["added"], effect["test_rows"]) == (len(rows()), made["rows"], 2)
    monkeypatch.chdir(tmp_path)  # the same rows by another path
    elsewhere = run(capsys, monkeypatch, "effect", train.name, "--with", new, "--test", test)
    assert elsewhere == effect
    held_out = run(capsys, monkeypatch, "effect", train, "--with", new)
    assert held_out["added"] < made["rows"]  # rows made from held-out rows would give the answers away
    curve = run(capsys, monkeypatch, "curve", train, "--test", test, "--steps", 3, "--repeats", 2)
    assert curve["points"][-1]["rows"] == len(rows())
    assert curve["forecasts"][0]["says"].startswith(f"twice the data ({2 * len(rows())} rows): about ")
    like = run(capsys, monkeypatch, "compare", train, train)
    assert like["coverage"]["value"] == 1
