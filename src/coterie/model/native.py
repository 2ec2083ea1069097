"""Kernels in C, built with the machine's own compiler when they are first needed, and kept beside the base models."""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from coterie.model.pull import models_dir

INCLUDED = Path(__file__).with_name("vector.h")
NEEDS = {"avx2", "fma"}  # by the names of /proc/cpuinfo: what vector.h is written for
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
log = logging.getLogger(__name__)


def built(source: Path) -> Any | None:
    """`source` as a shared library; None where it cannot be built or this processor lacks what it needs."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    flags = Path("/proc/cpuinfo")
    if not compiler or not flags.exists() or not NEEDS.issubset(flags.read_text().split()):
        return None
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        facts = next(line for line in flags.read_text().splitlines() if line.startswith("flags"))
        content = source.read_bytes() + INCLUDED.read_bytes() + version + facts.encode() + repr(FLAGS).encode()
        made = models_dir().parent / "built" / f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"
        if not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
                fresh, include = Path(scratch) / "fresh.so", f"-I{INCLUDED.parent}"
                command = [compiler, *FLAGS, include, str(source), "-o", str(fresh), "-lm"]
                subprocess.run(command, capture_output=True, check=True)
                fresh.replace(made)
        return ctypes.CDLL(str(made))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s cannot be built (%s): PyTorch computes it, more slowly", source.name, error)
        return None
