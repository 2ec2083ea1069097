"""Documents as a source: what is read, what is found, what nobody else may read, and what survives a kill."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coterie.errors import CoterieError, DataError, StorageError
from coterie.knowledge import documents, parse_worker, store
from coterie.knowledge.chunk import SIZE, Chunk, chunks, pieces
from coterie.knowledge.documents import Documents, Learned, learn, listed, overview
from coterie.knowledge.documents_spec import DocumentsSpec
from coterie.knowledge.evidence import EVERYONE, Reader
from coterie.knowledge.near import BANDS
from coterie.knowledge.parse import OLE, Parsed, Section, parse
from coterie.knowledge.parse_worker import Parsing
from coterie.knowledge.store import Store
from coterie.knowledge.vectors import Mapped
from knowledge_support import PAGE, POLICY, WordEmbedder, docx_of, pdf_of

ANYONE = Reader()


class Source:
    """A folder of documents, its index, and its declaration."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder, self.embedder = root / "files", root / "index", WordEmbedder()
        self.root.mkdir()
        self.spec = DocumentsSpec(kind="documents", path="files")

    def declare(self, **fields: object) -> None:
        self.spec = DocumentsSpec.model_validate({"kind": "documents", "path": "files", **fields})

    def write(self, name: str, content: str | bytes) -> Path:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def learn(self) -> Learned:
        return learn("source", self.spec, self.root, self.folder, self.embedder)

    def ask(self, question: str, groups: Iterable[str] = (), limit: int = 20) -> list[str]:
        """Where the answers lie."""
        opened = Documents("source", self.spec, self.folder, self.embedder, self.root)
        try:
            return [e.where for e in opened.search(question, Reader("someone", frozenset(groups)), limit)]
        finally:
            opened.close()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


READABLE = {
    "rules.md": (POLICY.encode(), "how long does delivery take", "Standard delivery takes 3 days"),
    "hours.html": (PAGE, "when does the workshop open", "opens at nine"),
    "guide.pdf": (pdf_of("Oil the chain weekly", "Check the brakes monthly"), "brakes", "Check the brakes monthly"),
    "prices.docx": (docx_of(("Prices", "A new tube costs 7 pounds.")), "what costs a tube", "tube costs 7 pounds"),
    "note.txt": ("Dogs are welcome in the shop — always.".encode(), "may I bring dogs", "Dogs are welcome"),
    "utf16.txt": ("The key is under the mat.".encode("utf-16"), "where is the key", "under the mat"),
}


@pytest.mark.parametrize("name", READABLE)
def test_every_kind_of_file_is_read_and_found(source: Source, name: str) -> None:
    content, question, passage = READABLE[name]
    source.write(name, content)
    assert source.learn().errors == ()
    found = Documents("source", source.spec, source.folder, source.embedder).search(question, ANYONE)
    assert passage in found[0].text
    assert found[0].where.startswith(name)


def test_a_script_or_a_menu_of_a_page_is_no_text(source: Source) -> None:
    text = " ".join(s.text for s in parse(Path("hours.html"), PAGE).sections)
    assert "nine in the morning" in text
    assert "alert" not in text
    assert "color:red" not in text


UNREADABLE = {
    "broken.pdf": (b"%PDF-1.4 and then nothing", "broken, or no PDF"),
    "cut.pdf": (pdf_of("Hello")[:150], "broken, or no PDF"),
    "empty.md": (b"  \n", "the file is empty"),
    "latin.txt": ("Öl und Fett".encode("latin-1"), r"not UTF-8 text \(byte 0\)"),
    "binary.txt": (b"abc\x00\x01\x02", "zero bytes"),
    "locked.docx": (OLE + b"\x00" * 600, "protected by a password"),
    "broken.docx": (b"PK\x03\x04 no archive", "broken, or no DOCX"),
    "blank.pdf": (pdf_of(""), "no text was found"),
    "large.txt": (b"word " * 300_000, "over max_mb = 1"),
}


def test_what_cannot_be_read_is_reported_by_name_and_the_rest_is_found(source: Source) -> None:
    source.declare(max_mb=1)
    for name, (content, _) in UNREADABLE.items():
        source.write(name, content)
    source.write("rules.md", POLICY)
    done = source.learn()
    assert {path for path, _ in done.errors} == set(UNREADABLE)
    for path, why in done.errors:
        assert why.startswith(path), "no folder of the machine"
        assert re.search(UNREADABLE[path][1], why), why
    assert source.ask("delivery")[0].startswith("rules.md")
    seen = overview("source", source.spec, source.folder, ANYONE)
    assert len(seen["errors"]) == len(UNREADABLE)


def test_a_file_that_takes_too_long_is_given_up_and_the_rest_is_found(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = source.write("a.pdf", pdf_of("Oil the chain weekly"))
    source.write("rules.md", POLICY)
    with monkeypatch.context() as hurried:
        hurried.setattr(parse_worker, "LIMIT_S", 0.001)
        done = source.learn()
    assert done.errors == (("a.pdf", "a.pdf: not read within 0.001 s; it is left until it changes (touch it)"),)
    assert source.ask("delivery")[0].startswith("rules.md")
    os.utime(slow)
    assert source.learn().errors == (), "and it is tried again"
    assert "a.pdf > page 1" in source.ask("oil the chain")


def test_a_parser_that_breaks_down_takes_one_file_along() -> None:
    parsing = Parsing()
    try:
        assert parsing.parse(Path("a.pdf"), pdf_of("One")).sections[0].text == "One"
        assert parsing._process
        parsing._process.kill()
        with pytest.raises(DataError, match=r"b\.pdf: the process that reads it broke down"):
            parsing.parse(Path("b.pdf"), pdf_of("Two"))
        assert parsing.parse(Path("c.html"), PAGE).title == parse(Path("c.html"), PAGE).title
        deep = b"<html><body>" + b"<div>" * 100_000 + b"deep"
        with suppress(DataError):  # read or refused, and the next one is read
            parsing.parse(Path("deep.html"), deep)
        assert parsing.parse(Path("d.md"), b"# A\n" + b"word " * 20_000).title == "A"
    finally:
        parsing.close()


def test_a_file_is_read_up_to_the_declared_size_and_not_a_byte_further(source: Source) -> None:
    source.declare(max_mb=0.5)
    source.write("fits.txt", b"word\n" + b"x" * ((1 << 19) - 5))
    source.write("over.txt", b"word\n" + b"x" * ((1 << 19) - 4))
    assert [path for path, _ in source.learn().errors] == ["over.txt"]


def test_a_file_that_breaks_later_is_reported_and_the_others_stay(source: Source) -> None:
    source.write("a.md", "# A\nThe lamp is red.")
    file = source.write("b.txt", "The door is green.")
    source.learn()
    file.write_bytes(b"\xff\xfe\xff")
    assert [path for path, _ in source.learn().errors] == ["b.txt"]
    assert source.ask("lamp door") == ["a.md"]
    file.write_text("The door is blue.")
    assert source.learn().errors == ()
    assert "b.txt" in source.ask("door blue")


def refuse(monkeypatch: pytest.MonkeyPatch, call: str, name: str) -> None:
    """Let a call of the system fail for what is called `name`."""
    owner, _, attribute = call.rpartition(".")
    asked = {"pathlib.Path": Path, "os": os}[owner]
    real = getattr(asked, attribute)

    def called(path: object, *more: object, **named: object) -> object:
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *more, **named)

    monkeypatch.setattr(asked, attribute, called)


def test_what_the_limit_refused_is_read_once_the_limit_is_raised(source: Source) -> None:
    source.declare(max_mb=0.001)
    source.write("a.md", "# A\nThe lamp is red.\n" + "word " * 1000)
    assert "over max_mb" in source.learn().errors[0][1]
    assert source.learn().indexed == 0, "and told again"
    source.declare(max_mb=1)
    done = source.learn()
    assert (done.errors, done.indexed) == ((), 1)
    assert source.ask("lamp red")[0].startswith("a.md")


@pytest.mark.parametrize("call", ["pathlib.Path.read_bytes", "pathlib.Path.stat", "pathlib.Path.is_file"])
def test_a_file_that_cannot_be_read_for_a_while_keeps_what_it_said_and_is_tried_again(
    source: Source, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    source.write("a.md", "# A\nThe lamp is red.")
    source.write("b.md", "# B\nThe door is green.")
    source.learn()
    os.utime(source.root / "a.md")
    for _ in range(2):
        with monkeypatch.context() as failing:
            refuse(failing, call, "a.md")
            done = source.learn()
        assert done.errors == (("a.md", "a.md: cannot be read (Permission denied)"),)
        assert (done.indexed, done.dropped, done.passages) == (0, 0, 2)
        assert "a.md" in source.ask("lamp red")
    asked = source.embedder.asked
    done = source.learn()
    assert (done.errors, done.indexed, source.embedder.asked) == ((), 0, asked), "the same as before: no work"
    assert "a.md" in source.ask("lamp red")
    with monkeypatch.context() as failing:
        refuse(failing, call, "c.md")
        source.write("c.md", "# C\nThe roof is flat.")
        assert [path for path, _ in source.learn().errors] == ["c.md"]
    assert source.learn().indexed == 1
    assert source.ask("roof flat")[0] == "c.md"


def test_what_lies_in_a_folder_that_cannot_be_listed_is_not_gone(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.declare(permissions=[{"files": "hr/*.md", "readers": ["hr"]}])
    source.write("a.md", "# A\nThe lamp is red.")
    source.write("hr/pay.md", "# Pay\nThe pay is 900 pounds.")
    source.write("hr-not.md", "# Not\nThe roof is flat.")
    source.learn()
    (source.root / "hr-not.md").unlink()
    with monkeypatch.context() as failing:
        refuse(failing, "os.scandir", "files/hr")
        done = source.learn()
    assert done.errors == (("hr/", "hr/: cannot be listed (Permission denied)"),)
    assert done.dropped == 1
    assert source.ask("pay pounds", ["hr"])[0] == "hr/pay.md"
    seen = [overview("s", source.spec, source.folder, Reader("x", g)) for g in (frozenset({"hr"}), frozenset[str]())]
    assert [s["errors"] for s in seen] == [[done.errors[0][1]], []], "told to those who may read what is in it"
    (source.root / "hr" / "pay.md").unlink()
    done = source.learn()
    assert (done.errors, done.dropped) == ((), 1)
    assert source.ask("pay pounds", ["hr"]) == ["a.md"]
    with monkeypatch.context() as failing:
        refuse(failing, "os.scandir", "files")
        with pytest.raises(DataError, match="files: cannot be listed"):
            source.learn()
    assert source.ask("lamp") == ["a.md"]


def test_a_repeat_that_cannot_be_read_when_the_first_goes_is_read_later(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "# Guarantee\nOur guarantee covers every part for 2 years after the day of delivery, whoever fitted it."
    source.write("a.md", text)
    source.write("b.md", text)
    source.learn()
    (source.root / "a.md").unlink()
    with monkeypatch.context() as failing:
        refuse(failing, "pathlib.Path.read_bytes", "b.md")
        assert [path for path, _ in source.learn().errors] == ["b.md"]
    assert source.learn().errors == ()
    assert source.ask("guarantee") == ["b.md"]


def test_hashes_of_repeats_go_with_their_passages_and_numbers_tell_passages_apart(source: Source) -> None:
    text = "# Guarantee\nOur guarantee covers every part for {} years after the day of delivery, whoever fitted it."
    for name, years in (("a", 2), ("b", 2), ("c", 3)):
        source.write(f"{name}.md", text.format(years))
    source.learn()
    assert sorted(source.ask("guarantee")) == ["a.md", "c.md"], "b says what a says; c does not"
    count = "select (select count(*) from bands), count(*) from chunks where repeats is null"
    with closing(sqlite3.connect(source.folder / "index.db")) as db:
        assert db.execute(count).fetchone() == (2 * BANDS, 2)
    for name in "abc":
        (source.root / f"{name}.md").unlink()
    source.learn()
    with closing(sqlite3.connect(source.folder / "index.db")) as db:
        assert db.execute(count).fetchone() == (0, 0)


def test_a_name_that_is_no_text_is_reported_and_the_rest_is_found(source: Source) -> None:
    source.write("a.md", "# A\nThe lamp is red.")
    with open(os.fsencode(source.root) + b"/caf\xe9.md", "wb") as file:
        file.write(b"# Coffee\nIt is hot.")
    for _ in range(2):
        assert source.learn().errors == ((r"caf\xe9.md", r"caf\xe9.md: its name is not UTF-8; rename it"),)
        assert source.ask("lamp") == ["a.md"]
    os.rename(os.fsencode(source.root) + b"/caf\xe9.md", source.root / "coffee.md")
    assert source.learn().errors == ()
    assert source.ask("hot coffee")[0] == "coffee.md"


def test_what_nobody_foresaw_in_a_file_takes_one_file_along(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write("a.md", "# A\nThe lamp is red.")
    source.write("b.md", "# B\nThe door is green.")

    def breaks(parsed: Parsed) -> list[Chunk]:
        if parsed.title == "A":
            raise ValueError("of no use to a user")
        return chunks(parsed)

    with monkeypatch.context() as broken:
        broken.setattr(documents, "chunks", breaks)
        assert source.learn().errors == (("a.md", "a.md: cannot be read (ValueError)"),)
    assert source.learn().errors == ()
    assert sorted(source.ask("lamp door")) == ["a.md", "b.md"]


def test_headings_are_kept_and_a_citation_opens_its_passage(source: Source) -> None:
    long = " ".join(["The courier comes before noon."] * 40)
    source.write("rules.md", f"# Rules\n\n## Delivery\n{long}\n\n### Abroad\nIreland takes 6 days.\n" + "x " * 500)
    source.learn()
    opened = Documents("source", source.spec, source.folder, source.embedder)
    found = opened.search("Ireland days", ANYONE)[0]
    assert found.where == "rules.md > Delivery > Abroad"
    assert opened.open(found.where, ANYONE).text == found.text
    assert opened.open("rules.md > nowhere", ANYONE) is None


@given(st.text(alphabet="ab. \n", max_size=3000), st.integers(40, 200))
def test_pieces_are_short_and_lose_only_white_space(text: str, size: int) -> None:
    found = list(pieces(text, size))
    assert all(0 < len(p) <= size for p in found)
    assert "".join("".join(found).split()) == "".join(text.split())


@given(st.lists(st.tuples(st.sampled_from(["", "One", "Two"]), st.text(alphabet="xyz ", min_size=1, max_size=900))))
def test_places_within_a_document_are_different(parts: list[tuple[str, str]]) -> None:
    parsed = Parsed("Title", tuple(Section((h,) if h else (), t) for h, t in parts if t.strip()))
    found = chunks(parsed)
    assert len({c.place for c in found}) == len(found)
    assert all(len(c.text) <= SIZE + 5 for c in found)


# ---- incremental


def test_only_what_changed_is_indexed_again(source: Source) -> None:
    source.write("a.md", "# A\nThe lamp is red.")
    source.write("b.md", "# B\nThe door is green.")
    first = source.learn()
    assert (first.indexed, first.dropped) == (2, 0)
    asked = source.embedder.asked
    assert source.learn().indexed == 0
    os.utime(source.root / "a.md")  # touched, not changed
    assert source.learn().indexed == 0
    assert source.embedder.asked == asked
    source.write("b.md", "# B\nThe door is blue now.")
    source.write("c.md", "# C\nThe roof is flat.")
    (source.root / "a.md").unlink()
    then = source.learn()
    assert (then.indexed, then.dropped, then.passages) == (2, 1, 2)
    assert source.ask("lamp red")
    assert "a.md" not in source.ask("lamp red")
    assert source.ask("roof")[0] == "c.md"
    opened = Documents("source", source.spec, source.folder, source.embedder)
    assert all("green" not in e.text for e in opened.search("door", ANYONE))


def test_an_open_index_sees_what_is_learned_later(source: Source) -> None:
    source.write("a.md", "# A\nThe lamp is red.")
    source.learn()
    opened = Documents("source", source.spec, source.folder, source.embedder)
    source.write("b.md", "# B\nThe door is green.")
    source.learn()
    assert opened.search("door green", ANYONE)[0].where == "b.md"
    (source.root / "b.md").unlink()
    source.learn()
    assert [e.where for e in opened.search("door green", ANYONE)] == ["a.md"]


def test_who_asks_while_it_is_learned_always_gets_an_answer(source: Source) -> None:
    source.write("stays.md", "# Lamp\nThe lamp in the hall is red.")
    source.learn()
    opened = Documents("source", source.spec, source.folder, source.embedder)
    stop, failures = threading.Event(), list[str]()

    def ask() -> None:
        while not stop.is_set():
            try:
                found = [e.where for e in opened.search("red lamp hall", ANYONE, 3)]
            except Exception as error:  # the thread's own; told by the test
                failures.append(repr(error))
                return
            if found[:1] != ["stays.md"]:
                failures.append(f"found {found}")

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(12):
            for n in range(6):
                source.write(f"{n}.md", f"# Door {n}\nDoor {n} has been painted {turn} times so far.")
            source.learn()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []


def test_near_duplicates_are_found_once_and_come_back_when_the_first_goes(source: Source) -> None:
    text = "Our guarantee covers every part for 2 years after the day of delivery, whoever fitted it to the bike. " * 3
    source.write("a.md", f"# A\n{text}")
    source.write("b.md", f"# B\n{text.replace('whoever', 'Whoever')}")
    source.write("c.md", f"# C\n{text.replace('2 years', '3 years')}")
    source.learn()
    assert sorted(source.ask("guarantee")) == ["a.md", "c.md"]  # another number is another fact
    (source.root / "a.md").unlink()
    source.learn()
    assert sorted(source.ask("guarantee")) == ["b.md", "c.md"]


def test_another_embedding_model_begins_anew(source: Source) -> None:
    source.write("a.md", "# A\nThe lamp is red.")
    source.learn()
    source.embedder.name = "others"  # type: ignore[misc]
    with pytest.raises(CoterieError, match="run `coterie learn`"):
        source.ask("lamp")
    assert source.learn().indexed == 1
    assert source.ask("lamp") == ["a.md"]


def test_what_is_not_there_is_said(source: Source) -> None:
    with pytest.raises(CoterieError, match="not indexed yet; run `coterie learn`"):
        source.ask("anything")
    shutil.rmtree(source.root)
    with pytest.raises(DataError, match="no such folder"):
        source.learn()


def test_a_damaged_index_is_said_with_the_mend(source: Source) -> None:
    source.write("a.md", "# A\nThe lamp is red.")
    source.learn()
    (source.folder / "index.db").write_bytes(b"no database at all, but long enough to be looked at" * 50)
    for leftover in source.folder.glob("index.db-*"):
        leftover.unlink()
    with pytest.raises(StorageError, match=r"delete .* and run `coterie learn`"):
        source.ask("lamp")


def test_a_link_out_of_the_folder_is_not_followed(source: Source, tmp_path: Path) -> None:
    (tmp_path / "secret.md").write_text("# Secret\nThe code is 1234.")
    (source.root / "link.md").symlink_to(tmp_path / "secret.md")
    source.write("a.md", "# A\nThe lamp is red.")
    assert [name for name, _ in listed(source.root, source.spec)[0]] == ["a.md"]


KILLED = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from coterie.knowledge import documents
from coterie.knowledge.documents_spec import DocumentsSpec
from knowledge_support import WordEmbedder
documents.BATCH = 3
class Slow(WordEmbedder):
    def embed(self, texts):
        time.sleep(0.02)
        return super().embed(texts)
documents.learn("source", DocumentsSpec(kind="documents", path="files"), Path({root!r}), Path({folder!r}), Slow(),
                count=lambda w, d, t: print(d, flush=True))
print("done", flush=True)
"""


@pytest.mark.parametrize("after", [1, 5, 9])
def test_killed_while_indexing_it_goes_on_where_it_was(source: Source, after: int) -> None:
    for n in range(40):
        source.write(f"{n:02d}.md", f"# Item {n}\nThe thing number {n} is kept on shelf {n * 7}.")
    paths = [str(Path(documents.__file__).parents[2]), str(Path(__file__).parent)]
    code = KILLED.format(paths=paths, root=str(source.root), folder=str(source.folder))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    for _ in range(after):
        process.stdout.readline()
    time.sleep(0.005 * after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    before = len(source.ask("thing number shelf", limit=100))
    assert before >= 3 * (after - 1)  # what had been committed is found, by readers too
    done = source.learn()
    assert done.indexed <= 40 - before
    assert len(source.ask("thing number shelf", limit=100)) == 40
    assert source.learn().indexed == 0


def test_words_and_rows_that_no_commit_knows_are_put_right(source: Source) -> None:
    """As if killed between tantivy's commit and SQLite's."""
    source.write("a.md", "# A\nThe lamp is red.")
    source.learn()
    copy = source.folder / "index.db"
    kept = copy.read_bytes()
    source.write("b.md", "# B\nThe door is green.")
    source.learn()
    for leftover in source.folder.glob("index.db-*"):
        leftover.unlink()
    copy.write_bytes(kept)
    assert source.ask("lamp door") == ["a.md"]
    assert source.learn().indexed == 1
    assert sorted(source.ask("lamp door")) == ["a.md", "b.md"]
    writer = Store(source.folder, source.embedder.width, source.embedder.name)
    assert (source.folder / "vectors.i8").stat().st_size == writer.rows * source.embedder.width
    writer.close()


# ---- packing


def many(count: int) -> str:
    """A document of so many passages."""
    shelves = [" ".join(f"Thing {n}{k} is kept on shelf {n * 7 + k}." for k in range(20)) for n in range(count)]
    return "".join(f"# Item {n}\n{text}\n" for n, text in enumerate(shelves))


@pytest.fixture
def shrunk(source: Source, monkeypatch: pytest.MonkeyPatch) -> Source:
    """An index of 2 + 40 passages, of which the 40 have just been deleted from the folder."""
    monkeypatch.setattr(store, "SPARE", 8)
    source.write("a.md", many(40))
    source.learn()
    source.write("b.md", "# Lamp\nThe lamp is red.")
    source.write("c.md", "# Door\nThe door is green.")
    source.learn()
    (source.root / "a.md").unlink()
    return source


def rows_of(source: Source) -> list[int]:
    """How many rows each of the files of vectors has."""
    return [file.stat().st_size // source.embedder.width for file in source.folder.glob("vectors*.i8")]


def test_rows_of_the_vectors_that_nobody_has_are_given_back(shrunk: Source) -> None:
    before = {question: shrunk.ask(question)[0] for question in ("red lamp", "green door")}
    opened = Documents("source", shrunk.spec, shrunk.folder, shrunk.embedder)
    opened.searching.refresh()
    shrunk.learn()
    assert rows_of(shrunk) == [2]
    assert len(list(shrunk.folder.glob("scales*.f32"))) == 1
    search = opened.searching
    old = search._vectors.of(np.array([40, 41]))  # the files that are deleted are still open here
    for question, where in before.items():
        assert [opened.search(question, ANYONE, 1)[0].where, shrunk.ask(question)[0]] == [where] * 2
    assert (search._vectors.of(np.arange(2)) == old).all(), "bit for bit as they were"
    shrunk.write("d.md", "# Roof\nThe roof is flat.")
    shrunk.learn()
    assert opened.search("flat roof", ANYONE)[0].where == "d.md"
    shrunk.write("a.md", many(40))
    shrunk.learn()
    for file in shrunk.root.iterdir():
        file.unlink()
    shrunk.learn()
    assert (rows_of(shrunk), opened.search("red lamp", ANYONE)) == ([0], [])
    opened.close()


def test_a_few_rows_that_nobody_has_are_left(shrunk: Source) -> None:
    shrunk.write("a.md", many(41))
    shrunk.learn()
    assert rows_of(shrunk) == [83], "under half of them"
    shrunk.write("a.md", many(5))
    shrunk.learn()
    assert rows_of(shrunk) == [7]
    shrunk.write("a.md", many(2))
    shrunk.learn()
    assert rows_of(shrunk) == [9], "fewer than it pays to"


class Killed(BaseException):
    """Ends a writer where it stands."""


@pytest.mark.parametrize("where", ["Mapped.packed", "Mapped.commit", "Store.set", "Mapped.tidy"])
def test_killed_while_packing_nothing_is_lost(shrunk: Source, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    kind = {"Mapped": Mapped, "Store": Store}[where.split(".")[0]]
    real, packing = getattr(kind, where.split(".")[1]), []

    def killed(self: object, *args: object) -> object:
        if packing and (where != "Store.set" or args[0] == "packed") and (where != "Mapped.tidy" or len(packing) > 1):
            raise Killed
        return real(self, *args)

    pack, begun = Store.pack, Mapped.packed
    opened = Documents("source", shrunk.spec, shrunk.folder, shrunk.embedder)
    with monkeypatch.context() as dying:
        dying.setattr(Store, "pack", lambda self: (packing.append(1), pack(self)))
        if where == "Mapped.tidy":
            dying.setattr(Mapped, "packed", lambda self, *args: (packing.append(1), begun(self, *args))[1])
        dying.setattr(kind, where.split(".")[1], killed)
        with pytest.raises(Killed):
            shrunk.learn()
    for _ in range(2):
        assert opened.search("red lamp", ANYONE)[0].where == shrunk.ask("red lamp")[0] == "b.md"
        assert shrunk.ask("green door")[0] == "c.md"
        assert shrunk.learn().errors == ()
        assert rows_of(shrunk) == [2]
    opened.close()


def test_who_asks_while_it_is_packed_gets_an_answer(shrunk: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Documents("source", shrunk.spec, shrunk.folder, shrunk.embedder)
    real, tried = Mapped.open, []

    def late(self: Mapped, rows: int, mark: str) -> None:
        tried.append(rows)
        if len(tried) == 1:
            shrunk.learn()  # between what the reader has read of the database and the files that it named
        real(self, rows, mark)

    monkeypatch.setattr(Mapped, "open", late)
    assert opened.search("red lamp", ANYONE)[0].where == "b.md"
    assert tried == [42, 2]
    opened.close()
    (shrunk.folder / "vectors-1.i8").unlink()
    with pytest.raises(StorageError, match="vectors are missing"):
        shrunk.ask("red lamp")


def test_a_disk_without_room_for_packing_leaves_it_as_it_is(shrunk: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Mapped, *_: object) -> None:
        (self.folder / "vectors-1.i8").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Mapped, "packed", full)
    assert shrunk.learn().errors == ()
    assert rows_of(shrunk) == [42]
    assert shrunk.ask("red lamp")[0] == "b.md"


# ---- permissions

GROUPS = ("sales", "hr", "board")


def test_readers_are_declared_by_source_and_by_glob(source: Source) -> None:
    source.declare(
        readers=["sales"],
        permissions=[{"files": "hr/*", "readers": ["hr"]}, {"files": ["*public*"], "readers": ["*"]},
                     {"files": "*nobody*", "readers": []}],
    )  # fmt: skip
    for name in ("a.md", "hr/pay.md", "hr/public.md", "nobody.md"):
        source.write(name, f"# {name}\nThe pay is a matter of {name}.")
    source.learn()
    assert sorted(source.ask("pay")) == ["hr/public.md"]
    assert sorted(source.ask("pay", ["sales"])) == ["a.md", "hr/public.md"]
    assert sorted(source.ask("pay", ["hr"])) == ["hr/pay.md", "hr/public.md"]
    assert "nobody.md" not in source.ask("pay nobody", [*GROUPS, EVERYONE])


def test_changed_readers_hold_before_anything_is_asked(source: Source) -> None:
    source.write("a.md", "# A\nThe plan is secret.")
    source.learn()
    assert source.ask("plan") == ["a.md"]
    source.declare(readers=["board"])
    with pytest.raises(CoterieError, match="readers have changed since it was indexed; run `coterie learn`"):
        source.ask("plan", ["board"])
    source.learn()
    assert source.ask("plan") == []
    assert source.ask("plan", ["board"]) == ["a.md"]


def test_a_repeat_of_what_one_may_not_read_is_still_found(source: Source) -> None:
    text = "# Plan\nIn spring we open a second shop by the river, with a workshop and a small cafe for everyone."
    source.declare(permissions=[{"files": "board.md", "readers": ["board"]}])
    source.write("board.md", text)
    source.write("news.md", text)
    source.learn()
    assert source.ask("second shop") == ["news.md"]
    assert sorted(source.ask("second shop", ["board"])) == ["board.md", "news.md"]


readers_of = st.lists(st.sampled_from([*GROUPS, EVERYONE]), max_size=2, unique=True)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(readers_of, min_size=1, max_size=8),
    st.sets(st.sampled_from(GROUPS)),
    st.integers(1, 5),
    st.sampled_from(
        ["gold", "gold silver", "access:1 OR *", '" ) OR chunk:[0 TO 99]', "*", "x' or 1=1 --", "gold\ngold"]
    ),
)
def test_nobody_gets_what_they_may_not_read(
    tmp_path_factory: pytest.TempPathFactory, owners: list[list[str]], groups: set[str], limit: int, question: str
) -> None:
    """Whatever is asked, by words, by vectors, by citation, by earlier questions, by the list."""
    source = Source(tmp_path_factory.mktemp("permissions"))
    source.declare(
        permissions=[{"files": f"{n}.md", "readers": who} for n, who in enumerate(owners)], judged="judged.jsonl"
    )
    for n in range(len(owners)):
        source.write(f"{n}.md", f"# Gold {n}\nThe gold of number {n} lies in vault {n}, silver {n * 3}.")
    every = [f"{n}.md" for n in range(len(owners))]
    source.write("judged.jsonl", json.dumps({"question": question, "documents": every}) + "\n")
    source.learn()
    may = {f"{n}.md" for n, who in enumerate(owners) if set(who) & (groups | {EVERYONE})}
    reader = Reader("someone", frozenset(groups))
    opened = Documents("source", source.spec, source.folder, source.embedder, source.root)
    found = [e.where for e in opened.search(question, reader, limit)]
    assert set(found) <= may
    assert len(found) == min(limit, len(may)), "a filter after the search would leave fewer"
    search = opened.searching
    search.refresh()
    classes = search.classes(reader.may)
    ids, _ = search.by_words("gold", classes, limit)
    assert len(ids) == min(limit, len(may))
    ((near, _),) = search.by_vectors(source.embedder.embed([question]), classes, limit)
    assert len(near) == min(limit, len(may))
    for path in every:
        assert (opened.open(path, reader) is not None) == (path in may)
    assert {f["path"] for f in overview("source", source.spec, source.folder, reader)["files"]} == may
    opened.close()


# ---- search


def test_the_scan_of_bytes_finds_what_an_exact_search_finds(source: Source) -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(300)]
    for n in range(200):
        source.write(f"{n}.md", f"# {n}\n" + " ".join(rng.choice(words, 30)))
    source.learn()
    search = Documents("source", source.spec, source.folder, source.embedder).searching
    search.refresh()
    whole = search._vectors.of(np.arange(len(search._of_row)))
    asked = source.embedder.embed([" ".join(rng.choice(words, 8)) for _ in range(20)])
    for vector, (ids, scores) in zip(asked, search.by_vectors(asked, [1], 10), strict=True):
        exact = np.sort(whole @ vector)[::-1][:10]
        assert np.allclose(scores, exact, atol=1e-6)
        assert len(set(ids.tolist())) == 10


def test_a_question_that_was_judged_before_finds_its_documents(source: Source) -> None:
    source.write("a.md", "# Fees\nWhen a card was stolen, it costs nothing to replace.")
    source.write("b.md", "# Form 27\nFill in both pages and sign at the bottom.")
    question = "My card was stolen, what should I do?"
    source.learn()
    assert source.ask(question)[0] == "a.md"
    source.write(
        "judged.jsonl", json.dumps({"question": "What should I do, my card was stolen!", "documents": ["b.md"]})
    )
    source.declare(judged="judged.jsonl")
    assert source.ask(question)[0] == "b.md"
    assert source.ask("What costs a card?")[0] == "a.md"  # another question: as before
    source.write("judged.jsonl", '{"question": "x"}')
    with pytest.raises(DataError, match=r"judged.jsonl:1: needs 'documents', a list"):
        source.ask(question)
