"""The experts that the engine has in memory: read when first asked for, the longest idle dropped for room."""

import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from coterie.engine.request import Adapter
from coterie.engine.step import Prepared, Step
from coterie.errors import CoterieError, UnknownExpert
from coterie.experts.expert import Applied, Expert
from coterie.experts.kinds import apply, read
from coterie.experts.library import Library
from coterie.experts.lora import sites_of
from coterie.experts.mixture import Laid, lay
from coterie.model.decoder import Decoder
from coterie.model.threads import give_back_pool


@dataclass(eq=False)
class Loaded:
    """An expert in memory. `applied` is empty but for soft prompts and prefixes, which come before the prompt."""

    expert: Expert
    applied: Applied
    laid: Laid
    prepared: Prepared | None  # for the step in C, where that runs
    key: tuple[Path, int]  # tells this version's weights from all others: its folder, and when that was made

    @property
    def first_layer(self) -> int:
        """The lowest layer that it changes."""
        return getattr(self.expert.config, "first_layer", 0)

    @property
    def ahead(self) -> int:
        """Virtual tokens before the prompt."""
        soft, prefix = self.applied.soft, self.applied.prefix
        return len(soft) if soft is not None else prefix.shape[2] if prefix is not None else 0

    @cached_property
    def size(self) -> int:
        """Bytes in memory: the weights in float32, and in the base's precision for each way of computing."""
        weights = sum(w.nbytes for w in self.expert.weights.values())
        return weights + weights // 2 * (1 + (self.prepared is not None))


class Shelf:
    """Experts of a library in memory, up to `budget` bytes; those `pinned` by name never leave it."""

    def __init__(
        self, library: Library | None, decoder: Decoder, step: Step | None, budget: int, pinned: frozenset[str]
    ) -> None:  # fmt: skip
        self._library, self._decoder, self._step = library, decoder, step
        self._budget, self._pinned = budget, pinned
        self._kept: dict[tuple[Path, int], Loaded] = {}  # the latest used last
        self._lock = threading.Lock()  # of what is kept; held for moments
        self._reading = threading.Lock()  # one expert is read at a time, while requests to those in memory go on

    def open(self, adapter: Adapter) -> Loaded:
        """A version's weights; read anew where an expert was removed and its numbers given again.

        Raises UnknownExpert, ModelError, and CoterieError where one expert alone is beyond the budget.
        """
        if self._library is None:
            raise UnknownExpert(f"there is no expert {adapter[0]!r}: this engine serves the base model only")
        folder = self._library.folder(*adapter)
        key = folder, folder.stat().st_mtime_ns
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

    def _latest(self, key: tuple[Path, int]) -> Loaded | None:
        """What is kept under `key`, from now on the latest used."""
        with self._lock:
            loaded = self._kept.pop(key, None)
            if loaded is not None:
                self._kept[key] = loaded
            return loaded

    def _keep(self, loaded: Loaded) -> None:
        with self._lock:
            self._kept[loaded.key] = loaded
            # Those that answer at the moment stay in memory until they end, whatever leaves the shelf.
            idle = [k for k in self._kept if k != loaded.key and k[0].parent.name not in self._pinned]
            while idle and sum(each.size for each in self._kept.values()) > self._budget:
                del self._kept[idle.pop(0)]

    def _load(self, adapter: Adapter, key: tuple[Path, int]) -> Loaded:
        assert self._library, "open has asked"
        expert = read(self._library, *adapter, self._decoder)
        before = expert.config.kind in ("prompt", "prefix")
        sites = sites_of(expert, self._decoder)  # once for both ways: norms of DoRA read the base's matrices
        prepared = self._step.prepare(expert, sites) if self._step else None
        applied = apply(expert, self._decoder) if before else Applied()
        loaded = Loaded(expert, applied, lay(expert, self._decoder, sites), prepared, key)
        give_back_pool()
        return loaded
