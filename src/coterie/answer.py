"""The second flow of the house on one page: request -> route -> generate."""

import logging
from dataclasses import dataclass, field, replace

from coterie.business import Business, Tell
from coterie.data.read import Message
from coterie.engine.constrain import choices
from coterie.engine.engine import Engine
from coterie.engine.request import Callback, Generation, Sampling
from coterie.errors import CoterieError, ModelError, UnknownExpert
from coterie.experts.instruction import frame, weights_of
from coterie.experts.library import ExpertFacts
from coterie.routing.nearest import Profile, load_profile, route

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A generation under way, and who gives it. `expert` is None for the base model."""

    generation: Generation
    expert: str | None
    version: int | None
    routed: bool
    similarity: float | None


@dataclass
class Answerer:
    """Answers for one business: its engine, its library, and the router's profiles."""

    business: Business
    engine: Engine
    _profiles: dict[str, tuple[ExpertFacts, Profile | None]] = field(default_factory=dict)

    @classmethod
    def open(cls, business: Business, tell: Tell = lambda _: None) -> "Answerer":
        """Load the base model and start the engine."""
        return cls(business, business.engine(tell))

    def chat(self, who: str, messages: list[Message], sampling: Sampling, on_piece: Callback | None = None) -> Answer:
        """Answer a conversation. `who` is an expert's name, "base", or "auto".

        An expert brings its own instruction where the conversation has none, and answers with one of its choices
        where it has been trained to. Raises UnknownExpert, ContextTooLong, Busy, DataError (messages).
        """
        question = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
        facts, similarity = self._choose(who, question)
        if facts:
            messages = frame(facts, messages)
            if facts.choices and sampling.constraint is None:
                sampling = replace(sampling, constraint=choices(facts.choices))
        prompt = self.engine.base.encode(self.engine.base.chat(messages))
        return self._submit(prompt, sampling, facts, who, similarity, on_piece)

    def complete(
        self, who: str, prompt: str | list[int], sampling: Sampling, on_piece: Callback | None = None
    ) -> Answer:
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
        facts, similarity = self._choose(who, text)
        return self._submit(tokens, sampling, facts, who, similarity, on_piece)

    def _choose(self, who: str, question: str) -> tuple[ExpertFacts | None, float | None]:
        library = self.business.library
        if who == "base" or who == self.business.config.business.base:
            return None, None
        if who != "auto":
            return library.facts(who), None
        shelf = {facts.name: facts for facts in library.shelf()}
        kept = self._profiles
        self._profiles = {
            name: kept[name] if name in kept and kept[name][0] == facts else (facts, self._profile(facts))
            for name, facts in shelf.items()
        }
        profiles = {name: profile for name, (_, profile) in self._profiles.items() if profile}
        nearest, similarity = route(self.engine.base, profiles, question)
        return (shelf[nearest] if nearest else None), similarity

    def _profile(self, facts: ExpertFacts) -> Profile | None:
        """What the router knows of an expert; None where it has none, or one that is damaged or of another base."""
        try:
            profile = load_profile(self.business.library.folder(facts.name, facts.version))
        except (ModelError, UnknownExpert) as error:
            log.warning("left out of routing: %s", error)
            return None
        fits = profile and len(profile.centre) == self.engine.base.decoder.config.width
        return profile if fits else None

    def _submit(
        self, prompt: list[int], sampling: Sampling, facts: ExpertFacts | None, who: str,
        similarity: float | None, on_piece: Callback | None,
    ) -> Answer:  # fmt: skip
        adapter = weights_of(facts) if facts else None
        generation = self.engine.submit(prompt, sampling, adapter, on_piece)
        return Answer(
            generation, facts.name if facts else None, facts.version if facts else None, who == "auto", similarity
        )
