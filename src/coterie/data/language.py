"""Which language a text is in: py3langid (BSD, 4.6 MB, 139 languages, about 10,000 short texts a second)."""

from functools import cache
from typing import Any

SHORTEST = 12  # bytes of letters below which a text is not judged
UNLIKELY = 0.02  # a row is in another language where the expected one is less likely than this


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language(text: str) -> str:
    """Two-letter code of the likeliest language; empty for a text too short to say."""
    return str(_identifier().classify(text)[0]) if _long_enough(text) else ""


def is_foreign(text: str, expected: str, found: str | None = None) -> str:
    """The language of a text that is surely not in `expected`; empty for all others. `found`: its `language`."""
    found = language(text) if found is None else found
    if not found or found == expected:
        return ""
    return found if dict(_identifier().rank(text)).get(expected, 0.0) < UNLIKELY else ""


def _long_enough(text: str) -> bool:
    return len("".join(filter(str.isalpha, text)).encode(errors="replace")) >= SHORTEST
