"""The experts that the engine has in memory: read when first asked for, the longest idle dropped for room."""

import threading
from dataclasses import dataclass
from pathlib import Path

from coterie.engine.by_torch import TorchStep
from coterie.engine.request import Adapter
from coterie.engine.step import Prepared, Step
from coterie.errors import CoterieError, UnknownExpert
from coterie.experts import arrow
from coterie.experts.expert import CONFIG, Applied, Expert
from coterie.experts.kinds import apply, read
from coterie.experts.library import Library
from coterie.experts.mixture import Laid, lay
from coterie.model.decoder import Decoder
from coterie.model.threads import give_back_pool

Key = tuple[Path, int]


@dataclass(eq=False)
class Loaded:
    """An expert in memory. `applied` is empty but for soft prompts and prefixes, which come before the prompt."""

    expert: Expert
    applied: Applied
    prepared: Prepared | Laid  # as the engine's step wants it
    key: Key  # tells this version's weights from all others: its folder, and when its configuration was written
    laid: Laid | None = None  # as PyTorch wants it beside the step in C, from when it is first needed
    directions: arrow.Prototypes | None = None  # for Arrow, likewise

    @property
    def first_layer(self) -> int:
        """The lowest layer that it changes."""
        return getattr(self.expert.config, "first_layer", 0)

    @property
    def ahead(self) -> int:
        """Virtual tokens before the prompt."""
        soft, prefix = self.applied.soft, self.applied.prefix
        return len(soft) if soft is not None else prefix.shape[2] if prefix is not None else 0

    @property
    def size(self) -> int:
        """Bytes in memory now: the weights in float32, and what was made of them for each way of computing."""
        held = [w.nbytes for w in self.expert.weights.values()]
        held += [t.nbytes for t in (self.applied.soft, self.applied.prefix) if t is not None]
        held += [d.nbytes for d in (self.directions or {}).values()]
        return sum(held) + sum(made.nbytes for made in (self.prepared, self.laid) if made is not None)


class Shelf:
    """Experts of a library in memory, up to `budget` bytes; those `pinned` by name never leave it."""

    def __init__(
        self, library: Library | None, decoder: Decoder, step: Step | TorchStep, budget: int, pinned: frozenset[str]
    ) -> None:  # fmt: skip
        self._library, self._decoder, self._step = library, decoder, step
        self._budget, self._pinned = budget, pinned
        self._kept: dict[Key, Loaded] = {}  # the latest used last
        self._lock = threading.Lock()  # of what is kept; held for moments
        self._reading = threading.Lock()  # one expert is read at a time, while requests to those in memory go on

    def open(self, adapter: Adapter) -> Loaded:
        """A version's weights; read anew where an expert was removed and its numbers given again.

        Raises UnknownExpert, ModelError, and CoterieError where one expert alone is beyond the budget.
        """
        if self._library is None:
            raise UnknownExpert(f"there is no expert {adapter[0]!r}: this engine serves the base model only")
        folder = self._library.folder(*adapter)
        try:
            key = folder, (folder / CONFIG).stat().st_mtime_ns
        except OSError:  # damaged, or removed a moment ago: reading says which
            key = folder, 0
        loaded = self._latest(key)
        if loaded is None:
            with self._reading:
                loaded = self._latest(key) or self._load(adapter, key)  # somebody else may have read it meanwhile
                if loaded.size > self._budget:
                    raise CoterieError(
                        f"the expert {adapter[0]} takes {loaded.size / 2**20:.0f} MiB, and expert_memory under "
                        f"[business] allows {self._budget / 2**20:.0f} for all experts: raise it"
                    )
                self._keep(loaded)
        return loaded

    def laid(self, loaded: Loaded) -> Laid:
        """An expert as PyTorch wants it."""
        if isinstance(loaded.prepared, Laid):
            return loaded.prepared
        if loaded.laid is None:
            loaded.laid = lay(loaded.expert, self._decoder)
            self._make_room(loaded)
        return loaded.laid

    def directions(self, loaded: Loaded) -> arrow.Prototypes:
        """What Arrow asks of a LoRA expert."""
        if loaded.directions is None:
            loaded.directions = arrow.prototypes(loaded.expert, self._decoder.config)
            self._make_room(loaded)
        return loaded.directions

    def check(self, together: list[Loaded]) -> None:
        """Raises CoterieError where experts that are to answer together are beyond the budget."""
        size = sum(loaded.size for loaded in together)
        if size > self._budget:
            raise CoterieError(
                f"{len(together)} experts together take {size / 2**20:.0f} MiB, and expert_memory under [business] "
                f"allows {self._budget / 2**20:.0f}: raise it, or ask fewer"
            )

    def _latest(self, key: Key) -> Loaded | None:
        """What is kept under `key`, from now on the latest used."""
        with self._lock:
            loaded = self._kept.pop(key, None)
            if loaded is not None:
                self._kept[key] = loaded
            return loaded

    def _keep(self, loaded: Loaded) -> None:
        with self._lock:
            for key in [k for k in self._kept if k[0] == loaded.key[0]]:  # its numbers were given to another since
                del self._kept[key]
            self._kept[loaded.key] = loaded
        self._make_room(loaded)

    def _make_room(self, latest: Loaded) -> None:
        """Drop the longest idle beyond the budget: not `latest`, and not the version of a pinned expert that was asked
        last. Those that answer at the moment stay in memory until they end, whatever leaves the shelf."""
        with self._lock:
            pinned = {k[0].parent.name: k for k in self._kept if k[0].parent.name in self._pinned}
            idle = [k for k in self._kept if k != latest.key and k not in pinned.values()]
            sizes = {k: each.size for k, each in self._kept.items()}
            while idle and sum(sizes.values()) > self._budget:
                key = idle.pop(0)
                del self._kept[key], sizes[key]

    def _load(self, adapter: Adapter, key: Key) -> Loaded:
        assert self._library, "open has asked"
        expert = read(self._library, *adapter, self._decoder)
        before = expert.config.kind in ("prompt", "prefix")
        applied = apply(expert, self._decoder) if before else Applied()
        loaded = Loaded(expert, applied, self._step.prepare(expert), key)
        give_back_pool()
        return loaded
