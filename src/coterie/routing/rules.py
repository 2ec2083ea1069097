"""What people decide ahead of the router: which experts a channel or certain words force or forbid."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from coterie.errors import CoterieError


@dataclass(frozen=True)
class Rule:
    """For requests on `channel` (any, where empty) that have one of `words` (any text, where there are none)."""

    channel: str = ""
    words: tuple[str, ...] = ()
    use: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()

    def applies(self, channel: str, text: str) -> bool:
        """Whether it is for this request. Words count whole, whatever their case."""
        if self.channel and self.channel.lower() != channel.lower():
            return False
        return not self.words or any(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text, re.I) for w in self.words)


@dataclass(frozen=True)
class Ruling:
    """`use`: one of these answers, however far the text is from it; empty: whoever is near. `refused`: and why."""

    use: tuple[str, ...]
    refused: dict[str, str]


def rule(rules: Sequence[Rule], channel: str, text: str, known: Collection[str]) -> Ruling:
    """The rules for one request. The first that applies with a `use` counts; every `forbid` that applies does.

    Raises CoterieError where a rule leaves nobody of those it wants used: a slip in coterie.toml must not pass unseen.
    """
    use: tuple[str, ...] = ()
    by, refused = 0, dict[str, str]()
    for number, r in enumerate(rules, 1):
        if r.applies(channel, text):
            refused |= {name: f"forbidden by rule {number} of coterie.toml" for name in r.forbid}
            if r.use and not use:
                use, by = r.use, number
    left = tuple(name for name in use if name in known and name not in refused)
    if use and not left:
        raise CoterieError(
            f"coterie.toml: routing.rules: rule {by} wants {', '.join(use)} used, of which none is in the library and "
            "allowed; fit it, import it, or mend the rule"
        )
    if left:
        refused |= {name: f"rule {by} of coterie.toml wants {', '.join(use)} used"
                    for name in known if name not in left and name not in refused}  # fmt: skip
    return Ruling(left, refused)
