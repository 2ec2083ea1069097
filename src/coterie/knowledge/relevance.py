"""Whether a question is about a database at all, told before any model writes SQL: by words, values and meaning.

Notable: a false yes costs a few generations, and its rows are weighed again beside the documents; a false no loses the
answer. So any one of three signs is enough: words of the question that name tables and columns or stand in a row, a
table whose words mean the same, a worked example that is alike.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coterie.knowledge.embed import Floats
from coterie.knowledge.entities import LONGEST, Embed, plain
from coterie.knowledge.paths import split_words
from coterie.knowledge.schema import TableSchema
from coterie.knowledge.support import content

_ASKING = "many much show list give tell find number count total sum average mean most least each every there"
ASKING = frozenset(_ASKING.split())  # what any question to any database may say
SHORTEST = 3  # characters of a value that says something


@dataclass(frozen=True)
class About:
    """What a database is about, as one group of readers sees it."""

    words: frozenset[str]  # of the names of tables and columns, and of what is said of them, as `content` cuts them
    values: frozenset[str]  # that stand in its rows, as `plain` writes them
    vectors: Floats  # (tables, width)

    @classmethod
    def of(cls, lines: Sequence[str], values: Iterable[str], embed: Embed) -> "About":
        """`lines`: each table in words (`spoken`)."""
        short = {p for v in values if len(p := plain(v)) >= SHORTEST and p.count(" ") < LONGEST}
        return cls(frozenset(content(" ".join(lines))), frozenset(short), embed(lines))

    def relevance(self, question: str, vector: Floats) -> float:
        """0 to 1; `vector` is the question's."""
        near = float((self.vectors @ vector).max()) if len(self.vectors) else 0.0
        return max(0.0, near, self.covered(question))

    def covered(self, question: str) -> float:
        """The share of the question's words that name something here or stand in a row."""
        words = plain(question).split()
        said = {i for i, w in enumerate(words) if w not in ASKING and (w.isdigit() or content(w))}
        here = {i for i in said if content(words[i]) & self.words}
        for size in range(1, min(LONGEST, len(words)) + 1):
            for start in range(len(words) - size + 1):
                if " ".join(words[start : start + size]) in self.values:
                    here |= said & set(range(start, start + size))
        return len(here) / len(said) if said else 0.0


def spoken(table: TableSchema, said: str = "") -> str:
    """A table in words: what it and its columns are called, and what is said of them and of the source."""
    columns = (f"{split_words(c.name)} {c.comment}".strip() for c in table.columns)
    return f"{said} {split_words(table.name)} {table.comment}: {', '.join(columns)}".strip()
