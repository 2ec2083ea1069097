"""What a business knows, all kinds of source together: learned, searched, opened, listed."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from coterie.business import Business
from coterie.errors import CoterieError
from coterie.knowledge import documents
from coterie.knowledge.documents import Documents, Learned
from coterie.knowledge.embed import Embedder, Endpoint, MiniLM
from coterie.knowledge.evidence import Evidence, Reader
from coterie.model.pull import EMBEDDER, pull

NEAR = 0.2  # cosine to the question under which a passage has nothing to say to it; see docs/log.md
EACH = 8  # pieces of evidence asked of each source
Tell = Callable[[str], None]
Count = Callable[[str, int, int], None]
Fits = Callable[[str], bool]


class Source(Protocol):
    """One source of any kind, opened."""

    name: str

    def search(self, question: str, reader: Reader, limit: int = EACH) -> list[Evidence]:
        """What it has to say that the reader may read."""
        ...

    def open(self, where: str, reader: Reader) -> Evidence | None:
        """What a citation names."""
        ...

    def close(self) -> None: ...


def embedder(business: Business, tell: Tell = lambda _: None) -> Embedder:
    """The declared embedding model. Raises CoterieError, ModelError."""
    spec = business.config.knowledge
    if spec.embeddings:
        return Endpoint(spec.embeddings, spec.embeddings_model, os.environ.get("COTERIE_EMBEDDINGS_KEY", ""))
    return MiniLM(pull(EMBEDDER, tell, "embedding model", EMBEDDER))


def index_folder(business: Business, name: str) -> Path:
    """Where a source's index is kept."""
    return business.folder / ".coterie" / "knowledge" / name


def learn(
    business: Business, names: list[str] | None = None, tell: Tell = lambda _: None,
    count: Count = lambda _w, _d, _t: None, by: Embedder | None = None,
) -> Iterator[Learned]:  # fmt: skip
    """Bring the indexes of all declared sources, or of `names`, up to date. One that fails does not stop the others:
    it is told as an error of its own."""
    declared = business.config.knowledge.sources
    if not declared:
        raise CoterieError(f"{business.folder}/coterie.toml declares no [knowledge.NAME]; see docs/knowledge.md")
    for name in names or declared:
        if name not in declared:
            known = ", ".join(declared)
            raise CoterieError(f"{business.folder}/coterie.toml declares no source {name!r}; declared: {known}")
    using = by or embedder(business, tell)
    for name in dict.fromkeys(names or declared):
        spec = declared[name]
        try:
            yield documents.learn(
                name, spec, business.folder / spec.path, index_folder(business, name), using, tell, count
            )
        except CoterieError as error:
            tell(f"{name}: {error}")
            yield Learned(name, 0, 0, 0, 0, ((name, str(error)),))


class Knowledge:
    """Every source of a business, opened when first asked for; one that cannot be opened does not stop the others."""

    def __init__(self, business: Business, by: Embedder | None = None, tell: Tell = lambda _: None) -> None:
        self.business, self.embedder = business, by or embedder(business, tell)
        self._open: dict[str, Source] = {}

    def close(self) -> None:
        for source in self._open.values():
            source.close()

    def source(self, name: str) -> Source:
        """A source, opened. Raises CoterieError: not declared, not learned yet."""
        declared = self.business.config.knowledge.sources
        if name not in declared:
            raise CoterieError(f"there is no source {name!r}; there are: {', '.join(declared) or 'none'}")
        if name not in self._open:
            folder = index_folder(self.business, name)
            self._open[name] = Documents(name, declared[name], folder, self.embedder, self.business.folder)
        return self._open[name]

    def gather(
        self, question: str, reader: Reader, fits: Fits = lambda _: True, tell: Tell = lambda _: None,
        limit: int = EACH,
    ) -> list[Evidence]:  # fmt: skip
        """What the sources have to say to a question, nearest first, of that what `fits`.

        What a source found by a query of its own (SQL, SPARQL) is an answer as it stands; passages must be near the
        question. A source that fails is told, and the others answer.
        """
        found: list[Evidence] = []
        for name in self.business.config.knowledge.sources:
            try:
                found += self.source(name).search(question, reader, limit)
            except CoterieError as error:
                tell(f"{name}: {error}")
        if not found:
            return []
        vectors = self.embedder.embed([question, *(e.text for e in found)])
        near = vectors[1:] @ vectors[0]
        near[[bool(e.query) for e in found]] = 1.0
        kept = [found[i] for i in np.argsort(-near, kind="stable") if near[i] >= NEAR]
        return [evidence for evidence in kept[:limit] if fits(evidence.text)]

    def open(self, source: str, where: str, reader: Reader) -> Evidence | None:
        """What a citation names, where the reader may read it."""
        return self.source(source).open(where, reader)


def overview(business: Business, reader: Reader) -> list[dict[str, Any]]:
    """Every declared source with what the reader may see of it: files, freshness, errors."""
    return [
        documents.overview(name, spec, index_folder(business, name), reader)
        for name, spec in business.config.knowledge.sources.items()
    ]
