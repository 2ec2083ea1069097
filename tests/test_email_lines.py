"""The lines to mail servers: encrypted ones with certificates that hold, and a folder that is numbered anew."""

import datetime
import ipaddress
import ssl
from collections.abc import Iterator
from contextlib import closing
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from coterie.desk.mailbox import Folder, Post, take_new
from coterie.store.database import writing
from coterie.store.mail import MailboxRow
from mail_support import PASSWORD, US, Postbox, deliver, free_port, imap_server, mail, mail_desk, spec


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that it signed itself, and its key."""
    folder, key = tmp_path_factory.mktemp("tls"), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    today = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(1)).not_valid_after(today + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ))  # fmt: skip
    return folder / "cert.pem", folder / "key.pem"


def signed_in(_server: Any, _session: Any, _envelope: Any, _mechanism: str, given: LoginPassword) -> AuthResult:
    return AuthResult(success=(given.login, given.password) == (US.encode(), PASSWORD.encode()))


@pytest.fixture(params=["smtps", "smtp+starttls"])
def smtp(request: pytest.FixtureRequest, certificate: tuple[Path, Path]) -> Iterator[tuple[str, Postbox]]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    box, port = Postbox(), free_port()
    secured = {"ssl_context": context} if request.param == "smtps" else {
        "tls_context": context, "require_starttls": True, "authenticator": signed_in, "auth_required": True,
    }  # fmt: skip
    controller = Controller(box, "127.0.0.1", port, **secured)
    controller.start()
    yield f"{request.param}://127.0.0.1:{port}", box
    controller.stop()


@pytest.fixture(autouse=True)
def password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTERIE_EMAIL_PASSWORD", PASSWORD)


def letter() -> EmailMessage:
    made = EmailMessage()
    made["From"], made["To"], made["Subject"] = US, "ada@mail.example", "Re: x"
    made.set_content("Yes.")
    return made


def test_a_letter_goes_over_an_encrypted_line_to_a_server_whose_certificate_is_trusted(
    smtp: tuple[str, Postbox], certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    post = Post(spec(smtp=smtp[0]))
    with pytest.raises(ssl.SSLCertVerificationError):  # an OSError: it is tried again, and nothing was sent
        post(letter(), US, "ada@mail.example")
    assert smtp[1].got == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    post(letter(), US, "ada@mail.example")
    assert [to for to, _ in smtp[1].got] == [["ada@mail.example"]]


def test_a_folder_is_read_over_starttls_only_where_the_certificate_is_trusted(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with imap_server(certificate) as port:
        declared = spec(imap=f"imap+starttls://127.0.0.1:{port}")
        with pytest.raises(ssl.SSLCertVerificationError):
            Folder(declared)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with closing(Folder(declared)) as folder:
            assert folder.state()[1] >= 1


def test_a_folder_that_is_numbered_anew_is_read_again_and_no_mail_is_doubled(tmp_path: Path) -> None:
    with imap_server() as port:
        deliver(port, mail("Old"), datetime.datetime.now(datetime.UTC) - datetime.timedelta(3))
        desk = mail_desk(tmp_path, lambda *_: None, imap=f"imap://127.0.0.1:{port}")
        with closing(Folder(desk.spec)) as folder:
            take_new(desk, folder)
            deliver(port, mail("One"))
            assert take_new(desk, folder) == {"new": 1}
            validity, _ = folder.state()
            with writing(desk.house.database) as session:  # as if the server had had another until now
                (mark,) = session.query(MailboxRow).filter(MailboxRow.name != "out")
                mark.validity = validity - 1
            deliver(port, mail("Two", sender="bob@mail.example"))
            assert take_new(desk, folder) == {"again": 1, "new": 1}
            assert take_new(desk, folder) == {}
    said = [desk.talks.messages(c.id)[0].text for c in desk.talks.listed()]
    assert sorted(said) == ["An order\n\nOne", "An order\n\nTwo"]
