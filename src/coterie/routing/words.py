"""The words of a text as a short vector: a signed sketch of its four-letter pieces.

What the base model makes of a text is its meaning; which very words it uses tells neighbouring subjects apart
("overdraft" and "card"). Every piece of a word adds or takes 1 in four places that a hash of it names (feature hashing,
Weinberger et al. 2009), so words that share a stem lie close and no vocabulary has to be kept.
"""

import re

import numpy as np
from numpy.typing import NDArray

PLACES = 256  # numbers in a sketch, a power of two
LONGEST = 1024  # letters of a text that count
_ODD = np.array([0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F], np.uint32)  # one hash for each place of a piece


def sketch(text: str) -> NDArray[np.float32]:
    """(PLACES), of unit length; zeros for a text without letters and digits. Case and punctuation do not count."""
    words = " ".join(re.findall(r"[^\W_]+", text[:LONGEST].lower()))
    letters = np.frombuffer(f" {words}   ".encode("utf-8", "replace"), np.uint8).astype(np.uint32)
    pieces = letters[:-3] | letters[1:-2] << 8 | letters[2:-1] << 16 | letters[3:] << 24
    pieces = np.unique(pieces[(letters[1:-2] != 32) & (letters[2:-1] != 32)])  # a space only before or after
    mixed = (pieces[:, None] ^ pieces[:, None] >> 15) * _ODD
    mixed = (mixed ^ mixed >> 13) * np.uint32(0x5BD1E995)
    signs = 1 - 2 * (mixed >> 8 & 1).astype(np.float32)
    found = np.bincount((mixed >> (33 - PLACES.bit_length())).ravel(), signs.ravel(), PLACES)
    unit: NDArray[np.float32] = (found / max(float(np.linalg.norm(found)), 1e-9)).astype(np.float32)
    return unit
