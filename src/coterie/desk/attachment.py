"""Files that came with messages: sealed under their customer's key, listed with the message, given out on request.

Notable: a file is never opened here, and its type is only what its sender says. Kept twice it is kept once.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select

from coterie.desk.message import NoConversation
from coterie.desk.mime import File
from coterie.privacy.house import House
from coterie.store.conversation import ConversationRow
from coterie.store.database import reading, writing
from coterie.store.mail import AttachmentRow

PURPOSE = "attachment"


@dataclass(frozen=True)
class Attachment:
    """One file, and whose it is."""

    customer: str
    conversation: str
    file: File


class Attachments:
    """All files of one business."""

    def __init__(self, house: House) -> None:
        self.house = house

    def keep(
        self, customer: str, conversation: str, key: str, files: Sequence[File], at: float
    ) -> list[dict[str, Any]]:
        """Keep the files that came under `key`, a hexadecimal mark; what a message says of them."""
        keys, rows, told = self.house.keys, list[AttachmentRow](), list[dict[str, Any]]()
        for n, file in enumerate(files):
            about = {"name": file.name, "type": file.type, "size": len(file.body)}
            id = f"{key[:28]}{n:04x}"
            told.append({"id": id, **about})
            rows.append(
                AttachmentRow(
                    id=id, conversation_id=conversation, at=at, about=keys.seal(customer, json.dumps(about), PURPOSE),
                    body=keys.seal_bytes(customer, file.body, PURPOSE),
                )
            )  # fmt: skip
        with writing(self.house.database) as session:
            for row in rows:
                if session.get(AttachmentRow, row.id) is None:
                    session.add(row)
        return told

    def get(self, id: str) -> Attachment:
        """Raises NoConversation where there is none, Erased where its customer was."""
        if not re.fullmatch(r"[0-9a-f]{32}", id):
            raise NoConversation(f"there is no file {id!r}")
        with reading(self.house.database) as session:
            row = session.get(AttachmentRow, id)
            c = session.get(ConversationRow, row.conversation_id) if row else None
        if row is None or c is None:
            raise NoConversation(f"there is no file {id!r}")
        return self._opened(row, c.customer)

    def of(self, customer: str) -> Iterator[Attachment]:
        """Every file of a customer."""
        with reading(self.house.database) as session:
            ids = session.scalars(
                select(AttachmentRow.id).join(ConversationRow, ConversationRow.id == AttachmentRow.conversation_id)
                .where(ConversationRow.customer == customer).order_by(AttachmentRow.at, AttachmentRow.id)
            ).all()  # fmt: skip
        return (self.get(id) for id in ids)

    def erase(self, customer: str) -> int:
        """Delete every file of a customer; how many."""
        whose = select(ConversationRow.id).where(ConversationRow.customer == customer)
        with writing(self.house.database) as session:
            ids = session.scalars(select(AttachmentRow.id).where(AttachmentRow.conversation_id.in_(whose))).all()
            session.execute(delete(AttachmentRow).where(AttachmentRow.conversation_id.in_(whose)))
        return len(ids)

    def _opened(self, row: AttachmentRow, customer: str) -> Attachment:
        about = json.loads(self.house.keys.unseal(customer, row.about, PURPOSE))
        body = self.house.keys.unseal_bytes(customer, row.body, PURPOSE)
        return Attachment(customer, row.conversation_id, File(about["name"], about["type"], body))
