"""The expert library: versions are only added, names cannot leave the shelf, a killed run leaves the old state."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from safetensors.torch import load_file, save_file

from coterie.business import Business, adopt
from coterie.engine.engine import Engine
from coterie.engine.request import Sampling
from coterie.errors import CoterieError, ModelError, StorageError, UnknownExpert
from coterie.experts import kinds
from coterie.experts.library import ExpertFacts, Library, check_name
from coterie.model.load import BaseModel, load


def publish(library: Library, name: str = "tea", mark: str = "") -> ExpertFacts:
    facts = ExpertFacts(name, description=f"{name} für alle", choices=("a", "b"), fingerprint=mark)
    return library.publish(facts, lambda folder: (folder / "weights").write_text(mark) and None, {"accuracy": 0.5})


class Shelf(RuleBasedStateMachine):
    """Whatever is published, promoted, failed, recorded and removed, the library says what a plain dict would."""

    NAMES = st.sampled_from(["tea", "cake", "a.b-c_1"])

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.library = Library(Path(self.folder.name) / "experts")
        self.known: dict[str, list[str]] = {}  # name -> mark of each version
        self.answers: dict[str, int] = {}
        self.measured: dict[tuple[str, int], int] = {}

    @rule(name=NAMES, mark=st.text(alphabet="xyz", min_size=1))
    def publish(self, name: str, mark: str) -> None:
        facts = publish(self.library, name, mark)
        self.known.setdefault(name, []).append(mark)
        self.answers[name] = len(self.known[name])
        assert facts.version == self.answers[name]

    @rule(name=NAMES, error=st.sampled_from([ValueError, OSError, KeyboardInterrupt]))
    def fail_in_the_middle(self, name: str, error: type[BaseException]) -> None:
        def fill(folder: Path) -> None:
            (folder / "weights").write_text("half")
            raise error("no space")

        wanted = KeyboardInterrupt if error is KeyboardInterrupt else StorageError
        with pytest.raises(wanted):
            self.library.publish(ExpertFacts(name), fill)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        version = data.draw(st.integers(1, len(self.known[name])))
        self.library.promote(name, version)
        self.answers[name] = version

    @precondition(lambda self: self.known)
    @rule(data=st.data(), figure=st.integers(0, 9))
    def record(self, data: st.DataObject, figure: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        version = data.draw(st.integers(1, len(self.known[name])))
        self.library.record(name, version, {"figure": figure})
        self.measured[name, version] = figure
        assert f"- figure: {figure}" in (self.library.folder(name, version) / "README.md").read_text()

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        self.library.remove(name)
        del self.known[name], self.answers[name]
        self.measured = {k: v for k, v in self.measured.items() if k[0] != name}

    @invariant()
    def the_library_says_what_happened(self) -> None:
        assert self.library.names() == sorted(self.known)
        for name, marks in self.known.items():
            assert self.library.versions(name) == list(range(1, len(marks) + 1))
            assert self.library.current(name) == self.answers[name]
            assert self.library.facts(name).version == self.answers[name]
            for version, mark in enumerate(marks, 1):
                facts = self.library.facts(name, version)
                assert (facts.fingerprint, facts.choices) == (mark, ("a", "b"))
                assert (self.library.folder(name, version) / "weights").read_text() == mark
                figure = self.measured.get((name, version))
                wanted = {"accuracy": 0.5} | ({} if figure is None else {"figure": figure})
                assert self.library.evaluation(name, version) == wanted
        shelves = self.library.root.glob("*/*") if self.library.root.exists() else []
        assert not [p.name for p in shelves if p.name.startswith(".")]

    def teardown(self) -> None:
        self.folder.cleanup()


TestShelf = Shelf.TestCase
TestShelf.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)

KILLED = """
    import os, signal, sys
    from pathlib import Path
    from coterie.experts import library
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    def fill(folder):
        (folder / "weights").write_text("new")
        if sys.argv[2] == "fill":
            die()
    if sys.argv[2] == "rename":
        os.rename = die
    if sys.argv[2] == "promote":
        library.Library.promote = die
    library.Library(Path(sys.argv[1])).publish(library.ExpertFacts("tea"), fill)
"""


@pytest.mark.parametrize(("moment", "versions"), [("fill", [1]), ("rename", [1]), ("promote", [1, 2])])
def test_a_process_killed_while_publishing_leaves_the_version_that_answered(
    moment: str, versions: list[int], tmp_path: Path
) -> None:
    library = Library(tmp_path)
    publish(library, mark="old")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert library.versions("tea") == versions
    assert (library.folder("tea") / "weights").read_text() == "old"
    assert list((tmp_path / "tea").glob(".publish-*")) or moment == "promote"
    assert publish(library, mark="newer").version == versions[-1] + 1
    assert (library.folder("tea") / "weights").read_text() == "newer"
    assert not list((tmp_path / "tea").glob(".publish-*"))


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../tea", "a/b", "/etc", "a\\b", ".hidden", "-dash", "Tea", "té", "a b", "tea\n", "a\0b", "x" * 65,
     "base", "auto"],
)  # fmt: skip
def test_names_that_leave_the_shelf_or_mean_something_else_are_refused(name: str, tmp_path: Path) -> None:
    library = Library(tmp_path / "experts")
    with pytest.raises(CoterieError, match="cannot name an expert"):
        check_name(name)
    with pytest.raises(CoterieError):
        publish(library, name)
    for ask in (library.folder, library.facts, library.evaluation, library.remove):
        with pytest.raises(UnknownExpert):
            ask(name)
    with pytest.raises(UnknownExpert):
        library.folder(name, 1)
    with pytest.raises(UnknownExpert):
        library.promote(name, 1)
    assert not list(tmp_path.rglob("*"))


def test_a_folder_that_a_name_walks_to_is_not_an_expert(tmp_path: Path) -> None:
    (tmp_path / "secret" / "1").mkdir(parents=True)
    library = Library(tmp_path / "experts")
    publish(library)
    for name in ("../secret", "tea/../../secret"):
        with pytest.raises(UnknownExpert):
            library.folder(name, 1)


@pytest.mark.parametrize("version", [0, -1, 2, 99])
def test_versions_that_are_not_there_are_refused(version: int, tmp_path: Path) -> None:
    library = Library(tmp_path)
    publish(library)
    with pytest.raises(UnknownExpert, match="tea"):
        library.promote("tea", version)
    with pytest.raises(UnknownExpert, match=f"version {version} of 'tea'; in the library: tea"):
        library.facts("tea", version)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', "\x00"])
def test_a_damaged_expert_json_is_refused_by_name(content: str, tmp_path: Path) -> None:
    library = Library(tmp_path)
    publish(library)
    (library.folder("tea") / "expert.json").write_text(content)
    with pytest.raises(ModelError, match=r"tea/1/expert\.json"):
        library.facts("tea")


def test_facts_written_by_a_later_version_of_coterie_can_be_read(tmp_path: Path) -> None:
    library = Library(tmp_path)
    facts = publish(library)
    file = library.folder("tea") / "expert.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mood": "new"}))
    assert library.facts("tea") == facts


def test_the_card_says_what_the_expert_is_and_how_good(tmp_path: Path) -> None:
    library = Library(tmp_path)
    publish(library)
    text = (library.folder("tea") / "README.md").read_text()
    for words in ("# tea, version 1", "tea für alle", "one of 2 choices", "- accuracy: 0.5", "may be wrong"):
        assert words in text


def test_a_shelf_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "experts").write_text("a file in the way")
    with pytest.raises(StorageError, match="tea"):
        publish(Library(tmp_path / "experts"))


def test_the_card_says_figures_with_their_intervals(tmp_path: Path) -> None:
    library = Library(tmp_path)
    publish(library)
    share = {"value": 0.5, "low": 0.25, "high": 0.75}
    figures = {"base": {"rows": 8, "too_long": 0, "accuracy": share, "macro_f1": 0.25},
               "expert": {"rows": 8, "too_long": 2, "accuracy": share, "macro_f1": 0.5}}  # fmt: skip
    library.record("tea", 1, {"held_out": figures})
    text = (library.folder("tea") / "README.md").read_text()
    assert "- held out, base, 8 rows: accuracy 50.0% (95% CI 25.0% to 75.0%), macro-f1 25.0%\n" in text
    assert (
        "- held out, expert, 8 rows: accuracy 50.0% (95% CI 25.0% to 75.0%), macro-f1 50.0%, 2 too long for the" in text
    )


def test_figures_that_cannot_be_written_leave_the_old_ones_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(tmp_path)
    publish(library)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StorageError, match="No space left on device"):
        library.record("tea", 1, {"accuracy": 0.6})
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_damaged_figures_are_refused_by_name(tmp_path: Path) -> None:
    library = Library(tmp_path)
    publish(library)
    (library.folder("tea") / "evaluation.json").write_text("{")
    with pytest.raises(ModelError, match=r"tea/1/evaluation\.json: damaged"):
        library.evaluation("tea")


# Experts and the base model that they were made for


@pytest.fixture
def other(tiny: Path, tmp_path: Path) -> Path:
    """A base model of the same name, shapes and tokens, and other weights."""
    folder = shutil.copytree(tiny, tmp_path / "other")
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if n.endswith("1.mlp.up_proj.weight"))
    save_file({**weights, name: weights[name] * 1.5}, file, {"format": "pt"})
    return folder


def test_a_models_mark_is_that_of_its_weights(tiny: Path, tiny_base: BaseModel, other: Path) -> None:
    assert load(tiny, torch.bfloat16, packed=True).decoder.mark == load(tiny).decoder.mark == tiny_base.decoder.mark
    assert load(other).decoder.mark != tiny_base.decoder.mark


def test_an_expert_of_another_base_of_the_same_shapes_is_refused_and_both_are_named(
    fitted_shop: Path, tiny_base: BaseModel, other: Path, tmp_path: Path
) -> None:
    shop = shutil.copytree(fitted_shop, tmp_path / "shop")
    library = Business.open(shop).library
    base = load(other)
    with pytest.raises(ModelError, match=f"{tiny_base.decoder.mark}.*{base.decoder.mark}"):
        kinds.read(library, "colors", 1, base.decoder)
    with closing(Engine(base, library, slots=1, context=64)) as engine:
        with pytest.raises(ModelError, match=r"made for .*train it again"):
            engine.submit([3, 4, 5], Sampling(2), ("colors", 1))
        assert engine.submit([3, 4, 5], Sampling(2), None).text() is not None, "the base model goes on"


def test_an_expert_that_names_another_model_of_the_hub_is_not_imported(
    fitted_shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = shutil.copytree(fitted_shop, tmp_path / "shop")
    source = shutil.copytree(Business.open(shop).library.folder("greet"), tmp_path / "guest")
    config = json.loads((source / "adapter_config.json").read_text())
    business = Business.open(shop)
    base = business.base()
    spec = business.config.business.model_copy(update={"base": "someone/tiny"})
    monkeypatch.setattr(business, "config", business.config.model_copy(update={"business": spec}))
    monkeypatch.setattr(business, "base", lambda *_: base)
    (source / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/other"}))
    with pytest.raises(ModelError, match=r"adapter_config\.json: made for someone/other.*someone/tiny"):
        adopt(business, "guest", source)
    (source / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "Someone/Tiny"}))
    assert adopt(business, "guest", source).base_mark == base.decoder.mark
