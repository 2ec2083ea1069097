"""The master key: 32 bytes that wrap every customer's key, from the environment, a file, or a command of a KMS."""

import base64
import binascii
import hashlib
import os
import secrets
import shlex
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from coterie.errors import CoterieError, StorageError

VARIABLE = "COTERIE_MASTER_KEY"  # the key itself, base64; _FILE: a file with it; _COMMAND: a command that prints it
COMMAND_TIMEOUT_S = 30
NONCE = 12  # bytes


class KeyLost(CoterieError):
    """The master key is missing or another one: what is encrypted stays as it is, and nothing starts."""

    exit_code = 3
    status = 503
    code = "master_key"


@dataclass(frozen=True)
class MasterKey:
    """`id` is its fingerprint. The key itself is never shown."""

    key: bytes = field(repr=False)

    @property
    def id(self) -> str:
        return hashlib.sha256(b"coterie master key\0" + self.key).hexdigest()[:32]

    def wrap(self, secret: bytes, about: bytes) -> bytes:
        """`secret` encrypted (AES-256-GCM); it opens only with the same `about`."""
        nonce = secrets.token_bytes(NONCE)
        return nonce + AESGCM(self.key).encrypt(nonce, secret, about)

    def unwrap(self, wrapped: bytes, about: bytes) -> bytes:
        """What `wrap` was given. Raises KeyLost."""
        try:
            return AESGCM(self.key).decrypt(wrapped[:NONCE], wrapped[NONCE:], about)
        except (InvalidTag, ValueError):
            raise KeyLost("a key in the database does not open with this master key, or was changed") from None


def new_key() -> str:
    """A fresh master key, as it is written in a file or a variable."""
    return base64.b64encode(secrets.token_bytes(32)).decode()


def read_key(text: str, where: str) -> MasterKey:
    """The key in base64. Raises CoterieError that names `where`, never the text."""
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise CoterieError(f"{where}: not a master key (32 bytes in base64); make one with `coterie keys new`")
    return MasterKey(key)


def master_key(environment: Mapping[str, str] | None = None) -> MasterKey | None:
    """The key that the environment names, or None where it names none. Raises CoterieError."""
    env = os.environ if environment is None else environment
    named = [v for v in (VARIABLE, f"{VARIABLE}_FILE", f"{VARIABLE}_COMMAND") if env.get(v)]
    if len(named) > 1:
        raise CoterieError(f"{' and '.join(named)} are both set; keep one")
    if not named:
        return None
    value = env[named[0]]
    if named[0] == VARIABLE:
        return read_key(value, VARIABLE)
    return _from_file(Path(value)) if named[0].endswith("_FILE") else _from_command(value)


def _from_file(file: Path) -> MasterKey:
    try:
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise CoterieError(f"{file}: others may read the master key; chmod 600 {shlex.quote(str(file))}")
        return read_key(file.read_text(errors="replace"), str(file))
    except OSError as error:
        raise KeyLost(f"{file}: the master key cannot be read ({error.strerror})") from error


def _from_command(command: str) -> MasterKey:
    try:
        done = subprocess.run(
            shlex.split(command), capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise KeyLost(f"{VARIABLE}_COMMAND could not be run ({type(error).__name__})") from error
    if done.returncode:
        raise KeyLost(f"{VARIABLE}_COMMAND failed with exit code {done.returncode}")
    return read_key(done.stdout, f"what {VARIABLE}_COMMAND printed")


def write_key(file: Path) -> None:
    """A fresh key in a new file that only its owner reads. Raises CoterieError where there is one already."""
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise CoterieError(f"{file}: exists already; a master key is never overwritten") from error
    except OSError as error:
        raise StorageError(f"{file}: cannot be written ({error.strerror})") from error
    with os.fdopen(handle, "w") as opened:
        opened.write(new_key() + "\n")
        opened.flush()
        os.fsync(opened.fileno())
