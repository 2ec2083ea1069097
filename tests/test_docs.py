"""Pages that are written out of the code are up to date, and what they say works."""

import re
import shlex
import tomllib
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import reference
from coterie.answer import Answerer
from coterie.business import Business
from coterie.cli.main import app
from coterie.config import Config
from coterie.web.app import create_app
from web_support import listening


@pytest.mark.parametrize("page", reference.pages(), ids=lambda path: path.name)
def test_the_reference_is_what_the_code_says(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == reference.pages()[page], "run `python scripts/reference.py`"


def test_every_field_and_command_is_described() -> None:
    toml, cli = (text for _, text in sorted(reference.pages().items()))
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.*) \| (.*) \|$", toml, re.MULTILINE)
    assert {"train", "rank", "learning_rate", "base"} <= {name for name, *_ in rows}
    assert all(value and meaning for _, value, _, meaning in rows), rows
    for command in ("fit", "eval", "generate", "chat", "serve", "doctor", "init", "pull", "experts export"):
        assert f"\n## coterie {command}\n" in cli


def test_the_defaults_in_the_table_are_the_defaults() -> None:
    page = reference.toml_page()
    for name, default in re.findall(
        r"^\| `(\w+)` \| .+ \| `(.+)` \| .* \|$", page.partition("## [experts.")[0], re.MULTILINE
    ):
        given = tomllib.loads(f"[business]\n{name} = {default}")
        assert Config.model_validate(given) == Config()


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(*kinds: str) -> list[tuple[str, str]]:
    """The code blocks of these kinds ("": of none) in all pages: the page, and the block."""
    found = [(p.name, fence) for p in PAGES for fence in p.read_text().split("\n```")[1::2]]
    return [(page, text) for page, fence in found for kind, _, text in [fence.partition("\n")] if kind in kinds]


COMMANDS = [
    (page, line.removeprefix("$ "))
    for page, block in blocks("console", "")
    for line in block.replace("\\\n", " ").splitlines() if line.removeprefix("$ ").startswith("coterie ")
]  # fmt: skip


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line[:50]}" for page, line in COMMANDS])
def test_every_command_in_the_pages_is_one_that_there_is(page: str, line: str) -> None:
    """Its name, its options and the kinds of their values; what they name need not be there."""
    words = shlex.split(line, comments=True)[1:]
    command, name = typer.main.get_command(app), "coterie"
    context = None
    while hasattr(command, "get_command"):
        name = words.pop(0)
        context = click.Context(command, context, name)
        command = command.get_command(context, name)
        assert command is not None, f"{page}: there is no command {name!r}"
    command.make_context(name, words, context)


@pytest.mark.parametrize(("page", "block"), blocks("toml"), ids=lambda x: str(x)[:30])
def test_every_declaration_in_the_pages_is_valid(page: str, block: str, tmp_path: Path) -> None:
    found = tomllib.loads(block)
    for spec in found.get("experts", {}).values():
        spec.setdefault("train", "data.csv")
    if found.keys() & Config.model_fields.keys():
        Config.model_validate(found)


def test_the_python_of_the_readme_works(fitted_shop: Path) -> None:
    business = Business.open(fitted_shop)
    answerer = Answerer.open(business)
    ((_, code),) = [b for b in blocks("python") if b[0] == "README.md"]
    scope: dict[str, Any] = {}
    with closing(answerer), listening(create_app(answerer)) as address:
        exec(code.replace("http://localhost:8000", address), scope)
    assert scope["answer"].choices[0].message.role == "assistant"
