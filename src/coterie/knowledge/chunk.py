"""Sections to chunks of about one embedding's length: short neighbours together, long ones cut between sentences."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from coterie.knowledge.parse import Parsed, Section

SIZE = 1000  # characters: about 220 tokens of English, and MiniLM reads 256
_CUTS = (r"\n\s*\n", r"\n", r"(?<=[.!?])\s+", r"\s+")  # where to cut, best first


@dataclass(frozen=True)
class Chunk:
    """A passage. place: the headings that it stands under, told apart by a number where several are alike."""

    place: str
    text: str


def chunks(parsed: Parsed, size: int = SIZE) -> list[Chunk]:
    """The passages of a document, in order. What follows a heading starts with it, so that a passage says its own
    subject; neighbours that fit into `size` characters together are one passage, under the first one's headings."""
    found: list[tuple[str, str]] = []
    for section in parsed.sections:
        head = section.headings[-1] if section.headings else ""
        for n, piece in enumerate(pieces(section.text, size)):
            text = f"{head}\n{piece}" if head and n == 0 and head != parsed.title else piece
            if found and n == 0 and len(found[-1][1]) + len(text) < size and not _page(section):
                found[-1] = (found[-1][0], f"{found[-1][1]}\n\n{text}")
            else:
                found.append((" > ".join(h for h in section.headings if h != parsed.title), text))
    seen: Counter[str] = Counter()
    out = []
    for place, text in found:
        seen[place] += 1
        out.append(Chunk(place if seen[place] == 1 else f"{place} ({seen[place]})".strip(), text))
    return out


def _page(section: Section) -> bool:
    """Pages of a PDF stay apart: a citation names the page."""
    return bool(re.fullmatch(r"page \d+", section.headings[0])) if section.headings else False


def pieces(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of at most `size` characters, cut at paragraphs, else lines, sentences, words, anywhere."""
    text = text.strip()
    while len(text) > size:
        cut = next((at for pattern in _CUTS if (at := _last(pattern, text, size)) >= size // 4), size)
        yield text[:cut].strip()
        text = text[cut:].strip()
    if text:
        yield text


def _last(pattern: str, text: str, size: int) -> int:
    """The end of the last match within `size` characters, or -1."""
    return max((m.start() or -1 for m in re.finditer(pattern, text[: size + 1])), default=-1)
