"""Make the folder of a business: a commented coterie.toml, or the example shop."""

import json
from pathlib import Path

from coterie.config import FILE
from coterie.errors import CoterieError, StorageError

EXAMPLE = Path(__file__).parent / "example"
TEMPLATE = """\
# What this business declares. Every field is described in docs/coterie-toml.md.
[business]
name = {name}
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
    """Write a new business into `folder` and return its files. Nothing that is there already is changed.

    Raises CoterieError where there is a business, or a file of the same name as one of the example's.
    """
    if (folder / FILE).exists():
        raise CoterieError(f"{folder / FILE}: there is a business here already")
    if not folder.is_dir() and folder.exists():
        raise CoterieError(f"{folder}: a file; name a folder")
    if example:
        found = sorted(p for p in EXAMPLE.rglob("*") if p.is_file())
        contents = {p.relative_to(EXAMPLE): p.read_bytes() for p in found}
    else:
        name = "".join(c if c.isprintable() else " " for c in folder.resolve().name)
        contents = {Path(FILE): TEMPLATE.format(name=json.dumps(name or "My business", ensure_ascii=False)).encode()}
    for file, content in contents.items():
        if (folder / file).exists() and (folder / file).read_bytes() != content:
            raise CoterieError(f"{folder / file}: already there, and would be overwritten; choose another folder")
    try:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for file in sorted(contents, key=lambda f: f.name == FILE):  # last what makes the folder a business
            (folder / file).write_bytes(contents[file])
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from error
    return [folder / file for file in contents]
