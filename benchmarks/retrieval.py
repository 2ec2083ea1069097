"""Does retrieval find the documents that a task needs, and what does it cost beside LlamaIndex's default stores?

Part 1, tau2_banking: 698 documents, 97 tasks; the question is the task's instruction text. Settings were chosen on the
tasks with an even number (0, 2, ...); figures are given for the odd ones and for all. The lines with judged questions
let the index know which documents served the tasks of the other half: halves by turns, as questions that recur; the
same without those whose text nearly repeats the question's (NEAR); and the first half against the second, as questions
that are new (the tasks are in order of subject).
Part 2: documents of one chunk, made of the real sentences, and the same vectors on both sides, so that only reading,
cutting, indexing and searching are compared; then one line with embedding. The peer runs in an environment of its own:
python -m venv DIR; DIR/bin/pip install llama-index-core numpy; give it with --peer DIR/bin/python.

    python benchmarks/retrieval.py --peer /tmp/peers-retrieval/bin/python
"""

import json
import math
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Report, finish, need_data, options

from coterie.knowledge.chunk import SIZE, chunks
from coterie.knowledge.documents import Documents, learn
from coterie.knowledge.documents_spec import DocumentsSpec
from coterie.knowledge.embed import EMBEDDER, MiniLM, minilm
from coterie.knowledge.evidence import EVERYONE
from coterie.knowledge.parse import parse
from coterie.knowledge.search import Search, clauses
from coterie.knowledge.store import File, Store
from coterie.model.pull import pull

Rank = list[list[str]]
SEEN = 400  # passages asked for: 50 documents are among them
NEAR = 0.2  # share of stretches of five words in common above which a task nearly repeats another


def bm25(documents: dict[str, str], questions: list[str], k: float = 1.5, b: float = 0.75) -> Rank:
    """Documents in order of BM25 for the whole question: the plain baseline (lower-case words, no stemming)."""
    words = {name: Counter(re.findall(r"\w+", text.lower())) for name, text in documents.items()}
    sizes = {name: sum(w.values()) for name, w in words.items()}
    mean, count = sum(sizes.values()) / len(sizes), len(words)
    df = Counter(w for of in words.values() for w in of)
    out = []
    for question in questions:
        asked = Counter(re.findall(r"\w+", question.lower()))
        scores = {
            name: sum(
                n * math.log(1 + (count - df[w] + 0.5) / (df[w] + 0.5))
                * of[w] * (k + 1) / (of[w] + k * (1 - b + b * sizes[name] / mean))
                for w, n in asked.items() if w in of
            ) for name, of in words.items()
        }  # fmt: skip
        out.append(sorted(scores, key=lambda name: -scores[name]))
    return out


def recall(found: Rank, needed: list[list[str]], which: Sequence[int]) -> tuple[float, float, int]:
    """Mean recall at 10 and at 50, and the tasks with all of their documents among 50."""
    at10 = [np.mean([n in found[i][:10] for n in needed[i]]) for i in which]
    at50 = [np.mean([n in found[i][:50] for n in needed[i]]) for i in which]
    return float(np.mean(at10)), float(np.mean(at50)), sum(x == 1 for x in at50)


def stretches(text: str) -> set[tuple[str, ...]]:
    """All stretches of five words."""
    words = text.lower().split()
    return set(zip(*(words[i:] for i in range(5)), strict=False))


class Known:
    """An embedder that looks up what was embedded before."""

    def __init__(self, model: MiniLM, vectors: dict[str, np.ndarray]) -> None:
        self.name, self.width, self.vectors = model.name, model.width, vectors

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.vectors[t] for t in texts])


def quality(report: Report) -> None:
    """Part 1."""
    data = need_data("tau2_banking")
    tasks = json.loads((data / "tasks.json").read_text())
    questions = [t["user_scenario"]["instructions"] for t in tasks]
    needed = [[f"{d}.md" for d in t["required_documents"]] for t in tasks]
    odd, every = range(1, len(tasks), 2), range(len(tasks))
    model = minilm()
    with tempfile.TemporaryDirectory() as work:
        root = Path(work) / "files"
        root.mkdir()
        texts = {}
        for file in sorted((data / "documents").glob("*.json")):
            d = json.loads(file.read_text())
            texts[f"{d['id']}.md"] = f"# {d['title']}\n\n{d['content']}\n"
            (root / f"{d['id']}.md").write_text(texts[f"{d['id']}.md"])
        spec = DocumentsSpec(kind="documents", path="files")
        start = time.perf_counter()
        done = learn("bank", spec, root, Path(work) / "index", model)
        report.figures["bank_index_s"] = time.perf_counter() - start
        size = sum(f.stat().st_size for f in (Path(work) / "index").rglob("*") if f.is_file())
        report.figures["bank_index_bytes_per_document"] = size / done.indexed
        report.figures["bank_index_bytes_per_passage"] = size / done.passages
        vectors = [model.embed([q, *clauses(q)]) for q in questions]
        known = Known(model, {q: v[0] for q, v in zip(questions, vectors, strict=True)})
        said = [stretches(q) for q in questions]
        near = [[len(a & b) / len(a | b) > NEAR for b in said] for a in said]
        half = len(tasks) // 2
        judging: dict[str, Callable[[int, int], bool]] = {  # whether task j's documents are known when i is asked
            "hybrid, nothing learned": lambda _i, _j: False,
            "hybrid + judged questions, by turns": lambda i, j: i % 2 != j % 2,
            "the same, near repeats left out": lambda i, j: i % 2 != j % 2 and not near[i][j],
            "hybrid + judged questions, other subjects": lambda i, j: (i < half) != (j < half),
        }  # fmt: skip
        opened: dict[tuple[int, ...], Documents] = {}

        def ours(i: int, judged: tuple[int, ...]) -> list[str]:
            if judged not in opened:
                file = Path(work) / f"judged{len(opened)}.jsonl"
                rows = [{"question": questions[j], "documents": needed[j]} for j in judged]
                file.write_text("".join(json.dumps(row) + "\n" for row in rows))
                asks = spec.model_copy(update={"judged": file.name if judged else ""})
                opened[judged] = Documents("bank", asks, Path(work) / "index", known, Path(work))
            source = opened[judged]
            gains = source.judged.gains if source.judged else lambda _: {}
            hits = source.searching.find(questions[i], {EVERYONE}, SEEN, gains, vectors[i])
            return list(dict.fromkeys(p.path for p, _ in hits))

        lines = {"BM25, whole question": bm25(texts, questions)}
        for label, knows in judging.items():
            lines[label] = [ours(i, tuple(j for j in every if knows(i, j))) for i in every]
        rows = []
        for label, found in lines.items():
            a, o = recall(found, needed, every), recall(found, needed, odd)
            rows.append([label, a[0], a[1], f"{a[2]}/{len(every)}", o[0], o[1], f"{o[2]}/{len(odd)}"])
        report.table(
            "tau2_banking: recall of the required documents",
            ["", "all: @10", "@50", "all found @50", "odd tasks: @10", "@50", "all found @50"], rows,
        )  # fmt: skip
        base, plain, turns, apart, new = rows
        ceiling = np.mean([min(10, len(n)) / len(n) for n in needed])
        report.say(f"A task needs {np.mean([len(n) for n in needed]):.1f} documents; no ranking has more than "
                   f"{ceiling:.3f} @10.")  # fmt: skip
        for key, row in (("bm25", base), ("hybrid", plain), ("judged", turns), ("judged_no_near_repeats", apart),
                         ("judged_new_subjects", new)):  # fmt: skip
            report.figures |= {f"recall10_{key}": row[1], f"recall50_{key}": row[2],
                               f"all_found50_{key}": int(row[3].split("/")[0])}  # fmt: skip
        report.ratios["recall10_vs_bm25"] = plain[1] / base[1]
        report.ratios["recall10_judged_vs_bm25"] = turns[1] / base[1]
        repeated = sum(any(n[j] for j in every if i % 2 != j % 2) for i, n in enumerate(near))
        report.say(f"{repeated} of {len(tasks)} tasks have a near repeat in the other half: more than {NEAR:.0%} of "
                   "the stretches of five words of both are the same.")  # fmt: skip


def made(
    sentences: list[str], vectors: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """`count` chunks of six real sentences each, their vectors (the mean of the sentences'), and which sentences."""
    picked = rng.integers(0, len(sentences), (count, 6))
    texts = [f"Passage {n}. " + " ".join(sentences[i] for i in row) for n, row in enumerate(picked)]
    mean = vectors[picked].mean(axis=1)
    return texts, (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32), picked


def speed(report: Report, peer: str, sizes: list[int], asks: int, threads: int) -> None:
    """Part 2."""
    data = need_data("tau2_banking")
    texts = [json.loads(f.read_text())["content"] for f in sorted((data / "documents").glob("*.json"))]
    found = re.split(r"(?<=[.!?])\s+|\n+", "\n".join(texts))
    sentences = [s for s in dict.fromkeys(s.strip(" -*#") for s in found) if 40 <= len(s) <= 200][:4000]
    model, rng = minilm(), np.random.default_rng(0)
    of_sentences = model.embed(sentences)
    rows = []
    for size in sizes:
        texts, vectors, picked = made(sentences, of_sentences, size, rng)
        chosen = rng.choice(size, asks, replace=False)
        questions = [f"{sentences[picked[c][0]]} {sentences[picked[c][1]]}" for c in chosen]
        asked = {q: model.embed([q, *clauses(q)]) for q in questions}
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            (folder / "texts.json").write_text(json.dumps(texts))
            (folder / "questions.json").write_text(json.dumps(list(asked)))
            np.save(folder / "vectors.npy", vectors)
            np.save(folder / "asked.npy", np.stack([v[0] for v in asked.values()]))
            own = _ours(folder, texts, vectors, asked, model)
            other: dict[str, Any] | None = None
            if peer:
                environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
                command = [peer, str(Path(__file__).parent / "peers" / "llama_index_store.py"), work]
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
                if done.returncode:
                    raise SystemExit(f"{' '.join(command)}\nfailed:\n{done.stderr[-2000:]}")
                other = json.loads(done.stdout.splitlines()[-1])
        p50s: dict[str, float] = {}
        for key, label, one in (
            ("coterie", "coterie, words and vectors", own["hybrid"]),
            ("coterie_vectors", "coterie, vectors alone", own["vectors"]), ("peer", "LlamaIndex, vectors", other),
        ):  # fmt: skip
            if one is None:
                continue
            p50, p99 = (1e3 * float(np.percentile(one["query_s"], p)) for p in (50, 99))
            hit = float(np.mean([c in f for c, f in zip(chosen.tolist(), one["found"], strict=True)]))
            bytes_ = one["bytes"] / size if "bytes" in one else "-"
            rows.append([f"{size:,} chunks: {label}", one["index_s"], p50, p99, 1e3 / p50, hit, bytes_])
            report.figures |= {f"{key}_{size}_{what}": x for what, x in (
                ("index_s", one["index_s"]), ("p50_ms", p50), ("p99_ms", p99), ("recall10", hit))}  # fmt: skip
            p50s[key] = p50
        if other:
            suffix = "" if size == sizes[-1] else f"_{size}"
            report.ratios[f"index_vs_peer{suffix}"] = other["index_s"] / own["hybrid"]["index_s"]
            report.ratios[f"query_vs_peer{suffix}"] = p50s["peer"] / p50s["coterie"]
            report.ratios[f"query_vectors_vs_peer{suffix}"] = p50s["peer"] / p50s["coterie_vectors"]
    report.table(
        "The same texts and vectors; a question is two sentences of a chunk, and the chunk is to be among ten",
        ["", "index s", "p50 ms", "p99 ms", "queries/s", "recall@10", "bytes per chunk"], rows,
    )  # fmt: skip


def _ours(
    folder: Path, texts: list[str], vectors: np.ndarray, asked: dict[str, np.ndarray], model: MiniLM
) -> dict[str, Any]:
    """Read, cut and index on disk, near-duplicates looked for; then ask by words and vectors together, and by the
    vectors alone."""
    start = time.perf_counter()
    store = Store(folder / "ours", model.width, model.name)
    with store.batch():
        for n, text in enumerate(texts):
            parsed = parse(Path(f"{n}.txt"), text.encode())
            store.put(File(f"{n}.txt", "0", 0, 0, parsed.title, (EVERYONE,)), chunks(parsed, 2 * SIZE))
        assert len(store.pending()) == len(texts), "each chunk has a number of its own, so none repeats another"
        store.finish(vectors)
    store.close()
    index_s = time.perf_counter() - start
    size = sum(f.stat().st_size for f in (folder / "ours").rglob("*") if f.is_file())
    search = Search(folder / "ours", model)

    def hybrid(question: str) -> list[int]:
        return [int(p.path[:-4]) for p, _ in search.find(question, {EVERYONE}, 10, vectors=asked[question])]

    def alone(question: str) -> list[int]:
        ids = search.by_vectors(asked[question][:1], search.classes({EVERYONE}), 10)[0][0]
        return [int(p.path[:-4]) for p in search.passages(ids.tolist()).values()]

    out: dict[str, Any] = {}
    for name, ask in (("hybrid", hybrid), ("vectors", alone)):
        ask(next(iter(asked)))
        seconds, found = [], []
        for question in asked:
            start = time.perf_counter()
            found.append(ask(question))
            seconds.append(time.perf_counter() - start)
        out[name] = {"index_s": index_s, "query_s": seconds, "found": found, "bytes": size}
    search.close()
    return out


def with_embedding(report: Report, count: int) -> None:
    """Real passages, embedded and indexed by us; beside it embedding alone as sentence-transformers does it: float32,
    32 texts at a time in order of length, padded."""
    import transformers

    data = need_data("tau2_banking")
    texts = [json.loads(f.read_text())["content"][:1000] for f in sorted((data / "documents").glob("*.json"))][:count]
    model, folder = minilm(), pull(EMBEDDER)
    model.embed(texts[:8])
    start = time.perf_counter()
    vectors = model.embed(texts)
    ours = time.perf_counter() - start
    reference = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    start, theirs_vectors = time.perf_counter(), np.zeros_like(vectors)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for first in range(0, len(order), 32):
        rows = order[first : first + 32]
        batch = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            hidden = reference(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        theirs_vectors[rows] = torch.nn.functional.normalize(mean, dim=-1).numpy()
    theirs = time.perf_counter() - start
    report.ratios["embed_vs_transformers"] = theirs / ours
    report.figures |= {
        "embed_passages_per_s": count / ours, "transformers_passages_per_s": count / theirs,
        "embed_cosine_to_reference_min": float((vectors * theirs_vectors).sum(axis=1).min()),
    }  # fmt: skip
    report.say(f"Embedding {count} passages: {count / ours:.0f}/s ours (bfloat16, packed), {count / theirs:.0f}/s by "
               "transformers in float32, padded: with embedding, this decides how long indexing takes.")  # fmt: skip


def main() -> None:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--peer", default=os.environ.get("COTERIE_RETRIEVAL_PEER", ""),
                        help="a Python that has llama-index-core; without it, only our side is measured")  # fmt: skip
    parser.add_argument("--sizes", help="numbers of chunks, as in 1000,10000,100000")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = [int(n) for n in (args.sizes or ("1000,5000" if args.quick else "1000,10000,100000")).split(",")]
    report = Report("Retrieval: documents found, and speed beside LlamaIndex")
    quality(report)
    speed(report, args.peer, sizes, 20 if args.quick else 50, args.threads)
    with_embedding(report, 128 if args.quick else 698)
    finish(report, args)


if __name__ == "__main__":
    main()
