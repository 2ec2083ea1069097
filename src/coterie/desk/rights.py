"""The desk in the house of privacy: conversations sealed and masked; given to their customer, deleted, kept no longer
than wished."""

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from coterie.answer import Answerer
from coterie.business import Business, Tell
from coterie.desk import trained
from coterie.desk.attachment import Attachments
from coterie.desk.cases import Cases, standing
from coterie.desk.conversation import Conversations
from coterie.desk.crm import open_crm, profile_of
from coterie.desk.desk import Desk, database_of
from coterie.desk.flow import Parts
from coterie.desk.knowing import check, ground
from coterie.desk.message import Message
from coterie.desk.procedures.actions import Actions
from coterie.desk.procedures.procedures import Embed, Procedures
from coterie.desk.procedures.runs import Runs
from coterie.desk.procedures.spec import Procedure, read_procedures
from coterie.grounding import Grounding
from coterie.privacy.house import House, open_house
from coterie.privacy.rights import EXPIRED_AT_ONCE, Noted, Room
from coterie.privacy.tables import PseudonymRow
from coterie.privacy.vault import PURPOSE, Vault
from coterie.store.conversation import ConversationRow, MessageRow, RatingRow, newest_entry
from coterie.store.crm import CrmWriteRow
from coterie.store.database import reading, writing
from coterie.store.mail import OUTWARD, AttachmentRow, MailboxRow, MailRow, OutboxRow
from coterie.store.procedure import ActionRow, RunRow
from coterie.store.webhook import HappeningRow, WebhookRow


def house_of(business: Business) -> House:
    """Keys, accounts and audit log of a business, over the desk's database. Raises KeyLost, CoterieError."""
    return open_house(business.folder, database_of(business))


def open_desk(answerer: Answerer, house: House, grounding: Grounding, tell: Tell = lambda _: None) -> Desk:
    """The desk at work: what is said is kept sealed, and every model sees it masked."""
    detector = answerer.business.detector(tell)
    if answerer.business.config.desk.origins:
        detector.open()  # customers are about to come: none of them waits for its training
    crm = answerer.business.config.desk.crm
    record = open_crm(crm) if crm else None
    profile = profile_of(record, crm.fields) if record and crm else Parts().profile
    vault = Vault(detector, house.database, house.keys)
    parts = Parts(mask=lambda customer, texts, known: vault.mask(customer, texts, _own(known)), profile=profile)
    if grounding.spec.sources:
        parts = replace(parts, ground=partial(ground, grounding), check=partial(check, grounding))
    procedures = procedures_of(
        answerer.business, house, profile, lambda texts: grounding.knowledge.embedder.embed(texts)
    )
    desk = Desk(
        answerer, house.database, parts, house.seal, house.unseal, procedures=procedures, audited=audited(house)
    )
    if record and crm and (crm.case_on or crm.note_on):
        desk.cases = Cases(record, crm, desk.conversations, audited(house), mask=parts.mask)
    desk.start()
    return desk


def declared(business: Business) -> dict[str, Procedure]:
    """The procedures of a business. Raises CoterieError for the first file that cannot be used."""
    spec = business.config.desk
    fields = spec.crm.fields.values() if spec.crm else ()
    return read_procedures(business.folder / spec.procedures, spec.hosts, fields)


def procedures_of(
    business: Business, house: House, profile: Callable[[str], Mapping[str, Any]], embed: Embed
) -> Procedures | None:
    """The procedures at work, with their actions written down and in the audit log; None where none is declared."""
    found = declared(business)
    if not found:
        return None
    actions = Actions(business.folder, business.folder / business.config.desk.procedures)
    runs = Runs(house.database, found, actions, house.seal, house.unseal, told=audited(house))
    return Procedures(runs, embed, profile)


def audited(house: House) -> Callable[[Session, str, str, str, Mapping[str, Any]], None]:
    """Writes into the audit log in the transaction of the deed; steps of procedures are for webhooks, too."""

    def told(session: Session, actor: str, action: str, customer: str, detail: Mapping[str, Any]) -> None:
        house.audit.record_in(session, actor, action, customer, **detail)
        if action.startswith("procedure."):
            data = {"action": action, "by": actor, **detail}
            session.add(HappeningRow(at=house.audit.clock(), kind="action", customer=customer, data=data))

    return told


def _own(known: Mapping[str, Any]) -> dict[str, list[str]]:
    """What the CRM says of a customer, to be masked however it is written."""
    return {kind: [str(value)] for kind, value in known.items() if isinstance(value, str | int)}


def rooms_of(house: House, business: Business) -> list[Room]:
    """Everything of this business that holds customers' data."""
    return [
        Room("crm", lambda c: _in_crm(house, c), lambda c: _in_crm(house, c)),  # named, not deleted: it is the CRM's
        Room("files", lambda c: _files(house, c), Attachments(house).erase),  # before the conversations they hang on
        Room(
            "conversations", lambda c: _export(house, c), lambda c: _erase(house, c),
            lambda before, noted: _expire(house, before, noted),
        ),
        Room("pseudonyms", lambda c: _pseudonyms(house, c), lambda c: _forget(house, c)),
        Room("consents", house.consents.of, house.consents.erase, house.consents.expire),
        trained.room_of(business, house),
    ]  # fmt: skip


def tell_of_erased(business: Business, tell: Tell) -> None:
    """After a fit: an expert that has learned anew without the rows of erased customers is marked no more; the others
    are told."""
    if trained.any_marked(business):
        house = house_of(business)
        try:
            for name, rows in trained.marked(business, house).items():
                tell(f"{name}: learned from customers who were erased; rows to take out: {', '.join(rows) or 'none'}")
        finally:
            house.close()


def _in_crm(house: House, customer: str) -> list[dict[str, Any]]:
    """Cases and notes about a customer that the desk has written to the CRM."""
    written = standing(Conversations(house.database, house.seal, house.unseal), customer)
    return [{"kind": w["kind"], "id": w["id"]} for w in written if w["state"] == "sent"]


def _export(house: House, customer: str) -> list[dict[str, Any]]:
    out, talks = [], Conversations(house.database, house.seal, house.unseal)
    with reading(house.database) as session:
        query = select(ConversationRow).where(ConversationRow.customer == customer).order_by(ConversationRow.opened_at)
        for row in session.scalars(query):
            messages = session.scalars(select(MessageRow).filter_by(conversation_id=row.id).order_by(MessageRow.seq))
            ratings = session.scalars(select(RatingRow).filter_by(conversation_id=row.id).order_by(RatingRow.seq))
            out.append({
                "id": row.id, "channel": row.channel, "opened_at": row.opened_at, "state": row.state,
                "messages": [{"seq": m.seq, "author": m.author, "kind": m.kind, "at": m.at,
                              "text": house.unseal(customer, m.body), **_by_mail(talks.opened(row, m))}
                             for m in messages],
                "ratings": [{"seq": r.seq, "good": r.good, "reason": house.unseal(customer, r.reason)}
                            for r in ratings],
                "procedures": [_run(house, session, r) for r in
                               session.scalars(select(RunRow).filter_by(conversation_id=row.id))],
            })  # fmt: skip
    return out


def _by_mail(m: Message) -> dict[str, Any]:
    """What the customer's mail held beside its words."""
    return {k: m.data[k] for k in ("email", "quoted") if m.author == "customer" and m.data.get(k)}


def _files(house: House, customer: str) -> list[dict[str, Any]]:
    return [{"conversation": a.conversation, "name": a.file.name, "type": a.file.type,
             "base64": base64.b64encode(a.file.body).decode()} for a in Attachments(house).of(customer)]  # fmt: skip


def _run(house: House, session: Session, run: RunRow) -> dict[str, Any]:
    """A procedure's run, with what was done in it."""

    def opened(kept: bytes) -> Any:
        return json.loads(house.unseal(run.customer, kept)) if kept else None

    actions = session.scalars(select(ActionRow).filter_by(run_id=run.id).order_by(ActionRow.begun_at))
    return {
        "procedure": run.name, "status": run.status, "began_at": run.began_at, "values": opened(run.state)["values"],
        "actions": [{"action": a.name, "status": a.status, "begun_at": a.begun_at, "arguments": opened(a.arguments),
                     "result": opened(a.result)} for a in actions],
    }  # fmt: skip


def _erase(house: House, customer: str) -> int:
    """Delete a customer's conversations with all that hangs on them, and tell other systems of it. How many."""
    with writing(house.database) as session:
        ids = list(session.scalars(select(ConversationRow.id).where(ConversationRow.customer == customer)))
        for at in range(0, len(ids), 500):
            _delete_all(session, ids[at : at + 500])
        session.execute(delete(HappeningRow).where(HappeningRow.customer == customer, HappeningRow.kind != "erasure"))
        session.add(HappeningRow(at=house.audit.clock(), kind="erasure", customer=customer, data={}))
    return len(ids)


def _expire(house: House, before: float, noted: Noted) -> int:
    """Delete EXPIRED_AT_ONCE of the resolved conversations that are as old; the desk goes on meanwhile."""
    old = (ConversationRow.state == "resolved") & (ConversationRow.changed_at < before)
    with writing(house.database) as session:
        query = select(ConversationRow.id).where(old).order_by(ConversationRow.changed_at).limit(EXPIRED_AT_ONCE)
        ids = list(session.scalars(query.with_for_update()))
        session.execute(delete(HappeningRow).where(HappeningRow.at < before, HappeningRow.kind == "action"))
        if ids:
            _delete_all(session, ids)
            noted(session, len(ids))
    if not ids:
        _forget_who_is_gone(house)
    return len(ids)


def _forget_who_is_gone(house: House) -> None:
    """Of customers whose last conversation has gone, their pseudonyms go too, and then their keys: see Keys.retire."""
    destroyed = 0
    for customers in house.keys.customers():
        still = select(ConversationRow.customer).where(ConversationRow.customer.in_(customers))
        with reading(house.database) as session:
            gone = sorted(set(customers) - set(session.scalars(still)))
        if gone:
            with writing(house.database) as session:  # one of them may have come back meanwhile
                of = PseudonymRow.customer.in_(gone) & PseudonymRow.customer.not_in(still)
                session.execute(delete(PseudonymRow).where(of))
            destroyed += house.keys.retire(gone)
    if destroyed:
        house.audit.record("retention", "retention", "", room="keys", deleted=destroyed)


def _delete_all(session: Session, ids: list[str]) -> None:
    of = update(MailRow).where(MailRow.conversation_id.in_(ids))  # their marks stay: no mail is taken twice
    session.execute(of.values(conversation_id=None, sender="", message_id=""))
    runs = select(RunRow.id).where(RunRow.conversation_id.in_(ids))
    session.execute(delete(ActionRow).where(ActionRow.run_id.in_(runs)))
    for table in (RunRow, RatingRow, AttachmentRow, OutboxRow, CrmWriteRow, HappeningRow, MessageRow):
        session.execute(delete(table).where(table.conversation_id.in_(ids)))
    session.execute(delete(ConversationRow).where(ConversationRow.id.in_(ids)))
    # SQLite gives the newest ids again, so no mark may stand beyond them: what comes next would be taken for told.
    newest = newest_entry(session)
    session.execute(update(WebhookRow).where(WebhookRow.told > newest).values(told=newest))
    outward = MailboxRow.name.in_(OUTWARD)
    session.execute(update(MailboxRow).where(outward, MailboxRow.uid > newest).values(uid=newest))


def _pseudonyms(house: House, customer: str) -> dict[str, str]:
    with reading(house.database) as session:
        rows = [(r.pseudonym, r.value) for r in session.scalars(select(PseudonymRow).filter_by(customer=customer))]
    return {pseudonym: house.keys.unseal(customer, value, PURPOSE) for pseudonym, value in rows}


def _forget(house: House, customer: str) -> int:
    with writing(house.database) as session:
        count = len(session.scalars(select(PseudonymRow.pseudonym).filter_by(customer=customer)).all())
        session.execute(delete(PseudonymRow).where(PseudonymRow.customer == customer))
    return count
