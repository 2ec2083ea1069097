"""Salesforce as the CRM: contacts, cases and their comments.

Notable: what a customer writes is always quoted by the library's own formatting, never pasted into a query.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from simple_salesforce.format import format_soql

from coterie.desk.crm import Case, Contact
from coterie.errors import CrmError
from coterie.salesforce import Org


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
    pause: Callable[[float], None] = time.sleep
    org: Org = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.org = Org(self.login_url, self.client_id, self.client_secret, self.pause)
        for name in (*self.fields, self.key_field):
            if not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)?", name):
                raise CrmError(f"Salesforce: {name!r} is not the name of a field")

    def find(self, customer: str) -> str | None:
        soql = format_soql("SELECT Id FROM Contact WHERE Email = {} LIMIT 1", customer)
        records = self.org.ask(lambda sf: sf.query(soql)["records"])
        return str(records[0]["Id"]) if records else None

    def read(self, id: str) -> Contact:
        soql = format_soql("SELECT " + ", ".join(self.fields) + " FROM Contact WHERE Id = {}", id)
        records = self.org.ask(lambda sf: sf.query(soql)["records"])
        if not records:
            raise CrmError(f"Salesforce has no contact {id!r}")
        return Contact(id, {k: v for k, v in records[0].items() if k != "attributes"})

    def open_case(self, id: str, case: Case) -> str:
        body = {"ContactId": id, "Subject": case.subject[:255], "Description": case.text[:32000], "Origin": "Web"}
        path = f"sobjects/Case/{self.key_field}/{_safe(case.key)}"  # PATCH there updates or creates: an upsert
        self.org.ask(lambda sf: sf.restful(path, method="PATCH", json=body))
        soql = f"SELECT Id FROM Case WHERE {self.key_field} = '{_safe(case.key)}'"  # both checked above
        return str(self.org.ask(lambda sf: sf.query(soql)["records"][0]["Id"]))

    def write_note(self, case_id: str, text: str, key: str) -> str:
        mark = f"[{_safe(key)}]"
        soql = format_soql("SELECT Id, CommentBody FROM CaseComment WHERE ParentId = {}", case_id)
        before = self.org.ask(lambda sf: sf.query_all(soql)["records"])
        same = [c["Id"] for c in before if str(c["CommentBody"]).endswith(mark)]
        if same:
            return str(same[0])
        body = {"ParentId": case_id, "CommentBody": f"{text[:3800]}\n{mark}"}
        return str(self.org.ask(lambda sf: sf.restful("sobjects/CaseComment/", method="POST", json=body)["id"]))


def _safe(key: str) -> str:
    if not re.fullmatch(r"[\w-]{1,80}", key):
        raise CrmError("a case's key has letters, digits, - and _ only")
    return key
