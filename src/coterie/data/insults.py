"""Insults and threats by a short list of our own, and by the terms that a business adds.

What it finds is meant to be read by a person. It is no classifier: it knows words, not what is done with them, so it
misses hate in polite words and finds quotations (tests/test_quality.py measures both).
"""

import re
from pathlib import Path

from coterie.errors import DataError

# Words that are an insult whoever says them, in English. Words with a harmless use (dog, pig, trash) are left out.
TERMS = (
    "idiot", "idiots", "idiotic", "moron", "morons", "moronic", "imbecile", "imbeciles", "cretin", "cretins",
    "dumbass", "dumbasses", "dimwit", "dimwits", "halfwit", "halfwits", "dipshit", "shithead", "shitheads",
    "asshole", "assholes", "arsehole", "arseholes", "bastard", "bastards", "bitch", "bitches", "wanker", "wankers",
    "tosser", "tossers", "prick", "pricks", "dickhead", "dickheads", "cunt", "cunts", "twat", "twats", "scumbag",
    "scumbags", "douchebag", "douchebags", "motherfucker", "motherfuckers", "whore", "whores", "slut", "sluts",
    "retard", "retards", "retarded", "subhuman", "subhumans", "untermensch", "vermin", "lowlife", "lowlifes",
)  # fmt: skip
PHRASES = (
    r"fuck (?:you|off|them|these|those|all)", r"piss off", r"go to hell", r"drop dead", r"kill (?:yourself|yourselves)",
    r"(?:deserves?|needs?|ought|have|has) to (?:die|be (?:killed|shot|hanged|wiped out|exterminated))",
    r"should (?:all )?(?:die|be (?:killed|shot|hanged|wiped out|exterminated|gassed))",
    r"(?:want|going|love|like|gonna|will) (?:to )?(?:kill|murder|hurt|strangle|stab) (?:you|them|all|these|those)",
    r"(?:i|we) (?:really |truly |absolutely )?(?:hate|despise|loathe|detest) (?:you|all|these|those|every)",
    r"(?:are|is|you are|you're|they're) (?:all )?(?:scum|filth|disgusting|worthless|vile|parasites?)",
)  # fmt: skip
DISGUISES = str.maketrans("013457@$!", "oieastasi")  # as in 1d10t; only tried on words that mix letters and signs


class Insults:
    """The built-in terms and phrases with those of a file: one a line, `#` begins a comment."""

    def __init__(self, file: Path | None = None) -> None:
        more = _read(file) if file else []
        words = "|".join(re.escape(t) for t in [*TERMS, *more])
        self._pattern = re.compile(rf"(?<!\w)(?:{words}|{'|'.join(PHRASES)})(?!\w)", re.IGNORECASE)

    def find(self, text: str) -> list[str]:
        """The terms in `text`, in small letters, in order."""
        found = [m.group().lower() for m in self._pattern.finditer(text)]
        if any(c in "013457@$!" for c in text):
            plain = " ".join(w.translate(DISGUISES) if re.search("[a-zA-Z]", w) else w for w in text.split())
            found += [m.group().lower() for m in self._pattern.finditer(plain) if m.group().lower() not in found]
        return found


def _read(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not readable as a list of terms ({error})") from error
    terms = [line.split("#")[0].strip() for line in lines]
    if not any(terms):
        raise DataError(f"{file}: holds no terms; write one a line")
    return [t for t in terms if t]
