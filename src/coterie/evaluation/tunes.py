"""Is a text a tune in ABC notation? A small structural parser of our own (ABC standard 2.1), not music21.

It reads the header fields, then every symbol of the body, and adds up each bar. `parse` says what is wrong; a tune is
valid when nothing is. Not judged: whether chords fit, whether it is any good.
"""

import re
from dataclasses import dataclass, field
from fractions import Fraction

HEADER = re.compile(r"([A-Za-z+]):\s*(.*)")
METER = re.compile(r"(\d+)\s*/\s*(\d+)$")
LENGTH = r"(?P<times>\d*)(?P<over>(?:/\d*)*)"
CHORD_LENGTH = LENGTH.replace("times", "ctimes").replace("over", "cover")
SYMBOLS = re.compile(
    r"(?P<space>[\s`\\]+)"
    r"|(?P<text>\"[^\"\n]*\"|![^!\n]*!|\+[a-z][^+\n]*\+)"
    r"|(?P<field>\[[A-Za-z]:[^\]\n]*\])"
    r"|(?P<bar>\|\]|\[\||:*\|+:*|::)(?P<part>\[?\d[\d,\-]*)?"
    r"|(?P<ending>\[\d[\d,\-]*)"
    r"|(?P<tuplet>\(\d(?::\d*){0,2})"
    r"|(?P<grace>\{/?[^{}\n]*\})"
    r"|(?P<chord>\[(?:[\^_=]{0,2}[A-Ga-g][,']*[\d/]*[\- ]*)+\])" + CHORD_LENGTH +
    r"|(?P<note>(?:\^\^|__|[\^_=])?[A-Ga-gxz][,']*)" + LENGTH +
    r"|(?P<broken>[<>]+)"
    r"|(?P<mark>[()\-~.HLMOPSTuv&yJR])"
)  # fmt: skip
TUPLETS = {2: 3, 3: 2, 4: 3, 6: 2, 8: 3}  # (p: p notes in the time of this many; 5, 7, 9 depend on the meter


@dataclass
class Tune:
    """Header fields, the length of each bar in whole notes, and what is wrong (empty for a valid tune)."""

    fields: dict[str, str] = field(default_factory=dict)
    bars: list[Fraction] = field(default_factory=list)
    notes: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        return not self.faults


def parse(text: str) -> Tune:
    """Read one tune. Faults: no X, K or M; a symbol that ABC lacks; no notes; more than half of the bars of
    another length than the meter's (upbeats, endings, and the bars on both sides of a repeat often are)."""
    tune, meters = Tune(), list[Fraction]()
    lines = [line.split("%", 1)[0].rstrip() for line in text.strip().splitlines()]
    meter, unit, body = Fraction(0), Fraction(1, 8), False
    bar = Fraction(0)
    for number, line in enumerate(lines, 1):
        header = HEADER.match(line)
        if header and not line.startswith(("|:", "[")):
            key, value = header.groups()
            tune.fields.setdefault(key, value)
            if key == "M":
                meter, unit = _meter(value, tune, number, unit, "L" in tune.fields)
            elif key == "L":
                at = METER.match(value.strip())
                unit = Fraction(int(at[1]), max(int(at[2]), 1)) if at else unit
            body = body or key == "K"
            continue
        if not line.strip():
            continue
        if not body:
            tune.faults.append(f"line {number}: music before the key (K:)")
            return tune
        bar = _music(line, number, tune, meters, unit, meter, bar)
        if tune.faults:
            return tune
    if bar:
        tune.bars.append(bar)
        meters.append(meter)
    for key in "XKM":
        if key not in tune.fields:
            tune.faults.append(f"no {key}: field")
    if not tune.notes:
        tune.faults.append("no notes")
    odd = [i for i, (b, m) in enumerate(zip(tune.bars, meters, strict=True), 1) if m and b != m]
    if 2 * len(odd) > len(tune.bars) and len(odd) > 2:
        tune.faults.append(
            f"{len(odd)} of {len(tune.bars)} bars are not as long as the meter says, the first: {odd[0]}"
        )
    return tune


def _meter(value: str, tune: Tune, number: int, unit: Fraction, fixed: bool) -> tuple[Fraction, Fraction]:
    """Length of a bar (0: free), and of an unmarked note: a sixteenth below 3/4, unless L says."""
    value = {"C": "4/4", "C|": "2/2"}.get(value.strip(), value.strip())
    if value in ("none", ""):
        return Fraction(0), unit
    at = METER.match(value)
    if not at or not int(at[2]):
        tune.faults.append(f"line {number}: meter {value!r} cannot be read")
        return Fraction(0), unit
    meter = Fraction(int(at[1]), int(at[2]))
    return meter, unit if fixed else Fraction(1, 16) if meter < Fraction(3, 4) else Fraction(1, 8)


def _music(
    line: str, number: int, tune: Tune, meters: list[Fraction], unit: Fraction, meter: Fraction, bar: Fraction
) -> Fraction:
    """Take one line of music; the length of the bar it leaves open."""
    at, squeezed, ratio = 0, 0, Fraction(1)
    while at < len(line):
        m = SYMBOLS.match(line, at)
        if not m or m.end() == at:
            tune.faults.append(f"line {number}: {line[at : at + 10]!r} is not ABC")
            return bar
        at = m.end()
        if m["bar"]:
            if bar:
                tune.bars.append(bar)
                meters.append(meter)
            bar = Fraction(0)
        elif m["tuplet"]:
            squeezed = int(m["tuplet"][1])
            usual = TUPLETS.get(squeezed, 3 if meter.numerator % 3 == 0 and meter.denominator == 8 else 2)
            parts = m["tuplet"].split(":")
            time = int(parts[1]) if len(parts) > 1 and parts[1] else usual
            ratio = Fraction(time, max(squeezed, 1))
            squeezed = int(parts[2]) if len(parts) > 2 and parts[2] else squeezed
        elif m["note"] or m["chord"]:
            side = ("times", "over") if m["note"] else ("ctimes", "cover")
            length = unit * _length(m[side[0]], m[side[1]])
            if m["chord"] and not m["ctimes"] and not m["cover"]:
                inner = re.search(r"[A-Ga-g][,']*(\d*)((?:/\d*)*)", m["chord"])
                length = unit * _length(inner[1], inner[2]) if inner else length
            if squeezed:
                squeezed, length = squeezed - 1, length * ratio
            bar += length
            tune.notes += 1
    return bar


def _length(times: str, over: str) -> Fraction:
    """A length as written: 3, 3/2, /, //, /4."""
    out = Fraction(int(times) if times else 1)
    for part in over.split("/")[1:]:
        out /= max(int(part), 1) if part else 2
    return out
