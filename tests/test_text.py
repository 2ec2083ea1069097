"""Tokens become text as they come: nothing lost, no half characters, and nothing that a stop text cuts away."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from coterie.engine.text import TextStream
from support import train_tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: words begin with ▁, rare characters are spelt in bytes, the first space of a text is dropped."""
    spelt = {f"<0x{i:02X}>": i + 1 for i in range(256)}
    letters = {c: 257 + i for i, c in enumerate("▁abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, **spelt, **letters}, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TOKENIZERS = {"bytes": train_tokenizer(), "byte fallback": byte_fallback_tokenizer()}
LETTERS = st.one_of(st.sampled_from("abc é你🙂\n"), st.characters(codec="utf-8", exclude_characters="�"))
WORDS = st.text(LETTERS).filter(lambda text: "<|" not in text)  # special tokens are not text


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=WORDS)
@settings(max_examples=100)
def test_pieces_of_any_text_add_up_to_it_and_never_show_half_a_character(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    stream = TextStream(tokenizer, ())
    pieces = [stream.push(token) for token in tokenizer.encode(text).ids]
    assert "".join(pieces) + stream.flush() == text
    assert not any("�" in piece for piece in pieces)


@given(tokens=st.lists(st.integers(0, TOKENIZERS["bytes"].get_vocab_size() - 1)))
@settings(max_examples=200)
def test_pieces_of_any_tokens_add_up_to_what_the_tokenizer_makes_of_them(tokens: list[int]) -> None:
    """Half characters, impossible bytes and special tokens too, as a model may write them."""
    stream = TextStream(TOKENIZERS["bytes"], ())
    assert "".join(stream.push(t) for t in tokens) + stream.flush() == TOKENIZERS["bytes"].decode(tokens)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=WORDS, data=st.data())
@settings(max_examples=200)
def test_text_ends_before_the_first_stop_text(kind: str, text: str, data: st.DataObject) -> None:
    """Stop texts from anywhere in the text, across its tokens, or not in it at all."""
    tokenizer, stops = TOKENIZERS[kind], []
    for _ in range(data.draw(st.integers(1, 3))):
        at, size = data.draw(st.integers(0, len(text))), data.draw(st.integers(1, 5))
        stops.append(text[at : at + size] or data.draw(WORDS.filter(bool)))
    stream, tokens = TextStream(tokenizer, tuple(stops)), tokenizer.encode(text).ids
    out = so_far = ""
    for taken, token in enumerate(tokens, 1):
        out += stream.push(token)
        whole = tokenizer.decode(tokens[:taken]).rstrip("�")
        so_far = whole if text.startswith(whole) and len(whole) > len(so_far) else so_far
        assert stream.stopped == any(s in so_far for s in stops)
        if stream.stopped:
            break
        waiting = so_far.removeprefix(out)
        assert out + waiting == so_far
        assert not waiting or any(s.startswith(waiting) for s in stops)  # no more is held back than must be
    out += stream.flush()
    found = [so_far.find(s) for s in stops if s in so_far]
    assert out == (so_far[: min(found)] if found else text)
