"""`coterie experts merge` and `chart`: an expert as a whole model, and its training as a picture."""

import json
from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.experts import Folder, Json, Name, app
from coterie.cli.show import result
from coterie.errors import CoterieError


@app.command()
def merge(
    name: Name,
    target: Annotated[Path, typer.Argument(help="A new folder, or with --gguf a new .gguf file.")],
    folder: Folder = Path(),
    gguf: Annotated[str, typer.Option(help="Write GGUF, matrices as f32, f16, bf16 or q8_0.")] = "",
    version: Annotated[int | None, typer.Option(help="An older version.")] = None,
    as_json: Json = False,
) -> None:
    """Merge a LoRA expert into a whole model, for transformers or (--gguf) llama.cpp."""
    from coterie.business import Business
    from coterie.export import merge_expert

    path = merge_expert(Business.open(folder), name, target, gguf, version)
    result({"path": str(path)}, as_json, str(path))


@app.command()
def chart(
    name: Name,
    target: Annotated[Path, typer.Argument(help="The picture to write, .svg or .png.")],
    folder: Folder = Path(),
    version: Annotated[int | None, typer.Option(help="An older version.")] = None,
    as_json: Json = False,
) -> None:
    """Draw how an expert's loss fell while it was trained."""
    from coterie.business import Business
    from coterie.evaluation import charts

    library = Business.open(folder).library
    facts = library.facts(name, version)
    file = library.folder(name, version) / "losses.json"
    if not file.exists():
        raise CoterieError(f"{name}, version {facts.version}: no losses are kept of it; it was not trained here")
    kept = json.loads(file.read_text())
    charts.save(charts.losses(f"{name}, version {facts.version}", kept["losses"], kept["held_out"]), target)
    result({"path": str(target)}, as_json, str(target))
