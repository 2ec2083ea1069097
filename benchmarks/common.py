"""What the comparison programs share: their options, the machine and versions, tables, and benchmarks/RESULTS.md."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from coterie.model.load import default_dtype

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
PACKAGES = ("torch", "transformers", "peft", "xllamacpp")
os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of the peers among our tables
screen = Console(stderr=True, soft_wrap=True, width=None if sys.stderr.isatty() else 120)


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


def skip(why: str) -> NoReturn:
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
            skip(f"{name} is not installed; pip install {' '.join(names)}")


def hugging_face_copy(model: Path, folder: Path) -> None:
    """Write the weights of `model` into `folder` as transformers saves them: a GGUF is opened by transformers too."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gguf = next((file.name for file in model.glob("*.gguf")), None)
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, gguf_file=gguf, dtype="float32")
    if hasattr(whole.config, "quantization_config"):  # the weights are whole again, the config still says otherwise
        del whole.config.quantization_config
        whole.hf_quantizer = None
    whole.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model, gguf_file=gguf).save_pretrained(folder)


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
        self._lost = (0.0, 0.0)
        self.at = [self._now()]

    def _now(self) -> tuple[float, float]:
        return time.perf_counter() - self._lost[0], time.process_time() - self._lost[1]

    def tick(self) -> None:
        self.at.append(self._now())

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside costs no time."""
        wall, cpu = self._now()
        yield
        now = self._now()
        self._lost = (self._lost[0] + now[0] - wall, self._lost[1] + now[1] - cpu)

    def steps(self) -> dict[str, list[float]]:
        """Seconds of each step."""
        pairs = list(zip(self.at[:-1], self.at[1:], strict=True))
        return {"seconds": [b[0] - a[0] for a, b in pairs], "cpu": [b[1] - a[1] for a, b in pairs]}


def _environment(threads: int) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def run_side(command: Sequence[str], threads: int) -> dict[str, Any]:
    """Run one side in its own process; the JSON object on its last line of stdout."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=_environment(threads), check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}\nfailed:\n{done.stderr[-3000:]}")
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return out


class Side:
    """A side that stays loaded and answers one job after another, so that sides can take turns: see `take_jobs`."""

    def __init__(self, command: Sequence[str], threads: int, python: str = sys.executable, **more: str) -> None:
        """`python`: of the environment that it runs in; `more`: environment variables."""
        self.command = command
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the object
        self.process = subprocess.Popen(
            [python, *command], env=_environment(threads) | more, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do a job and wait for what it found."""
        assert self.process.stdin
        assert self.process.stdout
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries print too
                out: dict[str, Any] = json.loads(line)
                return out
        self.log.seek(0)
        raise SystemExit(f"{' '.join(self.command)[:200]}\nfailed:\n{self.log.read()[-3000:]}")

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def take_jobs(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The other end of `Side`: a job a line on stdin, what it found a line on stdout, until stdin ends.

    Peaks of memory are of the jobs, not of loading.
    """
    reset_peak()
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), flush=True)


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


def precision() -> str:
    """What every side computes in, as Coterie does here: "bfloat16" or "float32"."""
    return str(default_dtype()).removeprefix("torch.")


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
    if os.getloadavg()[2] > (os.cpu_count() or 1) + 1:
        report.say("The machine was busy with other work meanwhile: do not rely on these figures.")
    screen.print(", ".join(f"{k} {v}" for k, v in facts.items()), highlight=False)
    if args.record:
        _record(report, facts)
    if args.json:
        rounded = {k: round(v, 4) for k, v in report.figures.items()}
        ratios = {k: round(v, 3) for k, v in report.ratios.items()}
        print(json.dumps({"ratios": ratios, "figures": rounded, "machine": machine(), "versions": versions()}))


def _record(report: Report, facts: dict[str, str]) -> None:
    """Put the program's section into RESULTS.md, in place of an older one."""
    ratios = []
    if report.ratios:
        ratios = ["Ratios: " + ", ".join(f"`{k}` **{v:.2f}**" for k, v in report.ratios.items()) + ".", ""]
    where = "Measured with `{command}` on {date}: {processor}, {cores} cores ({instructions}), {memory}; "
    where = where.format(**facts)
    where += ", ".join(f"{k} {facts[k]}" for k in ("python", *PACKAGES, "coterie") if k in facts) + "."
    title = report.title + ("" if precision() == "bfloat16" else ", on a processor with AVX2 only")
    section = "\n".join([f"## {title}", "", *ratios, where, *report.markdown]).strip() + "\n"
    old = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
    parts = re.split(r"(?m)^(?=## )", old)
    kept = [part.strip() + "\n" for part in parts]
    places = [n for n, part in enumerate(kept) if part.startswith(f"## {title}\n")]
    if places:
        kept[places[0]] = section
    else:
        kept.append(section)
    RESULTS.write_text("\n".join(kept))
