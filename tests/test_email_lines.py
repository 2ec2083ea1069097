"""The lines to mail servers: encrypted ones with certificates that hold, a folder that is numbered anew; PostgreSQL."""

import datetime
import imaplib
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword
from sqlalchemy.exc import DBAPIError

from coterie.desk.mailbox import Folder, Post, take_new
from coterie.store.database import writing
from coterie.store.mail import MailboxRow
from mail_support import (
    PASSWORD,
    US,
    Postbox,
    deliver,
    free_port,
    imap_server,
    mail,
    mail_desk,
    self_signed,
    smtp_server,
    spec,
    tls_before,
)

pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH")  # aiosmtpd knows of TLS by STARTTLS only


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that it signed itself, and its key."""
    return self_signed(tmp_path_factory.mktemp("tls"))


def signed_in(_server: Any, _session: Any, _envelope: Any, _mechanism: str, given: LoginPassword) -> AuthResult:
    return AuthResult(success=(given.login, given.password) == (US.encode(), PASSWORD.encode()))


@pytest.fixture(params=["smtps", "smtp+starttls"])
def smtp(request: pytest.FixtureRequest, certificate: tuple[Path, Path]) -> Iterator[tuple[str, Postbox]]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    box, port = Postbox(), free_port()
    starttls = request.param == "smtp+starttls"
    secured = {"tls_context": context, "require_starttls": True} if starttls else {"ssl_context": context}
    controller = Controller(
        box, "127.0.0.1", port, authenticator=signed_in, auth_required=True, auth_require_tls=starttls, **secured
    )
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


def test_a_folder_is_read_over_tls_from_the_first_byte(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with imap_server() as plain, tls_before(plain, certificate) as port:
        desk = mail_desk(tmp_path, lambda *_: None, imap=f"imaps://127.0.0.1:{port}")
        with pytest.raises(ssl.SSLCertVerificationError):
            Folder(desk.spec)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with closing(Folder(desk.spec)) as folder:
            take_new(desk, folder)
            deliver(plain, mail("Over a safe line"))
            assert take_new(desk, folder) == {"new": 1}


@pytest.mark.parametrize("starttls", [False, True])
def test_a_certificate_of_another_host_ends_the_line(
    starttls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = self_signed(tmp_path, "other.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(other[0]))
    with imap_server(other if starttls else None) as plain, tls_before(plain, other) as port:
        address = f"imap+starttls://127.0.0.1:{plain}" if starttls else f"imaps://127.0.0.1:{port}"
        with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
            Folder(spec(imap=address))


def test_where_starttls_was_taken_away_no_password_is_sent() -> None:
    with imap_server() as imap, smtp_server() as (smtp, box):
        declared = spec(imap=f"imap+starttls://127.0.0.1:{imap}", smtp=f"smtp+starttls://127.0.0.1:{smtp}")
        with pytest.raises(imaplib.IMAP4.error, match=r"(?i)tls"):
            Folder(declared)
        with pytest.raises(OSError, match="STARTTLS"):
            Post(declared)(letter(), US, "ada@mail.example")
        assert box.got == []


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


def test_on_postgresql_two_processes_take_and_send_each_mail_once(
    new_postgres: Callable[..., str], tmp_path: Path
) -> None:
    url, now, box = new_postgres(migrated=True), [1_800_000_000.0], Postbox()

    def send(letter: EmailMessage, _sender: str, to: str) -> None:
        box.got.append(([to], letter))

    first = mail_desk(tmp_path, send, now, url)
    desks = [first, mail_desk(tmp_path, send, now, url)]  # the second finds the first one's keys
    mails = [mail(f"Message {n}", sender=f"c{n}@mail.example") for n in range(12)]
    first.send_due()  # from here on

    def work(n: int) -> None:
        for raw in mails[:: 1 if n else -1]:
            for _ in range(20):
                try:
                    desks[n].take(raw)
                    break
                except DBAPIError:  # the other was at it: fetched again
                    continue

    _both(work)
    talks = first.talks
    assert sorted(talks.messages(c.id)[0].text for c in talks.listed()) == sorted(
        f"An order\n\nMessage {n}" for n in range(12)
    )
    for c in talks.listed():
        turn = talks.claim(c.id)
        assert turn
        talks.finish(turn, f"An answer to {turn.messages[-1].text.split()[-1]}")
    now[0] += 2
    _both(lambda n: desks[n].send_due())
    assert sorted(to[0] for to, _ in box.got) == sorted(f"c{n}@mail.example" for n in range(12))
    assert first.take(mails[0]) == "again"
    for to, answer in box.got:
        number = to[0].partition("@")[0].removeprefix("c")
        assert f"An answer to {number}\n" in answer.get_content()  # type: ignore[attr-defined]
    for desk in desks:
        desk.house.close()


def _both(work: Callable[[int], object]) -> None:
    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
