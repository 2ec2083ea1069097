"""Switch against dense at equal FLOPs per token, and our mixture-of-experts layer against transformers'.

    python benchmarks/switch.py            about 12 minutes on 2 CPU cores
    python benchmarks/switch.py --quick    a minute: same code, too short to mean much
    python benchmarks/switch.py --seeds 1  training once instead of three times

Training: two character models from scratch on tinyshakespeare (the last tenth is held out), same width, data order
and optimizer; the Switch model has 8 experts in every layer, one active per token, so its FLOPs per token are the
dense model's and the router's. `steps_vs_dense` is the number of steps of the dense model over those that Switch needs
to reach the dense model's final held-out loss, the median over `--seeds` weights and orders of data. The learning rate
is constant after warm-up, so that the length of a run does not shape its curve.

Layers: the same weights in ours and in transformers' Mixtral and SwitchTransformers layers, 8 experts; outputs are
checked for equality, then both are timed in turns. `layer_vs_transformers` is the geometric mean of the ratios of
medians over all cases, in bfloat16 only where the processor multiplies it; transformers gets the fastest of its own
ways of computing the layer. Both sides run in one process that keeps freed memory, as our training does.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import common
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from coterie.model import grouped, moe
from coterie.model.decoder import Decoder, ModelConfig, attend_packed, packed_positions
from coterie.model.load import default_dtype
from coterie.model.memory import keep

BALANCE, Z, CAPACITY, JITTER = 0.01, 0.001, 1.25, 0.01  # as in Switch Transformers and ST-MoE


class Trained(Decoder):
    """The decoder with weights that learn; every matrix goes through the same product, dense ones and experts'."""

    def linear(self, x: Tensor, name: str) -> Tensor:
        return moe.grouped(x, self.weights[name][None], torch.tensor([len(x)]))


def fresh(config: ModelConfig, seed: int) -> Trained:
    """Random weights: normal, 0.02, and those that write to the residual stream smaller, as in GPT-2."""
    generator = torch.Generator().manual_seed(seed)
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.02 * scale

    small = (2 * config.layers) ** -0.5
    weights = {"embed": draw(config.vocab, config.width), "final_norm": torch.ones(config.width)}
    for n in range(config.layers):
        weights |= {f"{n}.attn_norm": torch.ones(config.width), f"{n}.ffn_norm": torch.ones(config.width)}
        weights |= {f"{n}.qkv": draw(q + 2 * kv, config.width), f"{n}.o": draw(config.width, q, scale=small)}
        if n in config.sparse:
            # Routers that prefer something from the start, and experts that make up for the gate's weight below 1.
            weights[f"{n}.router"] = draw(config.experts, config.width, scale=6)
            weights[f"{n}.experts.gate_up"] = draw(config.experts, 2 * config.ffn, config.width)
            weights[f"{n}.experts.down"] = draw(config.experts, config.width, config.ffn, scale=3 * small)
        else:
            weights[f"{n}.gate_up"] = draw(2 * config.ffn, config.width)
            weights[f"{n}.down"] = draw(config.width, config.ffn, scale=small)
    return Trained(config, {k: v.requires_grad_() for k, v in weights.items()})


def loss_of(decoder: Trained, windows: Tensor, watch: dict[int, Tensor] | None = None) -> Tensor:
    """Mean cross-entropy of each next token, nats, of windows (B, T + 1); router logits go into `watch`."""
    lengths = [windows.shape[1] - 1] * len(windows)

    def change(layer: int, site: str, x: Tensor, out: Tensor) -> Tensor:
        if site != "router" or watch is None:
            return out
        watch[layer] = moe.score(x, decoder.weights[f"{layer}.router"], JITTER)
        return watch[layer]

    hidden = decoder.forward(
        windows[:, :-1].reshape(-1),
        packed_positions(lengths),
        attend_packed(lengths),
        change if watch is not None else None,
    )
    return F.cross_entropy(decoder.logits(hidden), windows[:, 1:].reshape(-1))


def train(
    config: ModelConfig, data: tuple[Tensor, Tensor], args: argparse.Namespace, seed: int,
    say: Callable[[str], None], target: float | None = None,
) -> list[tuple[int, float, float]]:  # fmt: skip
    """(step, seconds of training, held-out loss) every `args.every` steps; stops where the loss is `target` or less."""
    learn, held = data
    decoder = fresh(config, seed)
    served = Trained(replace(config, capacity=0.0), decoder.weights)
    optimizer = torch.optim.AdamW(decoder.weights.values(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.1,
                                  fused=True)  # fmt: skip
    order = torch.Generator().manual_seed(seed)
    span = args.length + 1
    windows = held[: len(held) // span * span].view(-1, span)[: args.held]
    curve, seconds = [], 0.0
    for step in range(1, args.steps + 1):
        started = time.perf_counter()
        starts = torch.randint(len(learn) - span, (args.batch,), generator=order)
        watch: dict[int, Tensor] = {}
        loss = loss_of(decoder, torch.stack([learn[s : s + span] for s in starts.tolist()]), watch)
        for logits in watch.values():
            loss = loss + BALANCE * moe.balance_loss(logits) + Z * moe.z_loss(logits)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.weights.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(step / 50, 1)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - started
        if step % args.every == 0:
            with torch.no_grad():
                value = statistics.fmean(float(loss_of(served, w)) for w in windows.split(32))
            curve.append((step, seconds, value))
            say(f"  step {step:5d}  {seconds:6.1f} s  held-out loss {value:.4f}")
            if target is not None and value <= target:
                break
    return curve


def corpus(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Tokens to learn from and held out: the last tenth of the text."""
    text = common.need_data("tinyshakespeare/input.txt").read_text()
    cut = len(text) * 9 // 10
    numbers = {c: i for i, c in enumerate(sorted(set(text)))}
    learn, held = (torch.tensor([numbers[c] for c in part]) for part in (text[:cut], text[cut:]))
    return learn, held


def switch_vs_dense(args: argparse.Namespace, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    data = corpus(args)
    dense = ModelConfig(
        vocab=int(max(part.max() for part in data)) + 1, width=args.width, layers=args.layers,
        heads=args.width // 32, kv_heads=args.width // 32, head_dim=32, ffn=args.ffn, context=args.length, tied=True,
    )  # fmt: skip
    switch = replace(dense, experts=args.experts, experts_per_token=1, gate_normed=False,
                     sparse=tuple(range(args.layers)), capacity=CAPACITY)  # fmt: skip
    say(f"dense: width {args.width}, {args.layers} layers, {args.steps} steps of {args.batch} x {args.length} tokens")
    curve = train(dense, data, args, seed, say)
    goal = curve[-1][2]
    say(f"switch: {args.experts} experts, 1 active; to reach {goal:.4f}")
    reached = train(switch, data, args, seed, say, goal)
    there = reached[-1][2] <= goal
    return {
        "seed": seed, "dense_steps": args.steps, "dense_seconds": round(curve[-1][1], 1), "dense_loss": round(goal, 4),
        "switch_steps": reached[-1][0] if there else None, "switch_seconds": round(reached[-1][1], 1),
        "switch_loss": round(reached[-1][2], 4), "experts": args.experts,
        "steps_vs_dense": round(args.steps / reached[-1][0], 2) if there else None,
        "time_vs_dense": round(curve[-1][1] / reached[-1][1], 2) if there else None,
    }  # fmt: skip


def medians(ways: dict[str, Callable[[Tensor], Any]], inputs: list[Tensor]) -> dict[str, float]:
    """Milliseconds of each way, median over `inputs`, taken in turns.

    Every round has other tokens, as in real use, so each expert's share of them changes from round to round.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(inputs[0])
    for x in inputs[1:]:
        for name, way in ways.items():
            started = time.perf_counter()
            way(x)
            taken[name].append((time.perf_counter() - started) * 1000)
    return {name: statistics.median(values) for name, values in taken.items()}


def mixtral_layer(
    width: int, ffn: int, dtype: torch.dtype, how: str
) -> tuple[MixtralSparseMoeBlock, dict[str, Tensor]]:
    config = transformers.MixtralConfig(
        hidden_size=width, intermediate_size=ffn, num_local_experts=8, num_experts_per_tok=2
    )
    config._experts_implementation = how
    torch.manual_seed(0)
    layer = MixtralSparseMoeBlock(config).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, width**-0.5)
    return layer, {"router": layer.gate.weight, "up": layer.experts.gate_up_proj, "down": layer.experts.down_proj}


def switch_layer(width: int, ffn: int, dtype: torch.dtype) -> tuple[SwitchTransformersSparseMLP, dict[str, Tensor]]:
    config = transformers.SwitchTransformersConfig(
        d_model=width, d_ff=ffn, num_experts=8, expert_capacity=1 << 20, dropout_rate=0.0, router_jitter_noise=0.0
    )
    torch.manual_seed(0)
    layer = SwitchTransformersSparseMLP(config).to(dtype)
    layer.router.classifier.float()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, width**-0.5)
    experts = list(layer.experts.values())
    return layer, {
        "router": layer.router.classifier.weight, "up": torch.stack([e.wi.weight for e in experts]),
        "down": torch.stack([e.wo.weight for e in experts]),
    }  # fmt: skip


def layers(args: argparse.Namespace, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every case's medians in milliseconds, and theirs over ours."""
    out = []
    for peer, k in (("Mixtral", 2), ("SwitchTransformers", 1)):
        for dtype in dict.fromkeys((torch.float32, default_dtype())):
            for tokens in args.tokens:
                cases = layer_case(peer, k, dtype, tokens, args)
                out += cases
                for case in cases:
                    say("  {layer:18} {dtype:8} {tokens:5d} tokens  {what:16} ours {ours_ms:8.2f} ms, "
                        "transformers {theirs_ms:8.2f} ms: {ratio:.2f} times".format(**case))  # fmt: skip
    return out


def layer_case(peer: str, k: int, dtype: torch.dtype, tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    width, ffn = 576, 1536
    theirs: dict[str, Any] = {}
    if peer == "Mixtral":
        for how in ("eager", "grouped_mm", "batched_mm") if tokens <= 64 else ("eager", "grouped_mm"):
            theirs[how], weights = mixtral_layer(width, ffn, dtype, how)
    else:
        theirs["eager"], weights = switch_layer(width, ffn, dtype)
    ours = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
    activate = moe.swiglu if peer == "Mixtral" else F.relu
    frozen: dict[str, Any] = {n: w.detach() for n, w in ours.items()}
    if dtype == torch.bfloat16 and not grouped.takes(frozen["up"]):
        for n in ("up", "down"):  # as the engine keeps them
            frozen[n] = [torch.ops.mkldnn._reorder_linear_weight(w, 16) for w in frozen[n]]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(1, tokens, width, generator=generator).to(dtype) for _ in range(args.rounds + 1)]
    slope = torch.randn_like(inputs[0])

    def layer(x: Tensor, w: dict[str, Any]) -> Tensor:
        flat = x.view(-1, width)
        return moe.feed_forward(
            flat, moe.score(flat, w["router"]), w["up"], w["down"], k, peer == "Mixtral", activate=activate
        ).view_as(x)

    def forward(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.no_grad():
                return f(x.clone())

        return run

    def both(f: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> Callable[[Tensor], None]:
        def run(x: Tensor) -> None:
            for p in parameters:
                p.grad = None
            f(x.clone().requires_grad_()).backward(slope)

        return run

    checked = forward(lambda x: layer(x, frozen))(inputs[0])
    for name, module in theirs.items():
        wanted = forward(module)(inputs[0])
        close = (checked.float() - wanted.float()).abs().mean() / wanted.float().abs().mean()
        # In bfloat16 a near tie between experts may turn, because transformers' Mixtral routes in bfloat16.
        if close > (1e-4 if dtype == torch.float32 else 0.05):
            raise SystemExit(f"{peer} {name} {dtype}: outputs differ by {close:.2%}")
    out = []
    for what, mine, others in (
        ("forward", forward(lambda x: layer(x, frozen)), {n: forward(m) for n, m in theirs.items()}),
        ("forward+backward", both(lambda x: layer(x, ours), list(ours.values())),
         {n: both(m, list(m.parameters())) for n, m in theirs.items()}),
    ):  # fmt: skip
        if what != "forward" and tokens < 64:  # nobody trains on so few
            continue
        times = medians({"ours": mine, **others}, inputs)
        best = min(others, key=lambda n: times[n])
        out.append({
            "layer": peer, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "what": what,
            "ours_ms": round(times["ours"], 3), "theirs_ms": round(times[best], 3), "their_way": best,
            "ratio": round(times[best] / times["ours"], 2),
        })  # fmt: skip
    return out


def tell_training(report: common.Report, found: list[dict[str, Any]]) -> None:
    """Median and range over the seeds; a run that never reaches the dense model's loss counts as 0."""
    for name in ("steps_vs_dense", "time_vs_dense"):
        values = [run[name] or 0.0 for run in found]
        into = report.ratios if name == "steps_vs_dense" else report.figures
        into[name] = statistics.median(values)
        report.figures |= {f"{name}, lowest": min(values), f"{name}, highest": max(values)}
    head = ["seed", "dense: steps", "dense: s", "loss", "Switch: steps to it", "Switch: s", "steps over", "time over"]
    rows = [[str(r["seed"]), r["dense_steps"], r["dense_seconds"], r["dense_loss"], r["switch_steps"] or "never",
             r["switch_seconds"], r["steps_vs_dense"] or "-", r["time_vs_dense"] or "-"] for r in found]  # fmt: skip
    report.table("Training from scratch at equal FLOPs per token", head, rows)
    report.say(
        f"tinyshakespeare by characters; {found[0]['experts']} experts, one active. `steps_vs_dense`: median "
        f"{report.ratios['steps_vs_dense']:.2f} over {len(found)} seed(s), from "
        f"{report.figures['steps_vs_dense, lowest']:.2f} to {report.figures['steps_vs_dense, highest']:.2f}."
    )


def tell_layers(report: common.Report, cases: list[dict[str, Any]]) -> None:
    """Geometric means: of all cases, of each peer, of each type of number, forward alone and with backward."""

    def mean(some: list[dict[str, Any]]) -> float:
        return math.exp(statistics.fmean(math.log(c["ratio"]) for c in some))

    report.ratios["layer_vs_transformers"] = mean(cases)
    for key in ("layer", "dtype", "what"):
        for value in dict.fromkeys(c[key] for c in cases):
            report.figures[f"layer_vs_transformers, {value}"] = mean([c for c in cases if c[key] == value])
    head = ["layer", "numbers", "tokens", "what", "ours, ms", "transformers, ms", "its way", "times"]
    rows = [[c["layer"], c["dtype"], c["tokens"], c["what"], c["ours_ms"], c["theirs_ms"], c["their_way"], c["ratio"]]
            for c in cases]  # fmt: skip
    report.table("Layers with 8 experts, width 576, feed-forward 1536", head, rows)
    report.say("Median of rounds taken in turns, other tokens in each; transformers by the fastest of its own ways.")


def main() -> None:
    parser = common.options(__doc__ or "")
    parser.add_argument("--only", choices=["training", "layers"], help="one half of it")
    for name, default in (("steps", 2500), ("every", 50), ("width", 32), ("layers", 2), ("ffn", 64), ("experts", 8),
                          ("batch", 32), ("length", 64), ("held", 256), ("seeds", 3)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rate", type=float, default=5e-3)
    args = parser.parse_args()
    args.tokens = (8, 128, 1024)
    if args.quick:
        args.steps, args.every, args.held, args.tokens, args.rounds, args.seeds = 60, 10, 64, (8, 128), 3, 1
    torch.set_num_threads(args.threads)
    keep()  # as wherever we train: freed memory stays in the process, for either side

    def say(text: str) -> None:
        common.screen.print(text, highlight=False)

    report = common.Report("Switch and dense, layers of experts: benchmarks/switch.py")
    if args.only != "layers":
        tell_training(report, [switch_vs_dense(args, seed, say) for seed in range(args.seeds)])
    if args.only != "training":
        tell_layers(report, layers(args, say))
    common.finish(report, args)


if __name__ == "__main__":
    main()
