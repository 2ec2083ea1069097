"""An expert's training rows made ready on disk, read once, without holding them all in memory."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from coterie.data.encode import Chat, TokenSet, encode_all
from coterie.data.read import Example
from coterie.data.split import mark_leaks, normalise
from coterie.errors import DataError

CHOICES_MOST = 10_000


@dataclass(frozen=True)
class Prepared:
    """Encoded rows, and what must be known of each: `numbers` and `keys` (rows)."""

    tokens: TokenSet
    numbers: list[int]  # the place of each row among the examples that were read
    keys: list[bytes]  # equal where two rows ask the same
    choices: tuple[str, ...]
    read: int
    leaked: int
    too_long: list[str]


def prepare(
    examples: Iterable[Example], tests: Sequence[str], model: Chat, folder: Path, longest: int, choices: bool
) -> Prepared:  # fmt: skip
    """Encode the examples into `folder`, without those that repeat a prompt of `tests` or have over `longest` tokens.

    Raises DataError where they have too many different completions for `choices`, StorageError for a full disk.
    """
    numbers, keys, answers, leaked = list[int](), list[bytes](), set[str](), 0

    def learnable() -> Iterator[Example]:
        nonlocal leaked
        for number, (example, repeats) in enumerate(mark_leaks(examples, tests)):
            if repeats:
                leaked += 1
                continue
            numbers.append(number)
            keys.append(hashlib.blake2b(normalise(example.asked).encode(), digest_size=16).digest())
            if choices:
                answers.add(example.completion)
                if len(answers) > CHOICES_MOST:
                    raise DataError(f"{example.where}: more than {CHOICES_MOST} different completions; that is too "
                                    "many for choices = true")  # fmt: skip
            yield example

    tokens, skipped = encode_all(learnable(), model, folder, longest)
    read = len(numbers) + leaked
    kept = [i for i in range(len(numbers)) if i not in skipped]
    return Prepared(
        tokens, [numbers[i] for i in kept], [keys[i] for i in kept], tuple(sorted(answers)), read, leaked,
        list(skipped.values()),
    )  # fmt: skip
