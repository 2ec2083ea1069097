"""The neighbourhood of a thing in a graph as a picture: SVG, drawn here, without a script or a font from elsewhere.

Notable: the thing stands in the middle, what it is tied to on an ellipse around it, sorted by relation, so that equal
relations stand together; the order and the places depend on the facts alone, and the same facts give the same picture.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

from coterie.knowledge.graph_source import Fact
from coterie.knowledge.paths import split_words
from coterie.knowledge.sparql import Term

WIDTH, MARGIN, LINE = 760, 130, 44  # pixels: of the picture, at its sides, and of height for each neighbour
LEAST, MOST = 320, 24  # pixels of height; neighbours drawn
NAME = 26  # characters of a name
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
    height = max(LEAST, LINE * len(shown) // 2 + 160)
    middle = (WIDTH / 2, height / 2)
    title = _name(Term("uri", thing), names)
    said = [f"{title}: {len(ties)} facts"] + [_sentence(title, tie, names) for tie in shown]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape("; ".join(said), quote=True)}">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="currentColor" opacity=".6"/></marker></defs>',
    ]
    for number, (name, back, term) in enumerate(shown):
        angle = 2 * math.pi * number / len(shown) - math.pi / 2 + math.pi / max(2, len(shown))
        x = middle[0] + (WIDTH / 2 - MARGIN) * math.cos(angle)
        y = middle[1] + (height / 2 - 40) * math.sin(angle)
        parts += _tie(middle, (x, y), _words(name), back, term, _name(term, names))
    parts += _node(middle, title, "m", round_=True)
    if left_out:
        parts.append(
            f'<text x="{WIDTH / 2:.0f}" y="{height - 6}" text-anchor="middle">{left_out} more not drawn</text>'
        )
    return "".join([*parts, "</svg>"])


def _tie(a: tuple[float, float], b: tuple[float, float], relation: str, back: bool, term: Term, name: str) -> list[str]:
    """A neighbour, the line to it, and on the line what the relation is called."""
    (x1, y1), (x2, y2) = _between(a, b, 0.2), _between(a, b, 0.86)
    x, y = _between(a, b, 0.53)
    ends = 'marker-start="url(#arrow)"' if back else 'marker-end="url(#arrow)"'
    line = f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {ends}/>'
    word = f'<text class="r" x="{x:.1f}" y="{y - 4:.1f}" text-anchor="middle">{escape(_short(relation))}</text>'
    return [line, word, *_node(b, name, "n", round_=term.kind != "literal")]


def _between(a: tuple[float, float], b: tuple[float, float], share: float) -> tuple[float, float]:
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share


def _node(at: tuple[float, float], name: str, kind: str, round_: bool) -> list[str]:
    """Things are round, values have corners."""
    text, (x, y) = _short(name), at
    half = max(30.0, 4.0 * len(text) + 12)
    shape = (
        f'<ellipse class="{kind}" cx="{x:.1f}" cy="{y:.1f}" rx="{half:.0f}" ry="17"/>'
        if round_
        else f'<rect x="{x - half:.1f}" y="{y - 15:.1f}" width="{2 * half:.0f}" height="30"/>'
    )
    label = f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{escape(text)}</text>'
    return [f"<g><title>{escape(name)}</title>{shape}{label}</g>"]


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
