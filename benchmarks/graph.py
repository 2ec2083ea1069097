"""Does the path finder answer questions over a graph? PathQuestion (Zhou et al. 2018), 2 and 3 hops over Freebase.

Questions are split by the person they ask about (by seed 0: 80% to learn from, 20% to measure), so no fact and no
question of the test half is seen in training. What is measured is the whole way: the question is linked to the graph
by the product's linker, the finder walks a graph on disk through SPARQL, and an answer is right when it is the set of
things that the data set says, no more and no less. The peer, in the same run and on the same graph, is what retrieval
does without training: the path whose words are the most like the question, by TF-IDF cosine over all paths that the
graph has (`lexical`), and the nearest training question's path, by TF-IDF cosine (`nearest`).

    python benchmarks/graph.py            # minutes
    python benchmarks/graph.py --quick    # a sixth of the test questions
"""

import argparse
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyoxigraph as ox
from common import Report, finish, need_data, options

from coterie.data.features import TfIdf
from coterie.evaluation.metrics import wilson
from coterie.knowledge.entities import plain
from coterie.knowledge.evidence import Reader
from coterie.knowledge.graph import Graph
from coterie.knowledge.graph_source import GraphSource
from coterie.knowledge.paths import Asked, Finder

BASE, WHO = "urn:pq:", Reader("benchmark")
LABEL = ox.NamedNode("http://www.w3.org/2000/01/rdf-schema#label")


@dataclass(frozen=True)
class Question:
    """One row: the answer is a set of things; `path` is what its author asked for."""

    text: str
    about: str
    path: tuple[str, ...]
    answers: frozenset[str]


def node(name: str) -> ox.NamedNode:
    return ox.NamedNode(BASE + name)


def read_facts(file: Path) -> list[tuple[str, str, str]]:
    return [tuple(line.split("\t")) for line in file.read_text().splitlines()]  # type: ignore[misc]


def read_questions(file: Path) -> list[Question]:
    out = []
    for line in file.read_text().splitlines():
        text, answer, walk = line.split("\t")
        parts = walk.split("#")
        answers = answer[answer.rindex("(") + 1 : -1].split("/")
        out.append(Question(text, parts[0], tuple(parts[1:-2:2]), frozenset(answers) - {""}))
    return out


def masked(question: Question) -> tuple[str, ...]:
    return tuple(plain(question.text.replace(question.about, " entity ")).split())


def split(rows: list[Question]) -> tuple[list[Question], list[Question]]:
    """By who is asked about: a fifth of them for the test."""
    people = sorted({r.about for r in rows})
    random.Random(0).shuffle(people)
    held = set(people[: len(people) // 5])
    return [r for r in rows if r.about not in held], [r for r in rows if r.about in held]


def peers(train: list[Question], facts: list[tuple[str, str, str]]) -> dict[str, Callable[[Question], tuple[str, ...]]]:
    """Two ways to choose a path without learning, among those that lead somewhere from the thing asked about."""
    out: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for s, r, o in facts:
        out[s][r].add(o)

    def reachable(about: str, hops: int = 3) -> list[tuple[str, ...]]:
        ends, found = {(): {about}}, list[tuple[str, ...]]()
        for _ in range(hops):
            ends = {
                (*path, r): {o for s in at for o in out[s][r]}
                for path, at in ends.items()
                for r in sorted({r for s in at for r in out[s]})  # ties fall the same way in each run
            }
            found += ends
        return found

    texts = [" ".join(masked(q)) for q in train]
    words = [" ".join(plain(r) for r in q.path) for q in train]
    space = TfIdf.learn(texts + words)
    known = space(texts)

    def lexical(q: Question) -> tuple[str, ...]:
        paths = reachable(q.about)
        scores = space([" ".join(plain(r) for r in p) for p in paths]) @ space([" ".join(masked(q))])[0]
        return paths[int(scores.argmax())]

    def nearest(q: Question) -> tuple[str, ...]:
        paths, order = set(reachable(q.about)), np.argsort(-(known @ space([" ".join(masked(q))])[0]), kind="stable")
        return next((train[i].path for i in order if train[i].path in paths), ())

    return {"lexical": lexical, "nearest": nearest}


def follow(facts: list[tuple[str, str, str]]) -> Callable[[str, tuple[str, ...]], frozenset[str]]:
    index: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for s, r, o in facts:
        index[s, r].add(o)

    def run(about: str, path: tuple[str, ...]) -> frozenset[str]:
        at = {about}
        for r in path:
            at = {o for s in at for o in index[s, r]}
        return frozenset(at)

    return run


def measure(hops: int, folder: Path, work: Path, args: argparse.Namespace, report: Report) -> list[list[object]]:
    facts, rows = read_facts(folder / f"{hops}H-kb.txt"), read_questions(folder / f"PQ-{hops}H.txt")
    train, test = split(rows)
    wordings = {masked(q) for q in train}
    if args.quick:
        test = test[:: 6 if hops == 3 else 3]
    graph = Graph(work / f"{hops}h")
    names = {name for s, _, o in facts for name in (s, o)}
    with graph.writing() as writer:
        triples = [ox.Triple(node(s), node(r), node(o)) for s, r, o in facts]
        triples += [ox.Triple(node(n), LABEL, ox.Literal(n.replace("_", " "))) for n in sorted(names)]
        writer.put("freebase", triples, ["*"], "1")
    finder, start = Finder({}), time.perf_counter()
    finder.learn([Asked(masked(q), tuple(BASE + r for r in q.path)) for q in train])
    learned = time.perf_counter() - start
    source, right, linked, seconds = GraphSource("freebase", graph, finder), [], 0, []
    source.answers(test[0].text, WHO)  # names are read once
    for q in test:
        start = time.perf_counter()
        found = source.answers(q.text, WHO, most=1)
        seconds.append(time.perf_counter() - start)
        linked += bool(found) and found[0].start == BASE + q.about
        right.append(bool(found) and {v.value.removeprefix(BASE) for v in found[0].values} == q.answers)
    graph.close()
    run, table = follow(facts), []
    unseen = [ok for ok, q in zip(right, test, strict=True) if masked(q) not in wordings]
    report.figures[f"hops{hops}_accuracy"] = sum(right) / len(right)
    report.figures[f"hops{hops}_accuracy_wording_not_in_training"] = sum(unseen) / max(1, len(unseen))
    report.figures[f"hops{hops}_linked"] = linked / len(test)
    report.figures[f"hops{hops}_test_questions"] = len(test)
    report.figures[f"hops{hops}_training_s"] = learned
    report.figures[f"hops{hops}_answer_p50_ms"] = float(np.median(seconds)) * 1e3

    def row(name: str, ok: list[bool]) -> list[object]:
        interval = wilson(sum(ok), len(ok))
        return [f"{hops} hops: {name}", sum(ok) / len(ok), f"{interval.low:.3f} to {interval.high:.3f}", len(ok)]

    table.append(row("coterie", right))
    table.append(row("coterie, wording not in training", unseen))
    for name, choose in peers(train, facts).items():
        ok = [run(q.about, choose(q)) == q.answers for q in test]  # the peers are told what the question names
        report.figures[f"hops{hops}_{name}"] = sum(ok) / len(ok)
        table.append(row(name, ok))
    report.ratios[f"hops{hops}_vs_nearest"] = report.figures[f"hops{hops}_accuracy"] / max(
        report.figures[f"hops{hops}_nearest"], 1e-9
    )
    report.ratios[f"hops{hops}_vs_lexical"] = report.figures[f"hops{hops}_accuracy"] / max(
        report.figures[f"hops{hops}_lexical"], 1e-9
    )
    return table


def main() -> None:
    args = options(__doc__.split("\n")[0]).parse_args()
    folder, report = need_data("pathquestion"), Report("Questions over a knowledge graph")
    with tempfile.TemporaryDirectory() as work:
        rows = [row for hops in (2, 3) for row in measure(hops, folder, Path(work), args, report)]
    report.table("PathQuestion, answer sets", ["", "accuracy", "95%", "questions"], rows)
    f = report.figures
    report.say(
        f"Trained in {f['hops2_training_s']:.1f} s and {f['hops3_training_s']:.1f} s; an answer, linking and SPARQL "
        f"included, takes {f['hops2_answer_p50_ms']:.0f} ms and {f['hops3_answer_p50_ms']:.0f} ms (median). Both peers "
        "are told what the question names; coterie finds it."
    )
    finish(report, args)


if __name__ == "__main__":
    main()
