"""What the desk's doors write down: who saw whose words, who asked for somebody else's, and what visitors were told.

Notable: pages read a conversation, or a list, again at each change. Looks of one person at one conversation that are
nearer than SEEN_S are one, and what a list shows for the first time is written at once, in one transaction: so a busy
desk adds some lines an hour for each agent, and not some for each message.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from coterie.config import ConsentSpec
from coterie.errors import CoterieError
from coterie.privacy.house import House
from coterie.privacy.rights import version_of
from coterie.recent import Recent

SEEN_S = 600.0  # looks at a conversation that are nearer than this are one
SEEN = 10_000  # of them kept; beyond that the oldest is forgotten, and would go on record once more
DISCLOSURE = "ai"  # the purpose under which it is on record that they were told they talk to an AI


class Looks:
    """Who looked at which conversation lately."""

    def __init__(self) -> None:
        self._seen = Recent[tuple[str, str], bool](SEEN, SEEN_S)

    def again(self, who: str, id: str) -> bool:
        """Whether they did not within SEEN_S: a page that reads a conversation at each change is one look."""
        fresh = not self._seen.get((who, id))
        self._seen.put((who, id), True)
        return fresh


class Witness:
    """Writes into a house's audit log and consent record; without a house, nothing."""

    def __init__(self, house: House | None = None) -> None:
        self.house = house
        self._read, self._seen, self._tried = Looks(), Looks(), Looks()

    def read(self, agent: str, id: str, customer: str) -> None:
        """An agent opened a conversation."""
        if self.house and self._read.again(agent, id):
            self.house.audit.record(f"agent:{agent}", "conversation.read", customer, id=id)

    def listed(self, agent: str, where: str, shown: Iterable[tuple[str, str]]) -> None:
        """An agent was shown words out of conversations, given as ids with their customers, in a list."""
        if self.house and (fresh := [(id, c) for id, c in shown if self._seen.again(agent, id)]):
            lines = [("conversation.listed", customer, {"id": id, "where": where}) for id, customer in fresh]
            self.house.audit.record_all(f"agent:{agent}", lines)

    def searched(self, agent: str, words: str, shown: list[tuple[str, str]]) -> None:
        """An agent searched what customers wrote. For what is not written down; the same words again are one search."""
        if self.house and self._seen.again(agent, f"search: {words}"):
            self.house.audit.record(f"agent:{agent}", "conversation.search", found=len(shown))
        self.listed(agent, "search", shown)

    def took_file(self, agent: str, id: str, customer: str) -> None:
        """An agent took a file that a customer sent."""
        if self.house:
            self.house.audit.record(f"agent:{agent}", "file.read", customer, id=id)

    def refused(self, who: str, id: str, customer: str) -> None:
        """A customer asked for a conversation of another, and did not get it."""
        if self.house and self._tried.again(who, id):
            self.house.audit.record(f"customer:{who}", "conversation.refused", customer, id=id)

    def told(self, customer: str, disclosure: str, language: str) -> None:
        """A visitor is shown that they talk to an AI."""
        if self.house:
            self.house.consents.tell(customer, DISCLOSURE, disclosure, language)

    def asked(self, customer: str, declared: Mapping[str, ConsentSpec]) -> list[dict[str, Any]]:
        """What a visitor is asked to agree to, and whether they do."""
        return [
            {"purpose": name, "text": spec.text, "language": spec.language,
             "version": version_of(spec.text, spec.language),
             "agreed": bool(self.house and self.house.consents.agreed(customer, name))}
            for name, spec in declared.items()
        ]  # fmt: skip

    def agreed(
        self, customer: str, declared: Mapping[str, ConsentSpec], purpose: str, version: str, yes: bool
    ) -> None:  # fmt: skip
        """A visitor agrees, or does no longer. Raises CoterieError where they saw another text than is asked now."""
        spec = declared.get(purpose)
        if spec is None or self.house is None:
            raise CoterieError(f"purpose: nobody is asked to agree to {purpose!r} here")
        if version != version_of(spec.text, spec.language):
            raise CoterieError("version: this text is no longer the one that is asked; begin the visit anew")
        self.house.consents.record(customer, purpose, "agreed" if yes else "withdrawn", spec.text, spec.language)
