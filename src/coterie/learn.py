"""An expert from its declaration: made, trained on examples, then on preferences, and written down."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from coterie.config import LEARNING_RATES, ExpertSpec
from coterie.data.encode import TokenSet, encode_all
from coterie.data.read import Example, read_pairs
from coterie.errors import CoterieError, DataError
from coterie.evaluation.calibration import logistic, threshold_for
from coterie.evaluation.metrics import macro_f1, wilson
from coterie.experts import adapter, classifier, full, kinds, lora, prefix, prompt
from coterie.experts.expert import Expert
from coterie.model.load import BaseModel
from coterie.model.save import save_model
from coterie.tuning.decisions import decisions
from coterie.tuning.loop import Outcome, Progress, Training, train
from coterie.tuning.objective import completions, preferences
from coterie.tuning.trunk import Trunk

HELD_OUT_MOST = 500  # rows held out for the loss while training
Say = Callable[[str], None]


def new_expert(spec: ExpertSpec, base: BaseModel) -> Expert:
    """An untrained expert of the declared kind and size. Raises CoterieError where the settings do not fit the base."""
    decoder, seed, first = base.decoder, spec.training.seed, spec.training.first_layer
    if first >= decoder.config.layers:
        raise CoterieError(f"training.first_layer = {first}: the base model has {decoder.config.layers} layers")
    if first and spec.kind not in ("lora", "adapter"):
        raise CoterieError(f"training.first_layer: an expert of kind {spec.kind!r} changes all layers; leave it out")
    if spec.kind == "lora":
        s = spec.lora
        return lora.fresh(
            lora.LoraConfig(s.rank, s.alpha, tuple(s.targets), s.rslora, s.dora, s.dropout, first), decoder, seed
        )
    if spec.kind == "adapter":
        a = spec.adapter
        return adapter.fresh(adapter.BottleneckConfig(a.size, a.placement, a.activation, 1.0, first), decoder, seed)
    if spec.kind == "full":
        return full.fresh(full.FullConfig(), decoder)
    words = base.encode(spec.prompt.start or spec.system or spec.description or "Answer as well as you can.")
    if spec.kind == "prompt":
        return prompt.fresh(prompt.PromptConfig(spec.prompt.tokens), decoder, words)
    return prefix.fresh(prefix.PrefixConfig(spec.prompt.tokens), decoder, words)


def learning_rate(spec: ExpertSpec) -> float:
    """The declared learning rate, or the default of the kind."""
    return spec.training.learning_rate or LEARNING_RATES[spec.kind]


def tune(
    spec: ExpertSpec, base: BaseModel, expert: Expert, data: TokenSet, rows: list[int], held: list[int],
    options: Sequence[str], work: Path, trunks: Path, progress: Callable[[Progress], None], say: Say,
) -> Outcome:  # fmt: skip
    """Train `expert` on `rows` of `data`, from the cached trunk where it leaves the lower layers alone.

    Answers that are one of `options` are learned as decisions between these, unless they are to be learned whole.
    """
    how = spec.training
    decided = decisions(base, data, options) if options and not how.whole_answers else None
    data = decided.data if decided else data
    trunk = Trunk(base.decoder, data, how.first_layer, trunks, tell=say) if how.first_layer else None
    settings = Training(how.epochs, how.batch, learning_rate(spec), how.warmup, how.weight_decay, seed=how.seed)
    return train(
        base.decoder, expert, completions(base.decoder, data, trunk, decided), data.lengths(), rows, held, settings,
        work / "checkpoint.safetensors", progress, say,
    )  # fmt: skip


def prefer(
    spec: ExpertSpec, base: BaseModel, expert: Expert, files: list[Path], work: Path,
    progress: Callable[[Progress], None], say: Say, masked: Callable[[Example], Example],
) -> dict[str, Any]:  # fmt: skip
    """Train `expert` further on pairs of a better and a worse answer, each `masked` first; the held-out loss before and
    after."""
    how, seed = spec.preference, spec.training.seed
    columns: dict[str, str] = dict(spec.columns.items())
    examples = (masked(e) for file in files for e in read_pairs(file, columns, spec.system))
    longest = min(spec.training.max_tokens, base.decoder.config.context)
    data, long_rows = encode_all(examples, base, work / "pairs", longest, together=2)
    if long_rows:
        first = next(iter(long_rows.values()))
        say(f"{len(long_rows) // 2} pairs over {longest} tokens were left out, the first: {first}")
    count = len(data) // 2
    if count < 2:
        raise DataError(f"{', '.join(map(str, files))}: {count} pair(s) to learn from; at least 2 are needed")
    order = np.random.default_rng(seed).permutation(count).tolist()
    held = order[: max(1, min(HELD_OUT_MOST, round(count * spec.training.held_out)))]
    rows = order[len(held) :]
    reference = Expert(expert.config, {k: v.clone() for k, v in expert.weights.items()})
    settings = Training(how.epochs, spec.training.batch, how.learning_rate, seed=seed)
    outcome = train(
        base.decoder, expert, preferences(base.decoder, data, reference, how.beta),
        data.lengths().reshape(-1, 2).sum(axis=1), rows, held, settings, work / "preference.safetensors", progress, say,
        kinds.apply(reference, base.decoder),
    )  # fmt: skip
    return {"preference_pairs": len(rows), "preference_loss_before": round(outcome.held_out[0], 4),
            "preference_loss": round(outcome.held_out[-1], 4)}  # fmt: skip


def classify(
    spec: ExpertSpec, base: BaseModel, business: str, examples: list[Example],
    read: classifier.Read = lambda _d, _t: None,
) -> tuple[classifier.Classifier, dict[str, Any]]:  # fmt: skip
    """A classifier of the examples, with its confidence and its threshold; and how it did on these rows, each left out
    in turn, which is also what both were set on. Raises DataError for fewer than two labels."""
    texts, labels = [e.question for e in examples], [e.completion for e in examples]
    found, left_out, chosen = classifier.learn(
        base, business, texts, labels, [e.where for e in examples], spec.training.seed, read
    )
    lead, said = classifier.lead(left_out), [found.names[i] for i in left_out.argmax(axis=1)]
    wanted = [labels[i] for i in chosen]
    right = np.array([s == w for s, w in zip(said, wanted, strict=True)])
    ties = max(1, len(right) // 100)  # between two labels: they keep few rows, all of them right, from being certain
    scale = max(float(lead.std()), 1e-6)
    (slope,), offset = logistic(np.append(lead / scale, [0.0] * ties)[:, None], np.append(right, [0.0] * ties))
    found = found.calibrated(float(slope) / scale, float(offset), 1.0, spec.error)
    confidence = found.confidence(lead)
    found = replace(found, threshold=threshold_for(confidence.tolist(), right.tolist(), spec.error))
    sent = confidence >= found.threshold
    figures = {
        "rows": len(said), "accuracy": wilson(int(right.sum()), len(right)).json(),
        "macro_f1": round(macro_f1(said, wanted), 5), "handled": round(float(sent.mean()), 5),
        "wrong": round(float((~right[sent]).mean()), 5) if sent.any() else 0.0,
    }  # fmt: skip
    return found, figures


def save_expert(base: BaseModel, expert: Expert, folder: Path, name: str) -> None:
    """Write an expert's weights into the folder of its version; a `full` one as a model of its own, in model/."""
    if expert.config.kind == "full":
        decoder = full.apply(expert, base.decoder).decoder
        assert decoder is not None
        save_model(replace(base, decoder=decoder), folder / "model")
    else:
        kinds.save(expert, folder, name, base.decoder.config)
