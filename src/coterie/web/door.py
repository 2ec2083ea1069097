"""Who is at the door of the desk: visitors with short-lived tokens, agents with an account or a signed invitation.

A visitor's token names the visitor and the site it was given to. It opens the desk for an hour, and can be changed
for a new one for thirty days, so that a reload goes on with the same conversation; no key stands in the page. A
site's own server may vouch for its customer with a JSON web token (HS256, `sub` and `exp`).

The keys are those of $COTERIE_DESK_KEY and $COTERIE_IDENTITY_KEY; the first is made and kept in the business's folder
where it is not given.
"""

import os
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastapi import Request
from itsdangerous import BadSignature, URLSafeTimedSerializer
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import OctKey

from coterie.errors import StorageError
from coterie.privacy.access import LOCAL, PASSER, VISITOR, Forbidden, NotSignedIn, Person
from coterie.privacy.keys import RESERVED

TOKEN_S, RENEWED_S = 3600, 30 * 24 * 3600
INVITED_S = 7 * 24 * 3600
COOKIE = "coterie_agent"
KEY_FILE = "desk.key"
Role = Literal["agent", "supervisor"]


@dataclass(frozen=True)
class Agent:
    """A person who works at the desk."""

    name: str
    role: Role = "agent"


Ended = Callable[[str, float], bool]  # whether an invitation of this name, made then, lets nobody in any more


class Door:
    """Makes and reads tokens. `origins`: sites that may show the widget."""

    def __init__(self, key: str, origins: list[str], identity_key: str = "", ended: Ended | None = None) -> None:
        self.ended = ended
        self.origins = {o.rstrip("/").lower() for o in origins}
        self._visitors = URLSafeTimedSerializer(key, "coterie-visitor")
        self._agents = URLSafeTimedSerializer(key, "coterie-agent")
        self._identity_key = identity_key

    # Visitors

    def site(self, request: Request) -> str:
        """The site that a visitor's request comes from. Raises Forbidden where it is not on the list."""
        origin = request.headers.get("origin", "").rstrip("/").lower()
        own = f"{request.url.scheme}://{request.url.netloc}".lower()
        if origin in ("", own):
            return own
        if origin in self.origins:
            return origin
        raise Forbidden(f"the site {origin!r} may not show this desk; list it in coterie.toml under [desk], origins")

    def admit(self, site: str, identity: str = "", former: str = "") -> tuple[str, str]:
        """The customer's stable name, and a token for them. Raises NotSignedIn for an identity that does not hold."""
        customer = self._vouched(identity) if identity else self._former(site, former) or f"visitor-{uuid.uuid4().hex}"
        return customer, self._visitors.dumps([customer, site])

    def visitor(self, request: Request) -> str:
        """The customer who makes this request. Raises NotSignedIn, Forbidden."""
        site, token = self.site(request), request.headers.get("authorization", "").removeprefix("Bearer ")
        customer = self._read(token, site, TOKEN_S)
        if customer is None:
            raise NotSignedIn("this visit has expired; begin it anew")
        return customer

    def _read(self, token: str, site: str, age_s: int) -> str | None:
        try:
            customer, given_to = self._visitors.loads(token, max_age=age_s)
        except (BadSignature, ValueError, TypeError):
            return None
        return str(customer) if given_to == site else None

    def _former(self, site: str, token: str) -> str | None:
        """Who held this token; nobody whom a site had vouched for: it must do so again."""
        customer = self._read(token, site, RENEWED_S) if token else None
        return customer if customer and customer.startswith("visitor-") else None

    def _vouched(self, identity: str) -> str:
        if not self._identity_key:
            raise NotSignedIn("identity: this desk has no COTERIE_IDENTITY_KEY to check it with")
        try:
            claims = jwt.decode(identity, OctKey.import_key(self._identity_key), algorithms=["HS256"]).claims
            jwt.JWTClaimsRegistry(sub={"essential": True}, exp={"essential": True}).validate(claims)
        except (JoseError, ValueError) as error:
            raise NotSignedIn(f"identity: not signed with this desk's key, or expired ({error})") from error
        subject = claims["sub"]
        if not isinstance(subject, str) or not 1 <= len(subject) <= 150 or subject.startswith("visitor-"):
            raise NotSignedIn("identity: sub must be a text of 1 to 150 characters")
        if subject.startswith(RESERVED):
            raise NotSignedIn(f"identity: sub must not begin with {RESERVED!r}")
        return subject

    # Agents

    def invite(self, agent: Agent) -> str:
        """A token that lets an agent in for a week, unless it is ended before."""
        return self._agents.dumps([agent.name, agent.role, time.time()])

    def invited(self, token: str) -> Agent | None:
        try:
            name, role, made_at = self._agents.loads(token, max_age=INVITED_S)
        except (BadSignature, ValueError, TypeError):
            return None
        return None if self.ended and self.ended(name, made_at) else Agent(name, role)

    def agent(self, request: Request) -> Agent:
        """The agent who makes this request, by account or by invitation. What changes something must come from a page
        of ours: a form on another site cannot set the header. Raises NotSignedIn, Forbidden."""
        agent = _by_account(request) or self.invited(request.cookies.get(COOKIE, ""))
        if agent is None:
            raise NotSignedIn("sign in with an account, or with the link that `coterie desk invite NAME` prints")
        if request.method not in ("GET", "HEAD") and request.headers.get("x-coterie-desk") != "1":
            raise Forbidden("this request was not made by the desk's own page")
        return agent


def _by_account(request: Request) -> Agent | None:
    """Who is signed in and may converse; owners and admins see the desk as supervisors."""
    person: Person | None = getattr(request.state, "person", None)
    if person is None or person in (LOCAL, PASSER, VISITOR) or "converse" not in person.may:
        return None
    return Agent(person.name, "supervisor" if person.role in ("owner", "admin") else "agent")


def open_door(folder: Path, origins: list[str], ended: Ended | None = None) -> Door:
    """With the keys of the environment, or of the business's folder. Raises StorageError."""
    return Door(_key(folder / ".coterie" / KEY_FILE), origins, os.environ.get("COTERIE_IDENTITY_KEY", ""), ended)


def _key(file: Path) -> str:
    given = os.environ.get("COTERIE_DESK_KEY", "")
    if given:
        return given
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
                f.write(secrets.token_urlsafe(32))
        except FileExistsError:
            pass
        key = file.read_text().strip()
    except OSError as error:
        raise StorageError(f"{file}: cannot be read or made ({error.strerror}); set COTERIE_DESK_KEY") from error
    if len(key) < 32:
        raise StorageError(f"{file}: no key in it; remove the file to have one made (visitors then begin anew)")
    return key
