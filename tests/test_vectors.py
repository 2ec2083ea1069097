"""Vectors in PostgreSQL: the same answers as from files, under the same permissions, and nothing left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import create_engine, text

from coterie.business import Business
from coterie.errors import CoterieError, StorageError
from coterie.knowledge.documents import Documents, learn
from coterie.knowledge.documents_spec import DocumentsSpec
from coterie.knowledge.evidence import Reader
from coterie.knowledge.search import Search
from coterie.knowledge.vectors import Postgres
from knowledge_support import WordEmbedder

pytest.importorskip("pgvector", reason="pgvector is not installed: pip install 'coterie[postgres]'")
SPEC = DocumentsSpec.model_validate(
    {"kind": "documents", "path": "files", "permissions": [{"files": "hr-*", "readers": ["hr"]}]}
)
THINGS = ("lamp", "door", "kettle", "bicycle", "garden", "window", "blanket", "ladder")
QUESTIONS = [f"Where is the {thing} kept?" for thing in THINGS]
HR = frozenset({"hr"})


@pytest.fixture(scope="module")
def server(new_postgres: Callable[..., str]) -> str:
    url = new_postgres()
    try:
        Postgres(url, "coterie_vectors_try", 4).close()
    except StorageError as error:
        pytest.skip(f"this PostgreSQL has no pgvector: {error}")
    return url


def rows(url: str, sql: str) -> list[Any]:
    engine = create_engine(url)
    try:
        with engine.connect() as c:
            return [tuple(row) for row in c.execute(text(sql))]
    finally:
        engine.dispose()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    for n, thing in enumerate(THINGS):
        for kind in ("hr", "all"):
            (tmp_path / "files" / f"{kind}-{thing}.md").write_text(
                f"# The {thing}, {kind}\n\nThe {thing} is kept on shelf {n} by the {kind} people, who are careful.\n"
            )
    return tmp_path


def index(root: Path, name: str, url: str) -> Path:
    assert not learn("s", SPEC, root / "files", root / name, WordEmbedder(), vectors=url).errors
    return root / name


def ask(folder: Path, url: str, question: str, groups: frozenset[str], limit: int = 20) -> list[tuple[str, float]]:
    source = Documents("s", SPEC, folder, WordEmbedder(), folder, url)
    try:
        return [(e.where.split(" > ")[0], e.score) for e in source.search(question, Reader("x", groups), limit)]
    finally:
        source.close()


@pytest.mark.parametrize("groups", [frozenset[str](), HR])
def test_files_and_postgresql_find_the_same(root: Path, server: str, groups: frozenset[str]) -> None:
    files, table = index(root, "files-index", ""), index(root, "table-index", server)
    for question in QUESTIONS:
        ours, theirs = (dict(ask(folder, url, question, groups)) for folder, url in ((files, ""), (table, server)))
        assert ours.keys() == theirs.keys()
        assert max(ours.values()) == pytest.approx(max(theirs.values()), abs=0.1)
        first = 2 if groups else 1  # the two that speak of the same thing score alike, but for rounding
        assert set(list(ours)[:first]) == set(list(theirs)[:first])
        assert groups or not any(path.startswith("hr") for path in theirs)


def test_the_readers_classes_are_a_condition_of_the_sql(root: Path, server: str) -> None:
    """Asked with a mask that hides nothing, the statement alone keeps to the classes; and it does before its limit."""
    search = Search(index(root, "i", server), WordEmbedder(), server)
    try:
        search.refresh()
        everything = np.ones(len(THINGS) * 2, np.bool_)
        asked = WordEmbedder().embed(["The lamp is kept on shelf 0 by the hr people"])
        for groups in ({"*"}, {"hr"}):
            own = search.classes(groups)
            ((lines, cosines),) = search._vectors.nearest(asked, everything, own, len(THINGS))
            assert len(lines) == len(THINGS)
            assert list(cosines) == sorted(cosines, reverse=True)
            paths = [p.path for p in search.passages(search._of_row[lines].tolist()).values()]
            assert {path.split("-")[0] for path in paths} == ({"hr"} if groups == {"hr"} else {"all"})
            for line, cosine in zip(lines, cosines, strict=True):  # and the vectors come back as they are
                assert float(search._vectors.of(np.array([line]))[0] @ asked[0]) == pytest.approx(cosine, abs=2e-3)
        assert search._vectors.nearest(asked, everything, [], 5)[0][0].size == 0
    finally:
        search.close()


def test_what_changes_or_goes_leaves_the_table_too(root: Path, server: str) -> None:
    folder = index(root, "i", server)
    search = Search(folder, WordEmbedder(), server)
    (table,) = [search._vectors.table]  # type: ignore[attr-defined]
    search.close()
    (root / "files" / "all-lamp.md").write_text("# The lamp\n\nIt was given away, and nobody here knows to whom.\n")
    (root / "files" / "all-door.md").unlink()
    index(root, "i", server)
    lines = [line for (line,) in rows(server, f"SELECT line FROM {table} ORDER BY line")]
    assert len(lines) == len(THINGS) * 2 - 1
    assert max(lines) == len(THINGS) * 2  # a number is not given twice
    found = ask(folder, server, "Where is the door kept?", frozenset())
    assert "all-door.md" not in dict(found)


def test_lines_that_no_commit_knows_are_put_right(root: Path, server: str) -> None:
    """As if killed between PostgreSQL's commit and SQLite's."""
    folder = index(root, "i", server)
    kept = (folder / "index.db").read_bytes()
    (root / "files" / "all-rope.md").write_text("# The rope\n\nThe rope is kept in the cellar behind the barrels.\n")
    index(root, "i", server)
    for leftover in folder.glob("index.db-*"):
        leftover.unlink()
    (folder / "index.db").write_bytes(kept)
    assert "all-rope.md" not in dict(ask(folder, server, "Where is the rope kept?", frozenset()))
    index(root, "i", server)
    assert ask(folder, server, "Where is the rope kept?", frozenset())[0][0] == "all-rope.md"


def test_another_place_is_another_index(root: Path, server: str) -> None:
    folder = index(root, "i", server)
    with pytest.raises(CoterieError, match="run `coterie learn`"):
        Search(folder, WordEmbedder())
    before = set(rows(server, "SELECT tablename FROM pg_tables WHERE tablename LIKE 'coterie_vectors_%'"))
    learn("s", SPEC, root / "files", folder, type("Other", (WordEmbedder,), {"name": "other"})(), vectors=server)
    after = set(rows(server, "SELECT tablename FROM pg_tables WHERE tablename LIKE 'coterie_vectors_%'"))
    assert len(before - after) == len(after - before) == 1  # the old table went with its index
    (table,) = next(iter(after - before))
    engine = create_engine(server)
    with engine.begin() as c:
        c.execute(text(f"DELETE FROM {table} WHERE line = 0"))
    engine.dispose()
    with pytest.raises(StorageError, match="lacks vectors of this index"):
        learn("s", SPEC, root / "files", folder, type("Other", (WordEmbedder,), {"name": "other"})(), vectors=server)


def test_a_server_that_is_not_there_is_named_without_its_password(root: Path) -> None:
    with pytest.raises(StorageError, match=r"postgresql://me:\*\*\*@127.0.0.1:9/x") as told:
        index(root, "i", "postgresql://me:secret@127.0.0.1:9/x")
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("url", ["sqlite:///x.db", "postgresql://"])
def test_an_address_of_something_else_is_refused(tmp_path: Path, url: str) -> None:
    (tmp_path / "coterie.toml").write_text(f'[knowledge]\nvectors = "{url}"\n')
    with pytest.raises(CoterieError, match=r"knowledge\.vectors"):
        Business.open(tmp_path)
