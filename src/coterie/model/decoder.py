"""The decoder of the Llama family: Llama 2/3, SmolLM2, Mistral, Qwen2/2.5/3, Mixtral and other mixtures of experts.

Notable: one forward for training, prefill and decoding. Sequences are packed end to end, (tokens, width),
with no padding; what differs between the three uses is only `attend`, a function that owns masks and cache,
and `change`, what an expert makes of the output of a projection or of a whole block (and whoever trains a router,
of its logits). Both are passed in, so the model knows of neither. `run` takes a range of layers, so that the lower
ones (the trunk) can be computed once.
Sources: Touvron et al. 2023 (Llama 2); Su et al. 2021 (RoPE); Ainslie et al. 2023 (GQA).
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.model import grouped, moe
from coterie.model.gradients import Padded, rms_norm, rotate, swiglu, written_out_attention

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q (N,H,D), k and v (N,Hkv,D) -> (N,H,D)
# Layer, site, x (N, in), out (N, out) -> what out becomes; it may write into out, and leaves unknown sites alone.
Change = Callable[[int, str, Tensor, Tensor], Tensor]
MARKED = 256  # numbers of each weight that tell a model from others
SHORT = 256  # tokens; up to here training writes attention out
SITES = ("qkv", "o", "gate_up", "down")  # projections, fused as they are computed
BLOCKS = ("attn", "ffn")  # the two halves of a layer: for a change there, x is the residual stream they add to


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a decoder, named as in Hugging Face's config.json where they agree."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    context: int
    eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    tied: bool = True
    qk_norm: bool = False
    family: str = "llama"
    experts: int = 0  # feed-forward experts of each layer in `sparse`; 0: a dense model
    experts_per_token: int = 2
    gate_normed: bool = True  # the weights of a token's experts sum to 1
    sparse: tuple[int, ...] = ()  # layers whose feed-forward is a mixture of experts
    expert_ffn: int = 0  # inner width of one expert, where it is not `ffn`
    capacity: float = 0.0  # only while training: an expert takes this many times its even share of tokens; 0: all

    @property
    def head(self) -> str:
        """The name of the output layer's weight."""
        return "embed" if self.tied else "head"

    def site_outputs(self, site: str) -> list[tuple[str, int]]:
        """The projections fused at a site, with their output sizes."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": [("q_proj", q), ("k_proj", kv), ("v_proj", kv)],
            "o": [("o_proj", self.width)],
            "gate_up": [("gate_proj", self.ffn), ("up_proj", self.ffn)],
            "down": [("down_proj", self.width)],
        }[site]

    def dense_sites(self, layer: int) -> tuple[str, ...]:
        """Sites that have one matrix for all tokens: in a layer with a mixture of experts, attention's only."""
        return SITES[:2] if layer in self.sparse else SITES

    def site_input(self, site: str) -> int:
        return {"o": self.heads * self.head_dim, "down": self.ffn}.get(site, self.width)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Inverse frequencies, (head_dim / 2), after the scaling the config asks for (`divided`: as GGUF writes it)."""
    freq = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    scaling = config.rope_scaling
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        return freq / float(scaling["factor"])
    if kind == "divided":
        return freq / torch.tensor(scaling["by"])
    if kind == "llama3":
        # Long wavelengths are stretched, short ones kept, those between interpolated (Llama 3.1).
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        turns = float(scaling["original_max_position_embeddings"]) * freq / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * freq / float(scaling["factor"]) + smooth * freq
    return freq


class _FrozenLinear(torch.autograd.Function):
    """x (N, in) by a packed weight that takes no gradient itself."""

    @staticmethod
    def forward(ctx, x, decoder, name):  # type: ignore[no-untyped-def]
        ctx.decoder, ctx.name = decoder, name
        return decoder.apply(x, decoder.packed[name])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return ctx.decoder.apply(grad.contiguous(), ctx.decoder.backward_pack(ctx.name)), None, None


def packs_bfloat16() -> bool:
    """Whether oneDNN has matrices in bfloat16 on this processor: with AVX-512."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Decoder:
    """A frozen decoder: `weights` by name, fused by site, and one `forward`."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], packed: bool = False) -> None:
        self.config, self.weights = config, weights
        self.device, self.dtype = weights["embed"].device, weights["embed"].dtype
        angles = torch.outer(torch.arange(config.context, dtype=torch.float32), rope_frequencies(config))
        self.cos = angles.cos().to(self.device)  # (context, D/2)
        self.sin = angles.sin().to(self.device)
        # oneDNN keeps a blocked copy of each matrix: twice as fast for the few rows of a decoding step.
        self.packed: dict[str, Tensor] = {}
        self.packed_back: dict[str, Tensor] = {}
        self.prepack = packed and self.device.type == "cpu" and self.dtype == torch.bfloat16 and packs_bfloat16()
        if self.prepack:
            for name, w in weights.items():
                if w.dim() == 2 and w.dtype == self.dtype and (name != "embed" or config.tied):
                    self.packed[name] = self.pack(w)
        experts = {name: w for name, w in weights.items() if self.prepack and w.dim() == 3}
        if all(grouped.takes(w) for w in experts.values()):
            experts = {}  # grouped.c wants them plain
        self.packed_experts = {name: [self.pack(expert) for expert in w] for name, w in experts.items()}

    @cached_property
    def mark(self) -> str:
        """Tells these weights from all others of the same shapes: a digest of some numbers of each, the same in float32
        and in bfloat16."""
        digest = hashlib.sha256(str(self.config).encode())
        for name, w in sorted(self.weights.items()):
            some = w.flatten()[:: max(1, w.numel() // MARKED)].bfloat16().contiguous().cpu()
            digest.update(name.encode() + some.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as they were read; each way of computing lays them out once more."""
        return sum(w.nbytes for w in self.weights.values())

    def pack(self, weight: Tensor) -> Tensor:
        """`weight` (out, in) in the layout that `apply` wants."""
        if self.prepack:
            return torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # type: ignore[no-any-return]
        return weight

    def apply(self, x: Tensor, packed: Tensor) -> Tensor:
        """x (N, in) by a weight that `pack` gave, (N, out)."""
        if self.prepack:
            return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")  # type: ignore[no-any-return]
        return F.linear(x, packed)

    def backward_pack(self, name: str) -> Tensor:
        """The packed transpose of a weight, for gradients; made when training first asks for it."""
        if name not in self.packed_back:
            self.packed_back[name] = self.pack(self.weights[name].t().contiguous())
        return self.packed_back[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.weights.get(name + ".bias")
        if name in self.packed:
            if torch.is_grad_enabled() and x.requires_grad:
                trained: Tensor = _FrozenLinear.apply(x, self, name)  # type: ignore[no-untyped-call]
                return trained if bias is None else trained + bias
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed[name], bias, "none", [], "")
            return out
        return F.linear(x, self.weights[name], bias)

    def project(self, layer: int, site: str, x: Tensor, change: Change | None) -> Tensor:
        out = self.linear(x, f"{layer}.{site}")
        return change(layer, site, x, out) if change else out

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[name], self.config.eps)

    def embed(self, ids: Tensor) -> Tensor:
        """Where the residual stream begins, (N, width), for token ids (N)."""
        return self.weights["embed"][ids]

    def run(
        self, hidden: Tensor, positions: Tensor, attend: Attend, change: Change | None = None,
        layers: range | None = None,
    ) -> Tensor:  # fmt: skip
        """The residual stream (N, width) of packed tokens at `positions` (N) after `layers`, by default all."""
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (N, 1, D), as `rotate` wants them
        for layer in range(self.config.layers) if layers is None else layers:
            mixed = self._attention(layer, hidden, cos, sin, attend, change)
            hidden = hidden + (change(layer, "attn", hidden, mixed) if change else mixed)
            fed = self._feed_forward(layer, hidden, change)
            hidden = hidden + (change(layer, "ffn", hidden, fed) if change else fed)
        return hidden

    def _attention(
        self, layer: int, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend, change: Change | None
    ) -> Tensor:
        c, n = self.config, len(hidden)
        q_size, kv_size = c.heads * c.head_dim, c.kv_heads * c.head_dim
        x = self.norm(hidden, f"{layer}.attn_norm")
        qk, v = self.project(layer, "qkv", x, change).split([q_size + kv_size, kv_size], dim=-1)
        qk = qk.view(n, c.heads + c.kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = qk.split([c.heads, c.kv_heads], dim=1)
            qk = torch.cat((self.norm(q, f"{layer}.q_norm"), self.norm(k, f"{layer}.k_norm")), dim=1)
        q, k = rotate(qk, cos, sin).split([c.heads, c.kv_heads], dim=1)
        mixed = attend(layer, q, k, v.view(n, c.kv_heads, c.head_dim)).reshape(n, q_size)
        return self.project(layer, "o", mixed, change)

    def _feed_forward(self, layer: int, hidden: Tensor, change: Change | None) -> Tensor:
        x = self.norm(hidden, f"{layer}.ffn_norm")
        if layer in self.config.sparse:
            return self._experts(layer, x, change)
        return self.project(layer, "down", swiglu(self.project(layer, "gate_up", x, change)), change)

    def _experts(self, layer: int, x: Tensor, change: Change | None) -> Tensor:
        c = self.config
        logits = moe.score(x, self.weights[f"{layer}.router"])
        if change:
            logits = change(layer, "router", x, logits)
        names = (f"{layer}.experts.gate_up", f"{layer}.experts.down")
        trains = torch.is_grad_enabled() and x.requires_grad
        kept: dict[str, Any] = self.packed_experts if self.packed_experts and not trains else self.weights
        gate_up, down = (kept[name] for name in names)
        return moe.feed_forward(x, logits, gate_up, down, c.experts_per_token, c.gate_normed, c.capacity)

    def finish(self, hidden: Tensor) -> Tensor:
        """The residual stream after the last layer, normed for `logits`, (N, width)."""
        return self.norm(hidden, "final_norm")

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend, change: Change | None = None) -> Tensor:
        """Hidden states (N, width) of packed tokens `ids` (N) at `positions` (N), normed for `logits`."""
        return self.finish(self.run(self.embed(ids), positions, attend, change))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, (N, vocab) in float32."""
        return self.linear(hidden, self.config.head).float()


def packed_positions(lengths: list[int], device: torch.device | str = "cpu", shared: int = 0) -> Tensor:
    """Positions 0..n-1 of each packed sequence, (sum of lengths), behind those of `shared` tokens that stand before all
    of them, once."""
    starts = [torch.arange(shared, device=device)] if shared else []
    return torch.cat([*starts, *(torch.arange(shared, shared + n, device=device) for n in lengths)])


def attend_packed(lengths: list[int], shared: int = 0, prefix: Tensor | None = None) -> Attend:
    """Causal attention within each packed sequence. The first `shared` tokens of all stand before every sequence.

    `prefix` (layers, 2, P, Hkv, D), keys and values of no tokens, stands before everything.
    Only here are sequences padded, on the right, where a causal mask already hides the padding.
    """
    longest, count = max(lengths), len(lengths)
    behind = shared + (0 if prefix is None else prefix.shape[2])
    rows = torch.arange(count).repeat_interleave(torch.tensor(lengths))
    places = packed_positions(lengths)
    first = attend_packed([shared], prefix=prefix) if shared else None
    layout: list[Padded] = []  # made when the first layer says how many heads there are

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = [] if prefix is None else [(prefix[layer, 0], prefix[layer, 1])]
        if first is None:
            return each(q, k, v, seen)
        (q0, q), (k0, k), (v0, v) = (t.split([shared, len(t) - shared]) for t in (q, k, v))
        return torch.cat([first(layer, q0, k0, v0), each(q, k, v, [*seen, (k0, v0)])])

    def each(q: Tensor, k: Tensor, v: Tensor, seen: list[tuple[Tensor, Tensor]]) -> Tensor:
        before = (
            (torch.cat([s[0] for s in seen]), torch.cat([s[1] for s in seen])) if seen else None
        )  # (behind, Hkv, D)
        learns = q.requires_grad or k.requires_grad or (before is not None and before[0].requires_grad)
        if longest <= SHORT and learns:
            if not layout:
                layout.append(_padded(rows, places, longest, count, behind, q.shape[1], k.shape[1], q.device))
            return written_out_attention(q, k, v, before, layout[0])
        place = (rows * longest + places).to(q.device)  # (N) where a token lies in the padded batch

        def pad(x: Tensor) -> Tensor:  # (N, H, D) -> (B, H, T, D)
            out = x.new_zeros(count * longest, *x.shape[1:]).index_copy(0, place, x)
            return out.view(count, longest, *x.shape[1:]).transpose(1, 2)

        keys, values = pad(k), pad(v)
        mask = None
        if before is not None:
            first_keys, first_values = (t.transpose(0, 1).expand(count, -1, -1, -1) for t in before)  # (B, Hkv, P, D)
            keys, values = torch.cat([first_keys, keys], dim=2), torch.cat([first_values, values], dim=2)
            mask = torch.ones(longest, behind + longest, dtype=torch.bool, device=q.device).tril(behind)
        group = q.shape[1] // k.shape[1]
        keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
        out = F.scaled_dot_product_attention(pad(q), keys, values, attn_mask=mask, is_causal=mask is None)
        return out.transpose(1, 2).reshape(count * longest, *q.shape[1:])[place]

    return attend


def _padded(
    rows: Tensor, places: Tensor, longest: int, count: int, shared: int, heads: int, kv_heads: int,
    device: torch.device,
) -> Padded:  # fmt: skip
    """Where the heads of each token (row, place) go, with the queries of a group side by side."""
    group, span = heads // kv_heads, shared + longest
    h, kv = torch.arange(heads), torch.arange(kv_heads)
    queries = ((rows[:, None] * kv_heads + h // group) * longest + places[:, None]) * group + h % group
    keys = (rows[:, None] * kv_heads + kv) * span + shared + places[:, None]
    mask = torch.full((longest, span), -math.inf).triu(1 + shared).repeat_interleave(group, 0)
    return Padded(queries.flatten().to(device), keys.flatten().to(device), mask.to(device), count)
