"""A file to its sections: Markdown, HTML, PDF, DOCX, plain text. A file that cannot be read raises DataError."""

import codecs
import io
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from coterie.errors import DataError

UNPACKED_MOST = 500 << 20  # bytes that a DOCX may unpack to
OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # the container of a DOCX with a password, and of the old .doc


@dataclass(frozen=True)
class Section:
    """A stretch of text under the same headings, the outermost first."""

    headings: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Parsed:
    """What a file says. title: its first heading of the first level, or its name."""

    title: str
    sections: tuple[Section, ...]


def parse(path: Path, content: bytes) -> Parsed:
    """The sections of a file. Raises DataError, naming the file and what is wrong with it."""
    kind = path.suffix.lower()
    reader = READERS.get(kind)
    if reader is None:
        raise DataError(f"{path}: a {kind or 'file without ending'} is not read; {', '.join(READERS)} are")
    if not content.strip():
        raise DataError(f"{path}: the file is empty")
    sections = tuple(s for s in reader(path, content) if s.text.strip())
    if not sections:
        raise DataError(f"{path}: no text was found in it" + (" (is it scanned?)" if kind == ".pdf" else ""))
    first = sections[0].headings[:1] if kind != ".pdf" else ()
    return Parsed(first[0] if first else path.stem.replace("_", " ").replace("-", " "), sections)


def decode(path: Path, content: bytes) -> str:
    """Text of UTF-8, or of UTF-16 with its mark. Raises DataError: a guess would index nonsense."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16") if utf16 else content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\x00" in text:
        raise DataError(f"{path}: not text: it holds zero bytes")
    return text


def _markdown(path: Path, content: bytes) -> Iterator[Section]:
    return _sections(decode(path, content))


def _sections(text: str) -> Iterator[Section]:
    """Sections of Markdown: cut at headings, the text between them as it stands."""
    from markdown_it import MarkdownIt

    lines = text.splitlines()
    trail: list[tuple[int, str]] = []  # level and words of the headings that hold here
    start = 0
    tokens = MarkdownIt("commonmark").parse(text)
    for at, token in enumerate(tokens):
        if token.type != "heading_open" or token.level or token.map is None:
            continue
        yield Section(tuple(words for _, words in trail), "\n".join(lines[start : token.map[0]]).strip())
        depth = int(token.tag[1])
        words = re.sub(r"[*_`]+", "", tokens[at + 1].content).strip()
        trail = [*((d, w) for d, w in trail if d < depth), (depth, words)]
        start = token.map[1]
    yield Section(tuple(words for _, words in trail), "\n".join(lines[start:]).strip())


def _html(path: Path, content: bytes) -> Iterator[Section]:
    """The main text of a page, by trafilatura; all of its text where that finds none."""
    import trafilatura

    try:
        found = trafilatura.extract(
            content, output_format="markdown", include_tables=True, include_comments=False, favor_recall=True
        ) or trafilatura.html2txt(content)  # fmt: skip
    except Exception as error:  # lxml and its helpers raise their own kinds
        raise DataError(f"{path}: not HTML that can be read ({error})") from error
    return _sections(found or "")


def _pdf(path: Path, content: bytes) -> Iterator[Section]:
    """A section for each page."""
    import pypdfium2 as pdfium

    try:
        document = pdfium.PdfDocument(content)
    except pdfium.PdfiumError as error:
        why = "it is protected by a password" if "assword" in str(error) else f"broken, or no PDF ({error})"
        raise DataError(f"{path}: {why}") from error
    try:
        for number in range(len(document)):
            try:
                page = document[number]
                text = page.get_textpage().get_text_bounded()
            except pdfium.PdfiumError as error:
                raise DataError(f"{path}: page {number + 1} is broken ({error})") from error
            yield Section((f"page {number + 1}",), re.sub(r"\r\n?", "\n", text).replace("\ufffe", ""))
    finally:
        document.close()


def _docx(path: Path, content: bytes) -> Iterator[Section]:
    """Paragraphs under their headings; the rows of a table with bars between the cells."""
    if content.startswith(OLE):
        raise DataError(f"{path}: it is protected by a password (or an old .doc); save it as a plain .docx")
    import docx
    from docx.table import Table
    from docx.text.paragraph import Paragraph

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            if sum(part.file_size for part in packed.infolist()) > UNPACKED_MOST:
                raise DataError(f"{path}: unpacks to over {UNPACKED_MOST >> 20} MiB; it is not read")
        document = docx.Document(io.BytesIO(content))
    except DataError:
        raise
    except Exception as error:  # zipfile, lxml and python-docx raise their own kinds
        raise DataError(f"{path}: broken, or no DOCX ({type(error).__name__}: {error})") from error
    trail: list[tuple[int, str]] = []
    held: list[str] = []
    for part in document.iter_inner_content():
        if isinstance(part, Table):
            held += ["| " + " | ".join(cell.text.strip() for cell in row.cells) + " |" for row in part.rows]
            continue
        assert isinstance(part, Paragraph)
        style = re.fullmatch(r"Heading (\d)|(Title)", (part.style and part.style.name) or "")
        if style is None or not part.text.strip():
            held.append(part.text)
            continue
        yield Section(tuple(words for _, words in trail), "\n".join(held).strip())
        depth = int(style[1] or 0)
        trail, held = [*((d, w) for d, w in trail if d < depth), (depth, part.text.strip())], []
    yield Section(tuple(words for _, words in trail), "\n".join(held).strip())


def _text(path: Path, content: bytes) -> Iterator[Section]:
    yield Section((), decode(path, content).strip())


READERS: dict[str, Callable[[Path, bytes], Iterator[Section]]] = {
    ".md": _markdown, ".markdown": _markdown, ".html": _html, ".htm": _html, ".pdf": _pdf, ".docx": _docx, ".txt": _text
}  # fmt: skip
