"""Arguments and options that many commands have."""

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Argument(help="The folder of the business, with its coterie.toml.")]
FolderOption = Annotated[Path, typer.Option("--folder", "-f", help="The folder of the business.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
