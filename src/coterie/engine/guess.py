"""Guess the tokens that follow by looking them up in what was read and written already (Saxena 2023, prompt lookup).

An answer that quotes its evidence, or repeats itself, is guessed well; the engine checks every guess against the
model's own choice, so a wrong one costs a row of one step and changes nothing.
"""

MATCH = 3  # tokens at the end that must have been seen before
BACK = 1024  # tokens that are looked through


def continuation(tokens: list[int], most: int) -> list[int]:
    """At most `most` tokens that followed when the present end of `tokens` was there last; none where it was not."""
    end, recent = tokens[-MATCH:], tokens[-BACK:]
    for at in range(len(recent) - MATCH - 1, -1, -1):
        if recent[at + MATCH - 1] == end[-1] and recent[at : at + MATCH] == end:
            return recent[at + MATCH : at + MATCH + most]
    return []
