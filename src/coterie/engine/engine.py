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
from dataclasses import dataclass, field

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from coterie.engine.constrain import Grammars
from coterie.engine.request import Adapter, Callback, Generation, Piece, Sampling, TokenChoice
from coterie.engine.sampling import sample
from coterie.engine.text import TextStream
from coterie.errors import Busy, ContextTooLong
from coterie.experts.expert import Applied, Expert
from coterie.experts.kinds import apply, load
from coterie.experts.library import Library
from coterie.experts.mixture import Mixture
from coterie.model.decoder import KVCache, packed_positions
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
    """A request that holds a cache slot."""

    request: Generation
    stream: TextStream
    rng: np.random.Generator
    matcher: LLMatcher | None
    length: int = 0  # tokens in the cache


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
        self._experts: dict[Adapter, Expert] = {}
        self._applied: dict[Adapter, Applied] = {}  # of soft prompts and prefixes
        self._mixture: tuple[list[Adapter], Mixture] = ([], Mixture([], base.decoder))
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: list[int], sampling: Sampling, adapter: Adapter | None = None,
        on_piece: Callback | None = None,
    ) -> Generation:  # fmt: skip
        """Queue a request; pieces of the answer arrive on the handle, or at `on_piece` in the engine's thread.

        Raises ContextTooLong, Busy (the queue is full), UnknownExpert, ModelError, CoterieError (constraint).
        """
        if not prompt:
            prompt = self.base.encode(self.base.bos_token or self.base.eos_token)
        if adapter is not None:
            self._load(adapter)
        length = len(prompt) + self._virtual(adapter)
        if length >= self.context:
            raise ContextTooLong(
                f"the prompt has {length} tokens; the context holds {self.context}, answer included: shorten it"
            )
        matcher = None
        if sampling.constraint:
            if self.grammars is None:
                self.grammars = Grammars(self.base)
            matcher = self.grammars.matcher(sampling.constraint)
        request = Generation(prompt, sampling, adapter, on_piece)
        row = _Running(
            request, TextStream(self.base.tokenizer, sampling.stop), np.random.default_rng(sampling.seed), matcher
        )
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
        return len(self._running), len(self._waiting)

    def close(self) -> None:
        """Cancel what runs and stop the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _load(self, adapter: Adapter) -> None:
        if adapter not in self._experts:
            assert self.library is not None, "an engine without a library serves the base model only"
            expert = load(self.library.folder(*adapter), self.base.decoder.config)
            if expert.config.kind in ("prompt", "prefix"):
                self._applied[adapter] = apply(expert, self.base.decoder)
            self._experts[adapter] = expert

    def _virtual(self, adapter: Adapter | None) -> int:
        """Virtual tokens that an expert puts before the prompt."""
        applied = self._applied.get(adapter) if adapter else None
        if applied is None:
            return 0
        return len(applied.soft) if applied.soft is not None else applied.prefix.shape[2]  # type: ignore[union-attr]

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
                    row.request.emit(Piece("", finish="error", error=error))
                self._running.clear()
            self.stats.busy_seconds += time.monotonic() - started
        for row in [*self._running, *self._waiting]:
            row.request.emit(Piece("", finish="cancelled"))

    def _drop_cancelled(self) -> None:
        with self._wake:
            gone = [row for row in self._waiting if row.request.cancelled]
            for row in gone:
                self._waiting.remove(row)
        for row in gone:
            row.request.emit(Piece("", finish="cancelled"))
        for row in [r for r in self._running if r.request.cancelled]:
            self._finish(row, "cancelled", row.stream.flush())

    def _admit(self) -> None:
        """Take waiting requests into free slots and prefill their prompts."""
        new: list[_Running] = []
        with self._wake:
            room, tokens = self.slots - len(self._running), 0
            while self._waiting and len(new) < room:
                tokens += len(self._waiting[0].request.prompt)
                if new and tokens > PREFILL_TOKENS:
                    break
                new.append(self._waiting.popleft())
        if not new:
            return
        self._running += new
        groups: dict[Adapter | None, list[_Running]] = {}  # a prefix stands before all rows of a forward
        for row in new:
            applied = self._applied.get(row.request.adapter) if row.request.adapter else None
            with_prefix = row.request.adapter if applied and applied.prefix is not None else None
            groups.setdefault(with_prefix, []).append(row)
        logits = [self._prefill(rows, self._applied[name].prefix if name else None) for name, rows in groups.items()]
        self._choose([row for rows in groups.values() for row in rows], torch.cat(logits))

    def _prefill(self, rows: list[_Running], prefix: Tensor | None) -> Tensor:
        """Fill the cache with the prompts of `rows`, packed in one forward; the scores (rows, vocab) of what follows."""
        decoder, device = self.base.decoder, self.base.decoder.device
        parts: list[Tensor] = []
        for row in rows:
            applied = self._applied.get(row.request.adapter) if row.request.adapter else None
            if applied and applied.soft is not None:
                parts.append(applied.soft)
            parts.append(decoder.embed(torch.tensor(row.request.prompt, device=device)))
            row.length = len(row.request.prompt) + self._virtual(row.request.adapter)
        behind = 0 if prefix is None else prefix.shape[2]
        lengths = [row.length - behind for row in rows]
        positions, repeats = packed_positions(lengths, device) + behind, torch.tensor(lengths)
        slots = torch.tensor([self._running.index(row) for row in rows]).repeat_interleave(repeats).to(device)
        attend = self.cache.attend_prefill(slots, positions, lengths, prefix)
        owners = self._owners(rows).repeat_interleave(repeats)
        hidden = decoder.run(torch.cat(parts), positions, attend, self._mixture[1].change(owners))
        self.stats.prompt_tokens += sum(lengths)
        return decoder.logits(decoder.finish(hidden[repeats.cumsum(0).to(device) - 1]))

    def _decode(self) -> None:
        """One more token for every running request."""
        rows, device = list(self._running), self.base.decoder.device
        ids = torch.tensor([row.request.generated[-1] for row in rows], device=device)
        positions = torch.tensor([row.length for row in rows], device=device)
        for row in rows:
            row.length += 1
        attend = self.cache.attend_decode(torch.arange(len(rows), device=device), positions)
        change = self._mixture[1].change(self._owners(rows))
        hidden = self.base.decoder.forward(ids, positions, attend, change)
        self.stats.steps += 1
        self._choose(rows, self.base.decoder.logits(hidden))

    def _owners(self, rows: list[_Running]) -> Tensor:
        """The place in the stack of each row's expert, -1 for the base (rows); rebuilds the stack where it must."""
        needed = dict.fromkeys(row.request.adapter for row in self._running if row.request.adapter)
        names = self._mixture[0]
        if not needed.keys() <= set(names):
            wanted = list(dict.fromkeys([*needed, *names]))
            names = wanted if len(wanted) <= STACK else list(needed)
            self._mixture = (names, Mixture([self._experts[name] for name in names], self.base.decoder))
        place = {name: i for i, name in enumerate(names)}
        return torch.tensor([place[row.request.adapter] if row.request.adapter else -1 for row in rows])

    def _choose(self, rows: list[_Running], logits: Tensor) -> None:
        """Choose each row's next token from its scores (rows, vocab), and send out what became certain."""
        for i, row in enumerate(rows):
            if row.matcher and self.grammars:
                self.grammars.mask(row.matcher, logits[i])
        greedy = logits.argmax(dim=-1).tolist()
        for i, row in enumerate(rows):
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
        """End a request; the last running one moves into its slot."""
        place, last = self._running.index(row), self._running[-1]
        if last is not row:
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
