"""Mail servers for tests: a real IMAP server in a process of its own, a real SMTP server that keeps what it gets."""

import ipaddress
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage, Message
from email.parser import BytesParser
from email.policy import default
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP as Server
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from imap_tools import MailBoxUnencrypted

from coterie.config import EmailSpec
from coterie.desk.conversation import Conversations
from coterie.desk.mail import MailDesk, Send
from coterie.privacy.house import House, open_house
from coterie.store.database import open_database

USER, PASSWORD, US = "support@shop.example", "a-password", "support@shop.example"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def self_signed(folder: Path, host: str = "127.0.0.1") -> tuple[Path, Path]:
    """The files of a certificate of a host, that it signed itself, and of its key."""
    key, today = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    numbered = host.replace(".", "").isdigit()
    shown = x509.IPAddress(ipaddress.ip_address(host)) if numbered else x509.DNSName(host)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - timedelta(1)).not_valid_after(today + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([shown]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ))  # fmt: skip
    return folder / "cert.pem", folder / "key.pem"


@contextmanager
def tls_before(port: int, certificate: tuple[Path, Path]) -> Iterator[int]:
    """A port where TLS is spoken from the first byte, before a plain server's `port`."""
    listener = socket.create_server(("127.0.0.1", 0))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)

    def pass_on(one: socket.socket, other: socket.socket) -> None:
        try:
            while got := one.recv(65536):
                other.sendall(got)
        except OSError:
            pass
        finally:
            for line in (one, other):
                line.close()

    def accept() -> None:
        while True:
            try:
                caller = listener.accept()[0]
            except OSError:
                return  # closed
            try:
                outer = context.wrap_socket(caller, server_side=True)
            except OSError:  # the caller does not believe the certificate
                continue
            inner = socket.create_connection(("127.0.0.1", port))
            for pair in ((outer, inner), (inner, outer)):
                threading.Thread(target=pass_on, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.close()


@contextmanager
def imap_server(certificate: tuple[Path, Path] | None = None) -> Iterator[int]:
    """pymap, with its mailboxes in memory; with a certificate and its key it offers STARTTLS. Its port."""
    port = free_port()
    secured = ["--cert", str(certificate[0]), "--key", str(certificate[1])] if certificate else ["--no-tls"]
    command = [sys.executable, "-c", "from pymap.main import main; main()",
               "--host", "127.0.0.1", "--port", str(port), *secured, "dict",
               "--demo-data", "--demo-user", USER, "--demo-password", PASSWORD]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


def deliver(port: int, raw: bytes, arrived: datetime | None = None) -> None:
    """Put a mail into the folder, as a mail server does; it arrives now, or then."""
    with MailBoxUnencrypted("127.0.0.1", port).login(USER, PASSWORD) as box:
        box.append(raw, "INBOX", dt=arrived)


@dataclass
class Postbox:
    """What the SMTP server took; `answers`: what it says to the next mails instead of taking them."""

    got: list[tuple[list[str], Message]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    async def handle_DATA(self, server: Server, session: Any, envelope: Any) -> str:
        if self.answers and (said := self.answers.pop(0)) != "250":
            return said
        self.got.append((envelope.rcpt_tos, BytesParser(policy=default).parsebytes(envelope.content)))
        return "250 OK"


@contextmanager
def smtp_server() -> Iterator[tuple[int, Postbox]]:
    box, port = Postbox(), free_port()
    controller = Controller(box, "127.0.0.1", port)
    controller.start()
    try:
        yield port, box
    finally:
        controller.stop()


def mail(text: str = "Where is my order?", sender: str = "Ada <ada@mail.example>", **headers: str) -> bytes:
    """A mail as people write them; `in_reply_to="..."` and the like are headers."""
    made = EmailMessage()
    given = {
        "from": sender,
        "to": US,
        "subject": "An order",
        "message_id": f"<{abs(hash(text)):x}@mail.example>",
    } | headers
    for name, value in given.items():
        if value:
            made[name.replace("_", "-")] = value
    made.set_content(text)
    return made.as_bytes()


def spec(**more: Any) -> EmailSpec:
    return EmailSpec(**{"address": US, "imap": "imap://127.0.0.1", "smtp": "smtp://127.0.0.1", **more})


def mail_desk(folder: Path, send: Send, now: list[float] | None = None, url: str = "", **more: Any) -> MailDesk:
    """A channel over a house of its own, or over the database at `url`; `now[0]`: what its clock says."""
    house: House = open_house(folder, open_database(url or f"sqlite:///{folder}/desk.db"), {})
    clock = (lambda: now[0]) if now else time.time
    talks = Conversations(house.database, house.seal, house.unseal, clock)
    return MailDesk(spec(**more), house, talks, send, "You are talking to an AI.", "The Shop", clock=clock)
