"""Write the reference pages out of the code: docs/reference/cli.md and docs/coterie-toml.md."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from coterie.cli.main import app
from coterie.config import Config

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTE = "<!-- Written by scripts/reference.py: change the code, not this page. -->\n"
WIDTH = 100
TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
LIMITS = {
    "minimum": "at least {}", "exclusiveMinimum": "above {}", "maximum": "at most {}", "exclusiveMaximum": "below {}",
    "minItems": "at least {}", "maxItems": "at most {}",
}  # fmt: skip


def pages() -> dict[Path, str]:
    """Every page that is written out of the code, by its path."""
    return {DOCS / "reference" / "cli.md": cli_page(), DOCS / "coterie-toml.md": toml_page()}


def cli_page() -> str:
    """Every command with its help."""
    parts = [NOTE, "# The command line\n"]
    parts += [f"## {path}\n\n```text\n{text}\n```\n" for path, text in _helps(typer.main.get_command(app), "coterie")]
    return "\n".join(parts)


def _helps(command: Any, name: str, parent: Any = None) -> Iterator[tuple[str, str]]:
    """The path and the help of a command, and of those under it."""
    context = command.context_class(
        command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH
    )
    yield context.command_path, "\n".join(line.rstrip() for line in command.get_help(context).strip().splitlines())
    for child, under in getattr(command, "commands", {}).items():
        yield from _helps(under, child, context)


def toml_page() -> str:
    """Every field of coterie.toml, a table for each section."""
    schema = Config.model_json_schema()
    parts = [NOTE, "# coterie.toml\n",
             "A business is a folder with this file. Of an expert, `train` must be given; all else may be left out. "
             "A field that is not listed here is an error. Paths are relative to the folder.\n"]  # fmt: skip
    for section in dict.fromkeys(_refs(schema, schema["$defs"])):
        about = schema["$defs"][section]
        title, _, text = about["description"].partition(": ")
        parts.append(f"## {title}\n\n{text[0].upper()}{text[1:]}\n\n| field | value | default | meaning |")
        parts.append("| --- | --- | --- | --- |")
        for name, field in about["properties"].items():
            if not any(_refs(field, schema["$defs"])):  # else it is a section of its own
                given = field.get("default")
                default = "" if given is None else f"`{json.dumps(given, ensure_ascii=False)}`"
                parts.append(f"| `{name}` | {_value(field)} | {default} | {field.get('description', '')} |")
        parts.append("")
    return "\n".join(parts)


def _refs(node: Any, sections: dict[str, Any]) -> Iterator[str]:
    """The sections that a part of the schema refers to, each before those within it."""
    if isinstance(node, dict):
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            yield name
            yield from _refs(sections[name], sections)
        for key, child in node.items():
            if key != "$defs":
                yield from _refs(child, sections)
    elif isinstance(node, list):
        for child in node:
            yield from _refs(child, sections)


def _value(field: dict[str, Any]) -> str:
    """What a field may be, in words."""
    if "const" in field or "enum" in field:
        return " or ".join(f"`{json.dumps(v)}`" for v in field.get("enum", [field.get("const")]))
    if "anyOf" in field:
        return " or ".join(_value(branch) for branch in field["anyOf"] if branch.get("type") != "null")
    limits = ", ".join(words.format(f"{field[key]:,}") for key, words in LIMITS.items() if key in field)
    if field.get("type") == "array":
        inner = _value(field["items"])
        what = f"list of {inner}"
    elif field.get("type") == "object":
        keys = field.get("propertyNames", {}).get("enum")
        what = f"table of {_value(field['additionalProperties'])}" + (f" by {', '.join(keys)}" if keys else "")
    else:
        what = TYPES[field["type"]]
    return f"{what}, {limits}" if limits else what


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)
