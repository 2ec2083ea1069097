"""What the terminal shows: results on stdout, progress and news on stderr."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:  # it would load torch, which `coterie --help` need not wait for
    from coterie.tuning.loop import Progress as Step

# Without emoji, or `rows.csv:100:` turns into one.
news = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
out = Console(highlight=False, markup=False, emoji=False)


def tell(text: str) -> None:
    """One line of news."""
    news.print(text)


def result(value: Any, as_json: bool, text: str | Table) -> None:
    """The command's result: `value` as one line of JSON, or `text` for people."""
    if as_json:
        print(json.dumps(value, ensure_ascii=False, default=str))
    elif isinstance(text, Table):
        out.print(text)
    else:
        print(text)
    sys.stdout.flush()


def table(headings: list[str], rows: list[list[str]]) -> Table:
    """A plain table."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        shown.add_column(heading, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


class Bars:
    """Progress bars on stderr; where that is no terminal, a line now and then instead."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=28), TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[note]}"), TimeRemainingColumn(compact=True), console=news,
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {}
        self.said: dict[str, int] = {}

    def step(self, name: str, s: "Step") -> None:
        """News of one training step."""
        note = f"loss {s.loss:.3f}  held-out {s.held_out_loss:.3f}  {s.tokens_per_s:.0f} tokens/s"
        self.count(f"training {name}", s.step, s.steps, note, f", {s.seconds_left / 60:.1f} min left")

    def count(self, what: str, done: int, total: int, note: str = "", tail: str = "") -> None:
        """`done` of `total`."""
        if news.is_terminal:
            if what not in self.tasks:
                self.tasks[what] = self.progress.add_task(what, total=total, note="")
            self.progress.update(self.tasks[what], completed=done, note=note)
        elif done * 20 // total > self.said.get(what, -1):
            self.said[what] = done * 20 // total
            tell(f"{what}: {done}/{total}  {note}{tail}")


@contextmanager
def bars() -> Iterator[Bars]:
    """Bars that are gone, or complete, when the work ends."""
    shown = Bars()
    with shown.progress if news.is_terminal else nullcontext():
        yield shown
