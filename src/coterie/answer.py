"""The second flow of the house on one page: request -> route -> generate."""

from dataclasses import dataclass, field, replace

from coterie.business import Business, Tell
from coterie.data.read import Message
from coterie.engine.constrain import choices
from coterie.engine.engine import Engine
from coterie.engine.request import Adapter, Callback, Generation, Sampling
from coterie.experts.instruction import frame, weights_of
from coterie.experts.library import ExpertFacts
from coterie.routing.nearest import Profile, load_profile, route


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
    _profiles: dict[Adapter, Profile | None] = field(default_factory=dict)

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

    def complete(self, who: str, text: str, sampling: Sampling, on_piece: Callback | None = None) -> Answer:
        """Go on from `text` as it stands, without a chat template."""
        facts, similarity = self._choose(who, text)
        return self._submit(self.engine.base.encode(text), sampling, facts, who, similarity, on_piece)

    def _choose(self, who: str, question: str) -> tuple[ExpertFacts | None, float | None]:
        library = self.business.library
        if who == "base" or who == self.business.config.business.base:
            return None, None
        if who != "auto":
            return library.facts(who), None
        profiles: dict[str, Profile] = {}
        for name in library.names():
            key = (name, library.current(name) or 0)
            if key not in self._profiles:
                self._profiles[key] = load_profile(library.folder(*key))
            profile = self._profiles[key]
            if profile:
                profiles[name] = profile
        nearest, similarity = route(self.engine.base, profiles, question)
        return (library.facts(nearest) if nearest else None), similarity

    def _submit(
        self, prompt: list[int], sampling: Sampling, facts: ExpertFacts | None, who: str,
        similarity: float | None, on_piece: Callback | None,
    ) -> Answer:  # fmt: skip
        adapter = weights_of(facts) if facts else None
        generation = self.engine.submit(prompt, sampling, adapter, on_piece)
        return Answer(
            generation, facts.name if facts else None, facts.version if facts else None, who == "auto", similarity
        )
