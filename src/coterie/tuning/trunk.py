"""The trunk's activations of a data set, computed once and kept on disk.

An expert confined to the upper layers (the branch) leaves what the lower ones (the trunk) compute unchanged, so
that it need be computed once for a data set: every epoch, every further run and every other such expert on the
same data starts from it. The file's name is a digest of the trunk's weights, the tokens and the cut, so a cache
made by other weights or other data is never found.
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

GROUP_TOKENS = 4096  # tokens of one forward; groups are fixed, so that a resumed cache has the same bits
BUDGET = 8 << 30  # bytes that all caches of a business may take; the longest unused go first


class Trunk:
    """The residual stream before layer `cut` for every token of `data`."""

    def __init__(
        self, decoder: Decoder, data: TokenSet, cut: int, folder: Path, budget: int = BUDGET,
        tell: Callable[[str], None] = lambda _: None,
        progress: Callable[[int, int], None] = lambda _done, _all: None,
    ) -> None:  # fmt: skip
        self.decoder, self.data, self.cut = decoder, data, cut
        self.values: Tensor | None = None  # (tokens, width), memory-mapped
        size = len(data.tokens) * decoder.config.width * decoder.dtype.itemsize
        file = folder / f"{_digest(decoder, data, cut)}.trunk"
        try:
            if size > budget:
                raise OSError(0, f"{size / 2**30:.1f} GiB are over the budget of {budget / 2**30:.1f} GiB")
            folder.mkdir(parents=True, exist_ok=True)
            _make_room(folder, file, budget - size)
            self._fill(file, size, progress)
        except OSError as error:
            tell(f"the trunk's activations are not kept, and computed anew each time: {error.strerror}")
            self.values = None

    def start(self, rows: list[int]) -> Tensor:
        """The residual stream of all tokens but the last of each row, (tokens, width)."""
        if self.values is None:
            return self._compute(rows, [slice(0, -1)] * len(rows))
        ends = self.data.ends
        return torch.cat([self.values[ends[i] : ends[i + 1] - 1] for i in rows]).to(self.decoder.device)

    def _fill(self, file: Path, size: int, progress: Callable[[int, int], None]) -> None:
        groups = _groups(self.data)
        marks = file.with_suffix(".done")
        kind = np.int16 if self.decoder.dtype.itemsize == 2 else np.float32
        fresh = not (file.exists() and file.stat().st_size == size and marks.exists())
        if fresh:
            marks.unlink(missing_ok=True)
            with file.open("wb") as f:
                try:
                    os.posix_fallocate(
                        f.fileno(), 0, max(size, 1)
                    )  # a full disk says so here, not when pages are written
                except OSError:
                    file.unlink()
                    raise
            marks.write_bytes(bytes(len(groups)))
        os.utime(file)
        stored = np.memmap(file, kind, "r+", shape=(len(self.data.tokens), self.decoder.config.width))
        done = np.memmap(marks, np.bool_, "r+", shape=(len(groups),))
        values = torch.from_numpy(stored).view(self.decoder.dtype)
        for n, rows in enumerate(groups):
            if not done[n]:
                first, last = self.data.ends[rows[0]], self.data.ends[rows[-1] + 1]
                values[first:last] = self._compute(list(rows), [slice(None)] * len(rows)).cpu()
                stored.flush()
                done[n] = True
                progress(n + 1, len(groups))
        done.flush()
        self.values = values

    @torch.no_grad()
    def _compute(self, rows: list[int], parts: list[slice]) -> Tensor:
        tokens = [
            torch.from_numpy(self.data.row(i)[0][part].astype(np.int64)) for i, part in zip(rows, parts, strict=True)
        ]
        shared = same_start(tokens, min(map(len, tokens)) - 1)
        lengths, device = [len(t) - shared for t in tokens], self.decoder.device
        hidden = self.decoder.embed(once(tokens, shared).to(device))
        positions, attend = packed_positions(lengths, device, shared), attend_packed(lengths, shared)
        out = self.decoder.run(hidden, positions, attend, layers=range(self.cut))
        start, rest = out[:shared], out[shared:].split(lengths)
        return torch.cat([part for one in rest for part in (start, one)])


def _groups(data: TokenSet) -> list[range]:
    """Rows in their order, so many together as make up GROUP_TOKENS (one long row may be more)."""
    out, first = [], 0
    for i in range(1, len(data) + 1):
        if i == len(data) or data.ends[i + 1] - data.ends[first] > GROUP_TOKENS:
            out.append(range(first, i))
            first = i
    return out


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
        file.with_suffix(".done").unlink(missing_ok=True)
