"""The engine's step in C (step.c): built on this machine, fed with packed weights, called once for each step.

Only where the processor has AVX2, a C compiler is there, and the base is a dense decoder whose sizes are multiples of
32, in bfloat16 where the processor multiplies that (AVX512-BF16), else in float32. Everywhere else, and for rows that
Arrow routes, PyTorch computes the same.

Notable: few rows wait for memory. In float32 the base's matrices are therefore held in 8 bits, a third of the bytes,
where that loses nothing (a base that comes out of GGUF's Q4_1 or Q8_0 lies on just such a grid) or the business allows
it, and a measurement at the start finds it slower for no number of rows. One way for all of them: which numbers a
request meets must not depend on who else is served. Inputs and sums stay in float32.
"""

import ctypes
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from coterie.engine.pages import PAGE, Pages
from coterie.experts import adapter, lora
from coterie.experts.adapter import BottleneckConfig
from coterie.experts.expert import Expert
from coterie.model.decoder import BLOCKS, Decoder
from coterie.model.native import built

SOURCE = Path(__file__).with_name("step.c")
LANES = 16  # numbers that one instruction sums, and outputs in a block of a packed matrix
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUP = 32  # inputs of a matrix in 8 bits that share a scale and an offset
LOST_NOTHING = 1e-12  # of a matrix's squared norm: float32's own rounding, and what is left of it in GGUF's grids
SAMPLE = 64 << 20  # bytes of float32 that are multiplied to see what is faster: more than a cache holds
CLEARLY = 1.25  # times as long is slower, whatever else the machine does meanwhile
PASSES = 3  # of each way, in turns; the shortest counts
Weights = Literal["exact", "int8"]
log = logging.getLogger(__name__)
ACTIVATIONS = {"relu": 0, "swish": 1, "silu": 1, "gelu": 2}


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_P, _N = ctypes.c_void_p, ctypes.c_int64
_Matrix = _struct("Matrix", exact=_P, in8=_P, scales=_P)
_Layer = _struct("Layer", attn_norm=_P, ffn_norm=_P, q_norm=_P, k_norm=_P, qkv_bias=_P, o_bias=_P, qkv=_Matrix,
                 o=_Matrix, gate_up=_Matrix, down=_Matrix, router=_P, gate_ups=_P, downs=_P)  # fmt: skip
_Model = _struct("Model", layers=_N, width=_N, heads=_N, kv_heads=_N, head_dim=_N, ffn=_N, vocab=_N, experts=_N,
                 per_token=_N, inner=_N, gate_normed=_N, eps=ctypes.c_float, layer=_P, final_norm=_P, cos=_P, sin=_P,
                 head=_Matrix)  # fmt: skip
_LowRank = _struct("LowRank", a=_P, b=_P, gain=_P, rank=_N)
_Bottleneck = _struct("Bottleneck", down=_P, up=_P, down_bias=_P, up_bias=_P, size=_N, activation=_N, reads_sum=_N)
_Expert = _struct("Expert", low_rank=_P, bottleneck=_P, widest=_N)
_Group = _struct("Group", expert=_P, first=_N, count=_N, share=ctypes.c_float)
_Cache = _struct("Cache", keys=_P, values=_P, streams=_P, table=_P, entries=_P, layers=_N, span=_N, page=_N)


@cache
def _library() -> Any | None:
    library = built(SOURCE)
    if library:
        library.coterie_step.argtypes = [_P, _P, _N, _P, _P, _P, _P, _N, _P, _N, _P, _P, _N, _P, ctypes.c_int]
        library.coterie_round.argtypes = [_P, _N, _N, _P, _P, ctypes.c_int]
        library.coterie_round.restype = ctypes.c_double
        library.coterie_product.argtypes = [_P, _N, _P, _N, _P, _N, ctypes.c_int]
        library.coterie_product.restype = None
    return library


def dtype() -> torch.dtype | None:
    """What the step computes from on this machine; None where there is no step."""
    library = _library()
    return {2: torch.bfloat16, 4: torch.float32}[library.coterie_num()] if library else None


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix (out, in) in `dtype` as step.c reads it; zeros fill the last block of 16 outputs, and the last pair."""
    out, wide = weight.shape
    together = 4 // dtype.itemsize  # inputs that one instruction takes: a pair in bfloat16
    padded = torch.zeros(-(-out // LANES) * LANES, wide + wide % together, dtype=dtype)
    padded[:out, :wide] = weight
    return padded.view(-1, LANES, padded.shape[1] // together, together).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class In8:
    """A matrix (out, in) in 8 bits as step.c reads it, `in` a multiple of 32.

    values (out/16, in, 16), scales (out/16, in/32, 2, 16): scales and offsets; off: the share of its squared norm that
    rounding took.
    """

    values: Tensor
    scales: Tensor
    off: float

    @classmethod
    def of(cls, weight: Tensor) -> "In8":
        """The nearest to `weight` (out, in), float32."""
        (out, wide), weight, library = weight.shape, weight.contiguous(), _library()
        assert library, "asked for by a step"
        values = torch.empty(-(-out // LANES), wide, LANES, dtype=torch.int8)
        scales = torch.empty(len(values), wide // GROUP, 2, LANES)
        off = library.coterie_round(
            weight.data_ptr(), out, wide, values.data_ptr(), scales.data_ptr(), torch.get_num_threads()
        )
        return cls(values, scales, off)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    @property
    def dense(self) -> Tensor:
        """What it multiplies by, (out, in), rows of zeros at the end up to a multiple of 16."""
        wide = self.values.shape[1]
        scale, offset = self.scales.repeat_interleave(GROUP, 1).unbind(2)  # (blocks, in, 16)
        return (self.values * scale + offset).transpose(1, 2).reshape(-1, wide)


@dataclass(eq=False)
class Prepared:
    """An expert laid out for step.c, and what must live as long as it does."""

    struct: ctypes.Structure
    keep: list[Any] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(x.nbytes if isinstance(x, Tensor) else ctypes.sizeof(x) for x in self.keep if x is not None)


class Step:
    """The step of one base model."""

    def __init__(self, decoder: Decoder, library: Any, weights: Weights, slots: int) -> None:
        self.decoder, self._library = decoder, library
        self._keep: list[Any] = []
        c, w = decoder.config, decoder.weights
        sites = [w[f"{n}.{site}"] for n in range(c.layers) for site in c.dense_sites(n)]
        self._lossy = weights == "int8"
        self._rounds = decoder.dtype == torch.float32 and self._gains([*sites, w[c.head]], slots)
        layers = (_Layer * c.layers)()
        for n, layer in enumerate(layers):
            for name in ("attn_norm", "ffn_norm", "q_norm", "k_norm"):
                setattr(layer, name, self._wide(w.get(f"{n}.{name}")))
            layer.qkv_bias, layer.o_bias = self._wide(w.get(f"{n}.qkv.bias")), self._wide(w.get(f"{n}.o.bias"))
            for site in c.dense_sites(n):
                setattr(layer, site, self._matrix(w[f"{n}.{site}"]))
            if n in c.sparse:
                layer.router = self._wide(w[f"{n}.router"])
                layer.gate_ups, layer.downs = (self._matrices(w[f"{n}.experts.{x}"]) for x in ("gate_up", "down"))
        self._layers = layers
        experts, per_token = (c.experts, c.experts_per_token) if c.sparse else (0, 0)
        self._model = _Model(
            c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.ffn, c.vocab, experts, per_token,
            c.expert_ffn or c.ffn, c.gate_normed, c.eps, ctypes.addressof(layers), self._wide(w["final_norm"]),
            self._wide(decoder.cos), self._wide(decoder.sin), self._matrix(w[c.head]),
        )  # fmt: skip

    @classmethod
    def open(cls, decoder: Decoder, weights: Weights = "exact", slots: int = 16) -> "Step | None":
        """None where this machine or this base cannot do it.

        weights: what the base's matrices may be held in; slots: up to how many rows decode at once.
        """
        c = decoder.config
        fits = all(n % 32 == 0 for n in (c.width, c.head_dim, c.ffn, c.expert_ffn)) and not c.capacity
        if not fits or decoder.device.type != "cpu" or decoder.dtype != dtype():
            return None
        return cls(decoder, _library(), weights, slots)

    @property
    def in8(self) -> int:
        """Bytes of the matrices that are held in 8 bits."""
        return sum(kept.nbytes for kept in self._keep if isinstance(kept, In8))

    def _gains(self, weights: list[Tensor], slots: int) -> bool:
        """Whether products by matrices in 8 bits are clearly slower than by the exact ones for no number of rows."""
        pairs: list[tuple[Any, Any, torch.Size]] = []  # a matrix in both ways, and its shape
        keep, self._keep, read = self._keep, [], 0
        try:
            for weight in weights:
                if read < SAMPLE:
                    exact, light = self._exact(weight), self._light(weight)
                    if light is None:
                        return False
                    pairs.append((exact, light, weight.shape))
                    read += weight.nbytes
            for rows in sorted({1 << n for n in range(slots.bit_length())} | {slots}):
                best = [float("inf")] * 2
                for _ in range(PASSES):
                    for way, fastest in enumerate(best):
                        began = time.perf_counter()
                        for *matrices, (out, wide) in pairs:
                            self._product(matrices[way], rows, out, wide)
                        best[way] = min(fastest, time.perf_counter() - began)
                log.debug("%d rows: %.2f ms exact, %.2f ms in 8 bits", rows, best[0] * 1e3, best[1] * 1e3)
                if best[1] > CLEARLY * best[0]:
                    return False
            return True
        finally:
            self._keep = keep  # what was only measured is let go

    def _product(self, matrix: Any, rows: int, out: int, wide: int) -> Tensor:
        y = torch.empty(rows, -(-out // LANES) * LANES)
        x = torch.ones(rows, wide)
        self._library.coterie_product(
            ctypes.byref(matrix), rows, x.data_ptr(), wide, y.data_ptr(), y.shape[1], torch.get_num_threads()
        )
        return y

    def _matrices(self, experts: Tensor) -> int:
        """A mixture's, of weights (experts, out, in)."""
        made = (_Matrix * len(experts))(*(self._matrix(weight) for weight in experts))
        self._keep.append(made)
        return ctypes.addressof(made)

    def _matrix(self, weight: Tensor) -> Any:
        light = self._light(weight) if self._rounds else None
        return self._exact(weight) if light is None else light

    def _exact(self, weight: Tensor) -> Any:
        return _Matrix(self._kept(pack(weight, self.decoder.dtype)), None, None)

    def _light(self, weight: Tensor) -> Any | None:
        """The matrix in 8 bits; None where that would lose what may not be lost."""
        light = In8.of(weight)
        if light.off > LOST_NOTHING and not self._lossy:
            return None
        self._keep.append(light)
        return _Matrix(None, light.values.data_ptr(), light.scales.data_ptr())

    def _kept(self, weight: Tensor) -> int:
        self._keep.append(weight)
        return weight.data_ptr()

    def _wide(self, weight: Tensor | None) -> int | None:
        return None if weight is None else self._kept(weight.float().contiguous())

    def prepare(self, expert: Expert) -> Prepared:
        """`expert` as `run` wants it. Soft prompts and prefixes change no product: theirs is empty."""
        config, model = expert.config, self.decoder.config
        updates = (_LowRank * (model.layers * len(PROJECTIONS)))()
        bottlenecks = (_Bottleneck * (model.layers * len(BLOCKS)))()
        ready = Prepared(
            _Expert(ctypes.addressof(updates), ctypes.addressof(bottlenecks), LANES), [updates, bottlenecks]
        )
        for (layer, site), found in lora.sites_of(expert, self.decoder).items():
            self._prepare_site(config, layer, site, found, updates, ready)
        for layer in range(config.first_layer, model.layers) if config.kind == "adapter" else ():
            for block in adapter.PLACES[config.placement]:
                place = layer * len(BLOCKS) + BLOCKS.index(block)
                bottlenecks[place] = _bottleneck(expert, layer, block, self.decoder.dtype, ready)
        return ready

    def _prepare_site(
        self, config: lora.LoraConfig, layer: int, site: str, found: lora.Site, updates: Any, ready: Prepared
    ) -> None:
        owned = torch.tensor(lora.columns(config, self.decoder.config, site))
        start = 0
        for part, (projection, size) in enumerate(self.decoder.config.site_outputs(site)):
            span = slice(start, start + size)
            start += size
            mine = owned == part
            if not bool(mine.any()):
                continue
            rank = -(-int(mine.sum()) // LANES) * LANES
            up = torch.zeros(size, rank, dtype=self.decoder.dtype)
            up[:, : int(mine.sum())] = found.up[span][:, mine]
            gain = None if found.gain is None else found.gain[span].float().contiguous()
            a, b = pack(found.down[mine], up.dtype), pack(up, up.dtype)
            ready.keep += [a, b, gain]
            ready.struct.widest = max(ready.struct.widest, rank)
            updates[layer * len(PROJECTIONS) + PROJECTIONS.index(projection)] = _LowRank(
                a.data_ptr(), b.data_ptr(), None if gain is None else gain.data_ptr(), rank
            )

    def run(
        self, embedded: Tensor, positions: Tensor, slots: Tensor, cache: Pages,
        groups: Sequence[tuple[Prepared, int, int, float]], wanted: Tensor, starts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Scores (wanted, vocab) in float32 after the rows `wanted`, where every row is one more token of a sequence.

        embedded (rows, width), positions (rows); slots (rows) of the cache, which takes their keys and values. groups:
        expert, first row, rows, and the share that its update has. starts (rows), ascending: the layers at which rows
        begin, those above 0 with the residual stream that the cache has kept; a group's rows begin at one layer.
        """
        logits = torch.empty(len(wanted), self.decoder.config.vocab)
        starts = torch.zeros_like(positions) if starts is None else starts
        self._call(embedded, positions, slots, starts, cache, groups, wanted, logits, self.decoder.config.layers, None)
        return logits

    def trunk(self, ids: list[int], layers: int) -> Tensor:
        """The residual stream (tokens, width) in float32 of one text after the lowest `layers`."""
        c = self.decoder.config
        cache = Pages(replace(c, layers=layers), 1, len(ids), self.decoder.dtype)
        cache.make_room(cache.begin(0, cache.parts(None, layers), []), 0, len(ids))
        stream, nothing = torch.empty(len(ids), c.width), torch.zeros(0, dtype=torch.long)
        at, embedded = torch.arange(len(ids)), self.decoder.embed(torch.tensor(ids))
        first = torch.zeros_like(at)
        self._call(embedded, at, first, first, cache, (), nothing, torch.empty(0), layers, stream)
        return stream

    def _call(
        self, embedded: Tensor, positions: Tensor, slots: Tensor, starts: Tensor, cache: Pages,
        groups: Sequence[tuple[Prepared, int, int, float]], wanted: Tensor, logits: Tensor, layers: int,
        stream: Tensor | None,
    ) -> None:  # fmt: skip
        embedded = embedded.contiguous()
        table = (_Group * max(1, len(groups)))(*[
            _Group(ctypes.addressof(expert.struct), first, count, share) for expert, first, count, share in groups
        ])  # fmt: skip
        where = _Cache(
            cache.keys.data_ptr(), cache.values.data_ptr(), cache.streams.data_ptr(), cache.table.ctypes.data,
            cache.entries.ctypes.data, cache.config.layers, cache.span, PAGE,
        )  # fmt: skip
        failed = self._library.coterie_step(
            ctypes.byref(self._model), ctypes.byref(where), len(embedded), embedded.data_ptr(), positions.data_ptr(),
            slots.data_ptr(), starts.data_ptr(), len(groups), table, len(wanted), wanted.data_ptr(), logits.data_ptr(),
            layers, None if stream is None else stream.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("a step found no memory for its buffers")


def _bottleneck(expert: Expert, layer: int, block: str, dtype: torch.dtype, ready: Prepared) -> ctypes.Structure:
    config: BottleneckConfig = expert.config
    size = -(-config.size // LANES) * LANES

    def part(name: str) -> Tensor:
        return expert.weights[adapter.weight_name(layer, block, name)].to(dtype)

    bias = torch.zeros(size)
    bias[: config.size] = part("adapter_down.0.bias")
    up = torch.zeros(len(part("adapter_up.weight")), size, dtype=dtype)
    up[:, : config.size] = part("adapter_up.weight") * config.scaling
    parts = [
        pack(part("adapter_down.0.weight"), dtype),
        pack(up, dtype),
        bias,
        (part("adapter_up.bias") * config.scaling).float(),
    ]
    ready.keep += parts
    ready.struct.widest = max(ready.struct.widest, size)
    pointers = [p.data_ptr() for p in parts]
    return _Bottleneck(*pointers, size, ACTIVATIONS[config.activation], int(config.reads_sum))
