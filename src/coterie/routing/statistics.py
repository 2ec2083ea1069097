"""What the router keeps of one expert: closed-form statistics of its own training inputs, and a sample of them.

They are made from the expert's own inputs and nothing else, so that adding or removing an expert leaves those of
all others as they are, byte for byte. The sample says where each input came from (file and row) and not what it
said: once a row is erased from the data, the router cannot show it.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from coterie.errors import DataError, ModelError
from coterie.files import write_atomic
from coterie.model.load import BaseModel
from coterie.routing.space import RECIPE, Floats, identity, locate

FILE = "routing.safetensors"
MOST = 2000  # inputs that are read; beyond, a sample
SAMPLE = 800  # of them, kept: 1.8 MB for a base model of width 576
T = TypeVar("T")


@dataclass(frozen=True)
class Summary:
    """What is held of every expert at all times: in the space `space`, the `mean` (width) of where its inputs lie."""

    space: str
    count: int
    mean: Floats


@dataclass(frozen=True)
class Statistics(Summary):
    """Of one version of one expert.

    `scatter` (width, width): the covariance of its inputs; `sample` (n, width) of them in float16, and `where` each
    row of it came from.
    """

    scatter: Floats
    sample: NDArray[np.float16]
    where: tuple[str, ...]

    def save(self, folder: Path) -> None:
        """Write them into the folder of an expert's version: of the covariance the upper triangle."""
        triangle = self.scatter[np.triu_indices(len(self.mean))]
        facts = {
            "space": self.space, "recipe": RECIPE, "count": str(self.count), "where": json.dumps(self.where),
        }  # fmt: skip
        content = save({"mean": self.mean, "scatter": triangle, "sample": self.sample}, facts)
        write_atomic(folder / FILE, content)


def made_at(folder: str) -> int:
    """When the statistics of a version were made, in nanoseconds; 0 where there are none."""
    try:
        return os.stat(f"{folder}/{FILE}").st_mtime_ns  # a Path for each of 10,000 experts would take longer than this
    except OSError:
        return 0


def up_to_date(folder: Path) -> bool:
    """Whether the statistics of a version are as this router makes them. Looks at nothing but the head of the file."""
    try:
        return _read(folder, lambda f: (f.metadata() or {}).get("recipe")) == RECIPE
    except ModelError:
        return False


def load_summary(folder: Path) -> Summary | None:
    """The summary of a version, without reading the rest of its file; None where it has none. Raises ModelError."""
    return _read(folder, _summary)


def load_statistics(folder: Path) -> Statistics | None:
    """The statistics of a version; None where it has none. Raises ModelError where the file is damaged."""
    return _read(folder, _statistics)


def _read(folder: Path, take: Callable[[Any], T]) -> T | None:
    if not (folder / FILE).exists():
        return None
    try:
        with safe_open(folder / FILE, "np") as f:
            return take(f)
    except Exception as error:  # safetensors raises its own kind
        mend = "`coterie fit` or `coterie experts learn-route` mends it"
        raise ModelError(f"{folder / FILE}: damaged ({error}); {mend}") from error


def _summary(f: Any) -> Summary:
    facts, mean = f.metadata() or {}, f.get_tensor("mean")
    if not np.isfinite(mean).all():
        raise ValueError("numbers that are not finite")
    return Summary(facts["space"], int(facts["count"]), mean)


def _statistics(f: Any) -> Statistics:
    known, where = _summary(f), tuple(json.loads(f.metadata()["where"]))
    triangle, sample, width = f.get_tensor("scatter"), f.get_tensor("sample"), len(known.mean)
    scatter = np.zeros((width, width), np.float32)
    scatter[np.triu_indices(width)] = triangle
    scatter += np.triu(scatter, 1).T
    if sample.shape != (len(where), width) or not len(sample):
        raise ValueError(f"a sample of shape {sample.shape} for {len(where)} rows of width {width}")
    if not all(np.isfinite(part).all() for part in (triangle, sample)):
        raise ValueError("numbers that are not finite")
    return Statistics(known.space, known.count, known.mean, scatter, sample, where)


def learn(base: BaseModel, inputs: Sequence[str], where: Sequence[str], seed: int = 0) -> Statistics:
    """The statistics of an expert that was trained on `inputs`, which came from `where`. Raises DataError for none."""
    if not inputs:
        raise DataError("the router needs at least one training input to know an expert by")
    chosen = np.random.default_rng(seed).permutation(len(inputs))[:MOST]
    vectors = locate(base, [inputs[i] for i in chosen])
    return Statistics(
        identity(base), len(inputs), vectors.mean(axis=0), np.cov(vectors, rowvar=False, bias=True).astype(np.float32),
        vectors[:SAMPLE].astype(np.float16), tuple(where[i] for i in chosen[:SAMPLE]),
    )  # fmt: skip
