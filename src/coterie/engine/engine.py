"""The engine: one thread that generates for everyone at once, whichever expert each request wants.

Notable: a step decodes one token for every running request, rows of different experts and of the base model in
the same matrix products (see experts/lora.py). Requests join and leave between steps (continuous batching, Yu et
al. 2022, Orca). Running request i owns cache slot i: when one leaves, the last moves into its place, so that a
step reads the cache without gathering.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from coterie.engine.constrain import Grammars
from coterie.engine.request import Adapter, Blend, Callback, Generation, Piece, Sampling, TokenChoice
from coterie.engine.sampling import sample
from coterie.engine.text import TextStream
from coterie.errors import Busy, ContextTooLong, CoterieError
from coterie.experts import arrow
from coterie.experts.library import Library
from coterie.experts.lora import Lora, LoraStack
from coterie.experts.lora import load as load_lora
from coterie.model.decoder import Change, KVCache, packed_positions
from coterie.model.load import BaseModel

PREFILL_TOKENS = 2048  # prompt tokens taken in one step: bounds the pause of those already streaming
STACK = 8  # experts kept side by side though idle; beyond, only those in use
log = logging.getLogger(__name__)


@dataclass
class Stats:
    """Counters since the start; read by /metrics."""

    requests: int = 0
    rejected: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    first_token_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=1000))


@dataclass(eq=False)
class _Running:
    """A request that holds a cache slot, or one voice of several whose scores are averaged (Blend of `logits`).

    The first voice leads: it chooses the token and owns the others, which follow it and share its request.
    """

    request: Generation
    stream: TextStream
    rng: np.random.Generator
    matcher: LLMatcher | None
    adapter: Adapter | Blend | None = None  # of this voice
    weight: float = 1.0  # of this voice
    length: int = 0  # tokens in the cache
    leads: bool = True
    followers: "list[_Running]" = field(default_factory=list)

    @property
    def voices(self) -> "list[_Running]":
        """This row and those that follow it; each holds a slot."""
        return [self, *self.followers]

    @property
    def adapters(self) -> list[Adapter]:
        """The experts this row computes with."""
        if isinstance(self.adapter, Blend):
            return [adapter for adapter, _ in self.adapter.parts]
        return [self.adapter] if self.adapter else []


class Engine:
    """Generates for the base model and the experts of a library."""

    def __init__(
        self, base: BaseModel, library: Library | None = None, slots: int = 16, context: int = 2048, queue: int = 64
    ) -> None:
        config = base.decoder.config
        self.base, self.library = base, library
        self.slots, self.context, self.queue = slots, min(context, config.context), queue
        self.cache = KVCache(config, slots, self.context, base.decoder.dtype, base.decoder.device)
        self.stats = Stats()
        self.grammars: Grammars | None = None
        self._loras: dict[Adapter, Lora] = {}
        self._prototypes: dict[Adapter, arrow.Prototypes] = {}
        self._stack: tuple[list[Adapter], LoraStack] = ([], LoraStack([], base.decoder))
        self._arrow: arrow.Arrow | None = None  # of the stack, made when a row first asks for it
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: list[int], sampling: Sampling, adapter: Adapter | Blend | None = None,
        on_piece: Callback | None = None,
    ) -> Generation:  # fmt: skip
        """Queue a request; pieces of the answer arrive on the handle, or at `on_piece` in the engine's thread.

        Raises ContextTooLong, Busy (the queue is full), UnknownExpert, ModelError, CoterieError (constraint).
        """
        if not prompt:
            prompt = self.base.encode(self.base.bos_token or self.base.eos_token)
        if len(prompt) >= self.context:
            raise ContextTooLong(
                f"the prompt has {len(prompt)} tokens; the context holds {self.context}, answer included: shorten it"
            )
        if isinstance(adapter, Blend) and adapter.how == "logits" and len(adapter.parts) > self.slots:
            raise CoterieError(f"{len(adapter.parts)} experts cannot answer together in {self.slots} slots; ask fewer")
        matcher = None
        if sampling.constraint:
            if self.grammars is None:
                self.grammars = Grammars(self.base)
            matcher = self.grammars.matcher(sampling.constraint)
        request = Generation(prompt, sampling, adapter, on_piece)
        row = _Running(
            request, TextStream(self.base.tokenizer, sampling.stop), np.random.default_rng(sampling.seed), matcher,
            adapter,
        )  # fmt: skip
        if isinstance(adapter, Blend) and adapter.how == "logits":
            total = sum(weight for _, weight in adapter.parts)
            (row.adapter, weight), *others = adapter.parts
            row.weight = weight / total
            row.followers = [replace(row, adapter=a, weight=w / total, leads=False, followers=[]) for a, w in others]
        for voice in row.voices:
            for one in voice.adapters:
                self._load(one, prototypes=isinstance(voice.adapter, Blend) and voice.adapter.how == "arrow")
        with self._wake:
            if len(self._waiting) >= self.queue:
                self.stats.rejected += 1
                raise Busy(f"{self.queue} requests wait already; try again in {Busy.retry_after_s} seconds")
            self.stats.requests += 1
            self._waiting.append(row)
            self._wake.notify()
        return request

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def load_numbers(self) -> tuple[int, int]:
        """How many requests run, and how many wait."""
        return sum(row.leads for row in self._running), len(self._waiting)

    def close(self) -> None:
        """Cancel what runs and stop the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _load(self, adapter: Adapter, prototypes: bool = False) -> None:
        if adapter not in self._loras:
            assert self.library is not None, "an engine without a library serves the base model only"
            self._loras[adapter] = load_lora(self.library.folder(*adapter), self.base.decoder.config)
        if prototypes and adapter not in self._prototypes:
            self._prototypes[adapter] = arrow.prototypes(self._loras[adapter], self.base.decoder.config)

    @torch.inference_mode()
    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._running or self._closing)
                if self._closing:
                    break
            started = time.monotonic()
            try:
                self._drop_cancelled()
                self._admit()
                if self._running:
                    self._decode()
            except Exception as error:
                log.exception("a step of the engine failed; its requests end with an error")
                for row in self._running:
                    if row.leads:
                        row.request.emit(Piece("", finish="error", error=error))
                self._running.clear()
            self.stats.busy_seconds += time.monotonic() - started
        for row in [*self._running, *self._waiting]:
            if row.leads:
                row.request.emit(Piece("", finish="cancelled"))

    def _drop_cancelled(self) -> None:
        with self._wake:
            gone = [row for row in self._waiting if row.request.cancelled]
            for row in gone:
                self._waiting.remove(row)
        for row in gone:
            row.request.emit(Piece("", finish="cancelled"))
        for row in [r for r in self._running if r.leads and r.request.cancelled]:
            self._finish(row, "cancelled", row.stream.flush())

    def _admit(self) -> None:
        """Prefill waiting requests into free slots, all their prompts packed in one forward."""
        new: list[_Running] = []
        with self._wake:
            room, tokens = self.slots - len(self._running), 0
            while self._waiting and len(new) + len(self._waiting[0].voices) <= room:
                voices = self._waiting[0].voices
                tokens += len(voices) * len(voices[0].request.prompt)
                if new and tokens > PREFILL_TOKENS:
                    break
                new += self._waiting.popleft().voices
        if not new:
            return
        slots = torch.arange(len(self._running), len(self._running) + len(new))
        self._running += new
        lengths = [len(row.request.prompt) for row in new]
        for row, length in zip(new, lengths, strict=True):
            row.length = length
        device = self.base.decoder.device
        ids = torch.tensor([t for row in new for t in row.request.prompt], device=device)
        positions = packed_positions(lengths, device)
        repeats = torch.tensor(lengths)
        attend = self.cache.attend_prefill(slots.repeat_interleave(repeats).to(device), positions, lengths)
        hidden = self.base.decoder.forward(ids, positions, attend, self._change(new, repeats))
        last = hidden[repeats.cumsum(0).to(device) - 1]
        self.stats.prompt_tokens += sum(row.length for row in new if row.leads)
        self._choose(new, self.base.decoder.logits(last))

    def _decode(self) -> None:
        """One more token for every running request."""
        rows, device = list(self._running), self.base.decoder.device
        ids = torch.tensor([row.request.generated[-1] for row in rows], device=device)
        positions = torch.tensor([row.length for row in rows], device=device)
        for row in rows:
            row.length += 1
        attend = self.cache.attend_decode(torch.arange(len(rows), device=device), positions)
        hidden = self.base.decoder.forward(ids, positions, attend, self._change(rows, torch.ones_like(positions)))
        self.stats.steps += 1
        self._choose(rows, self.base.decoder.logits(hidden))

    def _change(self, rows: list[_Running], repeats: Tensor) -> Change | None:
        """What the experts of `rows` make of a batch with `repeats` (rows) tokens of each; restacks where it must."""
        needed = dict.fromkeys(adapter for row in self._running for adapter in row.adapters)
        names = self._stack[0]
        if not needed.keys() <= set(names):
            wanted = list(dict.fromkeys([*needed, *names]))
            names = wanted if len(wanted) <= STACK else list(needed)
            self._stack = (names, LoraStack([self._loras[name] for name in names], self.base.decoder))
            self._arrow = None
        place = {name: i for i, name in enumerate(names)}
        shares = torch.zeros(len(rows), len(names))  # of each expert in each row
        by_token = torch.zeros(len(rows), len(names), dtype=torch.bool)  # the experts that Arrow may wake
        top_k = torch.ones(len(rows), dtype=torch.long)
        for i, row in enumerate(rows):
            if isinstance(row.adapter, Blend) and row.adapter.how == "arrow":
                by_token[i, [place[a] for a in row.adapters]] = True
                top_k[i] = row.adapter.top_k
            elif isinstance(row.adapter, Blend):
                for adapter, weight in row.adapter.parts:
                    shares[i, place[adapter]] += weight
            elif row.adapter:
                shares[i, place[row.adapter]] = 1.0
        owner = torch.arange(len(rows)).repeat_interleave(repeats.cpu())
        routed, device = by_token[owner].any(dim=1).nonzero()[:, 0], self.base.decoder.device
        if not len(routed):
            return self._stack[1].change_shared(shares[owner])
        if self._arrow is None or bool((by_token & ~self._arrow.known).any()):
            self._arrow = arrow.Arrow(self._stack[1], [self._prototypes.get(name) for name in names])
        rows_of = owner[routed]
        gates = self._arrow.gates(routed.to(device), by_token[rows_of].to(device), top_k[rows_of].to(device))
        return self._stack[1].change_shared(shares[owner], gates)

    def _choose(self, rows: list[_Running], logits: Tensor) -> None:
        """Choose each row's next token from its scores (rows, vocab), and send out what became certain."""
        place = {id(row): i for i, row in enumerate(rows)}
        for i, row in enumerate(rows):
            if row.followers:
                logits[i] = sum(voice.weight * logits[place[id(voice)]] for voice in row.voices)
            if row.leads and row.matcher and self.grammars:
                self.grammars.mask(row.matcher, logits[i])
        greedy = logits.argmax(dim=-1).tolist()
        for i, row in enumerate(rows):
            if not row.leads:
                continue
            want = row.request.sampling
            token = greedy[i] if want.temperature == 0 else sample(logits[i], want, row.rng)
            detail = () if want.logprobs is None else (self._detail(logits[i], token, want.logprobs),)
            self._advance(row, token, detail)

    def _advance(self, row: _Running, token: int, detail: tuple[TokenChoice, ...]) -> None:
        request = row.request
        if request.first_at is None:
            request.first_at = time.monotonic()
            self.stats.first_token_seconds.append(request.first_at - request.asked_at)
        if token in self.base.eos:
            self._finish(row, "stop", row.stream.flush())
            return
        request.generated.append(token)
        self.stats.generated_tokens += 1
        text = row.stream.push(token)
        if row.matcher:
            row.matcher.consume_token(token)
        if row.stream.stopped or (row.matcher and row.matcher.is_stopped()):
            self._finish(row, "stop", text + row.stream.flush(), detail)
        elif len(request.generated) >= request.sampling.max_tokens or row.length + 1 >= self.context:
            self._finish(row, "length", text + row.stream.flush(), detail)
        elif text or detail:
            request.emit(Piece(text, detail))

    def _finish(self, row: _Running, why: str, text: str, detail: tuple[TokenChoice, ...] = ()) -> None:
        """End a request; the last running row moves into the slot of each of its voices."""
        for voice in row.voices:
            place, last = self._running.index(voice), self._running[-1]
            if last is not voice:
                end = len(self._running) - 1
                for store in (self.cache.keys, self.cache.values):
                    store[:, place, :, : last.length] = store[:, end, :, : last.length]
                self._running[place] = last
            self._running.pop()
        row.request.emit(Piece(text, detail, finish=why))

    def _detail(self, scores: Tensor, token: int, top: int) -> TokenChoice:
        log_probs = torch.log_softmax(scores, dim=-1)
        values, ids = log_probs.topk(top) if top else (log_probs[:0], log_probs[:0].long())

        def text(i: int) -> str:
            return self.base.tokenizer.decode([i], skip_special_tokens=False)

        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return TokenChoice(token, text(token), float(log_probs[token]), tuple((text(i), v) for i, v in pairs))
