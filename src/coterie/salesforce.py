"""An organisation at Salesforce, signed in to, over simple-salesforce.

Notable: the client-credentials flow of OAuth 2 gives a session, which is asked for again when it has ended; a busy
server is asked again after a moment, a used-up limit is not; and the last of the day's requests are left to others.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
import requests
from simple_salesforce import Salesforce
from simple_salesforce.exceptions import SalesforceError, SalesforceExpiredSession

from coterie.errors import CrmError

VERSION = "59.0"
RETRIES, PAUSE_S, TIMEOUT_S = 2, 0.3, 5.0
SPARE = 0.05  # share of the day's requests that is left to others
T = TypeVar("T")


@dataclass
class Org:
    """`login_url`: the organisation's, such as https://acme.my.salesforce.com."""

    login_url: str
    client_id: str
    client_secret: str = field(repr=False)
    pause: Callable[[float], None] = time.sleep
    _client: Any = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def ask(self, do: Callable[[Any], T]) -> T:
        """Do it with a session of simple-salesforce. Raises CrmError."""
        last: Exception = CrmError("the session ends at once")
        for tried in range(RETRIES + 1):
            client = self.session()
            try:
                self._spare(client)
                return do(client)
            except SalesforceExpiredSession:
                with self._lock:
                    self._client = None if self._client is client else self._client
            except SalesforceError as error:
                if getattr(error, "status", 0) not in (429, 500, 502, 503, 504):
                    raise CrmError(f"Salesforce refused: {_said(error)}") from error
                last = error
                self.pause(PAUSE_S * 2**tried)
            except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                # requests' errors are OSErrors; the others come of an answer that is not what it should be
                raise CrmError(f"Salesforce gave no usable answer ({type(error).__name__})") from error
        raise CrmError(f"Salesforce failed {RETRIES + 1} times: {_said(last)}") from last

    def _spare(self, client: Any) -> None:
        usage = client.api_usage.get("api-usage")
        if usage and usage.used >= usage.total * (1 - SPARE):
            client.api_usage = {}  # look again next time: a new day may have begun
            raise CrmError(f"Salesforce: {usage.used} of the day's {usage.total} requests are used; the rest is kept")

    def session(self) -> Any:
        """The session that is open, or a new one. Raises CrmError."""
        with self._lock:
            if self._client is None:
                self._client = self._log_in()
            return self._client

    def _log_in(self) -> Any:
        form = {"grant_type": "client_credentials", "client_id": self.client_id, "client_secret": self.client_secret}
        url = f"{self.login_url.rstrip('/')}/services/oauth2/token"
        try:
            given = httpx.post(url, data=form, timeout=TIMEOUT_S)
            if given.status_code != 200:
                raise CrmError(f"Salesforce refused to sign in ({given.status_code}); check client id and secret")
            token, instance = given.json()["access_token"], str(given.json()["instance_url"]).rstrip("/")
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise CrmError(f"Salesforce: no session ({type(error).__name__})") from error
        client = Salesforce(session_id=token, instance_url=instance, version=VERSION, session=_Hurried())
        client.base_url = f"{instance}/services/data/v{VERSION}/"
        return client


def _said(error: Exception) -> str:
    """The reason in a Salesforce error, without the address, which may hold what a customer wrote."""
    content = getattr(error, "content", None)
    first = content[0] if isinstance(content, list) and content else {}
    return str(first.get("errorCode", type(error).__name__)) if isinstance(first, dict) else type(error).__name__


class _Hurried(requests.Session):  # type: ignore[misc]  # it has no types here
    """Gives up in time."""

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        kwargs.setdefault("timeout", TIMEOUT_S)
        return super().request(*args, **kwargs)
