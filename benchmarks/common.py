"""What the comparison programs share: their options, the machine and versions, tables, and benchmarks/RESULTS.md."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
PACKAGES = ("torch", "transformers", "peft", "xllamacpp")
screen = Console(stderr=True, soft_wrap=True)


@dataclass
class Report:
    """What one program found: `ratios` against a peer, `figures` with their units in the name, and prose to keep."""

    title: str
    ratios: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    markdown: list[str] = field(default_factory=list)

    def table(self, title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Show a table, and keep it for RESULTS.md."""
        shown = Table(title=title)
        for n, name in enumerate(head):
            shown.add_column(name, justify="right" if n else "left")
        cells = [[_cell(x) for x in row] for row in rows]
        for row in cells:
            shown.add_row(*row)
        screen.print(shown)
        lines = [head, ["---"] + ["---:"] * (len(head) - 1), *cells]
        self.markdown += ["", *("| " + " | ".join(line) + " |" for line in lines)]

    def say(self, text: str) -> None:
        """A sentence for the screen and for RESULTS.md."""
        screen.print(text, highlight=False)
        self.markdown += ["", text]


def _cell(x: Any) -> str:
    if isinstance(x, float):
        return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}" if abs(x) < 1 else f"{x:.2f}"
    return str(x)


def options(about: str) -> argparse.ArgumentParser:
    """The options that every program has."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="about a minute on 2 cores; figures are rough")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    parser.add_argument("--record", action="store_true", help="write the program's section of benchmarks/RESULTS.md")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each side")
    return parser


def skip(why: str) -> None:
    """End the program without a result, and say why in one line."""
    print(f"skipped: {why}")
    sys.exit(0)


def need_data(name: str) -> Path:
    """A file under $COTERIE_DATA (default ../shared/data beside the repository); where absent, ends the program."""
    root = Path(os.environ.get("COTERIE_DATA", ROOT.parent / "shared" / "data"))
    if not (root / name).exists():
        skip(f"{root / name} is not here; set COTERIE_DATA to the folder of public data")
    return root / name


def need_packages(*names: str) -> None:
    """Ends the program where a peer is not installed."""
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            skip(f"{name} is not installed; pip install 'coterie[bench]'")


def reset_peak() -> None:
    """Forget this process's peak of memory so far (Linux, proc(5): clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The most memory that this process had resident since `reset_peak`, in MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "proc(5) has VmHWM since Linux 2.6"
    return int(found[1]) / 1024


class Clock:
    """When each step of a run ended, on the wall and in CPU time of all threads; starts with a fresh peak of memory."""

    def __init__(self) -> None:
        reset_peak()
        self.at = [(time.perf_counter(), time.process_time())]

    def tick(self) -> None:
        self.at.append((time.perf_counter(), time.process_time()))

    def steps(self) -> dict[str, list[float]]:
        """Seconds of each step."""
        pairs = list(zip(self.at[:-1], self.at[1:], strict=True))
        return {"seconds": [b[0] - a[0] for a, b in pairs], "cpu": [b[1] - a[1] for a, b in pairs]}


def run_side(command: Sequence[str], threads: int) -> dict[str, Any]:
    """Run one side in its own process; the JSON object on its last line of stdout."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}\nfailed:\n{done.stderr[-3000:]}")
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return out


def machine() -> dict[str, str]:
    """Processor, cores, instructions, memory."""
    info = Path("/proc/cpuinfo").read_text()
    names = re.findall(r"model name\s*: (.+)", info)
    flags = set(" ".join(re.findall(r"flags\s*: (.+)", info)).split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": names[0] if names else platform.processor(), "cores": str(os.cpu_count()),
        "instructions": " ".join(f for f in ISA if f in flags), "memory": f"{memory:.0f} GiB",
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Python, the packages compared, and the commit."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*git, "status", "--porcelain", "src"], capture_output=True, text=True, check=False)
    found["coterie"] = (commit.stdout.strip() or "no git") + ("+changes" if dirty.stdout.strip() else "")
    return found


def finish(report: Report, args: argparse.Namespace) -> None:
    """Print, record, and give the JSON line, as the options ask."""
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts = {**machine(), **versions(), "date": date, "command": " ".join(["python", *sys.argv])}
    screen.print(", ".join(f"{k} {v}" for k, v in facts.items()), highlight=False)
    if args.record:
        _record(report, facts)
    if args.json:
        rounded = {k: round(v, 4) for k, v in report.figures.items()}
        ratios = {k: round(v, 3) for k, v in report.ratios.items()}
        print(json.dumps({"ratios": ratios, "figures": rounded, "machine": machine(), "versions": versions()}))


def _record(report: Report, facts: dict[str, str]) -> None:
    """Put the program's section into RESULTS.md, in place of an older one."""
    ratios = ["Ratios: " + ", ".join(f"`{k}` **{v:.2f}**" for k, v in report.ratios.items()) + "."]
    where = "Measured with `{command}` on {date}: {processor}, {cores} cores ({instructions}), {memory}; "
    where = where.format(**facts)
    where += ", ".join(f"{k} {facts[k]}" for k in ("python", *PACKAGES, "coterie") if k in facts) + "."
    section = "\n".join([f"## {report.title}", "", *ratios, "", where, *report.markdown]).strip() + "\n"
    old = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
    parts = re.split(r"(?m)^(?=## )", old)
    kept = [part.strip() + "\n" for part in parts]
    places = [n for n, part in enumerate(kept) if part.startswith(f"## {report.title}\n")]
    if places:
        kept[places[0]] = section
    else:
        kept.append(section)
    RESULTS.write_text("\n".join(kept))
