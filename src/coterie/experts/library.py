"""The expert library: a versioned shelf of experts, one folder for each version.

    experts/<name>/<version>/   adapter_model.safetensors, adapter_config.json (PEFT reads them as they are),
                                expert.json (what it is and how it was made), evaluation.json, README.md (its card)
    experts/<name>/current      the number of the version that answers

Notable: a version is written aside and put in place by one rename, and `current` by another; a process killed at
any point leaves either the old state or the new one. Weights are never changed, only added and removed.
"""

import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError, ModelError, StorageError, UnknownExpert
from coterie.experts.card import card
from coterie.files import check_free, write_atomic

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
RESERVED = ("base", "auto", "arrow")
SHOWN = 20  # names that an error lists
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExpertFacts:
    """What is known of one version of an expert; kept in its expert.json."""

    name: str
    kind: str = "lora"
    version: int = 0
    description: str = ""
    system: str = ""  # the instruction it was trained with, given to requests that bring none
    choices: tuple[str, ...] = ()  # the answers it may give; empty for free text
    examples: tuple[tuple[str, str], ...] = ()  # questions and answers shown before the conversation
    base: str = ""
    base_mark: str = ""  # of the base model's weights (Decoder.mark); empty where nobody noted it
    fingerprint: str = ""  # of base, data and settings: `fit` trains again only when it changes
    created: str = ""
    training: dict[str, Any] = field(default_factory=dict)


def check_name(name: str) -> str:
    """The name, if an expert may have it. Raises CoterieError."""
    if not NAME.fullmatch(name) or name in RESERVED:
        raise CoterieError(
            f"{name!r} cannot name an expert: use small letters, digits, '-', '_', '.'; not {' or '.join(RESERVED)}"
        )
    return name


@dataclass(frozen=True)
class Library:
    """The shelf at `root`."""

    root: Path

    def names(self) -> list[str]:
        """Names of the experts that have a current version."""
        return sorted(p.parent.name for p in self.root.glob("*/current"))

    def marks(self) -> dict[str, int]:
        """By name, when an expert last got a version or another one became its current: one look at each folder."""
        found: dict[str, int] = {}
        for name in filter(NAME.fullmatch, os.listdir(self.root) if self.root.exists() else ()):
            with suppress(FileNotFoundError):  # removed meanwhile
                found[name] = os.stat(f"{self.root}/{name}").st_mtime_ns
        return found

    def versions(self, name: str) -> list[int]:
        """Version numbers of an expert, oldest first."""
        return sorted(int(p.name) for p in (self.root / name).glob("*") if p.name.isdigit())

    def current(self, name: str) -> int | None:
        """The version of `name` that answers, or None. Raises ModelError where the file that says it is damaged."""
        file = self.root / name / "current"
        if not NAME.fullmatch(name) or not file.exists():
            return None
        try:
            return int(file.read_text())
        except ValueError as error:
            raise ModelError(
                f"{file}: damaged, not a version number; `coterie experts promote {name} VERSION` mends it"
            ) from error

    def folder(self, name: str, version: int | None = None) -> Path:
        """The folder of a version, by default the current one. Raises UnknownExpert."""
        version = self.current(name) if version is None else version
        folder = self.root / name / str(version)
        if version is None or not NAME.fullmatch(name) or not folder.is_dir():
            names = self.names()
            known = ", ".join(names[:SHOWN]) or "none yet; `coterie fit` trains them"
            known += f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            what = f"{name!r}" if version is None else f"version {version} of {name!r}"
            raise UnknownExpert(f"there is no expert {what}; in the library: {known}")
        return folder

    def facts(self, name: str, version: int | None = None) -> ExpertFacts:
        """What is known of a version. Raises UnknownExpert, or ModelError where its expert.json is damaged."""
        file = self.folder(name, version) / "expert.json"
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            known = {f.name for f in fields(ExpertFacts)}
            facts: dict[str, Any] = {k: tuple(v) if k == "choices" else v for k, v in raw.items() if k in known}
            facts["examples"] = tuple((asked, answered) for asked, answered in raw.get("examples", ()))
            return ExpertFacts(**facts)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{file}: damaged ({error}); remove this version or import it again") from error

    def shelf(self) -> list[ExpertFacts]:
        """Facts of all current versions. Damaged ones are left out, and named in the log."""
        out = []
        for name in self.names():
            try:
                out.append(self.facts(name))
            except CoterieError as error:
                log.warning("left out: %s", error)
        return out

    def evaluation(self, name: str, version: int | None = None) -> dict[str, Any]:
        """The measurements published with a version; empty where there are none. Raises ModelError where damaged."""
        file = self.folder(name, version) / "evaluation.json"
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: damaged ({error}); delete it, and `coterie eval` measures again") from error
        return found

    def publish(
        self, facts: ExpertFacts, fill: Callable[[Path], None], evaluation: dict[str, Any] | None = None
    ) -> ExpertFacts:
        """Add a version, whose weights `fill` writes into the folder it is given, and make it current."""
        shelf = self.root / check_name(facts.name)
        version = max(self.versions(facts.name), default=0) + 1
        facts = replace(facts, version=version)
        try:
            shelf.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=shelf, prefix=".publish-"))
        except OSError as error:
            raise StorageError(f"{shelf}: cannot be written ({error.strerror})") from error
        try:
            fill(scratch)
            write_atomic(scratch / "expert.json", json.dumps(asdict(facts), indent=2, ensure_ascii=False) + "\n")
            if evaluation is not None:
                write_atomic(scratch / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
            write_atomic(scratch / "README.md", card(facts, evaluation or {}))
            for file in [scratch, *scratch.rglob("*")]:
                file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors and mkdtemp leave them to their owner alone
                if file.is_file():
                    with file.open("rb") as f:
                        os.fsync(f.fileno())
            os.rename(scratch, shelf / str(version))
        except CoterieError:
            raise
        except Exception as error:  # safetensors raises its own kind for a full disk
            raise StorageError(f"{shelf}: version {version} cannot be written: {error}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self.promote(facts.name, version)
        self.sweep(facts.name)
        return facts

    def promote(self, name: str, version: int) -> None:
        """Let `version` answer from now on; also how one rolls back. Raises UnknownExpert."""
        self.folder(name, version)
        write_atomic(self.root / name / "current", f"{version}\n")
        self.touch()

    def stamp(self) -> int:
        """Changes whenever an expert is added, removed or promoted; 0 while there is no shelf."""
        return self.root.stat().st_mtime_ns if self.root.exists() else 0

    def touch(self) -> None:
        """Change the stamp: whoever watches the shelf looks again."""
        now = max(time.time_ns(), self.stamp() + 1)
        os.utime(self.root, ns=(now, now))

    def describe(self, name: str, version: int, description: str) -> ExpertFacts:
        """Say in other words what a version is for."""
        facts = replace(self.facts(name, version), description=description)
        folder = self.folder(name, version)
        write_atomic(folder / "expert.json", json.dumps(asdict(facts), indent=2, ensure_ascii=False) + "\n")
        write_atomic(folder / "README.md", card(facts, self.evaluation(name, version)))
        return facts

    def record(self, name: str, version: int, evaluation: dict[str, Any]) -> None:
        """Add measurements to a version, and bring its card up to date."""
        folder = self.folder(name, version)
        merged = {**self.evaluation(name, version), **evaluation}
        write_atomic(folder / "evaluation.json", json.dumps(merged, indent=2) + "\n")
        write_atomic(folder / "README.md", card(self.facts(name, version), merged))

    def remove(self, name: str) -> None:
        """Take an expert with all its versions off the shelf. Raises UnknownExpert."""
        self.folder(name)
        gone = Path(tempfile.mkdtemp(dir=self.root, prefix=".removed-"))
        os.rename(self.root / name, gone / name)
        shutil.rmtree(gone, ignore_errors=True)

    def export(self, name: str, target: Path, version: int | None = None) -> None:
        """Copy a version to `target`, a new folder. Raises UnknownExpert, CoterieError, StorageError."""
        source = self.folder(name, version)
        check_free(target)
        scratch = target.with_name(f".{target.name}.part")
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.copytree(source, scratch)
            os.rename(scratch, target)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise StorageError(f"{target}: cannot be written ({error.strerror or error})") from error

    def sweep(self, name: str) -> None:
        """Delete what killed runs left of versions that were never published."""
        for folder in (self.root / name).glob(".publish-*"):
            shutil.rmtree(folder, ignore_errors=True)
