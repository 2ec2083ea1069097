"""The neighbourhood of a thing in a graph as a picture: SVG, drawn here, without a script or a font from elsewhere.

Notable: the thing stands in the middle, what it is tied to in a column at its right and, from the second on, one at its
left, sorted by relation, so that equal relations stand together and no name covers another; the order and the places
depend on the facts alone, and the same facts give the same picture.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from coterie.knowledge.graph_source import Fact
from coterie.knowledge.paths import split_words
from coterie.knowledge.sparql import Term

AWAY, LINE = 250, 44  # pixels: from the thing to its neighbours, and of height for each of them
MOST = 24  # neighbours drawn
NAME = 26  # characters of a name
TALL, EDGE = 17, 8  # pixels: half the height of a node, and around all of them
STYLE = (
    "svg{color:#1d1d1f}@media(prefers-color-scheme:dark){svg{color:#f2f2f2}}"  # an <img> inherits no colour
    "text{font:13px system-ui,sans-serif;fill:currentColor}.r{font-size:11px;opacity:.75}"
    "line{stroke:currentColor;opacity:.45}ellipse,rect{fill:none;stroke:currentColor}.m{stroke-width:2.5}"
)


def draw(thing: str, facts: Sequence[Fact], names: Mapping[str, str]) -> str:
    """An SVG of the facts that begin or end at `thing`, an IRI; `names` are what things are called, by IRI."""
    seen: dict[tuple[str, bool, Term], None] = {}
    for fact in facts:
        back = not (fact.subject.kind == "uri" and fact.subject.value == thing)
        seen[(fact.relation, back, fact.subject if back else fact.object)] = None
    ties = sorted(seen, key=lambda t: (split_words(t[0]), t[1], _name(t[2], names), t[2].value))
    shown, left_out = ties[:MOST], len(ties[MOST:])
    title = _name(Term("uri", thing), names)
    said = [f"{title}: {len(ties)} facts"] + [_sentence(title, tie, names) for tie in shown]
    head = _Node(title, (0.0, 0.0), True)
    nodes = [head]
    drawn = []
    rows = (len(shown) + 1) // 2
    for number, (name, back, term) in enumerate(shown):
        side, row = divmod(number, rows)
        of = len(shown) - rows if side else rows
        at = (-AWAY if side else AWAY, LINE * (row - (of - 1) / 2))
        nodes.append(_Node(_name(term, names), at, term.kind != "literal"))
        drawn += _tie(head, nodes[-1], _words(name), back)
    left, right = min(n.at[0] - n.half for n in nodes) - EDGE, max(n.at[0] + n.half for n in nodes) + EDGE
    top, bottom = min(n.at[1] for n in nodes) - TALL - EDGE, max(n.at[1] for n in nodes) + TALL + EDGE
    below = 20 if left_out else 0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.0f} {top:.0f} {right - left:.0f} '
        f'{bottom - top + below:.0f}" role="img" aria-label="{escape("; ".join(said), quote=True)}">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="currentColor" opacity=".6"/></marker></defs>',
    ]
    parts += [*drawn, head.drawn("m")]
    if left_out:
        word = f"{left_out} more not drawn"
        parts.append(f'<text x="0" y="{bottom + 12:.0f}" text-anchor="middle">{word}</text>')
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Node:
    """A thing, round, or a value, with corners."""

    name: str
    at: tuple[float, float]
    round: bool

    @property
    def half(self) -> float:
        """Half of its width, by the characters that are shown."""
        return max(30.0, 4.0 * len(_short(self.name)) + 12)

    def side(self, sign: float) -> tuple[float, float]:
        """The middle of its right side, or with a negative sign of its left one."""
        return self.at[0] + math.copysign(self.half, sign), self.at[1]

    def drawn(self, kind: str) -> str:
        (x, y), half = self.at, self.half
        shape = (
            f'<ellipse class="{kind}" cx="{x:.1f}" cy="{y:.1f}" rx="{half:.0f}" ry="{TALL}"/>'
            if self.round
            else f'<rect x="{x - half:.1f}" y="{y - TALL:.1f}" width="{2 * half:.0f}" height="{2 * TALL}"/>'
        )
        label = f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{escape(_short(self.name))}</text>'
        return f"<g><title>{escape(self.name)}</title>{shape}{label}</g>"


def _tie(head: _Node, node: _Node, relation: str, back: bool) -> list[str]:
    """A neighbour, the line to it, and on the line what the relation is called."""
    (x1, y1), (x2, y2) = head.side(node.at[0]), node.side(-node.at[0])
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    ends = 'marker-start="url(#arrow)"' if back else 'marker-end="url(#arrow)"'
    line = f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {ends}/>'
    word = f'<text class="r" x="{x:.1f}" y="{y - 4:.1f}" text-anchor="middle">{escape(_short(relation))}</text>'
    return [line, word, node.drawn("n")]


def _sentence(title: str, tie: tuple[str, bool, Term], names: Mapping[str, str]) -> str:
    name, back, term = tie
    ends = (_name(term, names), title) if back else (title, _name(term, names))
    return f"{ends[0]} {_words(name)} {ends[1]}"


def _name(term: Term, names: Mapping[str, str]) -> str:
    name = names.get(term.value, split_words(term.value)) if term.kind == "uri" else term.value
    return _clean(name)


def _words(relation: str) -> str:
    return _clean(split_words(relation))


def _clean(text: str) -> str:
    """Without characters that XML has no place for."""
    return "".join(c if c.isprintable() else " " for c in text)


def _short(text: str) -> str:
    return text if len(text) <= NAME else text[: NAME - 1] + "\u2026"
