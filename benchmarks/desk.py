"""Whole contacts with the desk, from the customer's wish to the bank's state: the banking tasks of tau2-bench, offline.

See desk_tasks.py for the scripted customer. Escalate-all, BM25-FAQ, the base model and coterie (the base model with
the desk's confidence, whose thresholds are fixed on a development half) serve the same customers; the gold oracle must
reach 100%. Which single messages may be answered alone is measured by desk_intents.py. With a business whose expert is
trained (`coterie fit examples/banking77`), --business measures that expert too, by the product's own calibration.

A reply costs about 400 tokens read and 64 written: on 2 cores without AVX512 the 97 tasks take five to ten minutes,
--quick one to two; several customers are served at once, as the engine does it.

    python benchmarks/desk.py --quick
    python benchmarks/desk.py --record
    python benchmarks/desk.py --model FOLDER     # any base model, or --url of an OpenAI-compatible server
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
from common import Report, finish, need_data, options, screen
from desk_tasks import Bm25, Reply, Run, System, Task, oracle, play, products, read_documents, read_tasks, replay

from coterie.answer import Answerer
from coterie.business import Business
from coterie.data.read import Example
from coterie.desk.calibrate import outcomes
from coterie.desk.confidence import fit_confidence
from coterie.engine.engine import Engine
from coterie.engine.request import Sampling
from coterie.evaluation.calibration import threshold_for
from coterie.evaluation.tasks import banking77
from coterie.model.load import BaseModel, load
from coterie.model.pull import DEFAULT, pull

ERROR = 0.02
PERSON_COST = (3.0, 6.0, 12.0)  # of one contact with a person: low, middle, high; a currency of your choice
ASSISTANT_COST = 0.002  # of one answer on a small server
SHARES = ("verified", "assumed", "silent_failure", "escalation_recall", *(f"cost_at_{c:.0f}" for c in PERSON_COST))
QUICK_TASKS = 12
AT_ONCE = 8  # customers
DOCUMENTS, CHARACTERS = 2, 800  # that go before the model, and of each


def expert(report: Report, folder: Path, test: Sequence[Example], quick: bool) -> None:
    """The trained expert of a business: calibrated on half of its test rows as `coterie desk calibrate` does, measured
    on the other half, and the other way round."""
    answerer = Answerer.open(Business.open(folder))
    try:
        signals, right = outcomes(answerer, test[:: 10 if quick else 1], lambda n: None)
    finally:
        answerer.close()
    order = np.random.default_rng(1).permutation(len(right))
    sent, wrong = 0, 0
    for here, there in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        fitted = fit_confidence([signals[i] for i in here], [right[i] for i in here], ERROR)
        chosen = [right[i] for i in there if fitted.sure(signals[i])]
        sent, wrong = sent + len(chosen), wrong + len(chosen) - sum(chosen)
    report.figures |= {"expert_accuracy": sum(right) / len(right), "expert_handled": sent / len(right),
                       "expert_wrong": wrong / max(sent, 1)}  # fmt: skip
    report.say(f"The trained expert is right in {sum(right) / len(right):.1%} of {len(right)} rows; of "
               f"{sent / len(right):.1%} handled, {wrong / max(sent, 1):.1%} are wrong (two halves, each measured with "
               "what the other taught).")  # fmt: skip


def contacts(report: Report, args: argparse.Namespace, base: BaseModel | None) -> None:
    """Every system serves every customer."""
    folder = need_data("tau2_banking")
    tasks, documents = read_tasks(folder), read_documents(folder)
    gold = [replay(t).verified for t in tasks]
    if not all(gold):
        raise SystemExit(f"the oracle fails {gold.count(False)} tasks: the harness is broken")
    index, names = Bm25(documents), products(tasks, documents)
    if args.quick:
        tasks = tasks[:: len(tasks) // QUICK_TASKS]
    engine = Engine(base, None, slots=AT_ONCE, context=2048) if base else None
    model = _Model(engine, args.url, args.model_name, index, documents)
    systems: dict[str, System] = {
        "oracle (gold)": oracle, "escalate all": lambda _t, _s: Reply(person=True),
        "BM25-FAQ": lambda _t, said: Reply(documents[index.search(" ".join(said[::2]), 1)[0][1]]),
        "base model": model.reply,
    }  # fmt: skip
    runs: dict[str, list[Run]] = {}
    for name, system in systems.items():
        runs[name] = _played(tasks, system, names)
        screen.print(f"{name}: done")
    development, held = tasks[::2], tasks[1::2]
    rows = [_row(name, done) for name, done in runs.items()]
    for name, done in runs.items():
        key = name.split(" (")[0].replace(" ", "_").replace("-", "_").lower()
        report.figures |= _figures(key, done)
    for error in (0.01, 0.02, 0.05):
        by_task = {r.task.name: r for r in runs["base model"]}
        tuned = [by_task[t.name] for t in development]
        at = threshold_for([r.confidence for r in tuned], [r.verified for r in tuned], error)
        kept = [by_task[t.name] for t in held]
        ours = [r if r.confidence >= at else replace(r, escalated=True, done=[]) for r in kept]
        rows.append(_row(f"coterie, {error:.0%} wrong ({len(held)} held-out)", ours))
        percent = f"{100 * error:.0f}"
        report.figures |= _figures(f"coterie_at_{percent}", ours)
        report.figures[f"deflection_at_{percent}"] = sum(r.assumed for r in ours) / len(ours)
    report.figures["oracle_verified"] = sum(gold) / len(gold)
    head = ["contacts", "verified", "assumed", "silent failure", "escalation recall",
            *(f"cost at {c:.0f}" for c in PERSON_COST)]  # fmt: skip
    report.table("Contacts of tau2-bench's bank", head, rows)
    report.say("Cost is of one resolved contact: (answers x cost of an answer + escalated x cost of a person) / "
               "(verified + escalated), at three costs of a person. Verified: the bank's state is the gold one, and a "
               "person was called exactly where the gold solution calls one.")  # fmt: skip
    if engine:
        engine.close()


def _played(tasks: Sequence[Task], system: System, names: Sequence[str]) -> list[Run]:
    """Some customers at once, so that the engine has a batch."""

    def one(task: Task) -> Run:
        return replay(task) if system is oracle else play(task, system, names)

    runs = list[Run]()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for run in pool.map(one, tasks):
            runs.append(run)
            if len(runs) % 20 == 0:
                screen.print(f"{len(runs)} of {len(tasks)} customers", highlight=False)
    return runs


def _figures(key: str, runs: Sequence[Run]) -> dict[str, float]:
    shares = dict(zip(SHARES, _row("", runs)[1:], strict=False))
    return {f"{key}_{name}": float(x) for name, x in shares.items() if isinstance(x, float) and np.isfinite(x)}


def _row(name: str, runs: Sequence[Run]) -> list[object]:
    n, escalated = len(runs), sum(r.escalated for r in runs)
    verified, wanted = sum(r.verified for r in runs), [r for r in runs if r.task.wants_person]
    recall = sum(r.escalated for r in wanted) / len(wanted) if wanted else float("nan")
    solved = sum(r.verified and not r.escalated for r in runs) + escalated
    costs = [(n * ASSISTANT_COST + escalated * c) / solved if solved else float("inf") for c in PERSON_COST]
    silent = sum(r.silent_failure for r in runs)
    return [name, verified / n, sum(r.assumed for r in runs) / n, silent / n, recall, *costs]


class _Model:
    """A language model with the best documents before it, in our engine or behind an OpenAI-compatible server."""

    def __init__(
        self, engine: Engine | None, url: str, name: str, index: Bm25, documents: dict[str, str]
    ) -> None:  # fmt: skip
        self.engine, self.url, self.name, self.index, self.documents = engine, url, name, index, documents

    def reply(self, task: Task, said: Sequence[str]) -> Reply:
        found = self.index.search(" ".join(said[::2]), DOCUMENTS)
        facts = "\n\n".join(self.documents[name][:CHARACTERS] for _, name in found)
        system = (
            "You help customers of a bank. Answer in two sentences from these facts. Ask if you need to.\n\n" + facts
        )
        messages = [{"role": "system", "content": system}] + [
            {"role": "user" if n % 2 == 0 else "assistant", "content": text[:600]} for n, text in enumerate(said)
        ]
        text, logprobs = self._server(messages) if self.url else self._engine(messages)
        sure = float(np.exp(np.mean(logprobs))) if logprobs else 0.0
        return Reply(text, confidence=sure)

    def _engine(self, messages: list[dict[str, str]]) -> tuple[str, list[float]]:
        assert self.engine
        base = self.engine.base
        generation = self.engine.submit(base.encode(base.chat(messages)), Sampling(max_tokens=64, logprobs=0))
        text, logprobs = "", list[float]()
        for piece in generation:
            text += piece.text
            logprobs += [t.logprob for t in piece.tokens if t.logprob is not None]
        return text, logprobs

    def _server(self, messages: list[dict[str, str]]) -> tuple[str, list[float]]:
        body = {"model": self.name, "messages": messages, "max_tokens": 128, "temperature": 0, "logprobs": True}
        answer = httpx.post(f"{self.url.rstrip('/')}/v1/chat/completions", json=body, timeout=300).raise_for_status()
        choice = answer.json()["choices"][0]
        tokens = (choice.get("logprobs") or {}).get("content") or []
        return choice["message"]["content"], [t["logprob"] for t in tokens]


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--business", type=Path, help="a business whose expert names Banking77's intents, trained")
    parser.add_argument("--model", default=DEFAULT, help="base model: a hub id, a folder or a .gguf file")
    parser.add_argument("--url", default="", help="an OpenAI-compatible server to ask instead")
    parser.add_argument("--model-name", default="base", help="the model's name at that server")
    args = parser.parse_args()
    report = Report("Customer service: benchmarks/desk.py")
    contacts(report, args, None if args.url else load(pull(args.model), packed=True))
    if args.business:
        expert(report, args.business, banking77.splits(need_data("banking77")).test, args.quick)
    finish(report, args)


if __name__ == "__main__":
    main()
