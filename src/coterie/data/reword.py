"""Rewording by rule: edits of words, other opening phrases, and counterfactual swaps of names and gendered words."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coterie.data.lexicon import KEYS, NAMES, PAIRS

CARRIER_WORDS = range(2, 6)
# Words after which "her" is a person, not an owner.
NOT_OWNED = (
    "and|or|to|for|in|on|at|is|was|are|were|that|this|a|an|the|about|with|if|when|my|your|our|their|his|her|by|as|but"
)


def edit(text: str, rng: np.random.Generator) -> str:
    """One word in ten, at least one, moved, dropped or mistyped; numbers and masks ([EMAIL]) stay as they are."""
    words = text.split()
    for _ in range(max(1, round(len(words) / 10))):
        free = [i for i, w in enumerate(words) if w.isalpha()]
        if not free:
            break
        i = int(rng.choice(free))
        how = rng.integers(0, 3)
        if how == 0 and len(words) > 3:
            del words[i]
        elif how == 1 and i + 1 < len(words) and words[i + 1].isalpha():
            words[i], words[i + 1] = words[i + 1], words[i]
        else:
            words[i] = mistype(words[i], rng)
    return " ".join(words)


def mistype(word: str, rng: np.random.Generator) -> str:
    """`word` with one typing error: a letter doubled, left out, exchanged with the next, or its neighbour's key."""
    i, how = int(rng.integers(0, len(word))), rng.integers(0, 4)
    if how == 0 or len(word) < 3:
        return word[: i + 1] + word[i:]
    if how == 1:
        return word[:i] + word[i + 1 :]
    if how == 2 and i + 1 < len(word):
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    for row in KEYS:
        place = row.find(word[i].lower())
        if place >= 0:
            near = row[place - 1] if place and rng.integers(0, 2) else row[min(place + 1, len(row) - 1)]
            return word[:i] + (near.upper() if word[i].isupper() else near) + word[i + 1 :]
    return word


@dataclass
class Carriers:
    """Opening phrases that come with many labels, so say nothing of any, and what was seen after each."""

    phrases: dict[str, Counter[str]]  # phrase: how often each next word, and each next two, follow

    @classmethod
    def learn(cls, texts: Sequence[str], labels: Sequence[str], least: int = 5, most: int = 200) -> "Carriers":
        """Phrases of 2 to 5 words that open at least `least` texts, with at least a few different labels."""
        follows: defaultdict[str, Counter[str]] = defaultdict(Counter)
        answers: defaultdict[str, set[str]] = defaultdict(set)
        for text, label in zip(texts, labels, strict=True):
            words = text.split()
            for n in CARRIER_WORDS:
                if len(words) > n + 2 and not re.search(r"[.!?,]$", words[n - 1]):
                    phrase = " ".join(words[:n])
                    follows[phrase][_next(words, n, 2)] += 1
                    follows[phrase][_next(words, n, 1)] += 1
                    answers[phrase].add(label)
        wanted = min(5, max(2, len(set(labels)) // 4))
        good = [p for p, c in follows.items() if c.total() >= 2 * least and len(answers[p]) >= wanted]
        good.sort(key=lambda p: -follows[p].total())
        return cls({p: follows[p] for p in good[:most]})

    def others(self, text: str, wanted: int, rng: np.random.Generator) -> list[str]:
        """`text` with other openings, by chance, the commoner the likelier.

        An opening fits where the data has seen it before the same two words. Where none fits we back off: to long
        openings seen before the same one word, then to shorter openings of `text` itself.
        """
        words = text.split()
        for n in reversed(CARRIER_WORDS):
            own = " ".join(words[:n])
            if own not in self.phrases or len(words) <= n:
                continue
            for after, least in ((_next(words, n, 2), 2), (_next(words, n, 1), 4)):
                fits = [p for p, c in self.phrases.items()
                        if c[after] and len(p.split()) >= least and not _extends(p, own)]  # fmt: skip
                if fits:
                    weight = np.array([self.phrases[p][after] for p in fits], float)
                    some = rng.choice(len(fits), min(wanted, len(fits)), replace=False, p=weight / weight.sum())
                    return [" ".join([fits[i], *words[n:]]) for i in some]
        return []


def _next(words: list[str], n: int, count: int) -> str:
    """The `count` words after the first `n`, in small letters."""
    return " ".join(words[n : n + count]).lower()


def _extends(a: str, b: str) -> bool:
    """Whether one phrase begins with the other: their exchange would double or lose words."""
    return f"{a} ".lower().startswith(f"{b} ".lower()) or f"{b} ".lower().startswith(f"{a} ".lower())


class Swaps:
    """Exchanges gendered words for their counterparts, and names for names of the other groups in turn."""

    def __init__(self) -> None:
        self._words = {a: b for x, y in PAIRS for a, b in ((x, y), (y, x))}
        self._group = {name: group for group, names in NAMES.items() for name in names}
        self._turn: Counter[str] = Counter()
        words = "|".join(map(re.escape, [*self._words, "his", "him", "her", "hers"]))
        self._pattern = re.compile(rf"\b(?:(?i:{words})|{'|'.join(self._group)})\b")

    def swap(self, text: str, answer: str) -> tuple[str, str] | None:
        """Question and answer with everything swapped alike; None where there is nothing to swap."""
        names: dict[str, str] = {}
        new = self._apply(text, names)
        return None if new == text else (new, self._apply(answer, names))

    def _apply(self, text: str, names: dict[str, str]) -> str:
        def other(match: re.Match[str]) -> str:
            word = match.group()
            if word in self._group:
                if word not in names:
                    names[word] = self._name(self._group[word], {*names, *names.values()})
                return names[word]
            new = self._words.get(word.lower()) or _pronoun(word.lower(), text[match.end() :])
            return new.upper() if word.isupper() and len(word) > 1 else new.capitalize() if word[0].isupper() else new

        return self._pattern.sub(other, text)

    def _name(self, group: str, taken: set[str]) -> str:
        """A name of the group that had the fewest turns among the others: so all come equally often."""
        target = min((g for g in NAMES if g != group), key=lambda g: self._turn[g])
        self._turn[target] += 1
        start = self._turn[target] % len(NAMES[target])
        turned = NAMES[target][start:] + NAMES[target][:start]
        return next((n for n in turned if n not in taken), turned[0])


def _pronoun(word: str, rest: str) -> str:
    """`her` and `his` are two words each in the other gender: which, the next word tells."""
    owns = re.match(rf"\s+(?!(?:{NOT_OWNED})\b)[a-z]", rest)
    if word == "her":
        return "his" if owns else "him"
    return {"him": "her", "hers": "his", "his": "her" if owns else "hers"}[word]
