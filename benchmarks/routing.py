"""Does the router wake the right expert, and what is the answer worth compared with the right expert's own?

Part 1: experts by their training inputs alone, from the tasks of routing_tasks.py: choice on held-out inputs, inputs
that belong to nobody (out-of-scope questions of CLINC150), time to add and remove an expert, cost of routing beside
an answer of 64 tokens, and 10,000 experts. Part 2: LoRA experts are trained, and base, one LoRA on the union of the
data, uniform merge, Arrow, our router and the oracle (the right expert) answer the same held-out rows.

    python benchmarks/routing.py            # both parts; experts are kept in --work, so that a second run goes on
    python benchmarks/routing.py --part 1   # minutes
    python benchmarks/routing.py --part 2 --keep answered.json  # about 15 minutes on 2 quiet cores
    python benchmarks/routing.py --quick    # a small try of everything

What part 2 has measured already is kept in `--keep` and not measured again. `distinct` are 13 tasks of different
subjects, the set that figures are compared on; `all` adds seven that overlap (two banks, two kinds of journey, ...),
where the right answer is a matter of who asked.
"""

import json
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from routing_tasks import Task, outside, tasks

from coterie.business import Business, fit
from coterie.data.read import Example
from coterie.engine.engine import Engine
from coterie.engine.request import Adapter, Blend, Generation, Sampling
from coterie.evaluation.metrics import summarise, wilson
from coterie.model.constrain import choices
from coterie.model.load import BaseModel, load
from coterie.model.pull import DEFAULT, pull
from coterie.routing.router import Router
from coterie.routing.space import background, locate
from coterie.routing.statistics import Statistics, learn, load_statistics

DISTINCT = ["banking77", "clinc-kitchen", "clinc-auto", "clinc-work", "clinc-talk", "dogo-airline", "dogo-fastfood",
            "dogo-software", "gsm8k", "sql", "tunes", "shakespeare", "code"]  # fmt: skip
TRAINED = ["banking77", "clinc-work", "clinc-kitchen", "dogo-software", "sql", "gsm8k", "tunes", "code"]
ANSWER = 64  # tokens


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def auroc(inside: np.ndarray, out: np.ndarray) -> float:
    """Probability that an input from inside scores higher than one from outside (Mann-Whitney)."""
    order = np.concatenate([inside, out]).argsort(kind="stable").argsort() + 1
    return float((order[: len(inside)].sum() - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(out)))


def seconds(times: int, work: Any) -> float:
    """Median time of a call."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def choice(found: list[Task], vectors: dict[str, np.ndarray], strangers: np.ndarray, router: Router) -> dict[str, Any]:
    """Expert choice on held-out inputs (their `vectors` by task), abstention, calibration."""
    rows = [(t.name, router.route(v)) for t in found for v in vectors[t.name]]
    away = [router.route(v) for v in strangers]
    right = np.array([d.scored[0].name == name for name, d in rows])
    inside, out = (np.array([d.scored[0].similarity for d in ds]) for ds in ([d for _, d in rows], away))
    clinc = np.array([name.startswith("clinc") for name, _ in rows])
    sure = np.array([d.scored[0].probability for _, d in rows])
    bins = np.minimum((sure * 10).astype(int), 9)
    error = sum(abs(right[bins == b].mean() - sure[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    wrong = Counter((name, d.scored[0].name) for name, d in rows if d.scored[0].name != name)
    by_task = {t.name: round(float(right[[n == t.name for n, _ in rows]].mean()), 4) for t in found}
    return {
        "experts": len(found), "inputs": len(rows), "choice_accuracy": wilson(int(right.sum()), len(right)).json(),
        "by_task": by_task, "ood_auroc": round(auroc(inside, out), 4),
        "ood_auroc_within_clinc": round(auroc(inside[clinc], out), 4) if clinc.any() else None,
        "inside_admitted": round(float(np.mean([bool(d.chosen) for _, d in rows])), 4),
        "outside_admitted": round(float(np.mean([bool(d.chosen) for d in away])), 4),
        "calibration_error": round(float(error), 4),
        "most_confused": [[*pair, n] for pair, n in wrong.most_common(6)],
    }  # fmt: skip


def cost(base: BaseModel, router: Router, texts: list[str]) -> dict[str, Any]:
    """Time of routing one question, beside an answer of 64 tokens by the base model."""
    engine = Engine(base, slots=1, context=512)
    prompts = [base.encode(base.chat([{"role": "user", "content": t}])) for t in texts]
    vectors = [locate(base, [t])[0] for t in texts]
    for v in vectors:
        router.route(v)

    def answer(i: int) -> None:
        left, prompt = ANSWER, prompts[i]
        while left > 0:  # the base model may end early; then it is asked to go on
            handle = engine.submit(prompt, Sampling(max_tokens=left))
            handle.text()
            left -= max(1, len(handle.generated))

    try:
        turns = iter(list(range(len(texts))) * 3)
        answering = seconds(len(texts), lambda: answer(next(turns)))
        embedding = seconds(len(texts), lambda: locate(base, [texts[next(turns)]], engine.step))
        routing = seconds(len(texts), lambda: router.route(vectors[next(turns)]))
    finally:
        engine.close()
    return {
        "answer_ms": round(answering * 1e3, 2), "embed_ms": round(embedding * 1e3, 2),
        "route_ms": round(routing * 1e3, 2), "overhead": round((embedding + routing) / answering, 4),
        "overhead_with_shared_prefill": round(routing / answering, 4),
    }  # fmt: skip


def growth(base: BaseModel, router: Router, task: Task, count: int) -> dict[str, Any]:
    """Time to add and remove an expert, with few experts and with `count` invented ones of the real width."""
    inputs = [p for p, _ in task.train]
    start = time.perf_counter()
    made = learn(base, inputs, [str(i) for i in range(len(inputs))])
    learning = time.perf_counter() - start

    def turn(into: Router) -> tuple[float, float]:
        start = time.perf_counter()
        into.add("one-more", made)
        into.route(made.mean)
        added = time.perf_counter()
        into.remove("one-more")
        into.route(made.mean)
        return added - start, time.perf_counter() - added

    few, many = turn(router), Router(router.background)

    def cold() -> None:  # the shortlist's inputs are not in memory: whitened anew, and so are the comparisons of two
        router._samples.clear()
        router._duels.clear()
        router.route(made.sample[0].astype(np.float32))

    without_samples = seconds(5, cold)
    rng = np.random.default_rng(0)
    spread = np.sqrt(np.diag(router.background.scatter))

    def invented(seed: int) -> Statistics:
        own = np.random.default_rng(seed)
        sample = router.background.centre + spread * (own.normal(size=len(spread)) + own.normal(size=(64, len(spread))))
        scatter = np.diag(spread**2).astype(np.float32)
        where = tuple(map(str, range(64)))
        return Statistics(
            made.space, 64, sample.mean(axis=0).astype(np.float32), scatter, sample.astype(np.float16), where
        )

    for i in range(count):
        many.add(f"e{i}", invented(i), lambda i=i: invented(i))
    asked = rng.integers(0, count, 40)
    queries = [invented(i).sample[0].astype(np.float32) for i in asked]
    many.route(queries[0])
    turns = iter(queries)
    taken = seconds(len(queries), lambda: many.route(next(turns)))
    right = np.mean([many.route(q).scored[0].name == f"e{i}" for i, q in zip(asked, queries, strict=True)])
    large = turn(many)
    return {
        "learn_s": round(learning, 3), "inputs": len(inputs), "add_s": round(few[0], 3), "remove_s": round(few[1], 3),
        "route_ms_without_samples_in_memory": round(without_samples * 1e3, 1),
        "many": count, "many_add_s": round(large[0], 3), "many_remove_s": round(large[1], 3),
        "many_route_ms_samples_made_on_the_fly": round(taken * 1e3, 2), "many_choice": round(float(right), 4),
        "many_means_mib": round(many._means.nbytes * 2 / 2**20, 1),
    }  # fmt: skip


def write_business(folder: Path, found: list[Task], epochs: int) -> Business:
    """A business with an expert for each task, which is held to the task's labels, and `union` on all their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    toml = ['[business]\nname = "Routing benchmark"\ncontext = 512\n']

    def expert(name: str, files: list[str], choices: bool = False) -> None:
        toml.append(f"[experts.{name}]\ntrain = {json.dumps(files)}\nchoices = {json.dumps(choices)}\n"
                    f"training = {{ epochs = {epochs}, batch = 16, "
                    "held_out = 0.02, max_tokens = 256, first_layer = 15 }\n")  # fmt: skip

    for t in found:
        lines = [json.dumps({"prompt": p, "completion": c}) for p, c in t.train]
        (folder / f"{t.name}.jsonl").write_text("\n".join(lines) + "\n")
        expert(t.name, [f"{t.name}.jsonl"], t.choices)
    expert("union", [f"{t.name}.jsonl" for t in found])
    (folder / "coterie.toml").write_text("\n".join(toml))
    return Business.open(folder)


def quality(work: Path, found: list[Task], epochs: int, keep: Path | None) -> dict[str, Any]:
    """Answers of base, union, uniform merge, Arrow, router and oracle to the same rows; accuracy or token-F1.

    Whoever answers is held to its labels as when it serves: an expert knows its own, and the union, the merge and Arrow
    have none. `union_told` is the union held to the labels of the right task, which somebody would have to tell it.
    `keep`: a JSON file of method, task and score, read and written; it belongs to one set of experts.
    """
    business = write_business(work, found, epochs)
    for done in fit(business, tell=tell):
        tell(f"{done.facts.name}: version {done.facts.version}{'' if done.trained else ', kept from before'}")
    base, library, names = business.base(), business.library, [t.name for t in found]

    def of(name: str) -> Adapter:
        return name, library.current(name) or 0

    everyone = tuple((of(name), 1 / len(names)) for name in names)
    router = Router(background(base))
    for name in names:  # the union is no expert of the coterie
        router.add(name, load_statistics(library.folder(name)))

    def routed(text: str) -> Adapter | None:
        chosen = router.route(locate(base, [text])[0]).chosen
        return of(chosen[0][0]) if chosen else None

    who = {
        "base": lambda _t, _p: None, "union": lambda _t, _p: of("union"), "union_told": lambda _t, _p: of("union"),
        "uniform_merge": lambda _t, _p: Blend(everyone, "merge"), "arrow": lambda _t, _p: Blend(everyone, "arrow"),
        "router": lambda _t, p: routed(p), "oracle": lambda t, _p: of(t),
    }  # fmt: skip
    labels = {of(name): library.facts(name).choices for name in names}
    engine = business.engine(tell, slots=16, context=512, queue=64)
    made = {"epochs": epochs, "rows": {t.name: [len(t.train), len(t.test)] for t in found}}
    kept = json.loads(keep.read_text()) if keep and keep.exists() else {"of": made, "scores": {}}
    if kept["of"] != made:
        raise SystemExit(f"{keep} was measured with {kept['of']}, now it is {made}; name another file")
    out: dict[str, Any] = {name: dict(kept["scores"].get(name, {})) for name in who}
    try:
        for method, pick in who.items():
            for t in found:
                if t.name in out[method]:
                    continue
                most = min(96, max(len(engine.base.encode(c)) for _, c in t.test) + 4)
                examples = [Example(({"role": "user", "content": p}, {"role": "assistant", "content": c}), "")
                            for p, c in t.test]  # fmt: skip
                adapters = [pick(t.name, p) for p, _ in t.test]
                held = [labels[of(t.name)] if method == "union_told" else labels.get(a, ()) for a in adapters]
                samplings = [Sampling(max_tokens=most, constraint=choices(h) if h else None) for h in held]
                answers = answer_each(engine, examples, adapters, samplings)
                figures = summarise(answers, [c for _, c in t.test], t.choices)
                out[method][t.name] = figures["accuracy" if t.choices else "token_f1"]["value"]
                if keep:
                    keep.write_text(json.dumps({"of": made, "scores": out}, indent=1) + "\n")
        for method in who:
            out[method]["mean"] = round(float(np.mean(list(out[method].values()))), 4)
            tell(f"{method}: {out[method]['mean']:.4f}")
    finally:
        engine.close()
    against = {f"quality_of_{who}": round(out["router"]["mean"] / out[who]["mean"], 4) if out[who]["mean"] else None
               for who in ("oracle", "union", "union_told")}  # fmt: skip
    return {"epochs": epochs, "rows_each": len(found[0].train), "scores": out, **against}


def answer_each(
    engine: Engine, examples: list[Example], adapters: list[Adapter | Blend | None], samplings: list[Sampling]
) -> list[str]:
    """The answer to each example by its own expert."""
    answers: list[str] = []
    under_way: deque[Generation] = deque()
    for example, adapter, sampling in zip(examples, adapters, samplings, strict=True):
        prompt = engine.base.encode(engine.base.chat(example.prompt))
        under_way.append(engine.submit(prompt, sampling, adapter))
        if len(under_way) >= engine.slots + engine.queue // 2:
            answers.append(under_way.popleft().text().strip())
    return answers + [handle.text().strip() for handle in under_way]


def main() -> None:
    parser = common.options(__doc__ or "")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "coterie" / "benchmarks" / "routing")
    parser.add_argument("--part", type=int, choices=(1, 2), help="only this part")
    parser.add_argument("--rows", type=int, default=300, help="training rows of each expert of part 2")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a JSON file of what part 2 has measured: it is not measured again")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = common.need_data("banking77/train.csv").parents[1]
    quick, report = args.quick, dict[str, Any]()
    if args.part != 2:
        base = load(pull(DEFAULT, tell), packed=True)
        names = ["banking77", "clinc-work", "sql", "tunes"] if quick else None
        found = tasks(data, 60 if quick else 1000, 15 if quick else 150, names)
        strangers = locate(base, outside(data)[: 40 if quick else None])
        held_out = {t.name: locate(base, [p for p, _ in t.test]) for t in found}
        back, routers = background(base), {}
        known = {t.name: learn(base, [p for p, _ in t.train], [str(i) for i in range(len(t.train))]) for t in found}
        for which in ("distinct", "all"):
            chosen = [t for t in found if which == "all" or t.name in DISTINCT]
            routers[which] = Router(back)
            for t in chosen:
                routers[which].add(t.name, known[t.name])
            report[which] = choice(chosen, held_out, strangers, routers[which])
            tell(f"{which}: {report[which]}")
        texts = [t.test[i][0] for i in range(5) for t in found]
        report["cost"] = cost(base, routers["distinct"], texts[: 8 if quick else 40])
        report["growth"] = growth(base, routers["all"], found[0], 500 if quick else 10_000)
        tell(f"{report['cost']} {report['growth']}")
    if args.part != 1:
        found = tasks(
            data,
            60 if quick else args.rows,
            8 if quick else 50,
            ["clinc-kitchen", "sql", "tunes"] if quick else TRAINED,
        )
        report["quality"] = quality(
            args.work / ("quick" if quick else "full"), found, 1 if quick else args.epochs, args.keep
        )
    shown = common.Report("Routing: benchmarks/routing.py")
    figures(report, shown)
    common.finish(shown, args)


def figures(report: dict[str, Any], found: common.Report) -> None:
    """The figures by name, and everything measured as it came."""
    for which in ("distinct", "all"):
        if which in report:
            part = report[which]
            found.figures |= {
                f"choice_accuracy, {which}": part["choice_accuracy"]["value"], f"ood_auroc, {which}": part["ood_auroc"],
            }  # fmt: skip
    if "all" in report:
        found.figures |= {"choice_accuracy": report["all"]["choice_accuracy"]["value"],
                          "ood_auroc": report["all"]["ood_auroc"], "overhead": report["cost"]["overhead"]}  # fmt: skip
    against = {k: v for k, v in report.get("quality", {}).items() if k.startswith("quality_of_") and v}
    found.ratios |= against
    rows = [[f"{part}: {name}", json.dumps(value)] for part, values in report.items() for name, value in values.items()]
    found.table("Measured", ["what", "value"], rows)


if __name__ == "__main__":
    main()
