"""`coterie desk email`: take in what came by e-mail and send what is due, once or until Ctrl-C."""

import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.desk import app
from coterie.cli.options import FolderOption, Json
from coterie.cli.show import result, tell
from coterie.errors import CoterieError


@app.command("email")
def email_(
    folder: FolderOption = Path(),
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    as_json: Json = False,
) -> None:
    """Take in mails and send what is due, until Ctrl-C. `coterie serve` does so too, and answers them."""
    from coterie.business import Business
    from coterie.desk.conversation import Conversations
    from coterie.desk.mailbox import Folder, MailTask, open_mail, take_new
    from coterie.desk.rights import house_of

    business = Business.open(folder)
    spec = business.config.desk.email
    if spec is None:
        raise CoterieError(f"{business.folder / 'coterie.toml'}: there is no [desk.email]; see docs/email.md")
    house = house_of(business)
    try:
        desk = open_mail(business, house, Conversations(house.database, house.seal, house.unseal))
        if not once:
            task = MailTask(desk)
            task.start()
            tell(f"{spec.address} is read and answered from here (Ctrl-C stops it)")
            try:
                while True:
                    time.sleep(1)
            finally:
                task.close()
        with closing(Folder(spec)) as line:
            taken = take_new(desk, line)
        sent = desk.send_due()
    except OSError as error:
        raise CoterieError(f"desk.email: the mail server cannot be reached ({error})") from error
    finally:
        house.close()
    words = ", ".join(f"{n} {what}" for what, n in taken.items()) or "no mail"
    result({"taken": taken, "sent": sent}, as_json, f"{words}; {sent} sent")
