"""Conversations become the text, and text the tokens, that transformers makes of them; templates stay in a sandbox."""

from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import DataError
from coterie.model.load import BaseModel
from support import reference_tokenizer

ASK = {"role": "user", "content": "Where is my order?"}
ANSWER = {"role": "assistant", "content": "On its way."}
SYSTEM = {"role": "system", "content": "You are polite.\nBe brief."}
CONVERSATIONS = ([ASK], [SYSTEM, ASK], [ASK, ANSWER, ASK], [SYSTEM, ASK, ANSWER], [{**ASK, "content": " {{ 7*7 }} é "}])
TEMPLATES = {
    "Llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
        "{% for message in loop_messages %}{% if loop.index0 == 0 %}{% set content = system + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "Llama 3": (
        "{%- if strftime_now is defined %}\n    {%- set day = 'today' %}\n{%- else %}\n    {%- set day = 'today' %}\n"
        "{%- endif %}\n{{- bos_token }}\n{%- for message in messages %}\n"
        "    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + day }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant' }}\n{%- endif %}\n"
    ),
    "Qwen3": (
        "{%- set ns = namespace(last=messages|length - 1) %}\n{%- for message in messages[::-1] %}\n"
        "    {%- set index = (messages|length - 1) - loop.index0 %}\n    {%- if message.content is string and "
        "not message.content.startswith('<tool') %}\n        {%- set ns.last = index %}\n"
        "    {%- endif %}\n{%- endfor %}\n"
        "{%- for m in messages %}\n    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}\n"
        "{%- endfor %}\n{{- ns.last }}{{- messages | tojson }}"
    ),
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
}


@pytest.fixture(scope="module")
def smol_tokenizer(smol_path: Path) -> transformers.PreTrainedTokenizerBase:
    return reference_tokenizer(smol_path)


@pytest.mark.parametrize("prompt", [True, False])
def test_smollm2_is_asked_as_in_transformers(
    prompt: bool, smol: BaseModel, smol_tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    for messages in CONVERSATIONS:
        wanted = smol_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert smol.chat(messages, prompt) == wanted
        assert smol.encode(wanted) == smol_tokenizer(wanted, add_special_tokens=False).input_ids


@given(text=st.text(max_size=60))
def test_smollm2_reads_and_writes_any_text_as_transformers_does(
    text: str, smol: BaseModel, smol_tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    ids = smol.encode(text)
    assert ids == smol_tokenizer(text, add_special_tokens=False).input_ids
    assert smol.tokenizer.decode(ids, skip_special_tokens=False) == smol_tokenizer.decode(ids)


def test_smollm2_gives_back_the_texts_of_many_scripts_unchanged(smol: BaseModel) -> None:
    """Its vocabulary lacks the bytes of a few unassigned characters; none of those is text that people write."""
    for text in (
        "  two  spaces\n\n\ttab",
        "Grüße, Ελλάδα, мир, नमस्ते, 你好, こんにちは, 안녕",
        "🙂 👩‍👩‍👧 €5",
        "1,234.50",
    ):
        assert smol.tokenizer.decode(smol.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_other_families_give_the_text_that_transformers_gives(
    name: str, tiny: Path, tiny_base: BaseModel
) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(tiny)
    base = replace(tiny_base, template=TEMPLATES[name])
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            wanted = reference.apply_chat_template(
                messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
            )
            assert wanted
            assert base.chat(messages, prompt) == wanted


MARKS = st.sampled_from(
    ["<|im_start|>system\n", "<|im_end|>", "<|", "|>", "im_end", "<s>", "</s>", "<repo_name>", "a", "\n"]
)


@given(said=st.lists(MARKS, max_size=12).map("".join), role=st.sampled_from(["user", "assistant", "system"]))
def test_no_words_of_a_message_become_a_mark(said: str, role: str, smol: BaseModel, tiny_base: BaseModel) -> None:
    """Whoever says them: a forged turn would be obeyed as if the business had said it."""
    for base in (smol, tiny_base):
        special = {i for i, t in base.tokenizer.get_added_tokens_decoder().items() if t.special}

        def marks(content: str) -> list[int]:
            ids = base.encode(base.chat([ASK, {"role": role, "content": content}, ASK]))  # noqa: B023
            return [i for i in ids if i in special]  # noqa: B023

        assert marks(said) == marks("Nothing.")


def test_words_without_a_mark_stay_as_they_are(smol: BaseModel) -> None:
    for text in ("a < b |> c", "<b>bold</b>", "x <- y; <| f |>", ""):
        assert smol.unmarked(text) == text
    assert smol.unmarked("<|im_end|>") == "< |im_end|>"


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ self.__init__.__globals__ }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "range"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{% if %}", "template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_a_template_that_breaks_out_or_breaks_down_is_an_error_of_its_model(
    template: str, word: str, tiny_base: BaseModel
) -> None:
    with pytest.raises(DataError, match=word) as caught:
        replace(tiny_base, template=template).chat([ASK])
    assert "chat template of tiny" in str(caught.value)
