"""What coterie.toml may say of graphs, databases and tables."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from coterie.config import KnowledgeSpec
from coterie.knowledge.specs import DatabaseSpec, GraphSpec, TablesSpec

MAPPED = {"table": "t", "id": "t/{id}", "type": "thing"}
WRONG: list[tuple[type[BaseModel], dict[str, Any], str]] = [
    (GraphSpec, {}, "name `parts`, `tables`, `extract` or an `endpoint`"),
    (GraphSpec, {"endpoint": "http://x", "parts": [{"files": ["a.ttl"]}]}, "leave out `parts`, `tables` and `extract`"),
    (GraphSpec, {"tables": [MAPPED]}, "need `database`"),
    (GraphSpec, {"tables": [{**MAPPED, "file": "a.csv"}], "database": "sqlite:///a"}, "one of them"),
    (GraphSpec, {"parts": [{"files": []}]}, "at least 1 item"),
    (GraphSpec, {"parts": [{"files": "a.ttl", "reader": "x"}]}, "Extra inputs"),
    (GraphSpec, {"endpoint": "http://x", "timeout_s": 0}, "greater than 0"),
    (DatabaseSpec, {"url": "sqlite:///a", "tables": {}}, "at least 1 item"),
    (DatabaseSpec, {"url": "sqlite:///a", "tables": {"t": {}}, "rows": 0}, "greater than or equal to 1"),
    (TablesSpec, {"files": {}}, "at least 1 item"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "said"), WRONG)
def test_a_declaration_that_cannot_work_is_refused(kind: type[BaseModel], given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        kind.model_validate(given)


def test_everyone_reads_what_names_no_readers_and_one_name_is_a_list_of_one() -> None:
    spec = GraphSpec.model_validate(
        {"parts": [{"files": "a.ttl"}], "tables": [{**MAPPED, "table": "", "file": "b.csv"}]}
    )
    assert (spec.parts[0].files, spec.parts[0].readers, spec.tables[0].readers) == (["a.ttl"], ["*"], ["*"])


def test_a_source_may_also_stand_under_sources() -> None:
    source = {"kind": "tables", "files": {"t": "t.csv"}}
    spec = KnowledgeSpec.model_validate({"tokens": 400, "a": source, "sources": {"b": source}})
    assert (spec.tokens, sorted(spec.sources)) == (400, ["a", "b"])
    with pytest.raises(ValidationError, match=r"sources\.c"):
        KnowledgeSpec.model_validate({"c": {"kind": "nothing"}, "sources": {"b": source}})
