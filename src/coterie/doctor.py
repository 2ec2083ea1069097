"""What works on this machine and in this business, and the mend for what does not."""

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from coterie.config import FILE
from coterie.data.read import check_file
from coterie.errors import CoterieError
from coterie.model.load import default_dtype, load
from coterie.model.pull import DEFAULT, find, models_dir

LEAST_FREE = 2 << 30  # bytes


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    good: bool
    says: str


def examine(folder: Path) -> list[Check]:
    """Look at Python, processor, memory, disk, base model, and the business in `folder` if there is one."""
    from coterie.business import Business

    model = DEFAULT

    def base() -> str:
        path = find(model)
        if path is None:
            raise CoterieError(f"{model} is not here yet; `coterie pull {model}` fetches it")
        return f"{load(path).name} at {path}"

    def disk() -> str:
        place = folder if folder.exists() else Path()
        free = shutil.disk_usage(place).free
        if free < LEAST_FREE:
            raise CoterieError(f"{free / 2**30:.1f} GiB free; free up 2 GiB")
        return f"{free / 2**30:.0f} GiB free"

    def business() -> str:
        opened = Business.open(folder)
        for spec in opened.config.experts.values():
            for file in opened.files(spec.train + spec.test):
                check_file(file)
        for name in opened.library.names():
            opened.library.facts(name)
        return f"{opened.config.business.name}: {len(opened.config.experts)} experts declared, " \
               f"{len(opened.library.names())} in the library"  # fmt: skip

    looks: list[tuple[str, Callable[[], str]]] = [
        ("python", lambda: f"{platform.python_version()} at {sys.executable}"),
        ("processor", _processor), ("disk", disk), ("models", lambda: str(models_dir())),
    ]  # fmt: skip
    if (folder / FILE).exists():
        looks.append(("business", business))
        try:
            model = Business.open(folder).config.business.base
            if (folder / model).exists():
                model = str(folder / model)
        except CoterieError:
            pass
    return [_look(name, look) for name, look in [*looks, ("base model", base)]]


def _processor() -> str:
    kind = str(default_dtype()).removeprefix("torch.")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{where}, computing in {kind}"


def _look(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except (CoterieError, OSError) as error:
        return Check(name, False, str(error))
