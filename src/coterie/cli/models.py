"""`coterie moe` and `coterie anatomy`: mixtures of experts, and what a model is made of and costs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from coterie.cli.options import Folder, Json
from coterie.cli.show import Bars, bars, result, table, tell
from coterie.errors import CoterieError
from coterie.experts.card import in_words

moe = typer.Typer(
    help="Make mixtures of experts: upcycle a model, mix trained experts, tune, measure.", no_args_is_help=True
)
Model = Annotated[str, typer.Argument(help="A model directory, a .gguf file or a hub id.")]
Out = Annotated[Path, typer.Argument(help="A new folder for the model.")]
PerToken = Annotated[int, typer.Option(min=1, help="Experts that each token uses.")]


@moe.command()
def upcycle(
    model: Model, out: Out,
    experts: Annotated[int, typer.Option(min=2, help="Copies of each feed-forward.")] = 4,
    layers: Annotated[str, typer.Option(help="all, every-other, last-half, or numbers: 3,5,7.")] = "every-other",
    per_token: PerToken = 2,
    seed: Annotated[int, typer.Option(help="Fixes the fresh routers.")] = 0,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Turn a dense model's feed-forward layers into mixtures of copies; it says the same until it is tuned."""
    from coterie.mixture import upcycle_to

    done = upcycle_to(model, out, experts, layers, per_token, seed, tell)
    result(done, as_json, _written(done) + f"\nnext: coterie moe tune {out} NEW_FOLDER --what experts --data ...")


@moe.command()
def mix(
    folder: Folder, out: Out,
    expert: Annotated[list[str] | None, typer.Option("--expert", "-e", help="Mix this one; default: all.")] = None,
    per_token: PerToken = 2,
    keep_base: Annotated[bool, typer.Option(help="The base model is one of the experts.")] = True,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make one token-routed model of a business's trained LoRA experts (Branch-Train-MiX)."""
    from coterie.business import Business
    from coterie.mixture import mix_to

    done = mix_to(Business.open(folder), out, expert or [], per_token, keep_base, tell)
    result(done, as_json, _written(done) + f"\nnext: coterie moe tune {out} NEW_FOLDER --business {folder}")


@moe.command()
def tune(
    model: Model, out: Out,
    data: Annotated[list[Path] | None, typer.Option(help="Data file; may be repeated.")] = None,
    business: Annotated[Path | None, typer.Option(help="Use the training data of this business's experts.")] = None,
    what: Annotated[str, typer.Option(help="router, or experts (and router).")] = "router",
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Rows for each update.")] = 8,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak learning rate of the experts.")] = 5e-5,
    router_rate: Annotated[float, typer.Option(min=0, help="Peak learning rate of the routers.")] = 1e-3,
    balance: Annotated[float, typer.Option(min=0, help="Weight of the load-balancing loss.")] = 0.01,
    z: Annotated[float, typer.Option(min=0, help="Weight of the router's z-loss.")] = 0.001,
    jitter: Annotated[float, typer.Option(min=0, max=0.5, help="Noise on what the routers read.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Fixes split and order.")] = 0,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Tune a mixture's routers, or routers and experts, further, and write the result to a new folder."""
    from coterie.business import Business
    from coterie.files import check_free
    from coterie.mixture import tune_to, tuning_data
    from coterie.tuning.moe import WHAT, MoeTuning

    check_free(out)
    if what not in WHAT:
        raise CoterieError(f"--what {what!r}: use {' or '.join(WHAT)}")
    if not data and not business:
        raise CoterieError("nothing to tune on: give --data FILE, or --business FOLDER")
    examples = tuning_data(data or [], Business.open(business) if business else None)
    settings = MoeTuning(steps, batch, what, learning_rate, router_rate, balance, z, jitter, seed)
    with _steps(steps) as step:
        done = tune_to(model, out, examples, settings, tell, step)
    before, after = done["held_out_loss_before"], done["held_out_loss"]
    result(done, as_json, _written(done) + f"\nheld-out loss {before:.4f} before, {after:.4f} after")


@contextmanager
def _steps(total: int) -> Iterator[Any]:
    with bars() as shown:
        yield lambda s: _show(shown, s, total)


def _show(shown: Bars, step: Any, total: int) -> None:
    note = f"loss {step.loss:.3f}  balance {step.balance:.2f}"
    shown.count("tuning", step.step, total, note, f", {step.seconds_left / 60:.1f} min left")


@moe.command("eval")
def evaluate(
    model: Model, folder: Folder,
    expert: Annotated[list[str] | None, typer.Option("--expert", "-e", help="Only this one's test data.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Only the first rows; 0: all.")] = 0,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure a model by itself on the test data of a business's experts, with 95% confidence intervals."""
    from coterie.business import Business
    from coterie.mixture import measure

    done = measure(model, Business.open(folder), expert or [], limit)
    rows = [[name, str(f["rows"]), in_words(f)] for name, f in done.items()]
    result(done, as_json, table(["test data of", "rows", "figures"], rows))


def _written(done: dict[str, Any]) -> str:
    return (
        f"{done['path']}: {done['experts']} experts, {done['experts_per_token']} per token, in {len(done['layers'])} "
        f"layers; {done['parameters'] / 1e6:.1f}M parameters"
    )


def anatomy(
    model: Annotated[list[str], typer.Argument(help="Model directories, config.json or .gguf files, pulled models.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache while decoding, and of a prompt.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Sequences generated at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="Precision of the weights: float32, bfloat16, int8, int4.")] = "bfloat16",
    on: Annotated[list[str] | None, typer.Option(help="Hardware: here, vm2, L4, A10G, H100.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars an hour, instead of the table's.")] = None,
    as_json: Json = False,
) -> None:
    """What models are made of and cost: parameters, memory, FLOPs, and estimated speed, side by side."""
    from coterie.model.anatomy import BYTES, HARDWARE, compare, examine, priced, probe
    from coterie.model.pull import find

    if dtype not in BYTES:
        raise CoterieError(f"--dtype {dtype!r}: use one of {', '.join(BYTES)}")
    wanted = on or ["here", *HARDWARE]
    for name in wanted:
        if name != "here" and name not in HARDWARE:
            raise CoterieError(f"--on {name!r}: known hardware is here, {', '.join(HARDWARE)}")
    found = [examine(find(name) or Path(name)) for name in model]
    hardware = [priced(probe() if name == "here" else HARDWARE[name], price) for name in wanted]
    value = compare(found, hardware, dtype, context, batch)
    result(value, as_json, table(["", *(v["model"] for v in value)], _lines(value)))


def _lines(models: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each fact, a column for each model."""
    first = models[0]
    facts: list[tuple[str, Any]] = [
        ("family", lambda m: m["family"]),
        ("parameters", lambda m: _count(m["parameters"])),
        ("  active per token", lambda m: _count(m["active_parameters"])),
        ("experts", lambda m: f"{m['experts_per_token']} of {m['experts']}" if m["experts"] else "dense"),
        ("layers x width", lambda m: f"{m['layers']} x {m['width']}"),
        ("attention", lambda m: m["attention"]),
        ("context, tokens", lambda m: f"{m['context']:,}"),
        *((f"weights, {d}", lambda m, d=d: _bytes(m["weight_bytes"][d])) for d in first["weight_bytes"]),
        ("KV cache per token", lambda m: _bytes(m["kv_bytes_per_token"])),
        ("FLOPs per token, prompt", lambda m: _count(m["flops_per_token"]["prefill"])),
        ("FLOPs per token, decoding", lambda m: _count(m["flops_per_token"]["decode"])),
        (f"FLOPs per byte, batch {first['batch']}", lambda m: f"{m['flops_per_byte']:.1f}"),
    ]
    for i, speed in enumerate(first["speed"]):
        facts.append((f"on {speed['hardware']} (estimate)", lambda m, i=i: _speed(m["speed"][i])))
    return [[label, *(show(m) for m in models)] for label, show in facts]


def _speed(speed: dict[str, Any]) -> str:
    if speed["decode_tokens_per_s"] is None:
        return "does not fit"
    cost = speed["dollars_per_million_tokens"]
    said = f"{speed['decode_tokens_per_s']:,.0f} tokens/s, prompt {speed['prefill_tokens_per_s']:,.0f}"
    return said + (f", ${cost:,.2f} per million" if cost else "")


def _count(n: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return str(round(n))


def _bytes(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} B"
