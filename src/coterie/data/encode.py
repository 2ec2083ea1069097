"""Examples as tokens on disk: memory-mapped, with a mark on the tokens to learn."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coterie.data.read import Example, Message
from coterie.errors import DataError, StorageError


class Chat(Protocol):
    """The part of a base model that turns conversations into tokens."""

    eos_token: str

    def chat(self, messages: list[Message], prompt: bool = True) -> str: ...
    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class TokenSet:
    """Encoded examples: `tokens` and `learn` (total), `ends` (examples + 1); row i is ends[i]..ends[i+1]."""

    tokens: NDArray[np.int32]
    learn: NDArray[np.bool_]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends) - 1

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, (examples)."""
        return np.diff(self.ends)

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens and learn marks of row i."""
        span = slice(self.ends[i], self.ends[i + 1])
        return self.tokens[span], self.learn[span]


def encode(example: Example, model: Chat) -> tuple[list[int], list[bool]]:
    """Tokens of the conversation, and which of them are the assistant's (end mark included).

    Question and answer are encoded apart, as they are when the model answers. Raises DataError, naming the row,
    where the model's chat template cannot take these messages.
    """
    messages = list(example.messages)
    ids: list[int] = []
    learn: list[bool] = []
    done = 0  # characters of the conversation already encoded
    try:
        whole = model.chat(messages, prompt=False)
        for n, message in enumerate(messages, 1):
            if message["role"] != "assistant":
                continue
            before = model.chat(messages[: n - 1], prompt=True)
            after = whole if n == len(messages) else model.chat(messages[:n], prompt=False)
            if not (len(before) >= done and whole.startswith(before) and whole.startswith(after)):
                if n < len(messages):
                    continue  # a template that writes earlier answers in another way: they are context, not learned
                raise DataError("the model's chat template asks in another way than it writes the answered question")
            close = after.rfind(model.eos_token, len(before)) if model.eos_token else -1
            stop = close + len(model.eos_token) if close >= 0 else len(after)
            for begin, end, mark in ((done, len(before), False), (len(before), stop, True)):
                piece = model.encode(whole[begin:end])
                ids += piece
                learn += [mark] * len(piece)
            done = stop
    except DataError as error:
        raise DataError(f"{example.where}: {error}") from error
    return ids, learn


def encode_all(
    examples: Iterable[Example], model: Chat, folder: Path, longest: int, together: int = 1
) -> tuple[TokenSet, dict[int, str]]:
    """Encode `examples` into files in `folder`; those over `longest` tokens are left out.

    `together`: so many examples belong together (2 for preferences), and are left out together.
    The second says which these are: their number among the examples, and where they stand. Raises StorageError
    where the disk is full.
    """
    ends, skipped = [0], dict[int, str]()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "tokens.bin").open("wb") as tokens, (folder / "learn.bin").open("wb") as marks:
            source, number = iter(examples), 0
            while group := list(islice(source, together)):
                encoded = [encode(example, model) for example in group]
                size = max(len(ids) for ids, _ in encoded)
                if size > longest:
                    skipped |= {number + i: f"{e.where} ({size} tokens)" for i, e in enumerate(group)}
                    encoded = []
                for ids, learn in encoded:
                    tokens.write(np.array(ids, dtype=np.int32).tobytes())
                    marks.write(np.array(learn, dtype=np.bool_).tobytes())
                    ends.append(ends[-1] + len(ids))
                number += len(group)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from error
    if ends == [0]:
        return TokenSet(np.zeros(0, np.int32), np.zeros(0, np.bool_), np.array(ends)), skipped
    return TokenSet(
        np.memmap(folder / "tokens.bin", np.int32, "r"), np.memmap(folder / "learn.bin", np.bool_, "r"), np.array(ends)
    ), skipped


def batches(lengths: NDArray[np.int64], size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """One epoch of row numbers in batches of `size`, in an order fixed by `seed`.

    Rows of like length share a batch (sorted within shuffled chunks of 32 batches), so attention, the one place
    that pads, pads little; the batches themselves come shuffled.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    out: list[NDArray[np.int64]] = []
    for chunk in np.array_split(order, max(1, round(len(order) / (size * 32)))):
        ranked = chunk[np.argsort(lengths[chunk], kind="stable")]
        out += [ranked[i : i + size] for i in range(0, len(ranked), size)]
    for i in rng.permutation(len(out)):
        yield out[i]
