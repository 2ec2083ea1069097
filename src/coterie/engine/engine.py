"""The engine: one thread that generates for everyone at once, whichever expert each request wants.

Notable: a step decodes one token for every running request, rows of different experts and of the base model in
the same pass over the weights (step.py, on a GPU by_torch.py). Requests join and leave between steps
(continuous batching, Yu et al. 2022, Orca). Running request i owns cache slot i: when one leaves, the last moves
into its place. What a step has read and written stays for texts that begin alike (pages.py).
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from coterie.engine.by_torch import TorchStep
from coterie.engine.guess import continuation
from coterie.engine.pages import PAGE, Pages, Part
from coterie.engine.request import Adapter, Blend, Callback, Generation, Piece, Sampling, TokenChoice
from coterie.engine.running import Batch, Running, Turn, batch
from coterie.engine.sampling import sample
from coterie.engine.shelf import Loaded, Shelf
from coterie.engine.step import Step, Weights
from coterie.engine.text import TextStream
from coterie.errors import Busy, ContextTooLong, CoterieError, Stopped
from coterie.experts import arrow
from coterie.experts.library import Library
from coterie.experts.mixture import Gates
from coterie.model.constrain import Grammars, failure
from coterie.model.load import BaseModel
from coterie.model.threads import give_back_pool

PREFILL_TOKENS = 2048  # tokens of whole prompts read at once: bounds the pause of those already streaming
CHUNK = 256  # prompt tokens that a step takes along with everyone's next token
# Rows up to which a step costs hardly more than with one: those free are used for guesses. In float32 half as many.
SPECULATED = 8
ECHOED = 256  # prompt tokens scored at once: 256 x 49,152 float32 are 50 MB
EXPERT_MEMORY = 1 << 30  # bytes: 27 LoRA experts of rank 16 on SmolLM2-135M in float32
CACHE_MEMORY = 256 << 20  # bytes: 11,600 tokens of SmolLM2-135M
log = logging.getLogger(__name__)


@dataclass
class Stats:
    """Counters since the start; read by /metrics."""

    requests: int = 0
    rejected: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of those, found in the cache in all layers
    trunk_tokens: int = 0  # of those, found there only below the layers that their expert changes
    generated_tokens: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    first_token_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=1000))


# Rows that may choose their next token, each with a guess of the ones after it; and for each token of those, in order,
# the scores that follow the one before it.
Scored = tuple[list[tuple[Running, list[int]]], Tensor]


class Engine:
    """Generates for the base model and the experts of a library."""

    def __init__(
        self, base: BaseModel, library: Library | None = None, slots: int = 16, context: int = 2048, queue: int = 64,
        expert_memory: int = EXPERT_MEMORY, pinned: frozenset[str] = frozenset(), cache_memory: int = CACHE_MEMORY,
        weights: Weights = "exact",
    ) -> None:  # fmt: skip
        """`expert_memory`: bytes that experts in memory may take, those `pinned` by name never leave it;
        `cache_memory`: bytes that keys and values may take after their requests have ended; `weights`: what the
        base model's matrices may be held in (step.py)."""
        config = base.decoder.config
        self.base, self.library = base, library
        self.slots, self.context, self.queue = slots, min(context, config.context), queue
        self.stats = Stats()
        self._by_torch = TorchStep(base.decoder)
        self.step = Step.open(base.decoder, weights, slots) or self._by_torch
        if weights == "int8" and not self.step.in8:
            log.warning("weights = int8 changes nothing here (docs/performance.md)")
        dtype, device = base.decoder.dtype, base.decoder.device
        self.pages = Pages(config, slots, self.context, dtype, cache_memory, device)
        self._shelf = Shelf(library, base.decoder, self.step, expert_memory, pinned)
        self._arrow: tuple[list[Loaded], set[Loaded], arrow.Arrow] | None = None  # of a batch, and whom it may wake
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._wake = threading.Condition()
        self._closing = False
        give_back_pool()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def open(self, adapter: Adapter) -> Loaded:
        """Read an expert, where it is not in memory. Raises UnknownExpert, ModelError, CoterieError (memory)."""
        return self._shelf.open(adapter)

    def submit(
        self, prompt: list[int], sampling: Sampling, adapter: Adapter | Blend | None = None,
        on_piece: Callback | None = None,
    ) -> Generation:  # fmt: skip
        """Queue a request; pieces of the answer arrive on the handle, or at `on_piece` in the engine's thread.

        Raises ContextTooLong, Busy (the queue is full), UnknownExpert, ModelError, CoterieError (constraint), Stopped.
        """
        prompt = prompt or self.base.encode(self.base.bos_token or self.base.eos_token) or [0]
        blend = adapter if isinstance(adapter, Blend) else Blend(((adapter, 1.0),)) if adapter else None
        experts = [(self._shelf.open(a), weight) for a, weight in blend.parts] if blend else []
        length = len(prompt) + max((loaded.ahead for loaded, _ in experts), default=0)
        if length >= self.context:
            raise ContextTooLong(
                f"the prompt has {length} tokens; the context holds {self.context}, answer included: shorten it"
            )
        matcher = self.grammars.matcher(sampling.constraint) if sampling.constraint else None
        stream = TextStream(self.base.tokenizer, sampling.stop)
        rng = np.random.default_rng(None if sampling.seed is None else sampling.seed % 2**64)
        request = Generation(prompt, sampling, adapter, on_piece)
        row = self._row(Running(request, None, stream, rng, matcher), blend, experts)
        with self._wake:
            if self._closing:
                raise Stopped("the engine has stopped")
            if len(self._waiting) >= self.queue:
                self.stats.rejected += 1
                raise Busy(f"{self.queue} requests wait already; try again in {Busy.retry_after_s} seconds")
            self.stats.requests += 1
            self._waiting.append(row)
            self._wake.notify()
        return request

    def _row(self, row: Running, blend: Blend | None, experts: list[tuple[Loaded, float]]) -> Running:
        """`row` with its experts. Raises CoterieError where these cannot answer together."""
        if blend is None:
            return row
        if len(experts) == 1:
            return replace(row, loaded=experts[0][0])
        if blend.how == "logits":
            if len(experts) > self.slots:
                raise CoterieError(f"{len(experts)} experts cannot answer together in {self.slots} slots; ask fewer")
            total = sum(weight for _, weight in experts)
            first, *others = [replace(row, loaded=e, weight=w / total, followers=[]) for e, w in experts]
            first.followers = [replace(voice, leads=False) for voice in others]
            return first
        for (loaded, _), ((name, _), _) in zip(experts, blend.parts, strict=True):
            config = loaded.expert.config
            if config.kind != "lora" or config.dora:
                kind = "lora with dora" if config.kind == "lora" else config.kind
                raise CoterieError(f'{name} is of kind {kind}, which cannot be added up; set combine = "logits"')
        if blend.how == "arrow":
            for loaded, _ in experts:
                self._shelf.directions(loaded)
        self._shelf.check([loaded for loaded, _ in experts])
        return replace(row, shared=tuple(experts), woken=blend.top_k if blend.how == "arrow" else 0)

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

    def retire(self) -> bool:
        """Stop the thread if there is nothing to do, and say whether it has stopped."""
        with self._wake:
            if self._waiting or self._running:
                return False
            self._closing = True
            self._wake.notify()
        self._thread.join()
        return True

    @cached_property
    def grammars(self) -> Grammars:
        """Compiled when the first constrained request comes."""
        return Grammars(self.base)

    @torch.inference_mode()
    def _loop(self) -> None:
        try:
            while self._work_comes():
                started = time.monotonic()
                self._drop_cancelled()
                self._admit()
                beside = [row for row in self._running if self._beside(row)]
                self._step([row for row in self._running if row not in beside], self._go_on)
                self._step([row for row in beside if row in self._running], self._go_on_beside)
                self.stats.busy_seconds += time.monotonic() - started
        finally:
            with self._wake:
                self._closing = True
            for row in [*self._running, *self._waiting]:
                if row.leads:
                    row.request.emit(Piece("", finish="cancelled"))

    def _beside(self, row: Running) -> bool:
        """Whether PyTorch takes the row on beside the others' step: those that Arrow routes, and prompts to be told."""
        return bool(row.woken) or (row.whole and not row.length)

    def _full(self, row: Running) -> bool:
        """Whether the answer is as long as it may get."""
        said = len(row.request.generated)
        return said >= row.request.sampling.max_tokens or row.length + row.unread >= self.context

    def _work_comes(self) -> bool:
        """Wait for work; False once the engine closes."""
        with self._wake:
            if not (self._waiting or self._running or self._closing):
                give_back_pool()  # others compute while the engine rests
            self._wake.wait_for(lambda: self._waiting or self._running or self._closing)
            return not self._closing

    def _step(self, rows: list[Running], forward: Callable[[list[Running]], Scored]) -> None:
        """One more token for `rows`. Where that fails, each request is tried alone, and ends with its error."""
        if not rows:
            return
        requests = [row for row in rows if row.leads]
        try:
            scored = forward(rows)  # takes note of nothing before all is computed
        except Exception as error:
            if len(requests) > 1:
                log.warning("a step of the engine failed (%s); each of its requests is tried alone", error)
                for row in requests:
                    self._step(row.voices, forward)
            else:
                self._fail(requests, error)
            return
        try:
            self._choose(*scored)
        except Exception as error:
            self._fail(requests, error)

    def _fail(self, requests: list[Running], error: Exception) -> None:
        log.error("a step of the engine failed; the requests in it end with an error", exc_info=error)
        for row in requests:
            if row in self._running:
                self._finish(row, "error", error=error)

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
        """Give waiting requests the free slots, of those that are read whole as many as one step may take."""
        with self._wake:
            tokens = 0
            while self._waiting and len(self._running) + len(self._waiting[0].voices) <= self.slots:
                voices = self._waiting[0].voices
                size = sum(len(voice.request.prompt) for voice in voices if voice.whole)
                if tokens and tokens + size > PREFILL_TOKENS:
                    break
                tokens += size
                self._running += self._waiting.popleft().voices

    def _begin(self, row: Running) -> None:
        """Give a row its first pages: those that others have left with the same beginning."""
        layers, slot = self.base.decoder.config.layers, self._running.index(row)
        if row.whole:
            row.held = self.pages.begin(slot, (Part(0, layers, row),), [])  # nobody's but its own
        else:
            owner = row.loaded.key if row.loaded else tuple((one.key, share) for one, share in row.shared) or None
            first = min((loaded.first_layer for loaded in row.experts), default=layers)
            row.held = self.pages.begin(slot, self.pages.parts(owner, first), row.tokens)
        trunk, row.length = row.held.known[0], row.held.known[-1]
        if row.leads:
            row.request.cached, row.request.trunk = max(0, row.length - row.ahead), max(0, trunk - row.length)
            self.stats.cached_tokens += row.request.cached
            self.stats.trunk_tokens += row.request.trunk
        prefix = row.loaded.applied.prefix if row.loaded else None
        if prefix is not None and row.length < row.ahead:
            self.pages.make_room(row.held, slot, row.ahead)
            self.pages.put(slot, row.length, prefix)
            row.length = row.ahead

    def _room(self, row: Running, length: int) -> None:
        """Pages for the first `length` tokens of a row."""
        if row.held is None:
            self._begin(row)
        assert row.held, "just begun"
        self.pages.make_room(row.held, self._running.index(row), length)

    def _offer(self, row: Running) -> None:
        """Let others find what a row has in the cache, as soon as it fills a page."""
        if row.held and not row.whole and row.held.offered < row.length // PAGE:
            self.pages.offer(row.held, row.tokens, row.length)

    def _go_on(self, rows: list[Running]) -> Scored:
        """Everyone's next token, and some more of the prompts that are still being read."""
        turns = self._turns(rows)
        for row, count, guess in turns:
            self._room(row, row.length + count + len(guess))
        b = batch(turns, self._running, self.base.decoder, lambda loaded: loaded.prepared)
        scores = self.step.run(b.embedded, b.positions, b.slots, self.pages, b.groups, b.wanted, b.starts)
        return self._gone_on(turns), scores

    def _gone_on(self, turns: list[Turn]) -> list[tuple[Running, list[int]]]:
        """Take note of what a step has read; the rows that may choose their next token, with their guesses."""
        chosen: list[tuple[Running, list[int]]] = []
        for row, count, guess in turns:
            if count == row.unread:
                chosen.append((row, guess))
                if row.leads and not row.request.generated:
                    self.stats.prompt_tokens += len(row.request.prompt)
            row.length += count
            self._offer(row)
        self.stats.steps += 1
        return chosen

    def _turns(self, rows: list[Running]) -> list[Turn]:
        """How many of its unread tokens each row reads in one step, and its guess of those that follow."""
        out: list[Turn] = []
        cheap = SPECULATED if self.base.decoder.dtype == torch.bfloat16 else SPECULATED // 2
        chunk, free = CHUNK, cheap - len(rows)
        for row in [row for row in rows if row.leads]:
            reads, want = not row.request.generated, row.request.sampling
            if reads and chunk <= 0:
                continue
            for voice in row.voices:
                if voice.held is None:
                    self._begin(voice)
                # Voices answer together, so they read to the end together.
                count = min(voice.unread, chunk) if reads and not row.followers else voice.unread
                chunk -= count * reads
                out.append((voice, count, []))
            if not reads and not row.matcher and not row.followers and want.temperature == 0:
                most = min(free, want.max_tokens - len(row.request.generated) - 1, self.context - row.length - 2)
                if want.logprobs is None and most > 0:
                    guess = continuation(row.request.prompt + row.request.generated, most)
                    out[-1] = (row, 1, guess)
                    free -= len(guess)
        return out

    def _go_on_beside(self, rows: list[Running]) -> Scored:
        """By PyTorch: the whole prompts of `rows`, or the next tokens of those that Arrow routes."""
        for row in rows:
            self._room(row, row.length + row.unread)
        turns: list[Turn] = [(row, row.unread, []) for row in rows]
        b = batch(turns, self._running, self.base.decoder, self._shelf.laid)
        gates = self._gates(rows, b) if any(row.woken for row in rows) else None
        hidden = self._by_torch.hidden(b.embedded, b.positions, b.slots, self.pages, b.groups, b.starts, gates)
        for turn, row in enumerate(rows):
            if row.request.sampling.echo and row.leads and not row.request.generated:
                mine = hidden[(b.turns == turn).to(hidden.device)]
                self._echo(row.request, mine[-len(row.request.prompt) :])
        return self._gone_on(turns), self.base.decoder.logits(hidden[b.wanted.to(hidden.device)])

    def _gates(self, rows: list[Running], b: Batch) -> Gates:
        """Arrow's shares for the tokens of `rows` that wake some of their experts."""
        of = {self._shelf.laid(loaded): loaded for row in rows for loaded in row.experts}
        experts = [of[laid] for laid in dict.fromkeys(laid for laid, *_ in b.groups)]  # as `mixed` numbers them
        known = {loaded for row in rows if row.woken for loaded in row.experts}
        if self._arrow is None or self._arrow[0] != experts or not known <= self._arrow[1]:
            directions = [self._shelf.directions(loaded) if loaded in known else None for loaded in experts]
            self._arrow = experts, known, arrow.Arrow(directions, self.base.decoder.weights["final_norm"])
        device = self.base.decoder.device
        woken = torch.tensor([row.woken for row in rows])[b.turns]
        allowed = torch.tensor([[bool(row.woken) and one in row.experts for one in experts] for row in rows])[b.turns]
        tokens = woken.nonzero()[:, 0]
        return self._arrow[2].gates(tokens.to(device), allowed[tokens].to(device), woken[tokens].to(device))

    def _choose(self, turns: list[tuple[Running, list[int]]], logits: Tensor) -> None:
        """Choose each row's next token from its scores, and send out what became certain. Where a guess was right,
        the scores after it hold too, and the row goes on to the next."""
        place, count = dict[Running, int](), 0
        for row, guess in turns:
            place[row] = count
            count += 1 + len(guess)
        for row, _ in turns:
            if row.followers:
                logits[place[row]] = sum(voice.weight * logits[place[voice]] for voice in row.voices)
            if row.leads and row.matcher:
                self.grammars.mask(row.matcher, logits[place[row]])
        greedy = logits.argmax(dim=-1).tolist()
        for row, guess in turns:
            if not row.leads:
                continue
            want = row.request.sampling
            for i in range(place[row], place[row] + 1 + len(guess)):
                token = greedy[i] if want.temperature == 0 else sample(logits[i], want, row.rng)
                detail = () if want.logprobs is None else (self._detail(logits[i], token, want.logprobs),)
                self._advance(row, token, detail)
                right = i < place[row] + len(guess) and token == guess[i - place[row]]
                if not right or row not in self._running:
                    break
                row.length += 1

    def _advance(self, row: Running, token: int, detail: tuple[TokenChoice, ...]) -> None:
        request = row.request
        if request.first_at is None:
            request.first_at = time.monotonic()
            self.stats.first_token_seconds.append(request.first_at - request.asked_at)
        text, ended = "", token in self.base.eos
        if not ended:
            text = self._say(row, token)
            if row.matcher and not row.woken and request.sampling.logprobs is None:
                text += self._say_forced(row, row.matcher)
        if row.matcher and (broken := failure(row.matcher)):
            self._finish(row, "error", error=broken)
        elif ended or row.stream.stopped or (row.matcher and row.matcher.is_stopped()):
            # After an echo the end mark is told too: who scores a prompt counts on one token more than it has.
            told = () if ended and not request.sampling.echo else detail
            self._finish(row, "stop", text + row.stream.flush(), told)
        elif self._full(row):
            text += row.stream.flush()
            self._finish(row, "stop" if row.stream.stopped else "length", text, detail)
        elif text or detail:
            request.emit(Piece(text, detail))

    def _say(self, row: Running, token: int) -> str:
        """Take a token into the answer; the text that is certain with it."""
        row.request.generated.append(token)
        self.stats.generated_tokens += 1
        if row.matcher:
            row.matcher.consume_token(token)
        return row.stream.push(token)

    def _say_forced(self, row: Running, matcher: LLMatcher) -> str:
        """Say what the constraint leaves no choice about; the row reads it together with what it chooses next, if there
        is anything left to choose."""
        text = ""
        for token in matcher.compute_ff_tokens():
            if self._full(row) or row.stream.stopped:
                break
            text += self._say(row, token)
        return text

    def _finish(
        self, row: Running, why: str, text: str = "", detail: tuple[TokenChoice, ...] = (),
        error: Exception | None = None,
    ) -> None:  # fmt: skip
        """End a request; the last running row moves into the slot of each of its voices."""
        for voice in row.voices:
            if voice.held:
                self._offer(voice)
                self.pages.release(voice.held)
            place, last = self._running.index(voice), self._running[-1]
            if last is not voice:
                self.pages.move(len(self._running) - 1, place)
                self._running[place] = last
            self._running.pop()
        row.request.emit(Piece(text, detail, why, error))

    def _echo(self, request: Generation, hidden: Tensor) -> None:
        """Send out the prompt, and how likely each of its tokens (N) was, from their hidden states (N, width)."""
        text = self.base.tokenizer.decode(request.prompt, skip_special_tokens=False)
        top, detail = request.sampling.logprobs, list[TokenChoice]()
        if top is not None:
            first = self.base.tokenizer.decode(request.prompt[:1], skip_special_tokens=False)
            detail.append(TokenChoice(request.prompt[0], first, None))
            for start in range(0, len(hidden) - 1, ECHOED):
                following = request.prompt[start + 1 : start + 1 + ECHOED]
                scores = self.base.decoder.logits(hidden[start : start + len(following)])
                detail += [self._detail(s, t, top) for s, t in zip(scores, following, strict=True)]
        request.emit(Piece(text, tuple(detail)))

    def _detail(self, scores: Tensor, token: int, top: int) -> TokenChoice:
        log_probs = torch.log_softmax(scores, dim=-1)
        values, ids = log_probs.topk(top) if top else (log_probs[:0], log_probs[:0].long())

        def text(i: int) -> str:
            return self.base.tokenizer.decode([i], skip_special_tokens=False)

        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        likeliest = tuple((text(i), v) for i, v in pairs if v > -math.inf)  # a constraint may leave fewer than asked
        return TokenChoice(token, text(token), float(log_probs[token]), likeliest)
