"""Data files become examples, and examples the tokens to learn; what cannot be read is named by file and line."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.data.encode import batches, encode, encode_all
from coterie.data.prepare import prepare
from coterie.data.read import Example, read
from coterie.data.split import hold_out, leaks, mark_leaks, normalise
from coterie.errors import DataError, StorageError
from coterie.model.load import BaseModel

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
PAIR = {"prompt": "Hi", "completion": "Hello"}
LONG = "long " * 40_000  # 200,000 characters, more than the csv module allows of itself


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def spoken(example: Example) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in example.messages]


def user(text: str) -> tuple[str, str]:
    return "user", text


def assistant(text: str) -> tuple[str, str]:
    return "assistant", text


def system(text: str) -> tuple[str, str]:
    return "system", text


HELLO = [user("Hi"), assistant("Hello")]
READABLE: dict[str, tuple[str, bytes, dict[str, str], list[list[tuple[str, str]]]]] = {
    "jsonl pairs": ("a.jsonl", lines(PAIR, PAIR), {}, [HELLO, HELLO]),
    "jsonl messages": ("a.jsonl", lines({"messages": CHAT}), {}, [HELLO]),
    "jsonl mapped": ("a.jsonl", lines({"q": "Hi", "a": "Hello"}), {"prompt": "q", "completion": "a"}, [HELLO]),
    "jsonl messages mapped": ("a.jsonl", lines({"turns": CHAT}), {"messages": "turns"}, [HELLO]),
    "prompt preferred to messages": ("a.jsonl", lines({**PAIR, "messages": 0}), {"prompt": "prompt"}, [HELLO]),
    "jsonl own instruction": ("a.jsonl", lines({**PAIR, "system": "Be brief"}), {}, [[system("Be brief"), *HELLO]]),
    "jsonl more turns": ("a.jsonl", lines({"messages": CHAT + CHAT}), {}, [HELLO + HELLO]),
    "jsonl instruction in messages": (
        "a.jsonl", lines({"system": "not this", "messages": [{"role": "system", "content": "this"}, *CHAT]}), {},
        [[system("this"), *HELLO]],
    ),
    "jsonl blank lines, CRLF, no last newline": (
        "a.jsonl", b"\r\n" + lines(PAIR).replace(b"\n", b"\r\n\r\n") + lines(PAIR).strip(), {}, [HELLO, HELLO],
    ),
    "jsonl BOM": ("a.jsonl", b"\xef\xbb\xbf" + lines(PAIR), {}, [HELLO]),
    "jsonl only a BOM": ("a.jsonl", b"\xef\xbb\xbf\n", {}, []),
    "jsonl long text": ("a.jsonl", lines({**PAIR, "prompt": LONG}), {}, [[user(LONG.strip()), assistant("Hello")]]),
    "spaces around": ("a.jsonl", lines({"prompt": " Hi\n", "completion": "\tHello "}), {}, [HELLO]),
    "capital suffix": ("A.JSONL", lines(PAIR), {}, [HELLO]),
    "empty jsonl": ("a.jsonl", b"", {}, []),
    "csv": ("a.csv", b"prompt,completion\nHi,Hello\nHi,Hello", {}, [HELLO, HELLO]),
    "csv mapped, more columns": ("a.csv", b"id,q,a\n1,Hi,Hello\n", {"prompt": "q", "completion": "a"}, [HELLO]),
    "csv instruction": (
        "a.csv", b"prompt,completion,how\nHi,Hello,Be brief\nHi,Hello,\n", {"system": "how"},
        [[system("Be brief"), *HELLO], HELLO],
    ),
    "csv BOM and CRLF": ("a.csv", b"\xef\xbb\xbfprompt,completion\r\nHi,Hello\r\n", {}, [HELLO]),
    "csv old Mac newlines": ("a.csv", b"prompt,completion\rHi,Hello\r", {}, [HELLO]),
    "csv quoted newlines, commas, quotes": (
        "a.csv", b'prompt,completion\n"Hi\nyou, ""dear""",Hello\n', {}, [[user('Hi\nyou, "dear"'), assistant("Hello")]],
    ),
    "csv blank lines": ("a.csv", b"\nprompt,completion\n\nHi,Hello\n\n", {}, [HELLO]),
    "csv huge field": (
        "a.csv", f"prompt,completion\n{LONG},Hello\n".encode(), {}, [[user(LONG.strip()), assistant("Hello")]],
    ),
    "csv not UTF-8 where nobody looks": ("a.csv", b"prompt,completion,x\nHi,Hello,\xff\n", {}, [HELLO]),
    "empty csv": ("a.csv", b"", {}, []),
    "csv of a header": ("a.csv", b"prompt,completion\n", {}, []),
    "parquet": ("a.parquet", parquet([PAIR, PAIR]), {}, [HELLO, HELLO]),
    "parquet messages": ("a.parquet", parquet([{"messages": CHAT}]), {}, [HELLO]),
    "parquet mapped": ("a.parquet", parquet([{"q": "Hi", "a": "Hello"}]), {"prompt": "q", "completion": "a"}, [HELLO]),
    "parquet without rows": ("a.parquet", parquet([]), {}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", READABLE)
def test_every_kind_of_file_is_read(case: str, tmp_path: Path) -> None:
    name, content, columns, wanted = READABLE[case]
    (tmp_path / name).write_bytes(content)
    assert [spoken(e) for e in read(tmp_path / name, columns)] == wanted


def test_an_experts_instruction_goes_before_rows_that_bring_none(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(PAIR, {**PAIR, "system": "own"}))
    assert [spoken(e)[0] for e in read(file, system="Be brief")] == [system("Be brief"), system("own")]


def test_what_was_asked_and_the_last_question_are_told_apart() -> None:
    turns = [system("Be brief"), user("One?"), assistant("1"), user("Two?"), assistant("2")]
    example = Example(tuple({"role": r, "content": c} for r, c in turns), "here")
    assert (example.asked, example.question, example.completion) == ("One?\n1\nTwo?", "Two?", "2")


HEAD = b"prompt,completion\n"
UNREADABLE: dict[str, tuple[str, bytes, dict[str, str], str]] = {
    "not JSON": ("a.jsonl", lines(PAIR) + b"{oops\n", {}, r":2: not valid JSON"),
    "JSON cut short": ("a.jsonl", lines(PAIR, PAIR)[:-4], {}, r":2: not valid JSON"),
    "JSON after blank lines": ("a.jsonl", b"\n\n" + lines(PAIR) + b"\n[]\n", {}, r":5: a row must be an object"),
    "a number": ("a.jsonl", b"3\n", {}, r":1: a row must be an object, not int"),
    "JSON too deep": ("a.jsonl", b"[" * 100_000 + b"\n", {}, r":1: not valid JSON"),
    "a number too long": ("a.jsonl", b"1" * 5000 + b"\n", {}, r":1: not valid JSON"),
    "JSON in Latin-1": ("a.jsonl", lines(PAIR) + '{"prompt": "é"}'.encode("latin-1"), {}, r":2: not valid JSON"),
    "JSON in UTF-16": ("a.jsonl", lines(PAIR).decode().encode("utf-16"), {}, r":1: not valid JSON"),
    "raw NUL": ("a.jsonl", b'{"prompt": "a\0b", "completion": "c"}', {}, r":1: not valid JSON"),
    "escaped NUL": ("a.jsonl", lines({**PAIR, "prompt": "a\0b"}), {}, r":1: 'prompt' has bytes .* or NUL"),
    "half a surrogate pair": ("a.jsonl", b'{"prompt": "\\ud83d", "completion": "c"}', {}, r":1: 'prompt' has bytes"),
    "no prompt": ("a.jsonl", lines({"completion": "c"}), {}, r":1: no column 'prompt'; the row has 'completion'"),
    "unknown column": ("a.jsonl", lines(PAIR), {"prompt": "text"}, r":1: no column 'text'; the row has 'prompt'"),
    "unknown column of the instruction": ("a.jsonl", lines(PAIR), {"system": "how"}, r":1: no column 'how'"),
    "unknown field": ("a.jsonl", lines(PAIR), {"question": "q"}, r"columns: 'question' is not one of prompt,"),
    "messages and prompt": ("a.jsonl", lines(PAIR), {"prompt": "p", "messages": "m"}, "columns: name either"),
    "empty completion": ("a.jsonl", lines(PAIR, {**PAIR, "completion": " "}), {}, r":2: 'completion' must be text"),
    "number for text": ("a.jsonl", lines({**PAIR, "prompt": 5}), {}, r":1: 'prompt' must be text"),
    "instruction no text": ("a.jsonl", lines({**PAIR, "system": 5}), {}, r":1: 'system' must be text"),
    "messages no list": ("a.jsonl", lines({"messages": "Hi"}), {}, r":1: 'messages' must be a list"),
    "no messages": ("a.jsonl", lines({"messages": []}), {}, r":1: 'messages' must be a list"),
    "message no object": ("a.jsonl", lines({"messages": ["Hi"]}), {}, r":1: message 1 needs a role"),
    "unknown role": ("a.jsonl", lines({"messages": [{"role": "boss"}]}), {}, r":1: message 1 needs a role"),
    "message without content": ("a.jsonl", lines({"messages": [{"role": "user"}]}), {}, ":1: content of message 1"),
    "no answer": ("a.jsonl", lines({"messages": CHAT[:1]}), {}, r":1: the last message must be the assistant's"),
    "only an answer": ("a.jsonl", lines({"messages": CHAT[1:]}), {}, r":1: no message of the user"),
    "too few cells": ("a.csv", HEAD + b"Hi,Hello\nHi\n", {}, r":3: 1 columns where the header has 2"),
    "too many cells": ("a.csv", HEAD + b"Hi,Hello,there\n", {}, r":2: 3 columns where the header has 2"),
    "wrong after quoted newlines": ("a.csv", HEAD + b'"Hi\nyou",Hello\n\nHi\n', {}, r":5: 1 columns"),
    "open quote": ("a.csv", HEAD + b'Hi,Hello\n"Hi,Hello\nHi,Hello\n', {}, r":3: not readable as CSV"),
    "text after a quote": ("a.csv", HEAD + b'"Hi" you,Hello\n', {}, r":2: not readable as CSV"),
    "empty cell": ("a.csv", HEAD + b"Hi,\n", {}, r":2: 'completion' must be text"),
    "csv unknown column": ("a.csv", HEAD + b"Hi,Hello\n", {"prompt": "text"}, r":2: no column 'text'; the row has 'p"),
    "semicolons": ("a.csv", b"prompt;completion\nHi;Hello\n", {}, ":2: no column 'prompt'; .* has 'prompt;completion'"),
    "a column twice": ("a.csv", b"prompt,prompt\nHi,Hello\n", {}, r":1: the header names 'prompt' twice"),
    "csv NUL": ("a.csv", HEAD + b"Hi,Hello\nH\0i,Hello\n", {}, r":3: 'prompt' has bytes .* or NUL"),
    "csv in Latin-1": ("a.csv", HEAD + b"Hi,Hello\n" * 3000 + b"caf\xe9,Hello\n", {}, r":3002: 'prompt' has bytes"),
    "csv in UTF-16": ("a.csv", b"prompt,completion\n".decode().encode("utf-16"), {}, r":1: the header has bytes"),
    "parquet cut short": ("a.parquet", parquet([PAIR])[:-20], {}, r": truncated or not Parquet"),
    "no parquet": ("a.parquet", b"prompt,completion\n", {}, r": truncated or not Parquet"),
    "empty parquet file": ("a.parquet", b"", {}, r": truncated or not Parquet"),
    "parquet null": ("a.parquet", parquet([PAIR, {**PAIR, "completion": None}]), {}, r": row 2: 'completion' must"),
    "parquet column": ("a.parquet", parquet([PAIR]), {"prompt": "text"}, r": row 1: no column 'text'"),
    "wrong suffix": ("a.txt", b"Hi", {}, r": unknown kind of data file '\.txt'; use \.jsonl"),
    "no suffix": ("data", b"Hi", {}, r": unknown kind of data file ''"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_named_by_file_and_line(case: str, tmp_path: Path) -> None:
    name, content, columns, says = UNREADABLE[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        list(read(tmp_path / name, columns))
    assert "\n" not in str(caught.value)
    assert f"{tmp_path / name}" in str(caught.value) or says.startswith("columns")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"folder\.csv: a folder; name a data file"):
        list(read(tmp_path / "folder.csv"))
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        list(read(tmp_path / "none.csv"))


# Text as people write it: no control characters, which files and templates treat in their own ways, and nothing beyond
# emoji, because SmolLM2's vocabulary has not every byte.
LETTERS = st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"), max_codepoint=0x1FFFF)
TEXT = st.text(LETTERS, min_size=1, max_size=40).map(str.strip).filter(bool)


@given(rows=st.lists(st.tuples(TEXT, TEXT), max_size=8), kind=st.sampled_from(["jsonl", "csv", "parquet"]))
def test_whatever_is_written_is_read_back(
    rows: list[tuple[str, str]], kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("rows") / f"a.{kind}"
    records = [{"prompt": q, "completion": a} for q, a in rows]
    if kind == "csv":
        with file.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(records)
    else:
        file.write_bytes(lines(*records) if kind == "jsonl" else parquet(records))
    assert [(e.question, e.completion) for e in read(file)] == rows


# Encoding


def conversation(turns: list[str], system: str = "") -> Example:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return Example((*([{"role": "system", "content": system}] if system else []), *messages), "rows.csv:7")


def marked_runs(ids: list[int], learn: list[bool]) -> list[list[int]]:
    """The marked tokens, run by run."""
    runs: list[list[int]] = []
    for i, (token, mark) in enumerate(zip(ids, learn, strict=True)):
        if mark and (i == 0 or not learn[i - 1]):
            runs.append([])
        if mark:
            runs[-1].append(token)
    return runs


TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3).map(lambda pairs: [t for pair in pairs for t in pair])


@pytest.mark.parametrize("which", ["tiny_base", "smol"])
def test_exactly_the_assistants_tokens_are_marked(which: str, request: pytest.FixtureRequest) -> None:
    model: BaseModel = request.getfixturevalue(which)

    @given(turns=TURNS, system=st.just("") | TEXT)
    def check(turns: list[str], system: str) -> None:
        example = conversation(turns, system)
        ids, learn = encode(example, model)

        def text(tokens: list[int]) -> str:
            return model.tokenizer.decode(tokens, skip_special_tokens=False)

        whole = model.chat(list(example.messages), prompt=False)
        assert text(ids) == whole[: whole.rindex(model.eos_token) + len(model.eos_token)]
        assert [text(run) for run in marked_runs(ids, learn)] == [a + model.eos_token for a in turns[1::2]]
        asked = model.encode(model.chat(example.prompt))
        assert ids[: len(asked)] == asked, "what is learned follows the very tokens that the question has when asked"
        assert not learn[-len(ids) : len(asked)][-1]

    check()


def test_an_answer_that_spells_the_end_mark_holds_none_and_is_learned_whole(tiny_base: BaseModel) -> None:
    ids, learn = encode(conversation(["Hi", "Say <|im_end|> twice"]), tiny_base)
    (run,) = marked_runs(ids, learn)
    assert tiny_base.tokenizer.decode(run, skip_special_tokens=False) == "Say < |im_end|> twice<|im_end|>"


class Scripted:
    """A model of characters, whose template is the function it is given."""

    def __init__(self, write: Any, eos_token: str = "") -> None:
        self.write, self.eos_token = write, eos_token

    def chat(self, messages: list[dict[str, str]], prompt: bool = True) -> str:
        return self.write(messages, prompt)  # type: ignore[no-any-return]

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def test_earlier_answers_that_the_template_rewrites_are_context_only() -> None:
    def forget_earlier_thoughts(messages: list[dict[str, str]], prompt: bool) -> str:  # as Qwen3's template does
        out = ""
        for i, m in enumerate(messages):
            thought = "<think>" if m["role"] == "assistant" and i == len(messages) - 1 else ""
            out += f"[{m['role'][0]}]{thought}{m['content']}|"
        return out + ("[a]" if prompt else "")

    model = Scripted(forget_earlier_thoughts, "|")
    ids, learn = encode(conversation(["one", "1", "two", "2"]), model)
    assert "".join(map(chr, ids)) == "[u]one|[a]1|[u]two|[a]<think>2|"
    assert ["".join(map(chr, run)) for run in marked_runs(ids, learn)] == ["<think>2|"]


def test_a_template_without_an_end_mark_is_learned_to_its_end() -> None:
    model = Scripted(lambda ms, prompt: "".join(f"{m['role']}: {m['content']}\n" for m in ms) + "assistant: " * prompt)
    ids, learn = encode(conversation(["a", "b", "c", "d"]), model)
    assert ["".join(map(chr, run)) for run in marked_runs(ids, learn)] == ["b\n", "d\n"]


def test_a_row_that_the_template_refuses_is_named(tiny_base: BaseModel) -> None:
    def refuse(messages: list[dict[str, str]], prompt: bool) -> str:
        raise DataError("roles must alternate")

    with pytest.raises(DataError, match=r"rows\.csv:7: roles must alternate"):
        encode(conversation(["a", "b"]), Scripted(refuse))
    with pytest.raises(DataError, match=r"rows\.csv:7: .* asks in another way"):
        encode(conversation(["a", "b"]), Scripted(lambda ms, prompt: "?" if prompt else "a=b"))


@given(turns=st.lists(TURNS, max_size=6), longest=st.integers(5, 60))
def test_rows_on_disk_are_the_rows_encoded_and_long_ones_are_named(
    turns: list[list[str]], longest: int, tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    examples = [conversation(t) for t in turns]
    data, skipped = encode_all(examples, tiny_base, tmp_path_factory.mktemp("tokens"), longest)
    wanted = [encode(e, tiny_base) for e in examples]
    assert set(skipped) == {i for i, (ids, _) in enumerate(wanted) if len(ids) > longest}
    assert all(where.startswith("rows.csv:7 (") for where in skipped.values())
    kept = [w for i, w in enumerate(wanted) if i not in skipped]
    assert [(ids.tolist(), learn.tolist()) for ids, learn in map(data.row, range(len(data)))] == kept
    assert data.lengths().tolist() == [len(ids) for ids, _ in kept]


def test_a_folder_that_cannot_be_written_is_a_storage_error(tiny_base: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(StorageError, match="runs"):
        encode_all([conversation(["a", "b"])], tiny_base, tmp_path / "runs" / "x", 100)


# Batches and splits


@given(lengths=st.lists(st.integers(1, 50), max_size=300), size=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_batches_take_every_row_once_in_an_order_fixed_by_the_seed(lengths: list[int], size: int, seed: int) -> None:
    found = [b.tolist() for b in batches(np.array(lengths), size, seed)]
    assert sorted(i for b in found for i in b) == list(range(len(lengths)))
    assert all(1 <= len(b) <= size for b in found)
    assert found == [b.tolist() for b in batches(np.array(lengths), size, seed)]
    assert len(found) == len(list(batches(np.array(lengths), size, seed + 1))), "every epoch has as many steps"


def test_another_seed_gives_another_order() -> None:
    first, second = ([b.tolist() for b in batches(np.ones(100, np.int64), 4, seed)] for seed in (0, 1))
    assert first != second


@given(
    keys=st.lists(st.integers(0, 30), max_size=60), share=st.floats(0.001, 0.5), most=st.integers(1, 20),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_held_out_rows_are_apart_and_rows_that_ask_the_same_stay_together(
    keys: list[int], share: float, most: int, seed: int
) -> None:
    rows, held = hold_out(keys, share, most, seed)
    assert sorted(rows + held) == list(range(len(keys)))
    assert not {keys[i] for i in rows} & {keys[i] for i in held}
    assert (rows, held) == hold_out(keys, share, most, seed)
    if len(set(keys)) > 1:
        assert rows
        assert held
        smallest = min(keys.count(k) for k in set(keys))
        assert len(held) <= max(smallest, min(most, round(len(keys) * share)), 1)
    else:
        assert not held


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [("What's my balance?", "whats my balance", True), ("Where IS  my card?!", "where is my card", True),
     ("How do I close my account today?", "How do I close my account todax?", True),
     ("Where is my card?", "Where is my cash?", False), ("One", "Two", False), ("🙂", "🙁", False), ("?", "!", False),
     ("Überweisung?", "überweisung", True), ("你好吗", "你们好", False)],
)  # fmt: skip
def test_near_duplicates_of_test_rows_are_found(text: str, other: str, same: bool) -> None:
    filler = ["Something else altogether", "And another thing"]
    assert leaks([*filler, text, *filler], [other]) == ([2] if same else [])
    found = mark_leaks([conversation([t, "x"]) for t in [text, *filler]], [other])
    assert [leaked for _, leaked in found] == [same, False, False]


@given(train=st.lists(TEXT, max_size=12), test=st.lists(TEXT, max_size=6))
def test_after_leaks_are_taken_out_no_test_prompt_is_left(train: list[str], test: list[str]) -> None:
    leaked = set(leaks(train, test))
    left = {normalise(t) for i, t in enumerate(train) if i not in leaked}
    assert not left & {normalise(t) for t in test}
    assert leaks(train, []) == leaks([], test) == []


def test_leaks_are_found_part_by_part_of_a_large_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.data.split.PART", 7)
    asked = [f"{2**i:x} {3**i} {5**i:o}" for i in range(50)]
    taken = 0

    def examples() -> Any:
        nonlocal taken
        for text in asked:
            taken += 1
            yield conversation([text, "x"])

    marked = mark_leaks(examples(), [asked[6], asked[7], asked[49]])
    next(marked)
    assert taken == 7, "no more is read than is looked at together"
    assert [False, *(leaked for _, leaked in marked)] == [i in (6, 7, 49) for i in range(50)]


def test_rows_are_prepared_without_leaks_and_long_rows(tiny_base: BaseModel, tmp_path: Path) -> None:
    turns = [
        ("Is it red?", "yes"),
        ("Repeats a test row!", "no"),
        ("Is it " + "very " * 99 + "red?", "no"),
        ("IS IT RED", "no"),
    ]
    examples = [conversation(list(t)) for t in turns]
    data = prepare(iter(examples), ["repeats a test row"], tiny_base, tmp_path, 64, choices=True)
    assert (data.read, data.leaked, data.numbers, len(data.tokens)) == (4, 1, [0, 3], 2)
    assert data.keys[0] == data.keys[1]
    assert data.choices == ("no", "yes")
    assert len(data.too_long) == 1


def test_too_many_choices_are_refused(tiny_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.data.prepare.CHOICES_MOST", 2)
    examples = [conversation([f"question {i}", f"answer {i}"]) for i in range(3)]
    with pytest.raises(DataError, match="more than 2 different completions"):
        prepare(examples, [], tiny_base, tmp_path, 64, choices=True)
    assert prepare(examples, [], tiny_base, tmp_path, 64, choices=False).choices == ()


def test_public_data_is_read(public_data: Any) -> None:
    file = public_data("banking77/test.csv")
    examples = list(read(file, {"prompt": "text", "completion": "category"}))
    assert len(examples) == 3080
    assert len({e.completion for e in examples}) == 77
    assert examples[0].where == f"{file}:2"
