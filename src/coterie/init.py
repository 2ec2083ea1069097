"""Make the folder of a business: a commented coterie.toml, or the example shop."""

import shutil
from pathlib import Path

from coterie.config import FILE
from coterie.errors import CoterieError

EXAMPLE = Path(__file__).parent / "example"
TEMPLATE = """\
# What this business declares. Every field is described in docs/coterie-toml.md.
[business]
name = "{name}"
base = "HuggingFaceTB/SmolLM2-135M-Instruct"

# [experts.support]
# description = "Answers customers' questions"
# system = "You answer our customers."
# train = "data/support.jsonl"            # rows with prompt and completion, or messages
# # columns = {{ prompt = "question", completion = "answer" }}
# # test = "data/support_test.jsonl"
# # choices = true                        # classification: answers are completions seen in training
"""


def create(folder: Path, example: bool = False) -> list[Path]:
    """Write a new business into `folder` and return its files. Raises CoterieError where there is one already."""
    if (folder / FILE).exists():
        raise CoterieError(f"{folder / FILE}: there is a business here already")
    folder.mkdir(parents=True, exist_ok=True)
    if example:
        shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
    else:
        (folder / "data").mkdir(exist_ok=True)
        name = folder.resolve().name.replace("\\\\", " ").replace('"', " ")
        (folder / FILE).write_text(TEMPLATE.format(name=name))
    return sorted(p for p in folder.rglob("*") if p.is_file())
