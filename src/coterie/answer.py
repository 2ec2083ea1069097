"""The second flow of the house on one page: request -> route -> generate."""

import logging
import math
import threading
import time
from dataclasses import dataclass, replace
from functools import partial

from coterie.business import Business, Tell
from coterie.choose import Choice, Chooser, question
from coterie.data.read import Message, last_said
from coterie.engine.engine import Engine
from coterie.engine.request import Blend, Callback, Combine, Generation, Piece, Sampling, TokenChoice
from coterie.errors import CoterieError, UnknownExpert
from coterie.experts.classifier import KIND, Verdict
from coterie.experts.instruction import frame, weights_of
from coterie.experts.kinds import Labeller, adds_up, has_voice, labeller
from coterie.experts.library import ExpertFacts
from coterie.model.constrain import choices
from coterie.own import OwnEngines

ARROW_MOST = 64  # experts that Arrow may choose among
LABELLERS = 8  # classifiers in memory: one of 10,000 rows takes 90 MB
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A generation under way, and who gives it. `expert` is None for the base model, "arrow" for all at once.

    `experts`: name, version and share of all that answer together, the one named first.
    """

    generation: Generation
    expert: str | None
    version: int | None
    routed: bool
    similarity: float | None
    experts: tuple[tuple[str, int, float], ...] = ()
    verdict: Verdict | None = None  # of a classifier: how sure it is, and why


@dataclass(frozen=True)
class _Chosen:
    """Who answers, all of them able to answer together, and shares that sum to 1.

    The first speaks for them: it brings instruction and choices. Under "arrow" nobody does.
    """

    facts: tuple[ExpertFacts, ...] = ()
    shares: tuple[float, ...] = ()
    combine: Combine = "merge"
    leads: bool = True
    routed: bool = False
    similarity: float | None = None

    def adapter(self) -> tuple[str, int] | Blend | None:
        """As the engine wants it."""
        if len(self.facts) > 1:
            parts = zip(((f.name, f.version) for f in self.facts), self.shares, strict=True)
            return Blend(tuple(parts), self.combine)
        return weights_of(self.facts[0]) if self.facts else None


class Answerer:
    """Answers for one business: its engine, its library, and its router."""

    def __init__(self, business: Business, engine: Engine) -> None:
        self.business, self.engine = business, engine
        self.chooser = Chooser(business, engine.base, engine.step)
        memory = business.config.business.expert_memory << 20
        self._own = OwnEngines(business.own_engine, business.library, memory)
        self._labellers: dict[tuple[str, int], Labeller] = {}  # the latest used last
        self._opening = threading.Lock()

    def close(self) -> None:
        """Stop the engines."""
        self.engine.close()
        self._own.close()

    def _labeller_of(self, chosen: _Chosen) -> Labeller | None:
        """The first of the experts, where it is a classifier."""
        first = chosen.facts[0] if chosen.facts and chosen.leads else None
        if first is None or first.kind != KIND:
            return None
        with self._opening:
            key = (first.name, first.version)
            found = self._labellers.pop(key, None) or labeller(self.business.library, first, self.engine.base)
            self._labellers[key] = found
            while len(self._labellers) > LABELLERS:
                del self._labellers[next(iter(self._labellers))]
            return found

    @classmethod
    def open(cls, business: Business, tell: Tell = lambda _: None) -> "Answerer":
        """Load the base model and start the engine."""
        return cls(business, business.engine(tell))

    def chat(
        self, who: str | Choice, messages: list[Message], sampling: Sampling, on_piece: Callback | None = None,
        channel: str = "", preface: str = "",
    ) -> Answer:  # fmt: skip
        """Answer a conversation. `who` is an expert's name, "base", "auto", or "arrow"; or what the chooser has decided
        already. `preface` (evidence) goes before the last message, once it has been chosen who answers.

        An expert brings its own instruction where the conversation has none, and answers with one of its choices
        where it has been trained to. Raises UnknownExpert, ContextTooLong, Busy, DataError (messages).
        """
        chosen = self._choose(who, question(messages), channel)
        if labeller := self._labeller_of(chosen):
            return self._label(labeller, last_said(messages), sampling, chosen, on_piece)
        if preface:
            messages = [*messages[:-1], {**messages[-1], "content": preface + messages[-1]["content"]}]
        if chosen.facts and chosen.leads:
            first = chosen.facts[0]
            messages = frame(first, messages)
            if first.choices and sampling.constraint is None:
                sampling = replace(sampling, constraint=choices(first.choices))
        prompt = self.engine.base.encode(self.engine.base.chat(messages))
        return self._submit(prompt, sampling, chosen, on_piece)

    def complete(
        self, who: str, prompt: str | list[int], sampling: Sampling, on_piece: Callback | None = None,
        channel: str = "",
    ) -> Answer:  # fmt: skip
        """Go on from a text, or tokens, as they stand, without a chat template. Raises CoterieError for a token that
        the model does not have."""
        base = self.engine.base
        if isinstance(prompt, str):
            text, tokens = prompt, base.encode(prompt)
        else:
            vocab = base.decoder.config.vocab
            wrong = next((t for t in prompt if not 0 <= t < vocab), None)
            if wrong is not None:
                raise CoterieError(f"prompt: there is no token {wrong}; the model has tokens 0 to {vocab - 1}")
            text, tokens = base.tokenizer.decode(prompt, skip_special_tokens=False) if who == "auto" else "", prompt
        chosen = self._choose(who, text, channel)
        if labeller := self._labeller_of(chosen):
            text = text or base.tokenizer.decode(tokens, skip_special_tokens=False)
            return self._label(labeller, text, sampling, chosen, on_piece)
        return self._submit(tokens, sampling, chosen, on_piece)

    def _choose(self, who: str | Choice, text: str, channel: str) -> _Chosen:
        library, config = self.business.library, self.business.config
        if isinstance(who, Choice):
            return self._chosen(who)
        if who in ("base", config.business.base):
            return _Chosen()
        if who == "arrow":
            refused = self.chooser.refused(text, channel)
            facts = tuple(f for f in library.shelf() if f.name not in refused and adds_up(library, f))
            if len(facts) <= ARROW_MOST:
                facts = tuple(f for f in facts if self._opens(f))
            if not 1 <= len(facts) <= ARROW_MOST:
                raise CoterieError(
                    f"arrow chooses among 1 to {ARROW_MOST} LoRA experts (without DoRA) for each token; here are "
                    f'{len(facts)}: ask "auto", with combine = "arrow" under [routing]'
                )
            return _Chosen(facts, (1 / len(facts),) * len(facts), "arrow", leads=False)
        if who != "auto":
            return _Chosen((library.facts(who),), (1.0,))
        try:
            return self._chosen(self.chooser.choose(text, channel))
        except UnknownExpert:  # removed since it was chosen
            return self._chosen(self.chooser.choose(text, channel))

    def _opens(self, facts: ExpertFacts) -> bool:
        """Whether an expert can answer beside others; why not is logged, and told when it is asked alone."""
        try:
            self.engine.open((facts.name, facts.version))
        except CoterieError as error:
            log.warning("left out: %s", error)
            return False
        return True

    def _chosen(self, choice: Choice) -> _Chosen:
        """The nearest of the experts chosen, and those of the others that can answer together with it."""
        library, how = self.business.library, self.business.config.routing.combine
        found = [(library.facts(name), share) for name, share in choice.decision.chosen]
        if len(found) > 1:
            able = has_voice if how == "logits" else partial(adds_up, library)
            others = [part for part in found[1:] if able(part[0]) and self._opens(part[0])] if able(found[0][0]) else []
            found = [found[0], *others]
            found = found[: self.engine.slots] if how == "logits" else found  # a voice takes a slot
        total = sum(share for _, share in found)
        return _Chosen(
            tuple(f for f, _ in found), tuple(share / total for _, share in found), how, routed=True,
            similarity=choice.decision.similarity,
        )  # fmt: skip

    def _submit(
        self, prompt: list[int], sampling: Sampling, chosen: _Chosen, on_piece: Callback | None
    ) -> Answer:  # fmt: skip
        self._own.tidy()
        first = chosen.facts[0] if chosen.facts and chosen.leads else None
        if first and first.kind == "full":  # it answers alone, in an engine of its own
            return self._given(self._own.submit(first, prompt, sampling, on_piece), chosen)
        return self._given(self.engine.submit(prompt, sampling, chosen.adapter(), on_piece), chosen)

    def _label(
        self, labeller: Labeller, text: str, sampling: Sampling, chosen: _Chosen, on_piece: Callback | None
    ) -> Answer:
        """A classifier's answer, complete at once: its label is one token, as likely as it is sure."""
        (verdict,) = labeller.judge([text])
        encode = self.engine.base.encode
        generation = Generation(encode(text), sampling, None, on_piece, encode(verdict.label))
        likely = math.log(max(verdict.confidence, 1e-9))
        tokens = () if sampling.logprobs is None else (TokenChoice(generation.generated[0], verdict.label, likely),)
        generation.first_at = time.monotonic()
        generation.emit(Piece(verdict.label, tokens, "stop"))
        return self._given(generation, chosen, verdict)

    def _given(self, generation: Generation, chosen: _Chosen, verdict: Verdict | None = None) -> Answer:
        who = tuple((f.name, f.version, share) for f, share in zip(chosen.facts, chosen.shares, strict=True))
        name, version = (who[0][0], who[0][1]) if who else (None, None)
        if not chosen.leads:
            name, version = "arrow", None
        return Answer(generation, name, version, chosen.routed, chosen.similarity, who, verdict)
