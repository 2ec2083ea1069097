"""One piece of evidence: what every source gives, whatever it is made of, and what a citation opens."""

from dataclasses import dataclass

EVERYONE = "*"  # the group that each person belongs to, signed in or not


@dataclass(frozen=True)
class Evidence:
    """What one source has to say to a question.

    source: its name in coterie.toml. where: the address within it that a citation opens (a file and its heading, a
    table and its row, a triple). text: what goes before the model, and what is shown. score: higher is nearer, and
    comparable within one source only. query: the SQL or SPARQL that found it, "" where it was searched for by words.
    link: where a person reads it on the web, "" for nowhere. thing: the IRI of what it is about in a graph, whose
    neighbourhood can be drawn; "" for none.
    """

    source: str
    where: str
    text: str
    score: float
    query: str = ""
    link: str = ""
    thing: str = ""


@dataclass(frozen=True)
class Reader:
    """Who asks: a stable name, and the groups that permissions are given to. `EVERYONE` is always among them."""

    name: str = ""
    groups: frozenset[str] = frozenset()

    @property
    def may(self) -> frozenset[str]:
        """Every group whose documents, rows and triples this person may read."""
        return self.groups | {EVERYONE}
