"""`coterie experts`: the expert library from the command line."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.options import FolderOption, Json
from coterie.cli.show import result, table
from coterie.errors import CoterieError

app = typer.Typer(help="List, show, remove, import, export and roll back experts.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Name of the expert.")]


@app.command("list")
def list_experts(folder: FolderOption = Path(), as_json: Json = False) -> None:
    """The experts of the library and the version that answers."""
    from coterie.business import Business, describe

    found = describe(Business.open(folder))
    rows = [[e["name"], str(e["version"]), e["kind"], e["description"]] for e in found]
    result(found, as_json, table(["expert", "version", "kind", "description"], rows) if found else "no experts yet")


@app.command()
def show(
    name: Name, folder: FolderOption = Path(),
    version: Annotated[int | None, typer.Option(help="An older version.")] = None, as_json: Json = False,
) -> None:  # fmt: skip
    """An expert's card: what it is for, how it was made, how good it is."""
    from coterie.business import Business

    library = Business.open(folder).library
    facts = library.facts(name, version)
    value = {**asdict(facts), "evaluation": library.evaluation(name, version), "versions": library.versions(name)}
    result(value, as_json, (library.folder(name, version) / "README.md").read_text(encoding="utf-8"))


@app.command()
def remove(name: Name, folder: FolderOption = Path(), as_json: Json = False) -> None:
    """Take an expert with all its versions off the shelf."""
    from coterie.business import Business

    Business.open(folder).library.remove(name)
    result({"removed": name}, as_json, f"{name} is removed")


@app.command()
def promote(name: Name, version: int, folder: FolderOption = Path(), as_json: Json = False) -> None:
    """Let another version answer: how one rolls back."""
    from coterie.business import Business

    Business.open(folder).library.promote(name, version)
    result({"expert": name, "version": version}, as_json, f"{name}: version {version} answers from now on")


@app.command("import")
def import_expert(
    name: Name,
    source: Annotated[Path, typer.Argument(help="Folder in PEFT's format (adapter_config.json and .safetensors).")],
    folder: FolderOption = Path(),
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    system: Annotated[str, typer.Option(help="Instruction for requests that bring none.")] = "",
    as_json: Json = False,
) -> None:
    """Put an expert made elsewhere on the shelf: LoRA, adapter, soft prompt or prefix."""
    from coterie.business import Business, adopt

    facts = adopt(Business.open(folder), name, source, description, system)
    result(asdict(facts), as_json, f"{name}: version {facts.version} imported")


@app.command()
def export(
    name: Name,
    target: Annotated[Path, typer.Argument(help="A new folder; with --format gguf-lora a new file.")],
    folder: FolderOption = Path(),
    version: Annotated[int | None, typer.Option(help="An older version.")] = None,
    form: Annotated[str, typer.Option("--format", help="peft, or gguf-lora for llama.cpp's --lora.")] = "peft",
    as_json: Json = False,
) -> None:
    """Copy a version out, in the format that PEFT (adapters: AdapterHub) loads."""
    from coterie.business import Business
    from coterie.export import export_gguf_lora, needs_list

    if form not in ("peft", "gguf-lora"):
        raise CoterieError(f"--format {form}: known are peft and gguf-lora")
    business = Business.open(folder)
    if form == "gguf-lora":
        export_gguf_lora(business, name, target, version)
    else:
        business.library.export(name, target, version)
    note = needs_list(business.library.facts(name, version))
    result({"path": str(target), "note": note}, as_json, f"{target}\n{note}".strip())


@app.command("learn-route")
def learn_route(
    name: Name,
    inputs: Annotated[Path, typer.Option(help="What people will ask it: .txt (one a line), .jsonl, .csv, .parquet.")],
    folder: FolderOption = Path(),
    column: Annotated[str, typer.Option(help="The column of the inputs, in .jsonl, .csv and .parquet.")] = "prompt",
    as_json: Json = False,
) -> None:
    """Let the router know an expert by examples of its inputs: an imported one, or one whose statistics are damaged."""
    from coterie.business import Business
    from coterie.business import learn_route as learn
    from coterie.data.read import read_inputs

    business = Business.open(folder)
    business.library.folder(name)  # an unknown expert is said before the inputs are read
    found = [(business.place(str(where)), text) for where, text in read_inputs(inputs, column)]
    version = learn(business, name, found)
    result({"expert": name, "version": version, "inputs": len(found)}, as_json,
           f"{name}: the router knows it by {len(found)} inputs")  # fmt: skip
