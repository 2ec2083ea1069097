"""Salesforce as the CRM: contacts, cases, comments and knowledge articles, over simple-salesforce.

Notable: the client-credentials flow of OAuth 2 gives a session, which is asked for again when it has ended; a busy
server is asked again after a moment, a used-up limit is not; and the last of the day's requests are left to others.
What a customer writes is always quoted by the library's own formatting, never pasted into a query.
"""

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
import requests
from simple_salesforce import Salesforce
from simple_salesforce.exceptions import SalesforceError, SalesforceExpiredSession
from simple_salesforce.format import format_soql

from coterie.desk.crm import Case, Contact, CrmError
from coterie.knowledge.evidence import EVERYONE, Evidence, Reader

VERSION = "59.0"
RETRIES, PAUSE_S, TIMEOUT_S = 2, 0.3, 5.0
SPARE = 0.05  # share of the day's requests that is left to others
T = TypeVar("T")


@dataclass
class SalesforceCrm:
    """`login_url`: the organisation's, such as https://acme.my.salesforce.com. `fields`: of a contact, to be read.

    `key_field`: an external id field of Case (text, unique) that keeps a second try from opening a second case.
    """

    login_url: str
    client_id: str
    client_secret: str = field(repr=False)
    fields: Sequence[str] = ("Name", "Email")
    key_field: str = "Coterie_Key__c"
    language: str = "en_US"
    pause: Callable[[float], None] = time.sleep
    _client: Any = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        for name in (*self.fields, self.key_field):
            if not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)?", name):
                raise CrmError(f"Salesforce: {name!r} is not the name of a field")

    def find(self, customer: str) -> str | None:
        soql = format_soql("SELECT Id FROM Contact WHERE Email = {} LIMIT 1", customer)
        records = self._ask(lambda sf: sf.query(soql)["records"])
        return str(records[0]["Id"]) if records else None

    def read(self, id: str) -> Contact:
        soql = format_soql("SELECT " + ", ".join(self.fields) + " FROM Contact WHERE Id = {}", id)
        records = self._ask(lambda sf: sf.query(soql)["records"])
        if not records:
            raise CrmError(f"Salesforce has no contact {id!r}")
        return Contact(id, {k: v for k, v in records[0].items() if k != "attributes"})

    def open_case(self, id: str, case: Case) -> str:
        body = {"ContactId": id, "Subject": case.subject[:255], "Description": case.text[:32000], "Origin": "Web"}
        path = f"sobjects/Case/{self.key_field}/{_safe(case.key)}"  # PATCH there updates or creates: an upsert
        self._ask(lambda sf: sf.restful(path, method="PATCH", json=body))
        soql = f"SELECT Id FROM Case WHERE {self.key_field} = '{_safe(case.key)}'"  # both checked above
        return str(self._ask(lambda sf: sf.query(soql)["records"][0]["Id"]))

    def write_note(self, case_id: str, text: str, key: str) -> str:
        mark = f"[{_safe(key)}]"
        soql = format_soql("SELECT Id, CommentBody FROM CaseComment WHERE ParentId = {}", case_id)
        before = self._ask(lambda sf: sf.query_all(soql)["records"])
        same = [c["Id"] for c in before if str(c["CommentBody"]).endswith(mark)]
        if same:
            return str(same[0])
        body = {"ParentId": case_id, "CommentBody": f"{text[:3800]}\n{mark}"}
        return str(self._ask(lambda sf: sf.restful("sobjects/CaseComment/", method="POST", json=body)["id"]))

    def articles(self, question: str, reader: Reader, most: int = 3) -> list[Evidence]:
        """Published knowledge articles that answer a question; those that are for everyone."""
        words = " OR ".join(dict.fromkeys(re.findall(r"\w{3,}", question)[:12]))
        if not words or EVERYONE not in reader.may:
            return []
        sosl = (
            f"FIND {{{words}}} IN ALL FIELDS RETURNING Knowledge__kav(Id, Title, Summary, UrlName WHERE "
            + format_soql("PublishStatus = 'Online' AND IsVisibleInPkb = true AND Language = {})", self.language)
            + f" LIMIT {int(most)}"
        )
        found = self._ask(lambda sf: sf.search(sosl)["searchRecords"])
        return [
            Evidence("salesforce", f"article {r['UrlName']}", f"{r['Title']}\n{r.get('Summary') or ''}".strip(), 1 / n)
            for n, r in enumerate(found, 1)
        ]

    def _ask(self, do: Callable[[Any], T]) -> T:
        """Do it with a session. Raises CrmError."""
        last: Exception = CrmError("the session ends at once")
        for tried in range(RETRIES + 1):
            client = self._session()
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

    def _session(self) -> Any:
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


def _safe(key: str) -> str:
    if not re.fullmatch(r"[\w-]{1,80}", key):
        raise CrmError("a case's key has letters, digits, - and _ only")
    return key


class _Hurried(requests.Session):  # type: ignore[misc]  # it has no types here
    """Gives up in time."""

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        kwargs.setdefault("timeout", TIMEOUT_S)
        return super().request(*args, **kwargs)
