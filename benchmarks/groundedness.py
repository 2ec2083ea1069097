"""What share of the sentences of an answer does no source say: without grounding, with evidence, and checked?

The base model answers 100 questions of the example shop (its test rows, then its training rows; the model has
seen none). The judge is not the product's check: a sentence counts as said where all of its numbers stand in the shop's
policies and one line of them has at least 60% of its content words. Sentences that state nothing are not counted.
Both go by words and numbers, so that the last lines are low partly by construction. The last line quotes the sources
where the check leaves nothing (`unsupported = "quote"`); how near to the question a quotation must be was chosen on the
shop's other training rows. An answer is right where it has the numbers of the shop's own and half of its words.

    python benchmarks/groundedness.py
"""

import json
import tempfile
from collections import Counter
from pathlib import Path

from common import Report, finish, options

from coterie.answer import Answerer
from coterie.business import Business
from coterie.engine.request import Sampling
from coterie.grounding import Grounding, Rule, Writer
from coterie.init import create
from coterie.knowledge.evidence import Reader
from coterie.knowledge.support import Checker, content, lines, numbers, says_something, sentences
from coterie.sources import Knowledge, learn

ENOUGH = 0.6  # share of a sentence's content words in one line
ANSWER = 60  # tokens
RULES: tuple[Rule, Rule] = ("withhold", "quote")


def said(sentence: str, policy_lines: list[str], all_numbers: set[str]) -> bool:
    """The judge."""
    words = content(sentence)
    best = max(len(words & content(line)) / max(1, len(words)) for line in policy_lines)
    return best >= ENOUGH and numbers(sentence) <= all_numbers


def says(text: str, answer: str) -> bool:
    """Does a text say what the shop's own answer says? Its numbers, and half of its content words."""
    words = content(answer)
    return numbers(answer) <= numbers(text) and len(words & content(text)) >= len(words) / 2


def main() -> None:
    args = options(__doc__.split("\n")[0]).parse_args()
    report = Report("Groundedness: sentences that no source says")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "shop"
        create(folder, example=True)
        rows = [json.loads(line) for name in ("support_test", "support")
                for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()]  # fmt: skip
        questions = [row["prompt"] for row in rows][: 12 if args.quick else 100]
        policy = (folder / "policies.md").read_text()
        policy_lines, all_numbers = lines(policy), numbers(policy)
        business = Business.open(folder)
        list(learn(business))
        answerer, knowledge = Answerer.open(business), Knowledge(business)
        grounding, sampling = Grounding(answerer, knowledge), Sampling(ANSWER)
        names = ("without sources", "with evidence", "with evidence, checked", "checked, else quoted")
        found: dict[str, list[str]] = {name: [] for name in names}
        cited, right = Counter[str](), Counter[str]()
        own = [row["completion"] for row in rows]
        known = [said(answer, policy_lines, all_numbers) for answer in own[: len(questions)]]
        silent = 0  # of the questions whose own answer stands in no policy, those that are left open
        try:
            for question, answer, in_policy in zip(questions, own, known, strict=False):
                messages = [{"role": "user", "content": question}]
                grounded = grounding.gather(messages, Reader())
                texts = {"without sources": answerer.chat("base", messages, sampling).generation.text()}
                if grounded.known:  # else "I don't know", which states nothing
                    texts["with evidence"] = grounding.ask("base", messages, grounded, sampling).generation.text()
                    for name, rule in zip(names[2:], RULES, strict=True):
                        grounded.sentences = []
                        checker = Checker([e.text for e in grounded.evidence], knowledge.embedder)
                        writer = Writer(grounded, checker, rule, question)
                        texts[name] = writer.feed(texts["with evidence"]) + writer.end()
                        cited[name] += any(s.cites for s in grounded.sentences)
                silent += not in_policy and not texts.get(names[3])
                for name, text in texts.items():
                    found[name] += sentences(text)
                    right[name] += in_policy and says(text, answer)
        finally:
            answerer.close()
            knowledge.close()
    lines_ = []
    for name, texts in found.items():
        checked = [s for s in texts if says_something(s)]
        share = sum(not said(s, policy_lines, all_numbers) for s in checked) / max(1, len(checked))
        lines_.append([name, len(checked), share, cited[name] if name in names[2:] else "-", right[name]])
        key = name.replace(" ", "_").replace(",", "")
        report.figures |= {f"unsupported_{key}": share, f"right_{key}": right[name] / sum(known),
                           f"cited_{key}": cited[name] / len(questions)}  # fmt: skip
    report.table(
        f"{len(questions)} questions, {sum(known)} of them answered by the policies",
        ["", "sentences that state something", "no source says", "questions with a citation", "right"], lines_,
    )  # fmt: skip
    report.figures["answered_with_a_citation"] = cited[names[3]] / len(questions)
    report.figures["left_open_rightly"] = silent / max(1, len(known) - sum(known))
    report.say(f"Of {len(known) - sum(known)} questions that the policies do not answer, {silent} are left open.")
    finish(report, args)


if __name__ == "__main__":
    main()
