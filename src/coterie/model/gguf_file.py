"""Read a GGUF file: its facts and its tensors.

The package `gguf` has a reader, which makes several array views for each of the vocabulary's 100,000 strings: 3 to 5
seconds at every start, where this takes a tenth of one. Its types and its dequantisation are used.
Source: the format's specification (github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize
from numpy.typing import NDArray

SCALARS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip
TOGETHER = 1 << 10  # blocks that are dequantised in one row: long rows are few calls, and 16 of them fit the cache


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as it lies in the file. shape: outermost dimension first; data: its bytes."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    def numbers(self) -> NDArray[np.float32]:
        """float32, of the tensor's shape. Raises NotImplementedError for a kind that `gguf` cannot read."""
        size = GGML_QUANT_SIZES[self.kind][1]
        blocks = len(self.data) // size
        whole = blocks - blocks % TOGETHER
        parts = [self.data[: whole * size].reshape(-1, TOGETHER * size), self.data[whole * size :].reshape(1, -1)]
        made = [np.asarray(dequantize(p, self.kind), np.float32).reshape(-1) for p in parts if p.size]
        return np.concatenate(made).reshape(self.shape)


class _Cursor:
    """Takes one value after another from the bytes of a file. Raises struct.error beyond their end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self) -> str:
        written: bytes = self.take(f"{self.take('<Q')}s")
        return written.decode()

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.take("<" + SCALARS[kind])
        inner, count = GGUFValueType(self.take("<I")), self.take("<Q")
        if inner in SCALARS:
            form = f"<{count}{SCALARS[inner]}"
            start, self.at = self.at, self.at + struct.calcsize(form)
            return list(struct.unpack_from(form, self.data, start))
        if inner == GGUFValueType.ARRAY:
            raise ValueError("it has an array of arrays, which is not read")
        return [self.value(inner) for _ in range(count)]


def read(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """A GGUF file's facts by key, and its tensors by name.

    Raises OSError, ValueError, KeyError, MemoryError or struct.error where it is not whole or not GGUF.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(data)
    if cursor.take("4s") != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := cursor.take("<I")) not in (2, 3):
        raise ValueError(f"version {version}; known: 2 and 3")
    tensors, facts = cursor.take("<Q"), cursor.take("<Q")
    meta: dict[str, Any] = {}
    for _ in range(facts):
        name = cursor.text()
        meta[name] = cursor.value(GGUFValueType(cursor.take("<I")))
    listed: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]] = []
    for _ in range(tensors):
        name = cursor.text()
        shape = tuple(cursor.take("<Q") for _ in range(cursor.take("<I")))[::-1]
        listed.append((name, shape, GGMLQuantizationType(cursor.take("<I")), cursor.take("<Q")))
    align = meta.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1:
        raise ValueError(f"general.alignment is {align!r}")
    start = -(-cursor.at // align) * align
    found: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in listed:
        block, size = GGML_QUANT_SIZES[kind]
        count = math.prod(shape)
        if start + offset + count // block * size > len(data):
            raise ValueError(f"{name} ends beyond the file's end")
        found[name] = GgufTensor(kind, shape, np.frombuffer(data, np.uint8, count // block * size, start + offset))
    return meta, found
