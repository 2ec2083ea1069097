"""Whole contacts with the desk, from the customer's wish to the bank's state: the banking tasks of tau2-bench, offline.

See desk_tasks.py for the scripted customer. Escalate-all, BM25-FAQ, the base model with what BM25 finds, and coterie
serve the same customers; the gold oracle must reach 100%. "coterie" is the product: the desk's own answer flow with
the bank's 698 documents as knowledge, its checks, its procedures and its rules (desk_bank.py), and its own confidence,
calibrated on the development half of the tasks and measured on the other half. Which single messages may be answered
alone is measured by desk_intents.py. With a business whose expert is trained (`coterie fit examples/banking77`),
--business measures that expert too, by the product's own calibration.

The first run reads the documents and trains the expert that masks names, which takes some minutes; both are kept under
~/.cache/coterie. Several customers are served at once, as the engine does it.

    python benchmarks/desk.py --quick
    python benchmarks/desk.py --record
    python benchmarks/desk.py --model FOLDER     # any base model, or --url of an OpenAI-compatible server
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import Report, finish, need_data, options, screen
from desk_bank import Server, bank
from desk_tasks import (
    Bm25,
    Reply,
    Run,
    System,
    Task,
    answers,
    handed_over,
    oracle,
    play,
    products,
    read_documents,
    read_tasks,
    replay,
)

from coterie.answer import Answerer
from coterie.business import Business
from coterie.data.read import Example, Message
from coterie.desk.calibrate import outcomes
from coterie.desk.confidence import Confidence, Signals, fit_confidence
from coterie.engine.engine import Engine
from coterie.engine.request import Sampling
from coterie.errors import DataError
from coterie.evaluation.tasks import banking77
from coterie.model.load import load
from coterie.model.pull import DEFAULT, pull

ERROR = 0.02
ERRORS = (0.01, 0.02, 0.05)  # wished shares of wrong contacts among those that no person sees
PERSON_COST = (3.0, 6.0, 12.0)  # of one contact with a person: low, middle, high; a currency of your choice
ASSISTANT_COST = 0.002  # of one answer on a small server
SHARES = ("verified", "verified_alone", "assumed", "silent_failure", "escalation_recall",
          *(f"cost_at_{c:.0f}" for c in PERSON_COST))  # fmt: skip
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


def contacts(report: Report, args: argparse.Namespace) -> None:
    """Every system serves every customer."""
    folder = need_data("tau2_banking")
    tasks, documents = read_tasks(folder), read_documents(folder)
    gold = [replay(t).verified for t in tasks]
    if not all(gold):
        raise SystemExit(f"the oracle fails {gold.count(False)} tasks: the harness is broken")
    index, names = Bm25(documents), products(tasks, documents)
    if args.quick:
        tasks = tasks[:: len(tasks) // QUICK_TASKS | 1]  # an odd stride: every other one is of the development half
    server = Server(args.url, args.model_name) if args.url else None
    base = load(pull(args.model), packed=True)
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as scratch, bank(base, args.model, Path(scratch), AT_ONCE, server) as front:
        systems: dict[str, System] = {
            "oracle (gold)": oracle, "escalate all": lambda _t, _s: Reply(person=True),
            "BM25-FAQ": lambda _t, said: Reply(documents[index.search(" ".join(said[::2]), 1)[0][1]]),
            "base model": _Model(front.answerer.engine, server, index, documents).reply, "coterie": front.reply,
        }  # fmt: skip
        for name, system in systems.items():
            runs[name] = _played(tasks, system, names)
            screen.print(f"{name}: done")
    for name, done in runs.items():
        key = name.split(" (")[0].replace(" ", "_").replace("-", "_").lower()
        report.figures |= _figures(key, done)
    report.figures["oracle_verified"] = sum(gold) / len(gold)
    rows = [_row("coterie, not calibrated" if name == "coterie" else name, done) for name, done in runs.items()]
    development, held = runs["coterie"][::2], runs["coterie"][1::2]
    rows.append(_row(f"coterie, not calibrated ({len(held)} held-out)", held))
    report.figures |= _figures("coterie_held_out", held)
    rows += _calibrated(report, development, held)
    head = ["contacts", "verified", "without a person", "assumed", "silent failure", "escalation recall",
            *(f"cost at {c:.0f}" for c in PERSON_COST)]  # fmt: skip
    report.table("Contacts of tau2-bench's bank", head, rows)
    report.say("Cost is of one resolved contact: (answers x cost of an answer + escalated x cost of a person) / "
               "(verified + escalated), at three costs of a person. Verified: the bank's state is the gold one, and a "
               "person was called exactly where the gold solution calls one. Assumed is what a business would count as "
               "deflected; thresholds bound what a model writes, not what a procedure does.")  # fmt: skip
    _tell(report, runs["coterie"], args.model_name if args.url else args.model)


def _calibrated(
    report: Report, development: Sequence[Run], held: Sequence[Run]
) -> list[list[object]]:  # fmt: skip
    """The desk with its confidence, fitted on the development half: rows of the other half. A contact goes the same way
    with and without it up to the first answer that it is not sure of, so each is served once."""
    signals, right = answers(development)
    report.figures |= {"calibration_answers": len(right), "calibration_right": sum(right)}
    rows, refused = list[list[object]](), ""
    for error in ERRORS:
        fitted: Confidence | None = None
        try:
            fitted = fit_confidence(signals, right, error)
        except DataError as why:
            refused = str(why)
        ours = [handed_over(run, fitted.sure if fitted else _never) for run in held]
        percent, alone = f"{100 * error:.0f}", [r for r in ours if r.assumed]
        rows.append(_row(f"coterie, {error:.0%} wrong wished ({len(held)} held-out)", ours))
        report.figures |= _figures(f"coterie_at_{percent}", ours)
        report.figures |= {
            f"deflection_at_{percent}": len(alone) / len(ours),
            f"wrong_at_{percent}": sum(r.silent_failure for r in alone) / max(1, len(alone)),
        }
    said = f"Coterie's thresholds are set on {len(right)} answers to the development half, {sum(right)} of them right"
    report.say(f"{said}: `coterie desk calibrate` would refuse ({refused}), so nothing that the model writes is sent."
               if refused else said + ", so that the wished share holds with 95% confidence.")  # fmt: skip
    return rows


def _never(_signals: Signals) -> bool:
    return False


def _tell(report: Report, ours: Sequence[Run], model: str) -> None:
    """What the desk did, in words: what it solved alone, and why it called people."""
    why = Counter(r.replies[-1].reason for r in ours if r.escalated)
    alone, held = ([r for r in some if r.verified and r.assumed] for some in (ours, ours[1::2]))
    written = sum(any(reply.signals for reply in r.replies) for r in alone)
    report.figures |= {"coterie_verified_by_procedures": (len(alone) - written) / len(ours),
                       "coterie_verified_by_the_model": written / len(ours)}  # fmt: skip
    report.figures |= {f"coterie_handed_over_{reason}": count / len(ours) for reason, count in why.items()}
    reasons = ", ".join(f"{reason} {count}" for reason, count in why.most_common()) or "none"
    report.say(f"Coterie here is the desk's answer flow over {model}, with the bank's documents and two procedures, "
               f"without a trained expert. Not calibrated, it verifies {len(alone)} of {len(ours)} contacts without a "
               f"person ({len(held)} of {len(ours[1::2])} held-out): {len(alone) - written} by a procedure, which no "
               f"model decides, {written} by what the model wrote. People are called for: {reasons}.")  # fmt: skip
    if not written:
        report.say(f"{model} cannot act as an agent of this bank: nothing that it wrote has solved a contact. Beyond "
                   "the procedures the figures show how safely the desk hands over, not what it solves.")  # fmt: skip


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
    alone = sum(r.verified and not r.escalated for r in runs)
    solved = alone + escalated
    costs = [(n * ASSISTANT_COST + escalated * c) / solved if solved else float("inf") for c in PERSON_COST]
    silent = sum(r.silent_failure for r in runs)
    return [name, verified / n, alone / n, sum(r.assumed for r in runs) / n, silent / n, recall, *costs]


class _Model:
    """A language model with the best documents before it, in our engine or behind an OpenAI-compatible server."""

    def __init__(self, engine: Engine, server: Server | None, index: Bm25, documents: dict[str, str]) -> None:
        self.engine, self.server, self.index, self.documents = engine, server, index, documents

    def reply(self, task: Task, said: Sequence[str]) -> Reply:
        found = self.index.search(" ".join(said[::2]), DOCUMENTS)
        facts = "\n\n".join(self.documents[name][:CHARACTERS] for _, name in found)
        system = (
            "You help customers of a bank. Answer in two sentences from these facts. Ask if you need to.\n\n" + facts
        )
        messages: list[Message] = [{"role": "system", "content": system}]
        for n, text in enumerate(said):
            messages.append({"role": "assistant" if n % 2 else "user", "content": text[:600]})
        if self.server:
            return Reply(self.server.ask(messages, 128)[0])
        base = self.engine.base
        return Reply(self.engine.submit(base.encode(base.chat(messages)), Sampling(max_tokens=64)).text())


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--business", type=Path, help="a business whose expert names Banking77's intents, trained")
    parser.add_argument("--model", default=DEFAULT, help="base model: a hub id, a folder or a .gguf file")
    parser.add_argument("--url", default="", help="an OpenAI-compatible server to ask instead")
    parser.add_argument("--model-name", default="base", help="the model's name at that server")
    args = parser.parse_args()
    report = Report("Customer service: benchmarks/desk.py")
    contacts(report, args)
    if args.business:
        expert(report, args.business, banking77.splits(need_data("banking77")).test, args.quick)
    finish(report, args)


if __name__ == "__main__":
    main()
