"""Triples that a model proposes from a document, and that a person or a rule accepts before they are in the graph.

Notable: the model writes JSON under a schema whose relations are those declared, so it can propose nothing else; a
proposal whose names do not stand in the passage is dropped at once. What waits is a JSONL file, a proposal a line,
that can be read and edited; what is accepted becomes a source of the graph, named after its document, and goes when
the document goes. extract.py ties this to the documents and the graphs that a business declares.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import pyoxigraph as ox

from coterie.data.read import read_objects
from coterie.engine.engine import Engine
from coterie.engine.request import Adapter, Sampling
from coterie.errors import ContextTooLong, DataError
from coterie.files import alone, write_atomic
from coterie.knowledge.entities import plain
from coterie.knowledge.graph import EXTRACTED, Graph
from coterie.knowledge.mapping import LABEL, relation
from coterie.model.constrain import Constraint, json_schema

State = Literal["waiting", "accepted", "rejected"]
MOST = 6  # proposals of one passage
LONGEST = 80  # characters of a name
SYSTEM = (
    "Read the passage and list the facts it states, as subject, relation and object. "
    "Copy names from the passage to the letter. Leave out what it does not say. The relations: {relations}."
)


@dataclass(frozen=True)
class Proposal:
    """One triple, as names and a relation in words; `where` is the document, `passage` what it was read in.

    `by` says who decided: "" while it waits, a person's name, or "rule".
    """

    subject: str
    relation: str
    object: str
    where: str
    passage: str
    state: State = "waiting"
    by: str = ""

    @property
    def id(self) -> str:
        """The same for the same triple of the same document."""
        return hashlib.sha256(json.dumps([self.where, self.subject, self.relation, self.object]).encode()).hexdigest()[
            :16
        ]


def schema_of(relations: Collection[str]) -> Constraint:
    """A JSON list of triples whose relation is one of `relations`. Raises CoterieError for none."""
    if not relations:
        raise DataError("name the relations that may be read from documents")
    name = {"type": "string", "minLength": 1, "maxLength": LONGEST}
    triple = {
        "type": "object", "additionalProperties": False, "required": ["subject", "relation", "object"],
        "properties": {"subject": name, "relation": {"enum": sorted(relations)}, "object": name},
    }  # fmt: skip
    return json_schema({"type": "array", "items": triple, "maxItems": MOST})


def propose(
    engine: Engine, passages: Iterable[tuple[str, str]], relations: Sequence[str], adapter: Adapter | None = None
) -> Iterator[Proposal]:
    """What a model reads in `passages`, pairs of document and text. A passage too long for its context gives none."""
    constraint, system = schema_of(relations), SYSTEM.format(relations=", ".join(sorted(relations)))
    for where, text in passages:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        try:
            generation = engine.submit(
                engine.base.encode(engine.base.chat(messages)), Sampling(256, constraint=constraint), adapter
            )
        except ContextTooLong:
            continue
        yield from read_proposals(generation.text(), where, text, relations)


def read_proposals(written: str, where: str, passage: str, relations: Collection[str]) -> list[Proposal]:
    """The proposals in what a model wrote; those whose names are not in the passage, or not whole, are dropped."""
    try:
        listed = json.loads(written)
    except ValueError:  # cut off at the limit of tokens: what is whole counts
        listed = _whole(written)
    out: dict[str, Proposal] = {}
    here = f" {plain(passage)} "
    for item in listed if isinstance(listed, list) else []:
        try:
            proposal = Proposal(item["subject"].strip(), item["relation"], item["object"].strip(), where, passage)
        except (KeyError, TypeError, AttributeError):
            continue
        names = [plain(proposal.subject), plain(proposal.object)]
        if proposal.relation in relations and names[0] != names[1] and all(n and f" {n} " in here for n in names):
            out[proposal.id] = proposal
    return list(out.values())


def _whole(written: str) -> list[Any]:
    end = written.rfind("}")
    try:
        listed: list[Any] = json.loads(written[: end + 1] + "]") if end >= 0 else []
    except ValueError:
        return []
    return listed


class Pending:
    """The file of proposals; it is the only owner of their state."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> list[Proposal]:
        """In the order they came. Raises DataError, naming file and line."""
        if not self.file.exists():
            return []
        names = [f.name for f in fields(Proposal)]
        rows = read_objects(self.file, **dict.fromkeys(names, str))
        return [Proposal(**{name: row[name] for name in names}) for _, row in rows]

    def add(self, proposals: Iterable[Proposal]) -> int:
        """Let new ones wait; one that was decided before is not asked again. How many are new."""
        with self._alone():
            known = self.read()
            ids = {p.id for p in known}
            new = [p for p in dict((p.id, p) for p in proposals).values() if p.id not in ids]
            self._write([*known, *new])
        return len(new)

    def decide(self, ids: Collection[str], accept: bool, by: str) -> int:
        """Accept or reject. How many were waiting, or had been decided otherwise."""
        state: State = "accepted" if accept else "rejected"
        with self._alone():
            known = self.read()
            changed = [p.id in ids and p.state != state for p in known]
            if any(changed):
                self._write([replace(p, state=state, by=by) if c else p for p, c in zip(known, changed, strict=True)])
        return sum(changed)

    def decide_by(self, rule: Callable[[Proposal], bool | None]) -> int:
        """Let a rule decide those that wait: True accepts, False rejects, None leaves it to a person."""
        verdicts = {p.id: rule(p) for p in self.read() if p.state == "waiting"}
        yes, no = ({i for i, v in verdicts.items() if v is wanted} for wanted in (True, False))
        return self.decide(yes, True, "rule") + self.decide(no, False, "rule")

    def forget(self, gone: Callable[[Proposal], bool]) -> list[Proposal]:
        """Drop those that are `gone`, decided or not: they, or what they were read in, shall leave no trace."""
        with self._alone():
            known = self.read()
            dropped = [p for p in known if gone(p)]
            if dropped:
                ids = {p.id for p in dropped}
                self._write([p for p in known if p.id not in ids])
        return dropped

    def _alone(self) -> AbstractContextManager[None]:
        busy = f"{self.file}: another process is changing the proposals; try again"
        return alone(self.file.with_suffix(".lock"), busy, 10)

    def _write(self, proposals: list[Proposal]) -> None:
        lines = [json.dumps(asdict(p), ensure_ascii=False) for p in proposals]
        write_atomic(self.file, "".join(line + "\n" for line in lines))


def put_accepted(
    graph: Graph, pending: Pending, base: str, readers: Callable[[str], Collection[str]],
    stands: Callable[[Proposal], bool] = lambda _: True,
) -> list[str]:  # fmt: skip
    """Make the accepted proposals that stand sources of the graph, one a document, read by whom the document is read.

    Documents with none left are removed. The names of the sources.
    """
    by_document: dict[str, list[Proposal]] = {}
    for proposal in pending.read():
        if proposal.state == "accepted" and stands(proposal):
            by_document.setdefault(proposal.where, []).append(proposal)
    with graph.writing() as writer:
        for where, proposals in by_document.items():
            mark = hashlib.sha256("".join(sorted(p.id for p in proposals)).encode()).hexdigest()
            writer.put(EXTRACTED + where, _triples(proposals, base), readers(where), mark)
        for source in writer.sources():
            if source.name.startswith(EXTRACTED) and source.name.removeprefix(EXTRACTED) not in by_document:
                writer.remove(source.name)
    return [EXTRACTED + where for where in by_document]


def _triples(proposals: list[Proposal], base: str) -> Iterator[ox.Triple]:
    for p in proposals:
        ends = []
        for name in (p.subject, p.object):
            ends.append(relation(base + "named/", plain(name)))  # apart from relations of the same words
            yield ox.Triple(ends[-1], LABEL, ox.Literal(name))
        yield ox.Triple(relation(base, p.relation), LABEL, ox.Literal(p.relation))
        yield ox.Triple(ends[0], relation(base, p.relation), ends[1])
