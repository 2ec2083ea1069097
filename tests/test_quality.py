"""The quality report finds what is planted, names its rows, and mends it in a new file."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.cli.main import main
from coterie.data.fix import FIXES, fix
from coterie.data.insults import Insults
from coterie.data.language import is_foreign
from coterie.data.neighbours import bands, candidates, repeats
from coterie.data.page import write_page
from coterie.data.private import finder, is_card, is_iban, mask
from coterie.data.quality import Checks, check, label_errors
from coterie.data.read import Source, read
from coterie.data.report import Report
from coterie.data.split import normalise
from coterie.data.write import write_rows
from coterie.errors import CoterieError, DataError

FIND = finder("GB")
THINGS = (
    "kettle", "lamp", "carpet", "mirror", "bicycle", "tractor", "violin", "sofa", "helmet", "tent", "printer", "boiler",
    "camera", "drill", "mattress", "fridge",
)  # fmt: skip
ASKS = {
    "refund": ("I want my money back for the {}", "please refund the {} that I returned", "refund for my {} is late"),
    "delivery": ("when will the {} arrive at my house", "has the {} been shipped yet", "the {} has not been delivered"),
}


def rows_of_two_labels() -> list[dict[str, Any]]:
    """96 clean rows: three wordings by 16 things, of two labels."""
    return [
        {"prompt": ask.format(thing), "completion": label, "source": "shop", "licence": "own"}
        for label, asks in ASKS.items() for ask in asks for thing in THINGS
    ]  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSONL."""

    def make(rows: list[dict[str, Any]], name: str = "train.jsonl") -> Path:
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        return tmp_path / name

    return make


def found(report: Report, name: str) -> list[str]:
    """Line numbers of a finding's rows, in the order of the report."""
    return [p["place"].rsplit(":", 1)[1] for f in report.findings if f.name == name for p in f.places]


PLANTED: dict[str, dict[str, Any]] = {
    "duplicates": {"prompt": "Has the kettle been shipped, yet?!", "completion": "delivery"},
    "near-duplicates": {"prompt": "when will the kettle arrive at my houses", "completion": "delivery"},
    "conflicts": {"prompt": "has the kettle been shipped yet", "completion": "refund"},
    "label-errors": {"prompt": "the trombone has not been delivered and it was shipped", "completion": "refund"},
    "leaks": {"prompt": "Could someone tell me who runs the lost property desk?", "completion": "delivery"},
    "too-long": {"prompt": "when will my parcel arrive " * 40, "completion": "delivery"},
    "language": {"prompt": "Wann wird mein Paket endlich geliefert? Ich warte schon lange.", "completion": "delivery"},
    "private": {"prompt": "please refund to ada.lovelace@example.org today", "completion": "refund"},
    "insults": {"prompt": "you people are idiots and I want a refund", "completion": "refund"},
    "small-classes": {"prompt": "do you also sell spare bulbs in blue", "completion": "products"},
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found_on_its_row(fault: str, write: Callable[..., Path]) -> None:
    train = write([*rows_of_two_labels(), PLANTED[fault]])
    test = write([{"prompt": "could someone tell me who runs the lost property desk", "completion": "x"}], "test.jsonl")
    how = Checks(context=100)
    clean = check(Source((write(rows_of_two_labels(), "clean.jsonl"),)), Source((test,)), how)
    assert [f.name for f in clean.findings if f.name in ("leaks", "private", "insults", "language", "conflicts")] == []
    assert "97" in found(check(Source((train,)), Source((test,)), how), fault)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{broken", "not valid JSON"),
        ('["a list"]', "must be an object"),
        ('{"prompt": "", "completion": "x"}', "'prompt' must be text"),
        ('{"prompt": "hello"}', "no column 'completion'"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "needs a role"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_and_the_rest_still_checked(
    line: str, says: str, write: Callable[..., Path]
) -> None:
    file = write(rows_of_two_labels())
    with file.open("a") as f:
        f.write(line + "\n")
    report = check(Source((file,)))
    (finding,) = [f for f in report.findings if f.name == "unusable"]
    assert (report.rows, report.unusable, finding.count) == (96, 1, 1)
    assert finding.places[0]["text"].startswith(f"{file}:97: ")
    assert says in finding.places[0]["text"]


def test_the_report_counts_rows_labels_sources_licences_and_synthetic_rows(write: Callable[..., Path]) -> None:
    rows = rows_of_two_labels()
    made = {
        "prompt": "is the tuba shipped",
        "completion": "delivery",
        "license": "CC0",
        "synthetic": {"method": "edit"},
    }
    report = check(Source((write([*rows, made]),)))
    assert report.rows == 97
    assert report.labels == {"delivery": 49, "refund": 48}
    assert report.sources == {"shop": 96, "(not given)": 1}
    assert report.licences == {"own": 96, "CC0": 1}
    assert report.synthetic == 1
    assert sum(n for _, _, n in report.lengths["histogram"]) == 97
    assert next(iter(report.languages)) == "en"
    json.dumps(report.json())


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_same_rows_in_another_format_give_the_same_report(kind: str, write: Callable[..., Path]) -> None:
    rows = [{k: r[k] for k in ("prompt", "completion")} for r in [*rows_of_two_labels(), PLANTED["private"]]]
    jsonl = write(rows)
    other = jsonl.with_suffix(f".{kind}")
    if kind == "csv":
        write_rows(other, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), other)
    a, b = check(Source((jsonl,))), check(Source((other,)))
    assert [(f.name, f.rows.tolist()) for f in a.findings] == [(f.name, f.rows.tolist()) for f in b.findings]
    assert (a.labels, a.lengths) == (b.labels, b.lengths)


def test_free_text_has_no_label_findings(write: Callable[..., Path]) -> None:
    rows = [{**r, "completion": f"About your {i}: we will look into it."} for i, r in enumerate(rows_of_two_labels())]
    report = check(Source((write([*rows, {**rows[0], "completion": "Something else."}]),)))
    assert report.labels is None
    assert {f.name for f in report.findings} & {"label-errors", "small-classes", "imbalance"} == set()
    assert found(report, "conflicts") == ["1", "97"]


def test_an_imbalance_is_said(write: Callable[..., Path]) -> None:
    rows = [{"prompt": f"where is order {i}", "completion": "delivery"} for i in range(60)]
    report = check(Source((write([*rows, {"prompt": "money back", "completion": "refund"}]),)), how=Checks(labels=True))
    assert any(f.name == "imbalance" and "60 times" in f.title for f in report.findings)


# Fixes


@pytest.mark.parametrize("name", FIXES)
def test_a_fix_mends_its_fault_and_leaves_the_original(name: str, write: Callable[..., Path], tmp_path: Path) -> None:
    train = write([*rows_of_two_labels(), *PLANTED.values()])
    test = write([{"prompt": "could someone tell me who runs the lost property desk", "completion": "x"}], "test.jsonl")
    before, how = train.read_bytes(), Checks(context=100)
    report = check(Source((train,)), Source((test,)), how)
    counts = fix(report, Source((train,)), [name], tmp_path / "new.jsonl", FIND)
    assert train.read_bytes() == before
    assert counts["written"] + counts["dropped"] == len(PLANTED) + 96
    after = check(Source((tmp_path / "new.jsonl",)), Source((test,)), how)
    mends = [f.name for f in report.findings if name in f.fixes]
    if name == "mark-label-errors":
        marked = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
        suspects = [str(n) for n, row in enumerate(marked, 1) if row["suspect"]]
        assert suspects == sorted(found(report, "label-errors"), key=int)
    elif name in ("label-errors", "near-duplicates"):  # judged anew among fewer rows: what was named is gone
        gone = [json.loads(train.read_text().splitlines()[int(n) - 1]) for n in found(report, name)]
        left = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
        assert gone
        assert not [row for row in gone if row in left]
    elif name != "unusable":
        assert mends == [name]
        assert found(after, name) == []


def test_conflicts_are_decided_by_the_majority_and_dropped_where_there_is_none(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    same = [{"prompt": "Hello?", "completion": c} for c in ("a", "b", "a")]
    tied = [{"prompt": "Who is there", "completion": c} for c in ("a", "b")]
    other = [{"prompt": f"number {i} and so on", "completion": "ab"[i % 2]} for i in range(20)]
    file = write([*same, *tied, *other])
    fix(check(Source((file,))), Source((file,)), ["conflicts"], tmp_path / "new.csv", FIND)
    kept = list(csv.DictReader((tmp_path / "new.csv").open()))
    assert [(r["prompt"], r["completion"]) for r in kept[:3]] == [("Hello?", "a")] * 2 + [("number 0 and so on", "a")]
    assert len(kept) == 22


@pytest.mark.parametrize(
    ("names", "out", "says"),
    [
        (["everything"], "new.jsonl", "no such fix"),
        (["duplicates"], "train.jsonl", "already there"),
        (["duplicates"], "new.parquet", "ends in .jsonl or .csv"),
        (["duplicates"], "absent/new.jsonl", "no such folder"),
    ],
)
def test_a_fix_that_cannot_be_made_is_refused(
    names: list[str], out: str, says: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    train = write(rows_of_two_labels())
    before = train.read_bytes()
    with pytest.raises(CoterieError, match=says):
        fix(check(Source((train,))), Source((train,)), names, tmp_path / out, FIND)
    assert train.read_bytes() == before


def test_a_file_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def rows() -> Any:
        yield {"a": 1}
        yield {"b": 2}

    with pytest.raises(DataError, match="different columns"):
        write_rows(tmp_path / "new.csv", rows())
    assert list(tmp_path.iterdir()) == []


# Private data

CARDS = ("4111111111111111", "5555 5555 5555 4444", "3782-822463-10005", "6011 1111 1111 1117", "3530111333300000")
IBANS = (
    "GB82 WEST 1234 5698 7654 32",
    "DE89370400440532013000",
    "NL91 ABNA 0417 1643 00",
    "FR1420041010050500013M02606",
)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        *[(f"my card is {c}, thanks", "my card is [CARD], thanks") for c in CARDS],
        *[(f"pay {i} please", "pay [IBAN] please") for i in IBANS],
        ("write to Ada.Byron+shop@mail.example.co.uk.", "write to [EMAIL]."),
        ("call 020 7946 0958 or +44 7700 900123", "call [PHONE] or [PHONE]"),
        ("card 4111 1111 1111 1112 has a wrong check digit", "card 4111 1111 1111 1112 has a wrong check digit"),
        ("GB82 WEST 1234 5698 7654 33 is no IBAN", "GB82 WEST 1234 5698 7654 33 is no IBAN"),
        ("order 20231104 of 2023-11-04 for 12.99 at 10:30", "order 20231104 of 2023-11-04 for 12.99 at 10:30"),
        ("server 192.168.100.200, version 1.2.3", "server 192.168.100.200, version 1.2.3"),
        ("12 4111 1111 1111 1111 35", "12 [CARD] 35"),
        ("a@b and @home", "a@b and @home"),
    ],
)
def test_private_data_is_masked_and_what_only_looks_like_it_is_not(text: str, masked: str) -> None:
    assert mask(text, FIND) == masked


@given(
    before=st.text("abc ,.:;[]()\n", max_size=12), after=st.text("abc ,.:;[]()\n", max_size=12),
    number=st.integers(10**11, 10**14 - 1), first=st.sampled_from("3456"), gap=st.sampled_from(["", " ", "-"]),
)  # fmt: skip
def test_masks_never_leave_a_valid_card_number(before: str, after: str, number: int, first: str, gap: str) -> None:
    body = f"{first}{number}"
    digits = next(body + d for d in "0123456789" if is_card(body + d) or len(set(body + d)) == 1)
    text = f"{before}{gap.join(digits[i : i + 4] for i in range(0, len(digits), 4))}{after}"
    masked = mask(text, FIND)
    assert "[CARD]" in masked
    assert not any(c.isdigit() for c in masked)


@given(st.text(st.sampled_from("0123456789 -+().@abGB\n"), max_size=60))
def test_nothing_private_is_found_in_what_was_masked(text: str) -> None:
    masked = mask(text, FIND)
    assert FIND(masked) == []
    assert mask(masked, FIND) == masked


@given(st.integers(0, 10**18), st.integers(0, 9))
def test_one_wrong_digit_is_never_a_valid_iban(number: int, change: int) -> None:
    account = f"{number:018d}"
    check_digits = 98 - int(f"{account}131400") % 97  # DE is 13 14
    iban = f"DE{check_digits:02d}{account}"[:22]
    assert is_iban(iban)
    wrong = iban[:10] + str((int(iban[10]) + 1 + change % 9) % 10) + iban[11:]
    assert not is_iban(wrong)


def test_private_data_of_the_presidio_research_set_is_found(public_data: Callable[[str], Path]) -> None:
    """Cards, IBANs and e-mail addresses have checks and are found; phone numbers of all countries only in part."""
    kinds = {"EMAIL_ADDRESS": "email", "CREDIT_CARD": "card", "IBAN_CODE": "iban", "PHONE_NUMBER": "phone"}
    hits, total, extra = dict.fromkeys(kinds.values(), 0), dict.fromkeys(kinds.values(), 0), 0
    for row in json.loads(public_data("presidio_research/synth_dataset_v2.json").read_text()):
        spans = FIND(row["full_text"])
        known = [s for s in row["spans"] if s["entity_type"] in kinds]
        wanted = [(s["start_position"], s["end_position"], kinds[s["entity_type"]]) for s in known]
        for start, end, kind in wanted:
            total[kind] += 1
            hits[kind] += any(s.start < end and s.end > start for s in spans)
        extra += sum(not any(s.start < end and s.end > start for start, end, _ in wanted) for s in spans)
    share = {k: hits[k] / total[k] for k in total}
    assert min(share["email"], share["card"], share["iban"]) >= 0.99
    assert share["phone"] >= 0.5
    assert extra <= 5


# Insults, language, neighbours


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("You IDIOT, where is my order", ["idiot"]),
        ("what an 1d10t", ["idiot"]),
        ("they should all be shot", ["should all be shot"]),
        ("go to hell!", ["go to hell"]),
        ("I hate waiting", []),
        ("the dog killed the mood", []),
        ("a moronically named town called Scunthorpe", []),
    ],
)
def test_insults_are_found_as_words_not_as_parts_of_words(text: str, terms: list[str]) -> None:
    assert Insults().find(text) == terms


def test_a_business_adds_its_own_terms(tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text("# ours\nmuppet\n\nabsolute clown # as in the complaint of May\n")
    insults = Insults(tmp_path / "terms.txt")
    assert insults.find("you Muppet, you absolute clown, you idiot") == ["muppet", "absolute clown", "idiot"]
    (tmp_path / "empty.txt").write_text("# nothing\n")
    for name in ("empty.txt", "absent.txt"):
        with pytest.raises(DataError, match=name):
            Insults(tmp_path / name)


def test_insults_measured_on_hatecheck(public_data: Callable[[str], Path]) -> None:
    """Words alone find little of what is hateful, and more of it than of what is not: the docs say so in figures."""
    insults, hits, total = Insults(), {"hateful": 0, "non-hateful": 0}, {"hateful": 0, "non-hateful": 0}
    with public_data("hatecheck/test_suite_cases.csv").open() as f:
        for row in csv.DictReader(f):
            total[row["label_gold"]] += 1
            hits[row["label_gold"]] += bool(insults.find(row["test_case"]))
    assert 0.1 < hits["hateful"] / total["hateful"] < 0.3
    assert hits["hateful"] / (hits["hateful"] + hits["non-hateful"]) > 0.6


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Where is the parcel that I ordered?", ""),
        ("Wo ist das Paket, das ich bestellt habe?", "de"),
        ("¿Dónde está el paquete que pedí ayer?", "es"),
        ("Où est le colis que j'ai commandé ?", "fr"),
        ("我上星期订的包裹现在在哪里", "zh"),
        ("ok", ""),
        ("12345 67890", ""),
    ],
)
def test_the_language_of_a_row_is_judged_only_where_it_is_sure(text: str, language: str) -> None:
    assert is_foreign(text, "en") == language


@given(st.lists(st.text("abcdef ", min_size=1, max_size=30), min_size=1, max_size=12))
def test_minhash_misses_no_row_that_is_the_same_when_normalised(texts: list[str]) -> None:
    texts = [normalise(t) for t in texts]
    hashes = [bands(t) for t in texts]
    rows = np.frombuffer(b"".join(hashes), np.uint64).reshape(len(texts), -1)
    twice = {i for i, t in enumerate(texts) if texts.count(t) > 1}
    assert twice <= set(candidates(rows).tolist())
    near = repeats((i, t, h) for i, (t, h) in enumerate(zip(texts, hashes, strict=True)))
    for i, t in enumerate(texts):
        if t in texts[:i]:
            assert i in near
    assert all(other < i for i, other in near.items())
    assert set(near.values()).isdisjoint(near)  # what is kept repeats nothing


# Label errors, measured


def test_flipped_labels_are_found(public_data: Callable[[str], Path]) -> None:
    """5% of the labels of 16 intents of banking77 flipped at random."""
    file = public_data("banking77/train.csv")
    rows = [(e.prompt[-1]["content"], e.completion) for e in read(file, {"prompt": "text", "completion": "category"})]
    names = sorted({label for _, label in rows})[::5]
    rows = [row for row in rows if row[1] in names]
    rng = np.random.default_rng(0)
    flipped = set(rng.permutation(len(rows))[: len(rows) // 20].tolist())
    labels = [
        names[(names.index(label) + int(rng.integers(1, len(names)))) % len(names)] if i in flipped else label
        for i, (_, label) in enumerate(rows)
    ]
    errors = label_errors([text for text, _ in rows], labels)
    right = [i for i, _ in errors if i in flipped]
    assert len(right) / len(flipped) > 0.88
    assert len(right) / len(errors) > 0.88
    assert (
        np.mean([dict(errors)[i] == rows[i][1] for i in right]) > 0.9
    )  # the better label that it names is the true one


# Page and command line


def test_the_page_stands_alone_and_escapes_what_it_shows(write: Callable[..., Path], tmp_path: Path) -> None:
    evil = {"prompt": "<script>alert(1)</script> idiot, my refund", "completion": "refund"}
    write_page(tmp_path / "report.html", [("a <b> title", check(Source((write([*rows_of_two_labels(), evil]),))))])
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "a &lt;b&gt; title" in page
    assert "http:" not in page.replace("http://www.w3.org", "")
    assert "https:" not in page
    assert "--fix insults" in page


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `coterie data ARGS`."""
    monkeypatch.setattr("sys.argv", ["coterie", "data", *map(str, args)])
    with pytest.raises(SystemExit) as left:
        main()
    out = capsys.readouterr()
    return int(left.value.code or 0), out.out, out.err


def test_check_reports_mends_and_draws_from_the_command_line(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write([*rows_of_two_labels(), PLANTED["private"], PLANTED["duplicates"]])
    new, page = tmp_path / "new.jsonl", tmp_path / "page.html"
    code, out, _ = run(capsys, monkeypatch, "check", file, "--json", "--html", page,
                       "--fix", "private", "--fix", "duplicates", "--out", new)  # fmt: skip
    value = json.loads(out)
    assert (code, value["rows"]) == (0, 98)
    assert value["mended"] == {"written": 97, "dropped": 1, "changed": 1}
    assert "[EMAIL]" in new.read_text()
    assert page.exists()
    code, out, _ = run(capsys, monkeypatch, "check", file)
    assert (code, "Private data" in out) == (0, True)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["check", "absent.jsonl"], "no such file"),
        (["check", "{train}", "--fix", "private"], "go together"),
        (["check", "{train}", "--fix", "magic", "--out", "new.jsonl"], "no such fix"),
        (["check", "{train}", "--prompt", "frage"], "no column 'frage'"),
        (["check", "{train}", "--html", "{train}"], "ends in .html"),
        (["check", "{train}", "--expert", "x"], "needs the folder"),
        (["check", "{train}", "--region", "XX"], "not a region"),
        (["check", "{train}", "--terms", "absent.txt"], "absent.txt"),
        (["curve", "{train}", "--train"], "folder of a business"),
        (["compare", "{train}", "absent.txt"], "no such file"),
        (["augment", "{train}", "--out", "{train}"], "already there"),
        (["augment", "{train}", "--method", "magic", "--out", "{train}.new.jsonl"], "no such method"),
        (["augment", "{train}", "--method", "model", "--out", "{train}.new.jsonl"], "folder of a business"),
        (["effect", "{train}", "--with", "absent.jsonl"], "no such file"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_exit_code_2(
    args: list[str], says: str, write: Callable[..., Path], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    train = write(rows_of_two_labels())
    code, _, err = run(capsys, monkeypatch, *[a.replace("{train}", str(train)) for a in args])
    assert code == 2
    assert says in err
    assert "Traceback" not in err
