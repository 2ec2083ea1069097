"""The trunk's activations of a data set, computed once and kept on disk.

An expert confined to the upper layers (the branch) leaves what the lower ones (the trunk) compute unchanged, so
that it need be computed once for a data set: every epoch, every further run and every other such expert on the
same data starts from it. Rows are computed when a batch first needs them, so that training begins at once. The
file's name is a digest of the trunk's weights, the tokens and the cut, so a cache made by other weights or other data
is never found.

Notable: a run that was killed goes on with the same bits. What a row comes to may differ in its last bits with the rows
that are computed beside it, so a batch's rows are noted as there (in the file of marks, 4 bytes each) in one write,
after they are: the batch is found whole or computed whole again.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coterie.data.encode import TokenSet
from coterie.model.decoder import Decoder, attend_packed, packed_positions
from coterie.tuning.forward import once, same_start

BUDGET = 8 << 30  # bytes that all caches of a business may take; the longest unused go first
MARK = np.dtype(np.int32)


class Trunk:
    """The residual stream before layer `cut` for the tokens of `data`, all but the last of each row."""

    def __init__(
        self, decoder: Decoder, data: TokenSet, cut: int, folder: Path, budget: int = BUDGET,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.decoder, self.data, self.cut, self.tell = decoder, data, cut, tell
        self.kept = np.zeros(len(data), np.bool_)  # which rows `values` has
        self.values: Tensor | None = None  # (tokens, width), in memory that is the file
        size = len(data.tokens) * decoder.config.width * decoder.dtype.itemsize
        file = folder / f"{_digest(decoder, data, cut)}.trunk"
        try:
            if size > budget:
                raise OSError(0, f"{size / 2**30:.1f} GiB are over the budget of {budget / 2**30:.1f} GiB")
            folder.mkdir(parents=True, exist_ok=True)
            _make_room(folder, file, budget - size)
            self._open(file, size)
        except OSError as error:
            self._do_without(error)

    def start(self, rows: list[int]) -> Tensor:
        """The residual stream of all tokens but the last of each row, (tokens, width)."""
        if self.values is None:
            return self._compute(rows)
        missing = [i for i in rows if not self.kept[i]]
        try:
            if missing:
                self._keep(missing, self.values)
        except OSError as error:
            self._do_without(error)
            return self._compute(rows)
        return torch.cat([self.values[self._place(i)] for i in rows]).to(self.decoder.device)

    def _do_without(self, error: OSError) -> None:
        self.values = None
        self.tell(f"the trunk's activations are not kept, and computed anew each time: {error.strerror}")

    def _place(self, row: int) -> slice:
        return slice(self.data.ends[row], self.data.ends[row + 1] - 1)

    def _open(self, file: Path, size: int) -> None:
        self.marks = _marks(file)
        if not (file.exists() and file.stat().st_size == size and self.marks.exists()):
            self.marks.unlink(missing_ok=True)
            with file.open("wb") as f:
                try:
                    os.posix_fallocate(
                        f.fileno(), 0, max(size, 1)
                    )  # a full disk says so here, not when pages are written
                except OSError:
                    file.unlink()
                    raise
            self.marks.touch()
        os.utime(file)
        noted = self.marks.read_bytes()
        self.kept[np.frombuffer(noted[: len(noted) // MARK.itemsize * MARK.itemsize], MARK)] = True
        kind = np.int16 if self.decoder.dtype.itemsize == 2 else np.float32
        self.stored = np.memmap(file, kind, "r+", shape=(len(self.data.tokens), self.decoder.config.width))
        self.values = torch.from_numpy(self.stored).view(self.decoder.dtype)

    def _keep(self, rows: list[int], values: Tensor) -> None:
        made = self._compute(rows).cpu()
        for i, part in zip(rows, made.split((self.data.lengths()[rows] - 1).tolist()), strict=True):
            values[self._place(i)] = part
        self.stored.flush()
        with self.marks.open("ab", buffering=0) as f:
            f.write(np.array(rows, MARK).tobytes())
        self.kept[rows] = True

    @torch.no_grad()
    def _compute(self, rows: list[int]) -> Tensor:
        tokens = [torch.from_numpy(self.data.row(i)[0][:-1].astype(np.int64)) for i in rows]
        shared = same_start(tokens, min(map(len, tokens)) - 1)
        lengths, device = [len(t) - shared for t in tokens], self.decoder.device
        hidden = self.decoder.embed(once(tokens, shared).to(device))
        positions, attend = packed_positions(lengths, device, shared), attend_packed(lengths, shared)
        out = self.decoder.run(hidden, positions, attend, layers=range(self.cut))
        start, rest = out[:shared], out[shared:].split(lengths)
        return torch.cat([part for one in rest for part in (start, one)])


def _marks(file: Path) -> Path:
    """Beside a cache, the rows that it has."""
    return file.with_suffix(".rows")


def _digest(decoder: Decoder, data: TokenSet, cut: int) -> str:
    """Of everything that decides the activations."""
    digest = hashlib.sha256(f"{decoder.config} {decoder.dtype} {cut}".encode())
    for name, w in sorted(decoder.weights.items()):
        if name == "embed" or (name[0].isdigit() and int(name.split(".")[0]) < cut):
            digest.update(w.contiguous().cpu().view(torch.uint8).numpy().data)
    digest.update(np.ascontiguousarray(data.tokens).data)
    digest.update(np.ascontiguousarray(data.ends).data)
    return digest.hexdigest()[:24]


def _make_room(folder: Path, keep: Path, budget: int) -> None:
    """Delete the longest unused caches until those left take at most `budget` bytes."""
    others = sorted((f for f in folder.glob("*.trunk") if f != keep), key=lambda f: f.stat().st_mtime)
    taken = sum(f.stat().st_size for f in others)
    for file in others:
        if taken <= budget:
            return
        taken -= file.stat().st_size
        file.unlink()
        _marks(file).unlink(missing_ok=True)
