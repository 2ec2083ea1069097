"""What the name and place of a file say: the series that it belongs to, its part of it, and pairs of words.

Files that stand together are about one thing, and one of them introduces it. A series is the files of one name that
differ in a number at its end (`ledger_001.md`, `ledger_002.md`), whose lowest number introduces; or else the files of
one folder, introduced by one that is called so.
"""

import hashlib
import posixpath
import re
from itertools import pairwise

INTRODUCES = ("index", "readme", "overview", "introduction", "intro", "about")
_COMMON = """
a an the is are was be do does i you he it we they my your our their his her its to of in on at for from by with as and
or if than that this what which how when where why who
"""
_STOP = frozenset(_COMMON.split())
_FUNCTION_WORDS = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its
itself they them their theirs themselves what which who whom this that these those am is are was were be been being have
has had having do does did doing a an the and but if or because as until while of at by for with about against between
into through during before after above below to from up down in out on off over under again further then once here there
when where why how all any both each few more most other some such no nor not only own same so than too very s t can
will just don should now
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())  # of English (Porter's Snowball): what no question is about


def series_of(path: str) -> tuple[int, int]:
    """A number for the series of a file, the same for each file of it, and which part it is: -1 where that says
    nothing. The series 0 is none: files side by side in the source's own folder."""
    folder, stem = posixpath.split(posixpath.splitext(path)[0])
    numbered = re.fullmatch(r"(.*[^\W\d].*?)[\W_]*(\d{1,9})", stem)
    if numbered:
        return _mark(f"{folder or '.'}/{numbered[1]}#"), int(numbered[2])
    if not folder:
        return 0, -1
    return _mark(f"{folder}/"), 0 if stem.lower() in INTRODUCES else -1


def _mark(key: str) -> int:
    """Of 63 bits, so that SQLite and NumPy hold it; never 0."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1 | 1


def pairs(text: str) -> list[str]:
    """Each two neighbouring words, joined by "_": "Light Blue account" names another thing than "light" and "blue".
    None of them is a word like "the"."""
    words = re.findall(r"[^\W_]+", text.lower())
    return [f"{a}_{b}" for a, b in pairwise(words) if a not in _STOP and b not in _STOP]
