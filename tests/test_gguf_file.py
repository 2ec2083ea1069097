"""GGUF files are read as the package `gguf` reads them, and what is damaged is refused with a known error."""

import struct
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value
from hypothesis import given
from hypothesis import strategies as st

from coterie.model.gguf_file import TOGETHER, read

NUMBERS = {
    Value.UINT8: st.integers(0, 255), Value.INT32: st.integers(-(2**31), 2**31 - 1), Value.BOOL: st.booleans(),
    Value.UINT64: st.integers(0, 2**64 - 1), Value.FLOAT32: st.floats(width=32, allow_nan=False),
    Value.FLOAT64: st.floats(allow_nan=False), Value.STRING: st.text(max_size=20),
}  # fmt: skip
REFUSED = (ValueError, KeyError, OSError, MemoryError, struct.error)  # what `load` makes a ModelError of


@st.composite
def facts(draw: st.DrawFn) -> dict[str, tuple[Value, Value | None, Any]]:
    """By key: the kind of a value, that of an array's items, and the value."""
    found: dict[str, tuple[Value, Value | None, Any]] = {}
    for n in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(list(NUMBERS)))
        if draw(st.booleans()):
            found[f"a.{n}"] = (Value.ARRAY, kind, draw(st.lists(NUMBERS[kind], min_size=1, max_size=5)))
        else:
            found[f"s.{n}"] = (kind, None, draw(NUMBERS[kind]))
    return found


def write(path: Path, known: dict[str, tuple[Value, Value | None, Any]], tensors: dict[str, tuple[Any, Kind]]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for name, (kind, inner, value) in known.items():
        writer.add_key_value(name, value, kind, inner)
    for name, (weights, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@given(known=facts(), rows=st.integers(1, 40), blocks=st.integers(1, 80), kind=st.sampled_from(
    [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q4_0]
))  # fmt: skip
def test_facts_and_tensors_are_those_that_the_gguf_package_reads(
    known: dict[str, tuple[Value, Value | None, Any]], rows: int, blocks: int, kind: Kind
) -> None:
    """Up to 3,200 blocks: some sizes are below and some above TOGETHER, where the rest is read apart."""
    weights = np.random.default_rng(rows * blocks).standard_normal((rows, 32 * blocks)).astype(np.float32)
    assert TOGETHER < 3200
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        write(path, known, {"w": (weights, kind), "one": (weights[0, :32], Kind.F32)})
        meta, tensors = read(path)
        theirs = gguf.GGUFReader(path)
        wanted = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
        assert meta == wanted
        assert list(tensors) == ["w", "one"]
        for tensor in theirs.tensors:
            numbers = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
            assert tensors[tensor.name].kind == tensor.tensor_type
            np.testing.assert_array_equal(tensors[tensor.name].numbers(), numbers)


@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_with_a_known_error(data: st.DataObject) -> None:
    """Cut anywhere, or with any byte of its head changed: a length of 2^63 neither hangs nor takes the memory."""
    weights = np.ones((2, 32), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        write(path, {"s": (Value.STRING, None, "words"), "a": (Value.ARRAY, Value.INT32, [1, 2]),
                     "t": (Value.ARRAY, Value.STRING, ["x", "y"])}, {"w": (weights, Kind.Q8_0)})  # fmt: skip
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        else:
            content[data.draw(st.integers(0, 250))] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(content))
        try:
            tensors = read(path)[1]
        except REFUSED:
            return
        for tensor in tensors.values():
            try:
                tensor.numbers()
            except (NotImplementedError, *REFUSED):
                continue


NESTED = struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"a", Value.ARRAY, Value.ARRAY, 1) * 2000


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"GGML" + bytes(20), "GGUF"), (b"GGUF\x01" + bytes(19), "version 1"), (NESTED, "array of arrays")],
    ids=("magic", "old", "nested"),
)
def test_what_is_not_gguf_is_said(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "m.gguf")
