"""Facts that graphs read in documents, as a business declares it: proposed by a model, decided by people."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from coterie.business import Business, Count, Tell
from coterie.errors import CoterieError
from coterie.experts.instruction import weights_of
from coterie.knowledge import extract
from coterie.knowledge.evidence import Reader
from coterie.knowledge.proposals import Proposal, State
from coterie.knowledge.specs import GraphSpec
from coterie.sources import index_folder


@dataclass(frozen=True)
class Reading:
    """A graph that reads documents, and where both are indexed."""

    name: str
    spec: GraphSpec
    folder: Path
    documents: Path


def readings(business: Business, only: str = "") -> list[Reading]:
    """The graphs that read facts in documents. Raises CoterieError where `only` is none of them."""
    out = [
        Reading(name, spec, index_folder(business, name), index_folder(business, spec.extract.documents))
        for name, spec in business.config.knowledge.sources.items()
        if isinstance(spec, GraphSpec) and spec.extract and only in ("", name)
    ]
    if only and not out:
        raise CoterieError(f"{only!r} reads no documents: coterie.toml declares no [knowledge.{only}.extract]")
    return out


def propose(
    business: Business, only: str = "", tell: Tell = lambda _: None, count: Count = lambda _w, _d, _t: None
) -> Iterator[tuple[str, int]]:
    """Let a model read the passages that it has not read yet: each graph, and how many proposals are new."""
    found = readings(business, only)
    if not found:
        where = f"{business.folder}/coterie.toml"
        raise CoterieError(f"{where} declares no [knowledge.NAME.extract]; see docs/graph-and-sql.md")
    engine = business.engine(tell)
    try:
        for graph in found:
            assert graph.spec.extract, "readings says so"
            expert = graph.spec.extract.expert
            adapter = weights_of(business.library.facts(expert)) if expert else None
            yield graph.name, extract.read_documents(
                graph.spec, graph.folder, graph.documents, engine, adapter,
                lambda done, total, name=graph.name: count(f"reading for {name}", done, total),  # type: ignore[misc]
            )  # fmt: skip
    finally:
        engine.close()


def listed(business: Business, reader: Reader, state: State | None = "waiting") -> list[tuple[str, Proposal]]:
    """The graph and the proposal, of those from documents that the reader may read. None: in whatever state."""
    return [
        (graph.name, proposal)
        for graph in readings(business)
        for proposal in extract.readable(graph.folder, graph.documents, reader)
        if state in (None, proposal.state)
    ]


def decide(business: Business, ids: Collection[str], accept: bool, by: str, reader: Reader) -> int:
    """Accept or reject proposals; the graphs follow at once. How many were changed: not those that have been decided so
    already, or that are from documents that the reader may not read."""
    return sum(
        extract.decide(g.spec, g.folder, g.documents, frozenset(ids), accept, by, reader) for g in readings(business)
    )
