"""Pages that are written out of the code are up to date, and what they say works."""

import re
import tomllib
from pathlib import Path

import pytest

import reference
from coterie.config import Config


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
