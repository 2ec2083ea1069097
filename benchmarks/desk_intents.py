"""Intents by the product's own classifier: what it may answer alone at 2% wrong, on Banking77 and MultiDoGO.

The papers' splits, as they are. `coterie fit` learns from the training rows of a business with one expert of kind
classifier, and fixes confidence and threshold on the same rows, each left out in turn: the lowest threshold at which a
95% upper bound on the share of wrong labels is within 2%. Only then are the test rows labelled, once. The last column
but one is the most that any threshold could have handled on the test rows: nobody has it, and it tunes nothing.

    python benchmarks/desk_intents.py --quick
    python benchmarks/desk_intents.py --record
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import Report, finish, need_data, options, screen

from coterie.business import Business, fit
from coterie.config import Config
from coterie.data.read import Example
from coterie.data.write import write_rows
from coterie.evaluation.calibration import calibration
from coterie.evaluation.metrics import macro_f1, wilson
from coterie.evaluation.tasks import banking77, multidogo
from coterie.experts.kinds import labeller
from coterie.model.load import BaseModel, load
from coterie.model.pull import DEFAULT, pull

ERROR = 0.02
DOMAINS = {"airline": "an airline", "fastfood": "a restaurant", "finance": "a bank", "software": "a software company"}
QUICK_ROWS, QUICK_TESTS = 1000, 300


def intents(report: Report, base: BaseModel, model: str, quick: bool) -> None:
    """Each data set: learned, threshold fixed, then its test rows."""
    sets = {"banking77": ("a bank", banking77.splits(need_data("banking77")))}
    for domain, kind in list(DOMAINS.items())[: 1 if quick else 4]:
        sets[f"multidogo {domain}"] = (kind, multidogo.splits(need_data(f"multidogo/{domain}")))
    rows = []
    for name, (kind, data) in sets.items():
        train, test = list(data.train), list(data.test)
        if quick:
            train, test = _some(train, QUICK_ROWS), _some(test, QUICK_TESTS)
        with tempfile.TemporaryDirectory() as folder:
            business = _business(Path(folder), kind, model, base, train)
            began = time.monotonic()
            (fitted,) = fit(business, tell=lambda text: screen.print(text, highlight=False))
            seconds = time.monotonic() - began
            found = labeller(business.library, fitted.facts, base)
        began = time.monotonic()
        verdicts = found.judge([e.question for e in test])
        each = (time.monotonic() - began) / len(test)
        said, wanted = [v.label for v in verdicts], [e.completion for e in test]
        right = np.array([s == w for s, w in zip(said, wanted, strict=True)])
        sent, sure = np.array([v.sure for v in verdicts]), [v.confidence for v in verdicts]
        wrong = wilson(int((~right[sent]).sum()), max(1, int(sent.sum())))
        accuracy = wilson(int(right.sum()), len(right))
        f1, ece, most = macro_f1(said, wanted), calibration(sure, right.tolist())["ece"], _coverage(sure, right)
        key, expected = name.replace(" ", "_"), fitted.evaluation["held_out"]["expert"]["handled"]
        report.figures |= {
            f"{key}_accuracy": accuracy.value, f"{key}_macro_f1": f1, f"{key}_handled": float(sent.mean()),
            f"{key}_wrong": wrong.value, f"{key}_ece": ece, f"{key}_most_handled": most, f"{key}_fit_s": seconds,
            f"{key}_label_ms": 1000 * each,
        }  # fmt: skip
        between = f"{wrong.value:.2%} ({wrong.low:.2%} to {wrong.high:.2%})"
        rows.append([name, len(fitted.facts.choices), fitted.facts.training["rows"], len(test), accuracy.value, f1, ece,
                     expected, float(sent.mean()), between, most, round(seconds)])  # fmt: skip
    head = ["", "intents", "learned from", "test rows", "accuracy", "macro-F1", "ECE", "handled, training rows",
            "handled", "wrong of these (95% CI)", "most, by the test's own curve", "seconds to fit"]  # fmt: skip
    report.table(
        f"Intents: threshold for {ERROR:.0%} wrong fixed on training rows, test rows labelled once", head, rows
    )


def _business(folder: Path, kind: str, model: str, base: BaseModel, train: Sequence[Example]) -> Business:
    write_rows(folder / "train.jsonl", ({"prompt": e.question, "completion": e.completion} for e in train))
    expert = {"kind": "classifier", "error": ERROR, "train": "train.jsonl"}
    declared = {"business": {"name": kind, "base": model}, "experts": {"intents": expert}}
    return Business(folder, Config.model_validate(declared), base)


def _some(examples: list[Example], count: int) -> list[Example]:
    return [examples[i] for i in np.random.default_rng(0).permutation(len(examples))[:count]]


def _coverage(confidence: Sequence[float], right: np.ndarray) -> float:
    """The largest share of the rows, the surest first, with at most ERROR wrong (risk-coverage curve)."""
    order = np.argsort(-np.array(confidence), kind="stable")
    good = np.flatnonzero(np.cumsum(~right[order]) / np.arange(1, len(order) + 1) <= ERROR)
    return float(good[-1] + 1) / len(order) if len(good) else 0.0


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT, help="base model: a hub id, a folder or a .gguf file")
    args = parser.parse_args()
    report = Report("Intents and abstention: benchmarks/desk_intents.py")
    intents(report, load(pull(args.model), packed=True), args.model, args.quick)
    report.ratios["banking77_handled_vs_85"] = report.figures["banking77_handled"] / 0.85
    finish(report, args)


if __name__ == "__main__":
    main()
