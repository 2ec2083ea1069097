"""Charts without a plotting library: a chart is a list of shapes, written as SVG, or drawn as PNG with Pillow.

Colours are Okabe and Ito's (2008), which people with any colour vision tell apart; lines differ by dashes as well.
PNG needs Pillow (the extra `charts`), whose wheel brings its own font; SVG needs nothing.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from coterie.errors import CoterieError, StorageError
from coterie.files import write_atomic

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[tuple[int, ...], ...] = ((), (6, 3), (2, 2), (8, 3, 2, 3))
INK, FAINT = "#222222", "#dddddd"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 64, 20, 44, 52  # pixels
SCALE = 2  # pixels of a PNG to each of the sheet's
Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True)
class Line:
    points: tuple[tuple[float, float], ...]
    colour: str = INK
    width: float = 1.0
    dash: tuple[int, ...] = ()


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True)
class Words:
    x: float
    y: float  # of the baseline
    text: str
    anchor: Anchor = "start"
    size: int = 12
    bold: bool = False


@dataclass(frozen=True)
class Chart:
    """Shapes on a white sheet, the first at the bottom; `about` is read out by screen readers."""

    about: str
    shapes: tuple[Line | Box | Words, ...]
    width: int = WIDTH
    height: int = HEIGHT


@dataclass(frozen=True)
class Series:
    """A named line: points (x, y), and the interval (low, high) at each where it is known."""

    name: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Bar:
    """A value with its interval; None where none is known."""

    value: float
    low: float | None = None
    high: float | None = None


def curves(title: str, x: str, y: str, series: Sequence[Series]) -> Chart:
    """Lines over a common x, as of losses or learning curves. Raises ValueError where there is no finite point."""
    kept = [
        Series(s.name, [p for p in s.points if all(map(math.isfinite, p))],
               s.spread if len(s.spread) == len(s.points) else ()) for s in series
    ]  # fmt: skip
    xs = [p[0] for s in kept for p in s.points]
    ys = [p[1] for s in kept for p in s.points] + [v for s in kept for pair in s.spread for v in pair]
    if not xs:
        raise ValueError("nothing to draw")
    frame = _Frame(min(xs), max(xs), min(ys), max(ys))
    shapes: list[Line | Box | Words] = [*frame.axes(title, x, y)]
    for i, s in enumerate(kept):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        shapes.append(Line(tuple((frame.x(a), frame.y(b)) for a, b in s.points), colour, 2, dash))
        for (a, _), (low, high) in zip(s.points, s.spread, strict=False):
            shapes.append(Line(((frame.x(a), frame.y(low)), (frame.x(a), frame.y(high))), colour))
    shapes += _legend([s.name for s in kept], lines=True)
    said = "; ".join(f"{s.name} from {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in kept if s.points)
    return Chart(f"{title}. {y} over {x}: {said}", tuple(shapes))


def losses(title: str, training: Sequence[float], held_out: Sequence[float]) -> Chart:
    """Loss of each step and, spread evenly over them, of the held-out rows at the start and after each epoch."""
    steps = len(training)
    apart = steps / max(len(held_out) - 1, 1)
    return curves(title, "step", "nats per token", [
        Series("training", [(i, v) for i, v in enumerate(training, 1)]),
        Series("held out", [(i * apart, v) for i, v in enumerate(held_out)]),
    ])  # fmt: skip


def learning(title: str, sizes: Sequence[int], scores: Sequence[Bar], law: Callable[[float], float]) -> Chart:
    """The score at each number of rows, and the law through them up to four times the rows."""
    places = [sizes[0] * (4 * sizes[-1] / sizes[0]) ** (i / 40) for i in range(41)]
    return curves(title, "rows to learn from", "score", [
        Series("measured", [(n, b.value) for n, b in zip(sizes, scores, strict=True)],
               [(b.value if b.low is None else b.low, b.value if b.high is None else b.high) for b in scores]),
        Series("expected", [(n, law(n)) for n in places]),
    ])  # fmt: skip


def bars(title: str, y: str, groups: dict[str, dict[str, Bar]]) -> Chart:
    """Groups of bars side by side, as of tasks before and after. Raises ValueError where there are none."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    values = [b for group in groups.values() for b in group.values()]
    if not values:
        raise ValueError("nothing to draw")
    tops = [b.value if b.high is None else b.high for b in values]
    lows = [b.value if b.low is None else b.low for b in values]
    frame = _Frame(0, len(groups), min(0.0, *lows), max(*tops, 0.0, 1.0 if max(tops) <= 1 else 0.0), ticks_x=False)
    shapes: list[Line | Box | Words] = [*frame.axes(title, "", y)]
    slot = 0.8 / len(names)
    for g, (group, found) in enumerate(groups.items()):
        shapes.append(Words(frame.x(g + 0.5), HEIGHT - BOTTOM + 18, group, "middle"))
        for i, name in enumerate(names):
            if name not in found:
                continue
            b = found[name]
            left, right = frame.x(g + 0.1 + i * slot), frame.x(g + 0.1 + (i + 1) * slot)
            top, foot = sorted((frame.y(b.value), frame.y(0)))
            shapes.append(Box(left + 1, top, right - left - 2, foot - top, COLOURS[i % len(COLOURS)]))
            middle = (left + right) / 2
            high = frame.y(b.value)
            if b.low is not None and b.high is not None:
                high = frame.y(b.high)
                shapes.append(Line(((middle, frame.y(b.low)), (middle, high))))
            if right - left > 24:
                text = f"{100 * b.value:.0f}%" if max(tops) <= 1 else f"{b.value:.3g}"
                shapes.append(Words(middle, high - 4, text, "middle", 11))
    shapes += _legend(names)
    said = "; ".join(f"{g}: " + ", ".join(f"{n} {b.value:.3g}" for n, b in f.items()) for g, f in groups.items())
    return Chart(f"{title}. {y}. {said}", tuple(shapes))


class _Frame:
    """Where data lies on the sheet, and the axes around it."""

    def __init__(self, x0: float, x1: float, y0: float, y1: float, ticks_x: bool = True) -> None:
        self.x0, self.x1 = _widened(x0, x1)
        self.y0, self.y1 = _widened(y0, y1)
        self.xs = _ticks(self.x0, self.x1) if ticks_x else []
        self.ys = _ticks(self.y0, self.y1)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def axes(self, title: str, x: str, y: str) -> list[Line | Box | Words]:
        shapes: list[Line | Box | Words] = [Words(LEFT, 18, title, size=14, bold=True)]
        for tick in self.ys:
            shapes.append(Line(((LEFT, self.y(tick)), (WIDTH - RIGHT, self.y(tick))), FAINT))
            shapes.append(Words(LEFT - 6, self.y(tick) + 4, f"{tick:g}", "end", 11))
        for tick in self.xs:
            shapes.append(Line(((self.x(tick), HEIGHT - BOTTOM), (self.x(tick), HEIGHT - BOTTOM + 4))))
            shapes.append(Words(self.x(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", "middle", 11))
        foot = HEIGHT - BOTTOM
        shapes.append(Line(((LEFT, TOP), (LEFT, foot), (WIDTH - RIGHT, foot))))
        return [
            *shapes,
            Words(LEFT - 56, TOP - 8, y, size=11),
            Words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x, "middle"),
        ]


def _widened(low: float, high: float) -> tuple[float, float]:
    """Room around a single value, so that there is something to divide."""
    room = max(abs(low), 1.0) / 2
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high)) else (low - room, high + room)


def _ticks(low: float, high: float) -> list[float]:
    """Some 5 round numbers from `low` to `high`."""
    span = high - low
    size = 10 ** math.floor(math.log10(span / 4))
    step = next(s * size for s in (1, 2, 2.5, 5, 10) if span / (s * size) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _legend(names: Sequence[str], lines: bool = False) -> list[Line | Box | Words]:
    out: list[Line | Box | Words] = []
    at = float(LEFT + 60)
    for i, name in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        mark = (
            Line(((at, 32), (at + 18, 32)), colour, 2, DASHES[i % len(DASHES)])
            if lines
            else Box(at, 27, 18, 10, colour)
        )
        out += [mark, Words(at + 23, 36, name, size=11)]
        at += 37 + 6.5 * len(name)
    return out


def svg(chart: Chart) -> str:
    """The chart as a picture of its own, or to stand in a page as it is."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {chart.width} {chart.height}" width="{chart.width}" '
        f'height="{chart.height}" role="img" aria-label="{escape(chart.about)}" font-family="sans-serif">',
        f'<rect width="{chart.width}" height="{chart.height}" fill="#ffffff"/>',
    ]
    for s in chart.shapes:
        if isinstance(s, Box):
            parts.append(
                f'<rect x="{s.x:.1f}" y="{s.y:.1f}" width="{max(s.width, 0):.1f}" height="{max(s.height, 0):.1f}" '
                f'fill="{s.colour}"/>'
            )
        elif isinstance(s, Line):
            dash = f' stroke-dasharray="{" ".join(map(str, s.dash))}"' if s.dash else ""
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in s.points)
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{s.colour}" stroke-width="{s.width:g}"{dash}/>'
            )
        else:
            bold = ' font-weight="bold"' if s.bold else ""
            parts.append(
                f'<text x="{s.x:.1f}" y="{s.y:.1f}" font-size="{s.size}" text-anchor="{s.anchor}" fill="{INK}"{bold}>'
                f"{escape(s.text)}</text>"
            )
    return "\n".join([*parts, "</svg>\n"])


def png(chart: Chart) -> bytes:
    """The chart drawn in pixels. Raises CoterieError where Pillow is not installed."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise CoterieError("PNG charts need Pillow: pip install 'coterie[charts]'; .svg needs nothing") from error
    sheet = Image.new("RGB", (chart.width * SCALE, chart.height * SCALE), "#ffffff")
    draw = ImageDraw.Draw(sheet)
    anchors = {"start": "ls", "middle": "ms", "end": "rs"}
    for s in chart.shapes:
        if isinstance(s, Box):
            draw.rectangle(
                [s.x * SCALE, s.y * SCALE, (s.x + max(s.width, 0)) * SCALE, (s.y + max(s.height, 0)) * SCALE], s.colour
            )
        elif isinstance(s, Line):
            for part in _dashes(s):
                draw.line([(x * SCALE, y * SCALE) for x, y in part], s.colour, max(1, round(s.width * SCALE)), "curve")
        else:
            font = ImageFont.load_default(s.size * SCALE)
            draw.text((s.x * SCALE, s.y * SCALE), s.text, INK, font, anchors[s.anchor],
                      stroke_width=SCALE // 2 if s.bold else 0)  # fmt: skip
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def _dashes(line: Line) -> list[list[tuple[float, float]]]:
    """A line as the pieces that its dashes leave."""
    if not line.dash:
        return [list(line.points)]
    out: list[list[tuple[float, float]]] = []
    place, left = 0, float(line.dash[0])
    for (x0, y0), (x1, y1) in zip(line.points, line.points[1:], strict=False):
        length, done = math.hypot(x1 - x0, y1 - y0), 0.0
        while done < length:
            step = min(left, length - done)
            if place % 2 == 0:
                a, b = done / length, (done + step) / length
                out.append([(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in (a, b)])
            done, left = done + step, left - step
            if left <= 1e-9:
                place += 1
                left = float(line.dash[place % len(line.dash)])
    return out


def check_ending(file: Path) -> None:
    """Raises CoterieError where a chart cannot be written to a file of this name: asked before long work."""
    if file.suffix not in (".svg", ".png"):
        raise CoterieError(f"{file}: a chart is written as .svg or .png")


def save(chart: Chart, file: Path) -> None:
    """Write the chart by the file's ending, .svg or .png. Raises CoterieError for another, StorageError."""
    check_ending(file)
    data = svg(chart).encode() if file.suffix == ".svg" else png(chart)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{file.parent}: cannot be written ({error.strerror})") from error
    write_atomic(file, data)
