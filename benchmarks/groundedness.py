"""What share of the sentences of an answer does no source say: without grounding, with evidence, and checked?

The base model answers 100 questions of the example shop (its test rows, then its training rows; the model has
seen none). The judge is not the product's check: a sentence counts as said where all of its numbers stand in the shop's
policies and one line of them has at least 60% of its content words. Sentences that state nothing are not counted.
Both go by words and numbers, so that the last line is low partly by construction.

    python benchmarks/groundedness.py
"""

import json
import tempfile
from pathlib import Path

from common import Report, finish, options

from coterie.answer import Answerer
from coterie.business import Business
from coterie.engine.request import Sampling
from coterie.grounding import Grounding
from coterie.init import create
from coterie.knowledge.evidence import Reader
from coterie.knowledge.support import content, lines, numbers, says_something, sentences
from coterie.sources import Knowledge, learn

ENOUGH = 0.6  # share of a sentence's content words in one line
ANSWER = 60  # tokens


def said(sentence: str, policy_lines: list[str], all_numbers: set[str]) -> bool:
    """The judge."""
    words = content(sentence)
    best = max(len(words & content(line)) / max(1, len(words)) for line in policy_lines)
    return best >= ENOUGH and numbers(sentence) <= all_numbers


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
        found: dict[str, list[str]] = {"without sources": [], "with evidence": [], "with evidence, checked": []}
        answered = 0
        try:
            for question in questions:
                messages = [{"role": "user", "content": question}]
                grounded = grounding.gather(messages, Reader())
                alone = answerer.chat("base", messages, sampling)
                based = grounding.ask("base", messages, grounded, sampling) if grounded.known else None
                found["without sources"] += sentences(alone.generation.text())
                if based is None:  # "I don't know", which states nothing
                    continue
                text = based.generation.text()
                found["with evidence"] += sentences(text)
                writer = grounding.writer(grounded)
                writer.feed(text)
                writer.end()
                kept = [s.text for s in grounded.sentences if s.cites or not s.checked]
                found["with evidence, checked"] += kept
                answered += any(s.cites for s in grounded.sentences)
        finally:
            answerer.close()
            knowledge.close()
    lines_ = []
    for name, texts in found.items():
        checked = [s for s in texts if says_something(s)]
        share = sum(not said(s, policy_lines, all_numbers) for s in checked) / max(1, len(checked))
        lines_.append([name, len(checked), share])
        report.figures[f"unsupported_{name.replace(' ', '_').replace(',', '')}"] = share
    report.table(f"{len(questions)} questions", ["", "sentences that state something", "no source says"], lines_)
    report.figures["answered_with_a_citation"] = answered / len(questions)
    report.say(f"{answered} of {len(questions)} questions got at least one cited sentence; the rest get none, or "
               '"I don\'t know".')  # fmt: skip
    finish(report, args)


if __name__ == "__main__":
    main()
