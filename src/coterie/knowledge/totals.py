"""Questions over all things of a kind: how many, how much together or on average, which has the most or the least.

Notable: SPARQL under a small grammar. A question is read into an operation, a type of things, a property or a second
type, and filters; each must be a word of the graph's own shape (types, their properties, how types are linked), and
the SPARQL is put together from these alone. What the grammar has no place for (a comparison, a denial, a name that no
property has) is not guessed: there is no reading then, and the paths of paths.py are tried instead.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coterie.knowledge.entities import Mention, plain
from coterie.knowledge.shape import Shape, number
from coterie.knowledge.sparql import Term, iri

TIED = 20  # things that share the first place, at most

_ADJECTIVES = {
    "expensive costly dear": "price cost", "cheap": "price cost", "long short": "length duration time",
    "large big small": "size area population total amount", "high low tall": "height elevation amount",
    "heavy light": "weight", "populous": "population", "old young": "age",
}  # fmt: skip
_MEANS = {word: set(of.split()) for words, of in _ADJECTIVES.items() for word in words.split()}
_DOWN = {"cheap", "short", "small", "low", "light", "young"}
_FALLS = {"least", "fewest", "lowest", "smallest", "cheapest", "shortest", "minimum"}
_RISES = {"most", "highest", "largest", "biggest", "longest", "dearest", "maximum", "tallest", "heaviest", "greatest"}
_QUANTITIES = {"most", "fewest", "least"}
_SUMS, _MEANS_OF = {"total", "sum", "altogether"}, {"average", "mean"}
_OUTSIDE = {
    "not", "no", "never", "without", "more", "less", "fewer", "than", "over", "under", "above", "below", "before",
    "after", "between", "or", "except", "since", "until", "per", "each", "both", "only", "second", "third",
}  # fmt: skip
_LEADS = frozenset({"in", "from", "to", "by", "of", "at", "with", "for", "on"})  # what follows these must be understood
_SKIPPED = frozenset({"the", "a", "an", "all", "our", "every", "any", "of"})


@dataclass(frozen=True)
class Reading:
    """A question as SPARQL. `ranks`: rows are values with what they are ranked by, best first; else one number."""

    sparql: str
    said: str
    ranks: bool


Values = Callable[[str, Sequence[str]], list[tuple[str, Term]]]  # type, lower-case texts: properties that have them
Near = Callable[[str, str], list[str]]  # type, thing: relations of things of the type that lead to the thing


def stem(word: str) -> str:
    """A word in the singular, roughly."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


class _Question:
    """The words of a question, and which of them have been understood."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = plain(text).split()
        self.stems = [stem(w) for w in self.words]
        self.known: set[int] = set()

    def places(self, name: str) -> list[range]:
        """Where the words of a name stand, in the singular or the plural."""
        parts = [stem(w) for w in plain(name).split()]
        n = len(parts)
        return [range(i, i + n) for i in range(len(self.stems) - n + 1) if n and self.stems[i : i + n] == parts]

    def understood(self) -> bool:
        """Is there no name, number, or word after a preposition that no part of the reading stands for?"""
        capital = {w for part in re.findall(r"(?<=\s)[A-Z][\w'-]*", self.text) for w in plain(part).split()}
        for i, word in enumerate(self.words):
            if i in self.known:
                continue
            before = i - 1
            while before >= 0 and self.words[before] in _SKIPPED and self.words[before] not in _LEADS:
                before -= 1
            led = before >= 0 and self.words[before] in _LEADS and before not in self.known
            if (word in capital or word[0].isdigit() or led) and word not in _SKIPPED | _LEADS:
                return False
        return True


def asks(question: str) -> bool:
    """Does a question ask for anything of this kind? Most do not, and need no look at the graph's shape."""
    asked = _Question(question)
    return bool(_operation(asked)[0]) and not set(asked.words) & _OUTSIDE


def read(question: str, shape: Shape, mentions: Sequence[Mention], values: Values, near: Near) -> Reading | None:
    """The question under the grammar, or None. `mentions`: the things, not types, that it names."""
    if not asks(question):
        return None
    asked = _Question(question)
    operation, at = _operation(asked)
    named = {i for m in mentions for i in range(m.start, m.end) if m.how == "name"}
    if named & asked.known:  # "the average white band"
        return None
    places = ((place, t) for t in shape.properties for place in asked.places(shape.words[t]))
    types = sorted((p for p in places if not named & set(p[0])), key=lambda p: -len(p[0]))
    kept: list[tuple[range, str]] = []
    for place, t in types:  # the longest name that stands there: "invoice line", not "invoice"
        if not any(set(place) & set(other) for other, _ in kept):
            kept.append((place, t))
    kept.sort(key=lambda p: p[0].start)
    for place, _ in kept:
        asked.known |= set(place)
    if operation == "count":
        if len(kept) != 1 or kept[0][0].start < at:
            return None
        ((_, t),) = kept
        where = _filters(asked, shape, t, mentions, values, near)
        if where is None:
            return None
        query = f"SELECT (COUNT(DISTINCT ?x) AS ?value) WHERE {{ ?x a {iri(t)} . {where[0]} }}"
        return Reading(query, f"number of {shape.words[t]}{where[1]}", ranks=False)
    if operation in ("SUM", "AVG"):
        return _amount(asked, operation, kept, shape, mentions, values, near)
    return _ranked(asked, operation == "DESC", at, kept, shape, mentions, values, near)


def _operation(asked: _Question) -> tuple[str, int]:
    """What is asked for, and from which word on it is said of what: "" where nothing of this kind is."""
    words = asked.words
    for i in range(len(words) - 1):
        if words[i : i + 2] in (["how", "many"], ["number", "of"]):
            asked.known |= {i, i + 1}
            return "count", i + 2
    for i, word in enumerate(words):
        following = words[i + 1] if i + 1 < len(words) else ""
        if word in _RISES | _FALLS or _root(word):
            asked.known.add(i)
            falls = word in _FALLS or (word not in _RISES and _root(word) in _DOWN)
            return ("ASC" if falls != (following in _DOWN) else "DESC"), i  # "least cheap", "most cheap"
        if word in _SUMS | _MEANS_OF:
            asked.known.add(i)
            return ("SUM" if word in _SUMS else "AVG"), i
    return "", 0


def _root(word: str) -> str:
    """The adjective of a superlative ("cheapest": cheap) that is known; "" for other words."""
    if not word.endswith("est"):
        return ""
    roots = (word[:-3], word[:-2], word[:-3] + "y", word[:-4])
    return next((r for r in roots if r in _MEANS), "")


def _property(asked: _Question, t: str, shape: Shape, numbers: bool) -> str | None:
    """The property of a type that the question says, by its words or by an adjective; None for none, or several."""
    own = [p for p in sorted(shape.properties[t]) if not numbers or (t, p) in shape.numbers]
    taken = asked.known - _sums(asked)
    said = [(place, p) for p in own for place in asked.places(shape.words[p]) if not set(place) & taken]
    if said:
        longest = max(len(place) for place, _ in said)
        best = {p for place, p in said if len(place) == longest}
        if len(best) != 1:
            return None
        for place, p in said:
            if p in best:
                asked.known |= set(place)
        return best.pop()
    meant: set[str] = set()
    for i, word in enumerate(asked.words):
        if (adjective := word if word in _MEANS else _root(word)) and numbers:
            asked.known.add(i)
            meant |= _MEANS[adjective]
    fits = [p for p in own if set(map(stem, plain(shape.words[p]).split())) & meant]
    return fits[0] if len(fits) == 1 else None


def _sums(asked: _Question) -> set[int]:
    """Words that say an operation and may name a property too, as "total" does."""
    return {i for i, w in enumerate(asked.words) if w in _SUMS}


def _filters(
    asked: _Question, shape: Shape, t: str, mentions: Sequence[Mention], values: Values, near: Near, x: str = "?x"
) -> tuple[str, str] | None:
    """Patterns for the values and things that the question names, and words for them; None where something in it is
    not understood."""
    patterns, said, unplaced = list[str](), list[str](), set[int]()
    for mention in mentions:
        span = set(range(mention.start, mention.end))
        if span & asked.known or mention.how == "meaning":
            continue
        ways = [(r, thing) for thing in mention.iris for r in near(t, thing)]
        if len(ways) == 1:
            asked.known |= span
            patterns.append(f"{x} {iri(ways[0][0])} {iri(ways[0][1])} .")
            said.append(mention.name)
        elif mention.how == "name":
            unplaced |= span  # it may still be the value of a property
    words = asked.text.lower()
    tokens = [(m.start(), m.end()) for m in re.finditer(r"[\w'&.-]*\w", words)]
    spans = {words[a:b]: None for i, (a, _) in enumerate(tokens) for _, b in tokens[i : i + 5]}
    for prop, value in sorted(values(t, list(spans)), key=lambda f: -len(f[1].value)):
        places = [p for p in asked.places(value.value) if not set(p) & asked.known]
        if not places:
            continue
        asked.known |= set(places[0])
        patterns.append(f"{x} {iri(prop)} {value.sparql()} .")
        said.append(f"{shape.words.get(prop, '')}: {value.value}")
    for i in list(range(len(asked.words))):  # words of a property beside its value, "billed to" of "billing country"
        if any(asked.stems[i][:4] == stem(w)[:4] for s in said for w in plain(s).split()):
            asked.known.add(i)
    whole = not unplaced - asked.known and asked.understood()
    return (" ".join(patterns), "".join(f", {s}" for s in said)) if whole else None


def _amount(
    asked: _Question, operation: str, kept: list[tuple[range, str]], shape: Shape, mentions: Sequence[Mention],
    values: Values, near: Near,
) -> Reading | None:  # fmt: skip
    """The sum or the mean of a property."""
    if len(kept) != 1:
        return None
    ((_, t),) = kept
    prop = _property(asked, t, shape, numbers=True)
    where = _filters(asked, shape, t, mentions, values, near)
    if prop is None or where is None:
        return None
    inner = f"SELECT DISTINCT ?x ?v WHERE {{ ?x a {iri(t)} ; {iri(prop)} ?v . {where[0]} }}"
    query = f"SELECT ({operation}({number('?v')}) AS ?value) WHERE {{ {{ {inner} }} }}"
    name = {"SUM": "sum", "AVG": "average"}[operation]
    return Reading(query, f"{name} of {shape.words[prop]} of {shape.words[t]}{where[1]}", ranks=False)


def _ranked(
    asked: _Question, rising: bool, at: int, kept: list[tuple[range, str]], shape: Shape, mentions: Sequence[Mention],
    values: Values, near: Near,
) -> Reading | None:  # fmt: skip
    """Which thing, or which value of a property, has the most or the least of something."""
    order = "DESC" if rising else "ASC"
    first = "most" if rising else "least"
    of = at + 1 if asked.words[at] in _QUANTITIES else -1  # where what is counted stands
    counted = [t for place, t in kept if place.start == of]
    others = [t for place, t in kept if place.start != of]
    if not counted and len(kept) == 1:  # which T has the highest p
        ((_, t),) = kept
        prop = _property(asked, t, shape, numbers=True)
        where = _filters(asked, shape, t, mentions, values, near)
        if prop is None or where is None:
            return None
        query = (f"SELECT DISTINCT ?x ?value WHERE {{ ?x a {iri(t)} ; {iri(prop)} ?v . {where[0]} "
                 f"BIND({number('?v')} AS ?value) }} ORDER BY {order}(?value) LIMIT {TIED + 1}")  # fmt: skip
        return Reading(query, f"{shape.words[t]} with the {first} {shape.words[prop]}{where[1]}", ranks=True)
    if len(counted) != 1 or len(others) > 1:
        return None
    u = counted[0]
    if others:
        ways = shape.paths(u, others[0])
        said = [w for w in ways if any(asked.places(shape.words[r.removeprefix("^")]) for r in w)]
        ways = said if len(ways) > 1 else ways
        if len(ways) != 1:
            return None
        name, pattern = shape.words[others[0]], _chain(ways[0])
    else:
        prop = _property(asked, u, shape, numbers=False)
        if prop is None:
            return None
        name, pattern = shape.words[prop], f"?u {iri(prop)} ?x ."
    where = _filters(asked, shape, u, mentions, values, near, "?u")
    if where is None:
        return None
    things = f"?u a {iri(u)} . {pattern} {where[0]}"
    if others:
        kind = f"?x a {iri(others[0])} ."  # what has none of them has the fewest
        things = f"{kind} {things}" if rising else f"{kind} OPTIONAL {{ {things} }}"
    query = (f"SELECT ?x (COUNT(DISTINCT ?u) AS ?value) WHERE {{ {things} }} "
             f"GROUP BY ?x ORDER BY {order}(?value) LIMIT {TIED + 1}")  # fmt: skip
    return Reading(query, f"{name} with the {first} {shape.words[u]}{where[1]}", ranks=True)


def _chain(way: Sequence[str]) -> str:
    """Patterns from ?u over a way to ?x."""
    names = ["?u", *(f"?m{i}" for i in range(1, len(way))), "?x"]
    out = []
    for a, relation, b in zip(names, way, names[1:], strict=False):
        out.append(f"{b} {iri(relation[1:])} {a} ." if relation.startswith("^") else f"{a} {iri(relation)} {b} .")
    return " ".join(out)
