"""Tasks read public data into splits that do not share rows, suites measure models alike, charts are drawn."""

import json
import math
import sys
import xml.etree.ElementTree as Xml
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from coterie.business import Business, fit
from coterie.cli.main import app
from coterie.data.read import read
from coterie.data.split import leaks
from coterie.engine.engine import Engine
from coterie.engine.request import Sampling
from coterie.errors import CoterieError, DataError
from coterie.evaluation import charts
from coterie.evaluation.charts import Bar, Series
from coterie.evaluation.suite import measure
from coterie.evaluation.task import Splits, find, names
from coterie.model.load import BaseModel
from support import logits_of

PATHS = {
    "banking77": "banking77", "clinc150": "clinc150", "gsm8k": "gsm8k", "multidogo": "multidogo/finance",
    "geoquery": "text2sql", "nottingham": "nottingham",
}  # fmt: skip
SLOW = ("gsm8k", "wikisql")  # long or many rows, compared with one another
CHOICES = {"banking77": 77, "clinc150": 151, "multidogo": 17}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in (*PATHS, "wikisql")]
)
def test_a_task_reads_its_data_into_splits_that_share_nothing_and_scores_the_wanted_answers_as_right(
    name: str, public_data: Callable[[str], Path]
) -> None:
    path, task = public_data(PATHS.get(name, "text2sql")), find(name)
    splits = task.splits(path)
    assert min(len(splits.train), len(splits.test)) >= 200
    assert len(splits.test) <= 1000
    assert leaks([e.question for e in splits.train], [e.question for e in splits.test]) == []
    assert [e.where for e in task.splits(path).test] == [e.where for e in splits.test]
    if name in CHOICES:  # published files are sorted by class; the first rows must be a sample nonetheless
        assert len({e.completion for e in splits.test[:100]}) > 0.4 * min(CHOICES[name], 100)
    assert len(task.options(splits)) == CHOICES.get(name, 0)
    score = task.score(path)
    assert sum(score(e.completion, e) for e in splits.test[:60]) == 60
    assert sum(score(bad, e) for e in splits.test[:60] for bad in ("nonsense", "", "|")) == 0


def test_every_built_in_task_is_known_by_name() -> None:
    assert set(names()) == {*PATHS, "wikisql"}
    assert all(find(n).name == n and find(n).about for n in names())


@pytest.mark.parametrize("name", [*PATHS, "wikisql"])
def test_data_that_is_not_the_tasks_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path / "none")):
        find(name).splits(tmp_path / "none")
    for file in ("train.csv", "test.csv", "data_full.json", "train.jsonl", "test.jsonl", "train.tsv", "test.tsv",
                 "geography.json", "geography-schema.csv", "wikisql.json.bz2", "a.abc"):  # fmt: skip
        (tmp_path / file).write_text("oops\n")
    with pytest.raises(DataError, match=str(tmp_path)):
        find(name).splits(tmp_path)


TOML = 'train = "colors.csv"\ntest = "more.csv"\ncolumns = { prompt = "text", completion = "color" }\n'


@pytest.fixture
def own_task(fitted_shop: Path, tmp_path: Path) -> Path:
    """A user's own task on the colors of the shop."""
    (tmp_path / "colors.csv").write_text((fitted_shop / "colors.csv").read_text())
    rows = (
        "What is the color of snow at dusk,blue\nThe color of lava please,red\n" * 2
        + "A canary has which color,yellow\n"
    )
    (tmp_path / "more.csv").write_text("text,color\n" + rows)
    (tmp_path / "hue.toml").write_text(TOML + 'system = "Name the color."\nprompt = "Q: {prompt}?"\nchoices = true\n')
    return tmp_path / "hue.toml"


def test_a_task_of_ones_own_is_a_toml_file(own_task: Path) -> None:
    task = find(str(own_task))
    splits = task.splits(own_task.parent)
    assert (task.name, task.options(splits)) == ("hue", ("blue", "green", "red", "yellow"))
    assert {e.question for e in splits.test} == {
        "Q: What is the color of snow at dusk?", "Q: The color of lava please?", "Q: A canary has which color?"
    }  # fmt: skip
    assert len(splits.test) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train = 3", "train: must be a text"),
        ('train = "a"', "test: must be a text"),
        (TOML + "metric = 'vibes'", "metric: unknown 'vibes'; known: exact_match"),
        (TOML + "choices = 1", "choices: must be of type bool"),
        (TOML + "colour = 1", "unknown field 'colour'; known: train"),
        (TOML + "prompt = 'x'", "prompt: must contain"),
        ("train = ", "not valid TOML"),
    ],
)
def test_a_task_file_that_cannot_be_used_is_refused_by_field(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(CoterieError, match=words) as caught:
        find(str(tmp_path / "t.toml"))
    assert "t.toml" in str(caught.value)


# The commands


def call(*arguments: object) -> Any:
    run = CliRunner().invoke(app, [str(a) for a in arguments])
    assert run.exit_code == 0, (run.output, run.exception)
    return json.loads(run.stdout)


@pytest.mark.parametrize("how", [[], ["--likelihood"]])
def test_a_suite_measures_models_on_the_same_rows_and_draws_them(
    how: list[str], own_task: Path, fitted_shop: Path, tmp_path: Path
) -> None:
    data = f"{own_task}={own_task.parent}"
    found = call("suite", "run", fitted_shop, "--task", data, "-e", "base", "-e", "colors",
                 "--chart", tmp_path / "c.svg", "--out", tmp_path / "rows.json", "--json", *how)  # fmt: skip
    assert [(m["task"], m["who"], m["rows"]) for m in found["measured"]] == [("hue", "base", 3), ("hue", "colors", 3)]
    kept = json.loads((tmp_path / "rows.json").read_text())["measured"]
    for m, rows in zip(found["measured"], kept, strict=True):
        assert m["accuracy"]["value"] == pytest.approx(sum(rows["scores"]) / 3, abs=1e-4)
        assert set(rows["answers"]) <= {"blue", "green", "red", "yellow"}
        assert ("calibration" in m) == bool(how)
    (gain,) = found["gains"]
    assert gain["difference"]["value"] == pytest.approx((sum(kept[1]["scores"]) - sum(kept[0]["scores"])) / 3, abs=1e-4)
    assert "hue" in "".join(Xml.parse(tmp_path / "c.svg").getroot().itertext())


def test_tunes_are_measured_by_validity_and_the_perplexity_of_the_true_rest(
    tiny_base: BaseModel, public_data: Callable[[str], Path]
) -> None:
    path, task = public_data("nottingham"), replace(find("nottingham"), max_tokens=8)
    short = [e for e in task.splits(path).test if len(e.question) < 160][:3]
    engine = Engine(tiny_base, slots=2, context=512)
    try:
        found = measure(engine, task, Splits([], short), task.score(path))
        said = engine.submit(tiny_base.encode(tiny_base.chat(short[0].prompt)), Sampling(8)).text().strip()
        none = measure(engine, replace(task, max_tokens=500), Splits([], short), task.score(path))
    finally:
        engine.close()
    assert found.answers[0] == said
    assert found.figures["valid_tune"]["value"] == pytest.approx(sum(found.scores) / 3, abs=1e-4)
    nats, tokens = 0.0, 0
    for e in short:
        prompt, rest = tiny_base.encode(tiny_base.chat(e.prompt)), tiny_base.encode(e.completion)
        scores = torch.log_softmax(logits_of(tiny_base, [prompt + rest])[0][len(prompt) - 1 : -1], -1)
        nats -= float(scores.gather(1, torch.tensor(rest)[:, None]).sum())
        tokens += len(rest)
    assert found.figures["perplexity"]["tokens"] == tokens
    assert found.figures["perplexity"]["per_token"] == pytest.approx(math.exp(nats / tokens), rel=1e-3)
    assert (none.figures["rows_too_long"], none.scores) == (3, [0.0, 0.0, 0.0])


@pytest.mark.parametrize("kind", ["adapter", "prompt", "prefix", "full"])
def test_experts_of_every_kind_are_measured_by_what_they_say_and_by_likelihood(
    kind: str, own_task: Path, shop: Path
) -> None:
    toml = (shop / "coterie.toml").read_text().partition("[experts.greet]")[0]
    (shop / "coterie.toml").write_text(toml.replace("lora = {", f'kind = "{kind}"\nlora = {{'))
    (fitted,) = fit(Business.open(shop), ["colors"])
    assert fitted.facts.kind == kind
    for how in ([], ["--likelihood"]):
        data = f"{own_task}={own_task.parent}"
        found = call("suite", "run", shop, "--task", data, "-e", "base", "-e", "colors", "--json", *how)
        assert [m["rows"] for m in found["measured"]] == [3, 3]
        assert (found["measured"][1].get("calibration") is not None) == bool(how)
    rows = shop / "colors.csv"
    found = call("compare", shop, "-e", "base", "-e", "colors", "--data", rows, "--json")
    assert found["b_figures"]["rows"] == found["a_figures"]["rows"] > 3


def test_compare_tells_two_experts_apart_on_the_same_rows(fitted_shop: Path, own_task: Path) -> None:
    found = call("compare", fitted_shop, "-e", "base", "-e", "colors", "--data", fitted_shop / "colors.csv", "--json")
    assert (found["a"], found["b"], found["rows"], found["metric"]) == ("base", "colors", 24, "accuracy")
    a, b = found["a_figures"]["accuracy"]["value"], found["b_figures"]["accuracy"]["value"]
    assert found["difference"]["value"] == pytest.approx(b - a, abs=1e-4)
    assert found["difference"]["low"] <= found["difference"]["value"] <= found["difference"]["high"]
    assert 24 * found["difference"]["value"] == pytest.approx(found["only_b_right"] - found["only_a_right"], abs=1e-3)
    same = call(
        "compare", fitted_shop, "-e", "colors", "-e", "colors", "--task", f"{own_task}={own_task.parent}", "--json"
    )
    assert (same["difference"]["value"], same["difference"]["p"], same["mcnemar_p"]) == (0, 1, 1)
    text = CliRunner().invoke(app, ["compare", str(fitted_shop), "-e", "base", "-e", "greet", "--data",
                                    str(fitted_shop / "greet.jsonl"), "--limit", "6"])  # fmt: skip
    assert "greet less base" in text.stdout
    assert "token f1" in text.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["suite", "run", "SHOP"], "at least one --task"),
        (["suite", "run", "SHOP", "--task", "banking77"], "write NAME=PATH"),
        (["suite", "run", "SHOP", "--task", "nothing=x"], "unknown task 'nothing'; known: banking77"),
        (["suite", "run", "SHOP", "--task", "banking77=/nowhere"], "/nowhere: no such file or folder"),
        (["suite", "run", "SHOP", "--task", "banking77=x", "--chart", "c.gif"], ".svg or .png"),
        (["suite", "run", "SHOP", "--task", "banking77=x", "-e", "nobody"], "no expert 'nobody'"),
        (["suite", "data", "banking77=x", "SHOP"], "already there"),
        (["compare", "SHOP", "-e", "colors"], "--expert twice"),
        (["compare", "SHOP", "-e", "base", "-e", "colors"], "no rows to compare on"),
        (["compare", "SHOP", "-e", "base", "-e", "base", "--task", "a=b", "--data", "c"], "not both"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    arguments: list[str], words: str, fitted_shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coterie.cli.main import main

    said: list[str] = []
    monkeypatch.setattr("coterie.cli.main.tell", said.append)
    monkeypatch.setattr(sys, "argv", ["coterie", *(str(fitted_shop) if a == "SHOP" else a for a in arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert words in said[-1]


def test_a_tasks_rows_become_files_that_fit_learns_from(own_task: Path, tmp_path: Path) -> None:
    counts = call("suite", "data", f"{own_task}={own_task.parent}", tmp_path / "out", "--json")
    assert (counts["train"], counts["test"]) == (24, 3)
    rows = list(read(tmp_path / "out" / "train.jsonl"))
    assert len(rows) == 24
    assert rows[0].messages[0] == {"role": "system", "content": "Name the color."}


# Charts


finite = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=30), st.text(max_size=20))
def test_a_curve_lies_on_the_sheet_whatever_its_numbers_and_names(points: list[tuple[float, float]], name: str) -> None:
    printable = "".join(c for c in name if c.isprintable())
    chart = charts.curves("Loss", "step", "nats", [Series(printable, sorted(points))])
    for shape in chart.shapes:
        if isinstance(shape, charts.Line):
            assert all(-1 <= x <= chart.width + 1 and -1 <= y <= chart.height + 1 for x, y in shape.points)
    root = Xml.fromstring(charts.svg(chart))
    assert root.get("role") == "img"
    assert "Loss" in "".join(root.itertext())


@given(st.dictionaries(st.sampled_from("abc"), st.floats(-5, 5), min_size=1))
def test_bars_stand_on_the_zero_line_and_grow_with_their_values(values: dict[str, float]) -> None:
    chart = charts.bars("T", "score", {"task": {k: Bar(v, v - 0.1, v + 0.1) for k, v in values.items()}})
    boxes = [s for s in chart.shapes if isinstance(s, charts.Box)][: len(values)]
    by_value = sorted(zip(values.values(), boxes, strict=True), key=lambda pair: abs(pair[0]))
    assert [b.height for _, b in by_value] == sorted(b.height for _, b in by_value)
    assert all(b.y >= 0 and b.y + b.height <= chart.height for b in boxes)


def test_the_loss_of_an_experts_training_is_a_picture(fitted_shop: Path, tmp_path: Path) -> None:
    assert call("experts", "chart", "colors", tmp_path / "loss.svg", "-f", fitted_shop, "--json") == {
        "path": str(tmp_path / "loss.svg")
    }
    root = Xml.parse(tmp_path / "loss.svg").getroot()
    assert {"training", "held out", "colors, version 1"} <= set(root.itertext())
    run = CliRunner().invoke(app, ["experts", "chart", "nobody", str(tmp_path / "x.svg"), "-f", str(fitted_shop)])
    assert "no expert 'nobody'" in str(run.exception)


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        charts.curves("a", "b", "c", [Series("x", [(0, float("nan"))])])
    with pytest.raises(ValueError, match="nothing to draw"):
        charts.bars("a", "b", {})


def test_a_png_is_the_same_picture_in_pixels(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow, the extra `charts`, is not installed")
    chart = charts.bars("T", "score", {"task": {"base": Bar(0.5), "expert": Bar(1.0)}})
    charts.save(chart, tmp_path / "c.png")
    with image.open(tmp_path / "c.png") as picture:
        assert picture.size == (2 * chart.width, 2 * chart.height)
        colours = dict((c, n) for n, c in picture.getcolors(1 << 20))
    base, expert = (colours[tuple(int(c[i : i + 2], 16) for i in (1, 3, 5))] for c in charts.COLOURS[:2])
    assert expert == pytest.approx(2 * base, rel=0.1)


def test_png_without_pillow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    chart = charts.curves("a", "b", "c", [Series("x", [(0, 1), (1, 2)])])
    with pytest.raises(CoterieError, match=r"coterie\[charts\]"):
        charts.save(chart, tmp_path / "c.png")
    with pytest.raises(CoterieError, match=r"\.svg or \.png"):
        charts.save(chart, tmp_path / "c.gif")
    assert list(tmp_path.iterdir()) == []


def test_the_library_is_left_as_it_was(fitted_shop: Path) -> None:
    assert Business.open(fitted_shop).library.names() == ["colors", "greet"]
