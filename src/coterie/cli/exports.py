"""`coterie experts merge` and `chart`: an expert as a whole model, and its training as a picture."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.experts import Name, app
from coterie.cli.options import FolderOption, Json
from coterie.cli.show import result


@app.command()
def merge(
    name: Name,
    target: Annotated[Path, typer.Argument(help="A new folder, or with --gguf a new .gguf file.")],
    folder: FolderOption = Path(),
    gguf: Annotated[str, typer.Option(help="Write GGUF, matrices as f32, f16, bf16 or q8_0.")] = "",
    version: Annotated[int | None, typer.Option(help="An older version.")] = None,
    as_json: Json = False,
) -> None:
    """Merge a LoRA expert into a whole model, for transformers or (--gguf) llama.cpp."""
    from coterie.business import Business
    from coterie.export import merge_expert, needs_list

    business = Business.open(folder)
    path, note = merge_expert(business, name, target, gguf, version), needs_list(business.library.facts(name, version))
    result({"path": str(path), "note": note}, as_json, f"{path}\n{note}".strip())


@app.command()
def chart(
    name: Name,
    target: Annotated[Path, typer.Argument(help="The picture to write, .svg or .png.")],
    folder: FolderOption = Path(),
    version: Annotated[int | None, typer.Option(help="An older version.")] = None,
    as_json: Json = False,
) -> None:
    """Draw how an expert's loss fell while it was trained."""
    from coterie.business import Business
    from coterie.evaluation import charts
    from coterie.evaluation.suite import loss_chart

    charts.save(loss_chart(Business.open(folder).library, name, version), target)
    result({"path": str(target)}, as_json, str(target))
