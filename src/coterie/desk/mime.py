"""A mail taken apart: who wrote, what they wrote anew, what it answers, what came with it, and whether to trust it.

Notable: everything here comes from strangers. Nothing is fetched, nothing is run, and no header is believed but the
first Authentication-Results that bears our own server's name: that server puts it on top and takes away forged ones
(RFC 8601, section 5). What the writer quotes is put aside and never lost. Automatic mail is told as RFC 3834 and
common practice have it. Every loop here is linear in the mail.
"""

import email
import re
from collections.abc import Iterator
from dataclasses import dataclass
from email.header import decode_header, make_header
from email.message import Message
from email.utils import getaddresses
from typing import Any, Literal

import lxml.html

DEEPEST, MOST_PARTS, MOST_HEADER = 20, 200, 2000
ADDRESS = re.compile(r"[^\s@<>()\[\],;:\"\\]{1,64}@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*")
MESSAGE_ID = re.compile(r"<([^<>\s]{1,900})>")
# The line by which Outlook and others begin what they quote; other programs' quotes need no words.
ORIGINAL = re.compile(
    r"-{2,}\s*(?:original message|forwarded message|ursprüngliche nachricht|message d'origine|mensaje original|"
    r"messaggio originale|oorspronkelijk bericht|mensagem original|ursprungligt meddelande)\s*-{2,}",
    re.IGNORECASE,
)
_FIELD = re.compile(r"\*?[^\W\d_][\w .'-]{0,24}\*?\s?[:\uff1a]\*?\s\S")  # "Gesendet: Montag, ..."
_FROM = re.compile(r"\*?(?:from|von|de|da|van|från|fra|od|от|发件人|差出人)\s?[:\uff1a]\*?\s", re.IGNORECASE)
_BLOCKS = set(["p", "div", "tr", "li", "ul", "ol", "table", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "pre", "section"])
_UNSEEN = {"script", "style", "head", "title", "template", "noscript", "object", "iframe", "svg", "math"}
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden|font-size\s*:\s*0(?![.\d])|mso-hide\s*:\s*all", re.I)
Kind = Literal["person", "automatic", "bounce"]


@dataclass(frozen=True)
class File:
    """What came with a mail; `type` is what the sender calls it."""

    name: str
    type: str
    body: bytes


@dataclass(frozen=True)
class Incoming:
    """A mail. `text`: what is new in it, `quoted`: what it repeats; `answers`: Message-IDs, the nearest first."""

    sender: str
    name: str
    subject: str
    text: str
    quoted: str
    message_id: str
    answers: tuple[str, ...]
    to: tuple[str, ...]
    kind: Kind
    verified: bool
    files: tuple[File, ...] = ()


def read_mail(raw: bytes, authserv: str = "") -> Incoming:
    """Any bytes at all give something; what is missing is empty."""
    mail = email.message_from_bytes(raw)
    texts, pages, files = list[str](), list[str](), list[File]()
    for part in _leaves(mail):
        kind = part.get_content_type()
        named = _filename(part)
        if kind in ("text/plain", "text/html") and not named and part.get_content_disposition() != "attachment":
            (texts if kind == "text/plain" else pages).append(_text(part))
        else:
            body = _bytes(part)
            if body or named:
                files.append(File(named or f"file.{kind.partition('/')[2][:12]}", kind[:100], body))
    plain = "\n".join(texts).strip() or "\n".join(page_text(page) for page in pages)
    text, quoted = split_reply(plain)
    senders = _addresses(mail, "from")
    sender, name = (senders[0][1], senders[0][0]) if senders else ("", "")
    answers = [m for header in ("in-reply-to", "references") for m in reversed(MESSAGE_ID.findall(_raw(mail, header)))]
    return Incoming(
        sender, name[:200], " ".join(_header(mail, "subject").split())[:500], text, quoted,
        next(iter(MESSAGE_ID.findall(_raw(mail, "message-id"))), ""), tuple(dict.fromkeys(answers)),
        tuple(a for h in ("to", "cc", "delivered-to", "x-original-to") for _, a in _addresses(mail, h)),
        _kind(mail, sender), bool(authserv) and _verified(mail, senders, authserv), tuple(files),
    )  # fmt: skip


def _leaves(part: Message, depth: int = 0) -> Iterator[Message]:
    """Parts that hold something: of alternatives the plain text, else the last; a mail within the mail is a file."""
    children: Any = part.get_payload()
    if part.get_content_maintype() != "multipart" or not isinstance(children, list):
        yield part
        return
    if depth == DEEPEST:
        return
    children = children[:MOST_PARTS]
    if part.get_content_subtype() == "alternative":
        plain = [c for c in children if c.get_content_type() == "text/plain" and _text(c).strip()]
        children = plain[:1] or children[-1:]
    for child in children:
        yield from _leaves(child, depth + 1)


def _bytes(part: Message) -> bytes:
    inner: Any = part.get_payload()
    if isinstance(inner, list):  # message/rfc822, message/delivery-status
        return b"\n".join(m.as_bytes() for m in inner)
    found: Any = part.get_payload(decode=True)
    return found if isinstance(found, bytes) else b""


def _text(part: Message) -> str:
    body, charset = _bytes(part), str(part.get_content_charset() or "utf-8")
    try:
        return body.decode(charset)
    except (LookupError, ValueError):
        return body.decode("utf-8", "replace")


def _filename(part: Message) -> str:
    try:
        given = part.get_filename() or ""
        given = str(make_header(decode_header(given)))
    except (LookupError, ValueError, TypeError):
        given = "file"
    name = re.sub(r"[\x00-\x1f\x7f\u202a-\u202e\u2066-\u2069]", "", given)  # no right-to-left tricks in a name
    return re.split(r"[/\\]", name)[-1].strip(". ")[:120]


def _raw(mail: Message, name: str) -> str:
    """All headers of this name, as they were sent."""
    return " ".join(str(value)[: MOST_HEADER * 5] for value in mail.get_all(name, []))


def _header(mail: Message, name: str) -> str:
    given = str(mail.get(name, ""))[:MOST_HEADER]
    try:
        return str(make_header(decode_header(given)))
    except (LookupError, ValueError):
        return given


def _addresses(mail: Message, name: str) -> list[tuple[str, str]]:
    """Pairs of name and address, in small letters."""
    out = []
    for shown, address in getaddresses([str(v)[: MOST_HEADER * 5] for v in mail.get_all(name, [])]):
        if ADDRESS.fullmatch(address):
            try:
                shown = str(make_header(decode_header(shown)))
            except (LookupError, ValueError):
                shown = ""
            out.append((re.sub(r"[\x00-\x1f\x7f]", " ", shown), address.lower()))
    return out


def _kind(mail: Message, sender: str) -> Kind:
    """What must not be answered: reports of delivery, and mail that programs wrote."""
    if mail.get_content_type() == "multipart/report":
        return "bounce"
    local = sender.partition("@")[0]
    if _raw(mail, "return-path").strip() == "<>" or local in ("mailer-daemon", "postmaster"):
        return "bounce" if local in ("mailer-daemon", "postmaster") else "automatic"
    submitted = _raw(mail, "auto-submitted").strip().lower()
    precedence = _raw(mail, "precedence").strip().lower()
    automatic = (
        (submitted and not submitted.startswith("no"))
        or precedence in ("bulk", "junk", "list", "auto_reply")
        or any(mail.get(h) for h in ("list-id", "x-autoreply", "x-autorespond"))
        or re.fullmatch(r"(?:no|do-?not)-?reply|bounces?(?:[+=-].*)?", local)
        or not sender
    )
    return "automatic" if automatic else "person"


def _verified(mail: Message, senders: list[tuple[str, str]], authserv: str) -> bool:
    """Whether our server found that the mail is from the domain of its one sender: DMARC, else DKIM or SPF of it."""
    froms = [str(v) for v in mail.get_all("from", [])]
    if len(froms) != 1 or len(senders) != 1 or re.sub(r'"[^"]*"', "", froms[0]).count("@") != 1:
        return False
    domain = senders[0][1].rpartition("@")[2]
    for header in mail.get_all("authentication-results", []):
        said = re.sub(r'"[^"]*"', "", _without_comments(" ".join(str(header).split())[: MOST_HEADER * 5])).lower()
        name, *results = said.split(";")
        if name.split()[:1] == [authserv.lower()]:
            return any(_passes(result, domain) for result in results)
    return False


def _without_comments(text: str) -> str:
    out, depth = [], 0
    for c in text:
        depth += c == "("
        if not depth:
            out.append(c)
        depth -= c == ")" and depth > 0
    return "".join(out)


def _passes(result: str, domain: str) -> bool:
    """One method's result, for the sender's domain or the one above it."""
    method, *properties = result.split()[:20] or [""]
    values = dict(p.partition("=")[::2] for p in properties)
    key = {"dmarc=pass": "header.from", "dkim=pass": "header.d", "spf=pass": "smtp.mailfrom"}.get(method)
    signed = values.get(key or "", "").rpartition("@")[2].strip(".")
    return "." in signed and (domain == signed or domain.endswith("." + signed))


# What is new, and what is quoted


def split_reply(text: str) -> tuple[str, str]:
    """What was written anew, and what follows it: a quote, a signature under "-- ". Answers between quoted lines stay
    as they are; where nothing would be left, all of it is new."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    cut = next((n for n, line in enumerate(lines) if line in ("--", "\u2014") or _begins_quote(lines, n)), len(lines))
    end = cut
    while end and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith(">")):
        end -= 1
    if any(line.lstrip().startswith(">") for line in lines[end:cut]):
        cut = _attribution(lines, end)
    new = "\n".join(lines[:cut]).strip()
    return (new, "\n".join(lines[cut:]).strip()) if new else ("\n".join(lines).strip(), "")


def _begins_quote(lines: list[str], n: int) -> bool:
    if ORIGINAL.fullmatch(lines[n].strip()):
        return True
    below = [line.strip() for line in lines[n : n + 6]]
    return bool(_FROM.match(below[0])) and sum(bool(_FIELD.match(line)) for line in below) >= 3


def _attribution(lines: list[str], end: int) -> int:
    """Where a quote that begins after line `end` does with its "On Monday Ada wrote:", of up to three lines."""
    if end and lines[end - 1].endswith((":", "\uff1a")):
        for n in range(1, 4):
            above = " ".join(lines[max(0, end - n) : end])
            if re.search(r"@|\d", above):
                return max(0, end - n)
            if end - n <= 0 or not lines[end - n - 1].strip():
                break
    return end


def page_text(page: str) -> str:
    """HTML as text: nothing of it is run or fetched, what a reader would not see is left out, quotes get "> "."""
    try:
        root = lxml.html.document_fromstring(re.sub(r"^\s*<\?xml[^>]*>", "", page.replace("\x00", "")))
    except (ValueError, lxml.etree.LxmlError):
        return ""
    out = list[str]()
    # Walked by a stack: a page of strangers may be deeper than Python's calls.
    stack: list[Any] = [root]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            out.append(item)
            continue
        tail = item.tail or ""
        stack.append(re.sub(r"\s+", " ", tail))
        tag = item.tag if isinstance(item.tag, str) else ""
        if not tag or tag in _UNSEEN or _HIDDEN.search(item.get("style") or "") or item.get("hidden") is not None:
            continue
        quote, block = tag == "blockquote", tag in _BLOCKS
        if block or quote or tag == "br":
            stack.append("\n")
        if quote:
            stack.append("\x02")
        stack.extend(reversed(item))
        stack.append(re.sub(r"\s+", " ", item.text or ""))
        if quote:
            stack.append("\n\x01")
        elif block:
            stack.append("\n")
    return _quoted("".join(out))


def _quoted(text: str) -> str:
    """Lines between \\x01 and \\x02 behind "> "; many empty lines become one."""
    lines, depth = list[str](), 0
    for line in text.split("\n"):
        depth = max(0, depth + line.count("\x01"))
        words = line.replace("\x01", "").replace("\x02", "").replace("\xa0", " ").strip()
        if words or (lines and lines[-1]):
            lines.append("> " * min(depth, 5) + words if words else "")
        depth = max(0, depth - line.count("\x02"))
    return "\n".join(lines).strip()
