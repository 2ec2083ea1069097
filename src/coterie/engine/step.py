"""The engine's step in C (step.c): built on this machine, fed with packed weights, called once for each step.

Only where the processor has AVX2, a C compiler is there, and the base is a dense decoder whose sizes are multiples of 32,
in bfloat16 where the processor multiplies that (AVX512-BF16), else in float32. Everywhere else, and for rows that Arrow
routes, PyTorch computes the same.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.engine.pages import PAGE, Pages
from coterie.experts import adapter, lora
from coterie.experts.adapter import BottleneckConfig
from coterie.experts.expert import Expert
from coterie.experts.mixture import Sites
from coterie.model.decoder import BLOCKS, SITES, Decoder
from coterie.model.native import built

SOURCE = Path(__file__).with_name("step.c")
LANES = 16  # numbers that one instruction sums, and outputs in a block of a packed matrix
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ACTIVATIONS = {"relu": 0, "swish": 1, "silu": 1, "gelu": 2}


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_P, _N = ctypes.c_void_p, ctypes.c_int64
_Layer = _struct("Layer", attn_norm=_P, ffn_norm=_P, q_norm=_P, k_norm=_P, qkv_bias=_P, o_bias=_P, qkv=_P, o=_P,
                 gate_up=_P, down=_P)  # fmt: skip
_Model = _struct("Model", layers=_N, width=_N, heads=_N, kv_heads=_N, head_dim=_N, ffn=_N, vocab=_N,
                 eps=ctypes.c_float, layer=_P, final_norm=_P, cos=_P, sin=_P, head=_P)  # fmt: skip
_LowRank = _struct("LowRank", a=_P, b=_P, gain=_P, rank=_N)
_Bottleneck = _struct("Bottleneck", down=_P, up=_P, down_bias=_P, up_bias=_P, size=_N, activation=_N, reads_sum=_N)
_Expert = _struct("Expert", low_rank=_P, bottleneck=_P, widest=_N)
_Group = _struct("Group", expert=_P, first=_N, count=_N, share=ctypes.c_float)
_Cache = _struct("Cache", keys=_P, values=_P, streams=_P, table=_P, entries=_P, layers=_N, span=_N, page=_N)


@cache
def _library() -> Any | None:
    library = built(SOURCE, needs=("avx2", "fma"))
    if library:
        library.coterie_step.argtypes = [_P, _P, _N, _P, _P, _P, _P, _N, _P, _N, _P, _P, _N, _P, ctypes.c_int]
    return library


def dtype() -> torch.dtype | None:
    """What the step computes from on this machine; None where there is no step."""
    library = _library()
    return {2: torch.bfloat16, 4: torch.float32}[library.coterie_num()] if library else None


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix (out, in) in `dtype` as step.c reads it; zeros fill the last block of 16 outputs, and an odd input."""
    out, wide = weight.shape
    padded = torch.zeros(-(-out // LANES) * LANES, wide + wide % 2, dtype=dtype)
    padded[:out, :wide] = weight
    together = 4 // dtype.itemsize  # inputs that one instruction takes: a pair in bfloat16
    return padded.view(-1, LANES, padded.shape[1] // together, together).transpose(1, 2).contiguous()


@dataclass(eq=False)
class Prepared:
    """An expert laid out for step.c, and what must live as long as it does."""

    struct: ctypes.Structure
    keep: list[Any] = field(default_factory=list)


class Step:
    """The step of one base model."""

    def __init__(self, decoder: Decoder, library: Any) -> None:
        self.decoder, self._library = decoder, library
        self._keep: list[Any] = []
        c, w = decoder.config, decoder.weights
        layers = (_Layer * c.layers)()
        for n, layer in enumerate(layers):
            for name in ("attn_norm", "ffn_norm", "q_norm", "k_norm"):
                setattr(layer, name, self._wide(w.get(f"{n}.{name}")))
            layer.qkv_bias, layer.o_bias = self._wide(w.get(f"{n}.qkv.bias")), self._wide(w.get(f"{n}.o.bias"))
            for site in SITES:
                setattr(layer, site, self._kept(pack(w[f"{n}.{site}"], decoder.dtype)))
        self._layers = layers
        self._model = _Model(
            c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.ffn, c.vocab, c.eps, ctypes.addressof(layers),
            self._wide(w["final_norm"]), self._wide(decoder.cos), self._wide(decoder.sin),
            self._kept(pack(w["embed" if c.tied else "head"], decoder.dtype)),
        )  # fmt: skip

    @classmethod
    def open(cls, decoder: Decoder) -> "Step | None":
        """None where this machine or this base cannot do it."""
        c = decoder.config
        fits = all(n % 32 == 0 for n in (c.width, c.head_dim, c.ffn)) and not c.sparse
        return cls(decoder, _library()) if fits and decoder.device.type == "cpu" and decoder.dtype == dtype() else None

    def _kept(self, weight: Tensor) -> int:
        self._keep.append(weight)
        return weight.data_ptr()

    def _wide(self, weight: Tensor | None) -> int | None:
        return None if weight is None else self._kept(weight.float().contiguous())

    def prepare(self, expert: Expert, sites: Sites | None = None) -> Prepared:
        """`expert` as `run` wants it. Soft prompts and prefixes change no product: theirs is empty.

        sites: of `lora.sites_of`, where the caller has them.
        """
        config, model = expert.config, self.decoder.config
        updates = (_LowRank * (model.layers * len(PROJECTIONS)))()
        bottlenecks = (_Bottleneck * (model.layers * len(BLOCKS)))()
        ready = Prepared(
            _Expert(ctypes.addressof(updates), ctypes.addressof(bottlenecks), LANES), [updates, bottlenecks]
        )
        for (layer, site), found in (lora.sites_of(expert, self.decoder) if sites is None else sites).items():
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
    parts = [pack(part("adapter_down.0.weight"), dtype), pack(up, dtype), bias, (part("adapter_up.bias") * config.scaling).float()]
    ready.keep += parts
    ready.struct.widest = max(ready.struct.widest, size)
    pointers = [p.data_ptr() for p in parts]
    return _Bottleneck(*pointers, size, ACTIVATIONS[config.activation], int(config.reads_sum))
