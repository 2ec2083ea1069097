"""Fits and measures the check of a sentence against its evidence (knowledge/support.py).

Sentences of tau2_banking's documents. Said: a sentence as it stands, or with some of its words left out and neutral
ones put in, or its halves the other way round. Not said: with a number, a content word or a denial changed, or one
of another document that is near. Fitted on documents with an even number, measured on the odd ones.

    python benchmarks/support.py
"""

import json
import re

import numpy as np
from common import Report, finish, need_data, options

from coterie.knowledge.embed import minilm
from coterie.knowledge.support import SURE, content, features, lines, numbers, probability

_WORDS = "customers usually simply currently available please offer provide need include generally"
NEUTRAL = _WORDS.split()


def changed(sentence: str, pool: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """The sentence saying something else, and how."""
    words = sentence.split()
    how = rng.choice(["number", "word", "denial"])
    places = [i for i, w in enumerate(words) if re.search(r"\d", w)]
    if how == "number" and places:
        at = rng.choice(places)
        words[at] = re.sub(r"\d+", lambda m: str(int(m[0]) + int(rng.integers(1, 9))), words[at])
        return " ".join(words), "number"
    if how == "denial":
        at = next((i for i, w in enumerate(words) if w in ("is", "are", "can", "will", "may", "must", "does")), -1)
        if at >= 0:
            denied = at + 1 < len(words) and words[at + 1] == "not"
            return " ".join(words[: at + 1] + ([] if denied else ["not"]) + words[at + 1 + denied :]), "denial"
    places = [i for i, w in enumerate(words) if len(w) > 4 and w.isalpha()]
    for at in rng.permutation(places)[: max(2, len(places) // 2)]:
        words[at] = str(rng.choice(pool))
    return " ".join(words), "words"


def shortened(sentence: str, rng: np.random.Generator) -> str:
    """The sentence in other clothes: some words fewer, or its halves the other way round."""
    words = sentence.split()
    if rng.random() < 0.3 and len(words) > 8:
        half = len(words) // 2
        return " ".join(words[half:] + words[:half])
    kept = [w for w in words if rng.random() > 0.2 or re.search(r"\d|not|no\b", w)]
    for _ in range(int(rng.integers(0, 3))):
        kept.insert(int(rng.integers(0, len(kept) + 1)), str(rng.choice(NEUTRAL)))
    return " ".join(kept)


def main() -> None:
    args = options(__doc__.split("\n")[0]).parse_args()
    from sklearn.linear_model import LogisticRegression

    rng, model = np.random.default_rng(0), minilm()
    folder = need_data("tau2_banking") / "documents"
    texts = [json.loads(f.read_text())["content"] for f in sorted(folder.glob("*.json"))]
    texts = [t[:1000] for t in texts][:: 6 if args.quick else 2]
    of = [[s for s in lines(t) if len(content(s)) >= 3] or ["nothing"] for t in texts]
    pool = sorted({w for t in texts for w in t.split() if w.isalpha() and len(w) > 4})
    first = model.embed(texts)
    rows, truth, kinds, split = [], [], [], []
    for n, own in enumerate(of):
        vectors = model.embed(own)
        near = np.argsort(-(first @ first[n]))[1:4]
        asked = [(str(s), True, "said") for s in rng.choice(own, min(3, len(own)), replace=False)]
        asked += [(shortened(s, rng), True, "shortened") for s, _, _ in asked[:]]
        asked += [(*changed(str(s), pool, rng),) for s in rng.choice(own, min(4, len(own)), replace=False)]
        asked = [a if len(a) == 3 else (a[0], False, a[1]) for a in asked]
        asked += [(str(rng.choice(of[o])), False, "another document") for o in near]
        for (sentence, said, kind), vector in zip(asked, model.embed([a[0] for a in asked]), strict=True):
            if kind == "another document" and any(content(sentence) <= content(s) for s in own):
                continue  # it says the same
            rows.append(
                (numbers(sentence) <= numbers(texts[n]), features(sentence, texts[n], own, list(vectors @ vector)))
            )
            truth.append(said)
            kinds.append(kind)
            split.append(n % 2)
    truth_, split_ = np.array(truth), np.array(split)
    fits = np.array([f for _, f in rows])
    numbered = np.array([ok for ok, _ in rows])
    fitted = LogisticRegression(C=10, max_iter=2000).fit(
        fits[(split_ == 0) & numbered], truth_[(split_ == 0) & numbered]
    )
    print(
        "WEIGHTS =", tuple(round(float(w), 2) for w in fitted.coef_[0]), "BIAS =", round(float(fitted.intercept_[0]), 2)
    )
    sure = np.array([ok and probability(f) >= SURE for ok, f in rows])
    report = Report("Checking a sentence against its evidence")
    held = split_ == 1
    lines_ = []
    for kind in dict.fromkeys(kinds):
        which = held & (np.array(kinds) == kind)
        lines_.append([kind, int(which.sum()), float((sure[which] == truth_[which]).mean())])
    report.table("Held-out documents: share judged rightly", ["sentence", "count", "right"], lines_)
    report.figures["accuracy"] = float((sure[held] == truth_[held]).mean())
    report.figures["said_kept"] = float(sure[held & truth_].mean())
    report.figures["not_said_caught"] = float(1 - sure[held & ~truth_].mean())
    report.say(", ".join(f"{k} {v:.3f}" for k, v in report.figures.items()))
    finish(report, args)


if __name__ == "__main__":
    main()
