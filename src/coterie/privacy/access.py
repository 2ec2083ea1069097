"""Who may do what: six roles, a small table of permissions, and who asks.

Notable: as long as there is no account, whoever works at this machine is the owner, so that `coterie serve` needs no
set-up. The first account (`coterie accounts add`) closes the door.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from coterie.errors import Busy, CoterieError
from coterie.recent import Recent

Role = Literal["owner", "admin", "agent", "reviewer", "viewer", "visitor"]
Permission = Literal[
    "ask", "see", "metrics", "converse", "review", "manage", "customers", "export", "erase", "audit", "accounts",
    "keys",
]  # fmt: skip
ROLES: tuple[Role, ...] = get_args(Role)
PERMISSIONS: frozenset[Permission] = frozenset(get_args(Permission))
MAY: dict[Role, frozenset[Permission]] = {
    "owner": PERMISSIONS,
    "admin": PERMISSIONS - {"keys"},
    "agent": frozenset({"ask", "see", "converse", "customers"}),
    "reviewer": frozenset({"ask", "see", "review"}),
    "viewer": frozenset({"see", "metrics"}),
    "visitor": frozenset(),  # the widget's own door lets visitors into their own conversation, and nowhere else
}


class NotSignedIn(CoterieError):
    """Nobody is signed in, or not as who they say. Never tells which part was wrong."""

    status = 401
    code = "not_signed_in"


class Forbidden(CoterieError):
    """Somebody whose role, or whose token's scopes, do not allow it."""

    status = 403
    code = "forbidden"


@dataclass(frozen=True)
class Person:
    """Who makes a request. `may` is what the role allows, and of a token no more than its scopes. groups: those of the
    account, which with its role decide what is read."""

    name: str
    role: Role
    may: frozenset[Permission]
    by_token: bool = False  # a program with an API token, where the others are there themselves
    groups: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, name: str, role: Role, scopes: frozenset[str] | None = None, groups: frozenset[str] = frozenset()
    ) -> "Person":
        may = MAY[role] if scopes is None else frozenset(p for p in MAY[role] if p in scopes)
        return cls(name, role, may, scopes is not None, groups)

    def must(self, permission: Permission) -> None:
        """Raises NotSignedIn (a visitor), Forbidden."""
        if permission not in self.may:
            if self.role == "visitor":
                raise NotSignedIn("sign in first")
            raise Forbidden(
                f"this needs the permission {permission!r}, which {self.name!r} ({self.role}) does not have"
            )


COUNTED = 10_000  # names that a limit knows at once, 1 KiB each; beyond that the quietest begins anew

VISITOR = Person.of("visitor", "visitor")
LOCAL = Person.of("local", "owner")  # at this machine, while there are no accounts
PASSER = Person("anyone", "visitor", frozenset({"ask", "see", "metrics"}))  # from elsewhere, while there are none


@dataclass
class Limit:
    """At most `most` in any `seconds` of `clock`, for each name."""

    most: int
    seconds: float
    clock: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._times = Recent[str, deque[float]](COUNTED, self.seconds, self.clock)

    def count(self, name: str) -> None:
        """Raises Busy, with the time to wait, where it is too often."""
        now = self.clock()
        with self._lock:
            times = self._times.get(name) or deque()
            while times and times[0] <= now - self.seconds:
                times.popleft()
            if len(times) >= self.most:
                error = Busy(f"too many at once: at most {self.most} in {self.seconds:.0f} seconds")
                error.retry_after_s = max(1, round(times[0] + self.seconds - now))
                raise error
            times.append(now)
            self._times.put(name, times)
