"""The desk under load: time to the first words, messages lost and doubled, memory, and a server killed with -9.

Four parts, each with servers of its own; all of them in one call, or one with --part:
load    200 visitors of a scripted model behind the engine's interface, so that the desk is what is measured
real    16 visitors of the real model
kills   50 visitors of the scripted model, whose server is killed with -9 and started again ten times
memory  few visitors for --minutes, a new customer for each conversation: does the serving process grow? With --hurry
        they do not think, so that minutes bring as many customers as hours do

The application is the one of `coterie serve`, in a process of its own, and visitors are HTTP clients of the widget's
routes: each has a conversation, keeps its event stream open, writes, reads the answer to its end, thinks, writes again.
What counts as accepted is what the server has confirmed; a message whose confirmation got lost is sent
again with its key, and must stand there once. After the last kill every accepted message must be there, once, in order.

    python benchmarks/desk_load.py --quick
    python benchmarks/desk_load.py --minutes 60 --record     # 72 minutes; the last 60 take a tenth of a core
    python benchmarks/desk_load.py --part memory --minutes 60 --record
    python benchmarks/desk_load.py --part memory --minutes 10 --hurry    # about 4,000 customers
"""

import argparse
import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from common import Report, finish, options, screen

from coterie.desk.conversation import LEASE_S
from coterie.model.decoder import Decoder
from coterie.model.load import BaseModel
from coterie.model.pull import DEFAULT, pull

WORDS = "Thank you. Your order has left us this morning, and you will have it in two days. Is there more that I can do?"
TOKEN_S = 0.02  # of the scripted model, for one word of each answer
THINK_S, TURNS = 2.5, 10  # between an answer and the next message; messages of one conversation
SLOW, SLOW_THINK_S, SLOW_TURNS = 16, 20.0, 3  # visitors of part memory
HURRY, HURRY_TOKEN_S = 8, 0.001  # the same with --hurry: they do not think, and the model speaks at once
WARM, BLOCKS = 1 / 6, 15  # the share of part memory that is not judged; stretches of the rest
T_975 = 2.160  # Student's t for a 95% interval with BLOCKS - 2 degrees of freedom
SEVERAL = 40  # visitors of one address: the widget admits 120 new ones in a minute


class ScriptedEngine:
    """Behind the engine's interface: one thread that gives every request its next word, TOKEN_S after TOKEN_S."""

    def __init__(self, base: BaseModel, token_s: float = TOKEN_S) -> None:
        self.base, self.step, self.library, self.stats = base, None, None, None
        self.slots, self.queue, self.context, self.alive = 64, 1000, 2048, True
        self._token_s, self._lock, self._running = token_s, threading.Lock(), list[tuple[Any, list[str]]]()
        threading.Thread(target=self._speak, name="scripted", daemon=True).start()

    def submit(self, prompt: list[int], sampling: Any, adapter: Any = None, on_piece: Any = None) -> Any:
        from coterie.engine.request import Generation

        generation = Generation(prompt, sampling, adapter, on_piece)
        with self._lock:
            self._running.append((generation, [w + " " for w in WORDS.split()]))
        return generation

    def load_numbers(self) -> tuple[int, int]:
        return len(self._running), 0

    def close(self) -> None:
        self.alive = False

    def _speak(self) -> None:
        from coterie.engine.request import Piece, TokenChoice

        while self.alive:
            time.sleep(self._token_s)
            with self._lock:
                now, self._running = self._running, []
            left = []
            for generation, words in now:
                if generation.cancelled or not words:
                    generation.emit(Piece("", (), "cancelled" if generation.cancelled else "stop"))
                    continue
                word = words.pop(0)
                generation.emit(Piece(word, (TokenChoice(1, word, -0.1),)))
                left.append((generation, words))
            with self._lock:
                self._running += left


def serve(folder: Path, port: int, token_s: float, lease_s: float) -> None:
    """What `coterie serve` does, with the scripted engine, and with masking by rules (the tagger is a model too)."""
    import uvicorn

    from coterie.answer import Answerer
    from coterie.business import Business
    from coterie.desk import conversation
    from coterie.desk.desk import Desk
    from coterie.desk.flow import Parts
    from coterie.desk.rights import house_of, rooms_of
    from coterie.model.memory import few_arenas, settle
    from coterie.privacy.deidentify import Detector
    from coterie.privacy.vault import Vault
    from coterie.web.app import create_app

    few_arenas()
    conversation.LEASE_S = lease_s
    business = Business.open(folder)
    house = house_of(business)
    answerer = Answerer(business, ScriptedEngine(business.base(), token_s))  # type: ignore[arg-type]
    vault = Vault(Detector(None), house.database, house.keys)
    parts = Parts(mask=lambda customer, texts, known: vault.mask(customer, texts, {}))
    desk = Desk(answerer, house.database, parts, house.seal, house.unseal)
    desk.start()
    application = create_app(answerer, desk, house, lambda: rooms_of(house, business))
    settle()
    uvicorn.run(application, host="127.0.0.1", port=port, log_level="error")


def first_layer(model: Path, folder: Path) -> Path:
    """Of a base model all that the scripted engine needs, its words and its template, with one layer: quick to load."""
    from coterie.model.load import load as load_base
    from coterie.model.save import save_model

    base = load_base(model)
    config = replace(base.decoder.config, layers=1)
    weights = {name: w for name, w in base.decoder.weights.items() if not name[0].isdigit() or name.startswith("0.")}
    save_model(replace(base, decoder=Decoder(config, weights)), folder)
    return folder


def make_business(folder: Path, base: str) -> Path:
    """One without experts, that answers what it does not know."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "coterie.toml").write_text(f'[business]\nbase = "{base}"\n[desk]\nunknown = "answer"\nfailures = 1000\n')
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Server:
    """A server in a process of its own. `start` again after `kill`, at the same address."""

    command: list[str]
    port: int
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, within_s: float = 600) -> None:
        """Returns when it answers."""
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        until = time.monotonic() + within_s
        while time.monotonic() < until and self.process.poll() is None:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.address}/healthz", timeout=5).status_code == 200:
                    return
            time.sleep(0.05)
        raise SystemExit(f"the server did not start: {' '.join(self.command)}")

    def kill(self) -> None:
        """As a power cut does it."""
        assert self.process
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        assert self.process
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()

    def resident_mib(self) -> float:
        assert self.process
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Started, and warm: the first question of a business waits for what the router makes once."""
    server.start()
    try:
        asyncio.run(load(server, 1, 0.0, patience_s=300.0, name="first"))
        yield server
    finally:
        server.stop()


@dataclass
class Visitor:
    """A browser: after `turns` messages another customer sits down at it. `talks`: each conversation's id, and the
    texts that the server has confirmed there, in order."""

    name: str
    client: httpx.AsyncClient
    think_s: float
    turns: int
    talks: list[tuple[str, list[str]]] = field(default_factory=list)
    entries: dict[int, dict[str, Any]] = field(default_factory=dict)
    first_s: list[float] = field(default_factory=list)  # from the click until the first words
    whole_s: list[float] = field(default_factory=list)  # until the end of the answer
    unanswered: int = 0
    broken: int = 0  # requests that a dying server did not answer
    _headers: dict[str, str] = field(default_factory=dict)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _answering: bool = False
    _pieces: int = 0

    async def run(self, over: asyncio.Event, patience_s: float, after_s: float) -> None:
        """Talk until `over`, from `after_s` on; then wait until the last answer is there."""
        await asyncio.sleep(after_s)
        while not over.is_set() or not self.talks:
            self._headers = {"Authorization": f"Bearer {(await self._post('/widget/visits', {}))['token']}"}
            id = (await self._post("/widget/conversations", {"key": f"{self.name}-{len(self.talks)}"}))["id"]
            self.talks.append((id, []))
            self.entries.clear()
            reader = asyncio.create_task(self._read(id))
            try:
                while len(self.talks[-1][1]) < self.turns and (not over.is_set() or not self.talks[-1][1]):
                    await self._exchange(patience_s)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(over.wait(), self.think_s)
            finally:
                reader.cancel()

    async def _exchange(self, patience_s: float) -> None:
        (id, accepted), began, pieces = self.talks[-1], time.monotonic(), self._pieces
        text = f"{self.name} asks number {len(accepted)} of {len(self.talks)}"
        body = {"text": text, "key": str(len(accepted))}
        seq = int((await self._post(f"/widget/conversations/{id}/messages", body))["seq"])
        accepted.append(text)
        first, until = 0.0, began + patience_s
        while time.monotonic() < until:
            told = any(s > seq and e["kind"] == "message" for s, e in self.entries.items())
            if not first and (told or self._pieces > pieces):
                first = time.monotonic() - began
                self.first_s.append(first)
            if told:
                self.whole_s.append(time.monotonic() - began)
                return
            self._news.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), 1.0)
        self.unanswered += 1

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Until the server has confirmed it: the body brings a key, so that it counts once."""
        while True:
            try:
                answer = await self.client.post(path, json=body, headers=self._headers)
                if answer.status_code == 200:
                    found: dict[str, Any] = answer.json()
                    return found
                if answer.status_code not in (429, 503):
                    raise SystemExit(f"{path}: {answer.status_code} {answer.text[:300]}")
                await asyncio.sleep(float(answer.headers.get("retry-after", 1)))
            except httpx.TransportError:
                self.broken += 1
                await asyncio.sleep(0.1)

    async def _read(self, id: str) -> None:
        """The event stream, taken up again from the last entry wherever it breaks off."""
        while True:
            after = max(self.entries, default=0)
            path = f"/widget/conversations/{id}/events?after={after}"
            kind = ""
            try:
                async with self.client.stream("GET", path, headers=self._headers) as answer:
                    async for line in answer.aiter_lines():
                        if line.startswith("event: "):
                            kind = line[7:]
                        elif line.startswith("data: ") and kind == "entry":
                            entry = json.loads(line[6:])
                            self.entries[entry["seq"]] = entry
                            self._news.set()
                        elif line.startswith("data: ") and kind == "piece":
                            self._pieces += 1
                            self._news.set()
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)


@dataclass
class Found:
    """What a load did. Times in seconds."""

    visitors: list[Visitor]
    seconds: float
    memory: list[tuple[float, float, int]]  # seconds since the beginning, MiB, customers so far
    lost: int = 0
    doubled: int = 0
    disordered: int = 0
    answers_doubled: int = 0

    def first(self, percent: float) -> float:
        times = [t for v in self.visitors for t in v.first_s]
        return float(np.percentile(times, percent)) if times else float("nan")

    @property
    def accepted(self) -> int:
        return sum(len(said) for v in self.visitors for _, said in v.talks)

    def growth(self) -> tuple[float, float]:
        """MiB an hour after warm-up, and how far its 95% interval reaches to each side.

        A line through the means of BLOCKS equal stretches: neighbouring seconds say nearly the same, and each counted
        as a reading of its own would make the interval far too narrow.
        """
        at, mib, _ = np.array(self.memory).T
        edges = np.linspace(WARM * self.seconds, self.seconds, BLOCKS + 1)
        within = [(at >= low) & (at < high) for low, high in pairwise(edges)]
        blocks = [(at[w].mean() / 3600, mib[w].mean()) for w in within if w.any()]
        if len(blocks) < BLOCKS:
            return float("nan"), float("nan")
        line, covariance = np.polyfit(*np.array(blocks).T, 1, cov=True)
        return float(line[0]), T_975 * float(covariance[0, 0]) ** 0.5

    def by_customers(self) -> tuple[float, float]:
        """MiB for each 1,000 new customers: in the first third after warm-up, and in the last. What fills a cache
        ends; what is forgotten nowhere does not."""
        at, mib, customers = np.array(self.memory).T
        edges = np.linspace(WARM * self.seconds, self.seconds, 4)
        first, last = at[(at >= edges[0]) & (at < edges[1])], at[at >= edges[2]]
        out = []
        for part in (first, last):
            within = np.isin(at, part)
            enough = within.sum() > 2 and np.ptp(customers[within]) > 0
            out.append(float(np.polyfit(customers[within], mib[within], 1)[0]) * 1000 if enough else float("nan"))
        return out[0], out[1]


async def load(
    server: Server, count: int, seconds: float, think_s: float = THINK_S, patience_s: float = 60.0,
    meanwhile: Callable[[], None] | None = None, name: str = "visitor", turns: int = TURNS, several: int = SEVERAL,
) -> Found:  # fmt: skip
    """`count` visitors for so long, or for as long as `meanwhile` takes (kills), in a thread. Their first messages are
    spread over `think_s`; `several` share an address."""
    over, began, memory = asyncio.Event(), time.monotonic(), list[tuple[float, float, int]]()
    clients = [
        httpx.AsyncClient(
            base_url=server.address, timeout=httpx.Timeout(60, pool=None),
            transport=httpx.AsyncHTTPTransport(
                local_address=f"127.0.0.{n + 2}", limits=httpx.Limits(max_connections=None)
            ),
        ) for n in range((count + several - 1) // several)
    ]  # fmt: skip
    visitors = [Visitor(f"{name}-{n}", clients[n // several], think_s, turns) for n in range(count)]

    async def watch() -> None:
        for second in itertools.count():
            with suppress(OSError):  # between a kill and the next start
                customers = sum(len(v.talks) for v in visitors)
                memory.append((time.monotonic() - began, server.resident_mib(), customers))
                if second % 60 == 0:
                    now = f"minute {second // 60}, {memory[-1][1]:.1f} MiB, {customers} customers"
                    screen.print(f"{name}: {now}", highlight=False)
            await asyncio.sleep(1.0)

    watching = asyncio.create_task(watch())
    talking = [asyncio.create_task(v.run(over, patience_s, n * think_s / count)) for n, v in enumerate(visitors)]
    await (asyncio.to_thread(meanwhile) if meanwhile else asyncio.sleep(seconds))
    over.set()
    await asyncio.gather(*talking)
    watching.cancel()
    found = Found(visitors, time.monotonic() - began, memory)
    for client in clients:
        await client.aclose()
    return found


def check(folder: Path, found: Found) -> Found:
    """Count, in the database as it stands, what was accepted and is not there once and in order."""
    from coterie.business import Business
    from coterie.desk.conversation import Conversations
    from coterie.desk.rights import house_of

    house = house_of(Business.open(folder))
    talks = Conversations(house.database, house.seal, house.unseal)
    try:
        for id, wanted in (talk for visitor in found.visitors for talk in visitor.talks):
            messages = talks.messages(id, kinds=("message",))
            said = [m.text for m in messages if m.author == "customer"]
            found.lost += sum(text not in said for text in wanted)
            found.doubled += len(said) - len(set(said))
            found.disordered += [t for t in said if t in set(wanted)] != wanted
            found.answers_doubled += sum(a.author == b.author == "bot" for a, b in pairwise(messages))
    finally:
        house.close()
    return found


def killer(server: Server, kills: int, every_s: float) -> Callable[[], None]:
    """Kill and start the server so many times, each after `every_s` of load."""

    def work() -> None:
        for _ in range(kills):
            time.sleep(every_s)
            server.kill()
            server.start()
        time.sleep(every_s)

    return work


def scripted_server(folder: Path, token_s: float = TOKEN_S, lease_s: float = LEASE_S) -> Server:
    """`lease_s`: after which an answer that a killed process was at is begun anew."""
    port = free_port()
    command = [sys.executable, __file__, "--serve", str(folder), "--port", str(port), "--token-s", str(token_s)]
    command += ["--lease-s", str(lease_s)]
    return Server(command, port)


def _row(name: str, f: Found) -> list[object]:
    whole = [t for v in f.visitors for t in v.whole_s]
    rate, middle = f.accepted / f.seconds, float(np.median(whole)) if whole else float("nan")
    return [name, len(f.visitors), round(f.seconds), f.accepted, rate, 1000 * f.first(50), 1000 * f.first(99),
            1000 * middle, f.lost, f.doubled, f.disordered, sum(v.unanswered for v in f.visitors)]  # fmt: skip


def under_load(report: Report, place: Path, args: argparse.Namespace) -> Found:
    """Many visitors at once."""
    with running(scripted_server(make_business(place, args.mute))) as server:
        found = asyncio.run(load(server, args.visitors, 20 if args.quick else 180, name="load"))
    check(place, found)
    report.figures |= {
        "visitors": args.visitors, "first_p50_ms": 1000 * found.first(50), "first_p99_ms": 1000 * found.first(99),
        "messages_per_s": found.accepted / found.seconds, "lost": found.lost, "doubled": found.doubled,
    }  # fmt: skip
    return found


def with_the_real_model(report: Report, place: Path, args: argparse.Namespace) -> Found:
    """`coterie serve` itself, with the base model."""
    port = free_port()
    command = [sys.executable, "-m", "coterie", "serve", str(make_business(place, args.model)), "--port", str(port)]
    with running(Server(command, port)) as server:
        found = asyncio.run(load(server, 16, 20 if args.quick else 300, patience_s=600.0, name="real"))
    check(place, found)
    report.figures |= {
        "real_first_p50_ms": 1000 * found.first(50), "real_first_p99_ms": 1000 * found.first(99),
        "real_lost": found.lost, "real_doubled": found.doubled,
        "real_messages_per_s": found.accepted / found.seconds,
    }  # fmt: skip
    return found


def killed(report: Report, place: Path, args: argparse.Namespace) -> Found:
    """The server dies again and again, and its visitors go on."""
    kills = 2 if args.quick else args.kills
    with running(scripted_server(make_business(place, args.mute))) as server:
        work = killer(server, kills, 5.0)
        found = asyncio.run(load(server, 50, 0, patience_s=1800.0, meanwhile=work, name="kills"))
    check(place, found)
    report.figures |= {
        "kills": kills, "lost_after_kills": found.lost, "doubled_after_kills": found.doubled,
        "answers_doubled_after_kills": found.answers_doubled,
        "unanswered_after_kills": sum(v.unanswered for v in found.visitors),
    }  # fmt: skip
    return found


def over_time(report: Report, place: Path, args: argparse.Namespace) -> Found:
    """The same few visitors' worth of work, minute after minute."""
    minutes = args.minutes or (0.4 if args.quick else 60.0)
    with running(scripted_server(make_business(place, args.mute), HURRY_TOKEN_S if args.hurry else TOKEN_S)) as server:
        count, think_s, several = (HURRY, 0.0, 1) if args.hurry else (SLOW, SLOW_THINK_S, SEVERAL)
        work = load(server, count, minutes * 60, think_s, name="memory", turns=SLOW_TURNS, several=several)
        found = asyncio.run(work)
    check(place, found)
    (slope, around), (first, last) = found.growth(), found.by_customers()
    report.figures |= {
        "memory_minutes": minutes, "memory_messages": found.accepted, "memory_mib": found.memory[-1][1],
        "memory_mib_per_hour": slope, "memory_mib_per_hour_interval": around, "memory_lost": found.lost,
        "memory_customers": found.memory[-1][2], "memory_mib_per_1000_customers_first": first,
        "memory_mib_per_1000_customers_last": last,
    }  # fmt: skip
    report.say(
        f"Memory of the serving process after {minutes:g} minutes, {found.accepted} messages and "
        f"{found.memory[-1][2]} customers: {found.memory[-1][1]:.0f} MiB. After the first "
        f"{WARM * minutes:.0f} minutes it grew by {slope:+.1f} MiB an hour (95% interval {slope - around:+.1f} to "
        f"{slope + around:+.1f}: a line through the means of {BLOCKS} stretches); for each 1,000 new customers "
        f"{first:+.1f} MiB in the first third of the rest, {last:+.1f} MiB in the last."
    )
    return found


PARTS = {"load": under_load, "real": with_the_real_model, "kills": killed, "memory": over_time}


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, help="only this part; default: all, but with --quick not the real one")
    parser.add_argument("--minutes", type=float, help="of part memory; default 60, with --quick 0.4")
    parser.add_argument("--hurry", action="store_true", help="of part memory: as many customers as there can be")
    parser.add_argument("--visitors", type=int, default=200, help="of part load")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--model", default=DEFAULT, help="base model: a hub id, a folder or a .gguf file")
    parser.add_argument("--serve", type=Path, help="(used by the program itself)")
    parser.add_argument("--port", type=int)
    parser.add_argument("--token-s", type=float, default=TOKEN_S)
    parser.add_argument("--lease-s", type=float, default=LEASE_S)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.port, args.token_s, args.lease_s)
        return
    args.model = str(pull(args.model))
    parts = [args.part] if args.part else [name for name in PARTS if not (args.quick and name == "real")]
    report = Report("The desk under load" + (f", {args.part}" if args.part else "") + ": benchmarks/desk_load.py")
    rows = []
    with tempfile.TemporaryDirectory() as place:
        args.mute = str(first_layer(Path(args.model), Path(place) / "mute"))
        for name in parts:
            rows.append(_row(name, PARTS[name](report, Path(place) / name, args)))
    head = ["", "visitors", "seconds", "messages", "messages/s", "first words p50, ms", "p99, ms",
            "whole answer p50, ms", "lost", "doubled", "out of order", "unanswered"]  # fmt: skip
    report.table("The desk under load", head, rows)
    hurry = " With --hurry they do not think, and the model speaks at once." if args.hurry else ""
    report.say(
        f"The scripted model gives every answer a word each {1000 * TOKEN_S:.0f} ms, {len(WORDS.split())} in all; "
        f"first words are a whole sentence. Visitors think {THINK_S} s, in part memory {SLOW_THINK_S:.0f} s; after "
        f"{TURNS} messages, there after {SLOW_TURNS}, comes another customer.{hurry} Lost, doubled and out of order: "
        "counted in the database, against what the server had confirmed."
    )
    finish(report, args)


if __name__ == "__main__":
    main()
