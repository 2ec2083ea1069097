"""The base model's weights in 8 bits while answers are written (`weights = "int8"`): what it gains, and what it costs.

One process, exact and rounded weights in turns. Ratios: `speed_N_rows`, the time of a decoding step of N requests with
exact weights over that with rounded ones, of the base model and of rows with experts. Figures: perplexity of held-out
text under both, and the share of tokens after which both find the same one likeliest. The default base comes out of a
GGUF file, whose own rounding is kept as it is, so text is read with a second base too: the same weights with noise of
5%, which lie on no grid. With `--expert ROWS` also the accuracy of a LoRA expert of banking77, trained on so many rows
with exact weights, on 200 rows of the published test split, answered by the engine. Nothing is chosen by what is
measured here.
"""

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import methods
import torch

from coterie.business import Business, fit
from coterie.data.read import read
from coterie.engine.engine import Engine
from coterie.evaluation.suite import measure
from coterie.experts import lora
from coterie.experts.lora import LoraConfig
from coterie.experts.mixture import lay, mixed
from coterie.model.decoder import Decoder, KVCache, attend_packed, packed_positions
from coterie.model.int8 import computes
from coterie.model.load import BaseModel, load
from coterie.model.pull import pull

CONTEXT = 70  # tokens that each sequence has when its step is timed
ROWS = (1, 2, 4, 8, 16)
WINDOW = 256  # tokens of running text read at once


def texts(base: BaseModel, most: int) -> dict[str, list[list[int]]]:
    """Token ids of held-out text, up to `most` of each kind: customers' questions as the chat template has them, and
    running text."""
    questions, total = list[list[int]](), 0
    file = common.need_data("banking77/test.csv")
    for example in read(file, {"prompt": "text", "completion": "category"}, ""):
        if total < most:
            questions.append(base.encode(base.chat(list(example.messages), prompt=False)))
            total += len(questions[-1])
    ids = base.encode(next(common.need_data("tinyshakespeare").glob("*.txt")).read_text()[: 8 * most])[:most]
    return {"questions": questions, "Shakespeare": [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]}


def quality(exact: Decoder, light: Decoder, rows: list[list[int]]) -> tuple[float, float, float, int]:
    """Perplexity exact and rounded, the share of tokens after which both find the same one likeliest, and tokens."""
    loss, same, count = [0.0, 0.0], 0, 0
    for ids in rows:
        tokens = torch.tensor(ids)
        scores = [
            d.logits(d.forward(tokens, packed_positions([len(ids)]), attend_packed([len(ids)])))[:-1]
            for d in (exact, light)
        ]
        for i, each in enumerate(scores):
            loss[i] += float(torch.nn.functional.cross_entropy(each, tokens[1:], reduction="sum"))
        same += int((scores[0].argmax(1) == scores[1].argmax(1)).sum())
        count += len(ids) - 1
    return math.exp(loss[0] / count), math.exp(loss[1] / count), same / count, count


def off_the_grid(decoder: Decoder) -> tuple[Decoder, Decoder]:
    """A base whose weights nobody has rounded yet, exact and in 8 bits."""
    draw = torch.Generator().manual_seed(0)
    noisy = {
        name: w * (1 + 0.05 * torch.randn(w.shape, generator=draw)) if name in decoder.matrices else w
        for name, w in decoder.weights.items()
    }
    exact = Decoder(decoder.config, noisy)
    return exact, exact.in_int8()


def step_seconds(decoders: list[Decoder], rows: int, experts: int, rounds: int) -> list[float]:
    """The shortest step of each decoder, in turns: one token for `rows` sequences that share `experts` LoRA experts."""
    config = decoders[0].config
    cache = KVCache(config, rows, CONTEXT, decoders[0].dtype, decoders[0].device)
    ids, slots, at = torch.zeros(rows, dtype=torch.long), torch.arange(rows), torch.full((rows,), CONTEXT - 1)
    made = [lay(lora.fresh(LoraConfig(), decoders[0], seed), decoders[0]) for seed in range(experts)]
    change = mixed(made, decoders[0], slots * experts // rows) if experts else None
    shortest = [math.inf] * len(decoders)
    for _ in range(rounds):
        for i, decoder in enumerate(decoders):
            started = time.perf_counter()
            decoder.logits(decoder.forward(ids, at, cache.attend_decode(slots, at), change))
            shortest[i] = min(shortest[i], time.perf_counter() - started)
    return shortest


def expert_accuracy(path: Path, rows: int, answers: int) -> dict[str, dict[str, Any]]:
    """What an expert trained on `rows` of banking77 reaches with exact and with rounded weights."""
    task, data, splits = methods.splits_of("banking77", rows, answers)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lines = [json.dumps({"messages": list(example.messages)}) for example in splits.train]
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "coterie.toml").write_text(
            f'[business]\nbase = "{path}"\ncontext = 512\n[experts.it]\ntrain = "train.jsonl"\nchoices = true\n'
            f"system = {json.dumps(task.system)}\ntraining = {{ epochs = 2, first_layer = 15 }}\n"
        )
        business = Business.open(folder)
        (fitted,) = fit(business)
        found = {}
        for weights in ("exact", "int8"):
            engine: Engine = business.engine(slots=16, queue=1024, weights=weights)
            try:
                measured = measure(engine, task, splits, task.score(data), fitted.facts)
            finally:
                engine.close()
            found[weights] = measured.figures[measured.figures["metric"]]
    return found


@torch.inference_mode()
def compare(report: common.Report, base: BaseModel, quick: bool) -> None:
    """Speed and text."""
    exact, light = base.decoder, base.decoder.in_int8()
    rows = []
    for count in ROWS:
        for experts in sorted({0, min(4, count), count}):
            before, after = step_seconds([exact, light], count, experts, 5 if quick else 30)
            name = f"speed_{count}_rows" + (f"_{experts}_experts" if experts else "")
            report.ratios[name] = before / after
            rows.append([count, experts or "base", 1000 * before, 1000 * after, before / after])
    head = ["requests", "experts", "exact, ms", "int8, ms", "times as fast"]
    report.table("A decoding step", head, rows)
    table = []
    for kind, pair in (("as it is", (exact, light)), ("off the grid", off_the_grid(exact))):
        for name, found in texts(base, 1000 if quick else 6000).items():
            before, after, same, count = quality(*pair, found)
            report.figures |= {f"{name} {kind}, perplexity exact": before, f"{name} {kind}, perplexity int8": after}
            report.figures[f"{name} {kind}, same likeliest token"] = same
            table.append([kind, name, count, f"{before:.3f}", f"{after:.3f}", f"{100 * same:.2f}%"])
    head = ["base", "text", "tokens", "perplexity, exact", "perplexity, int8", "same likeliest token"]
    report.table("Held-out text", head, table)
    taken = sum(matrix.nbytes for matrix in light.int8.values())
    report.say(
        f"{base.name} in {exact.dtype}; the rounded matrices take {taken / 2**20:.0f} MiB beside the exact ones."
    )


def main() -> None:
    parser = common.options(__doc__ or "")
    parser.add_argument("--expert", type=int, default=0, help="rows to train an expert on; 0: none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = pull()
    base = load(path, packed=True)
    if not computes(base.decoder.dtype):
        common.skip("needs a processor with AVX2, and a C compiler")
    report = common.Report("Weights in 8 bits: benchmarks/precision.py")
    compare(report, base, args.quick)
    if args.expert:
        found = expert_accuracy(path, args.expert, 20 if args.quick else 200)
        table = [
            [w, f"{100 * f['value']:.1f}", f"{100 * f['low']:.1f} to {100 * f['high']:.1f}"] for w, f in found.items()
        ]
        report.table("An expert of banking77", ["weights", "right, %", "95% interval"], table)
        report.figures |= {f"banking77 {weights}, right": f["value"] for weights, f in found.items()}
    common.finish(report, args)


if __name__ == "__main__":
    main()
