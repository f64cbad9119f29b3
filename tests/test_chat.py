"""Tokens against Hugging Face's own apply_chat_template, for real template styles and both common tokenizer builds."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_tokenizers as tiny
from srppo.config import DataConfig
from srppo.data.chat import ChatFormat
from srppo.data.messages import Demonstration, Unusable
from srppo.data.templates import PLAIN_TEMPLATE
from srppo.errors import ConfigError

SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "hello"}
THERE = {"role": "assistant", "content": "hello there"}
ASK = {"role": "user", "content": "What is the capital of France?"}
PARIS = {"role": "assistant", "content": "The capital is Paris — naïve?\n  two  spaces"}

STYLES = {  # name -> tokenizer, its end-of-turn tokens, whether the template has a system role
    "chatml": (tiny.chatml, ["<|im_end|>", "<|endoftext|>"], True),
    "qwen3": (lambda: tiny.chatml(tiny.trl_template("qwen3")), ["<|im_end|>"], True),
    "llama3": (tiny.llama3, ["<|end_of_text|>", "<|eot_id|>"], True),
    "gemma": (tiny.gemma, ["<eos>", "<end_of_turn>"], False),
    "mistral": (tiny.llama2, ["</s>"], False),
}


def chat_of(style: str, **options: str) -> ChatFormat:
    build, ends, _ = STYLES[style]
    tokenizer = build()
    return ChatFormat(tokenizer, tiny.ids_of(tokenizer, *ends), **options)


def hf_ids(chat: ChatFormat, messages: list[dict[str, str]], *, ask: bool) -> list[int]:
    return chat.tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)


@pytest.mark.parametrize("style", STYLES)
def test_prompt_tokens_are_hugging_faces(style: str) -> None:
    chat = chat_of(style)
    conversations = [[ASK], [HELLO, THERE, ASK]] + ([[SYSTEM, ASK], [SYSTEM, HELLO, THERE, ASK]] if STYLES[style][2] else [])
    for messages in conversations:
        prompt = chat.render_prompt(messages)
        assert prompt.ids == hf_ids(chat, messages, ask=True)
        assert prompt.text == chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("style", STYLES)
def test_demonstration_is_hugging_faces_up_to_its_end_token(style: str) -> None:
    chat = chat_of(style)
    messages = [HELLO, THERE, ASK]
    encoded = chat.encode(Demonstration(messages, [PARIS]))
    full = hf_ids(chat, [*messages, PARIS], ask=False)
    last_end = max(n for n, i in enumerate(full) if i in chat.eos_ids)
    assert encoded.ids == full[: last_end + 1]  # a line break the template prints after it is gone
    assert encoded.ids[: len(encoded.prompt.ids)] == chat.render_prompt(messages).ids
    assert encoded.target_mask == [0] * len(encoded.prompt.ids) + [1] * (len(encoded.ids) - len(encoded.prompt.ids))
    assert not encoded.apart
    learned = [i for i, m in zip(encoded.ids, encoded.target_mask) if m]
    assert sum(i in chat.eos_ids for i in learned) == 1 and learned[-1] in chat.eos_ids
    answer = chat.response_text(learned)
    assert answer.strip().removeprefix("<think>\n\n</think>\n\n") == PARIS["content"]


@pytest.mark.parametrize("style", ["llama3", "gemma", "mistral"])
def test_bos_comes_once(style: str) -> None:
    chat = chat_of(style)
    bos = chat.tokenizer.bos_token_id
    assert chat.encode(Demonstration([ASK], [PARIS])).ids.count(bos) == 1
    assert chat.render_prompt("What is").ids == chat.tokenizer("What is")["input_ids"]
    assert chat.render_prompt("What is").ids.count(bos) == 1
    assert chat.render_prompt(f"{chat.tokenizer.bos_token}What is").ids.count(bos) == 1
    plain = chat_of(style, chat_template="plain")
    assert plain.render_prompt([ASK]).ids[0] == bos and plain.render_prompt([ASK]).ids.count(bos) == 1


@pytest.mark.parametrize("style", ["chatml", "llama3", "mistral"])
def test_raw_strings_are_prompt_plus_completion_plus_eos(style: str) -> None:
    """TRL's standard format (trl/trainer/sft_trainer.py tokenises prompt and prompt + completion + eos_token)."""
    chat = chat_of(style)
    tokenizer = chat.tokenizer
    encoded = chat.encode(Demonstration("Q: yes or no?\nA:", " yes yes"))
    assert encoded.ids == tokenizer("Q: yes or no?\nA: yes yes" + tokenizer.eos_token)["input_ids"]
    prompt = tokenizer("Q: yes or no?\nA:")["input_ids"]
    assert encoded.prompt.ids == prompt and encoded.target_mask == [0] * len(prompt) + [1] * (len(encoded.ids) - len(prompt))
    already = chat.encode(Demonstration("Q: yes or no?\nA:", " yes yes" + tokenizer.eos_token))
    assert already.ids == encoded.ids


def test_text_is_learned_whole_but_for_what_nothing_predicts() -> None:
    for style, given in (("llama3", 1), ("chatml", 1)):  # the BOS; without one the first token
        chat = chat_of(style)
        encoded = chat.encode(Demonstration(None, "hello there"))
        assert encoded.ids == [*chat.tokenizer("hello there")["input_ids"], chat.tokenizer.eos_token_id]
        assert encoded.target_mask == [0] * given + [1] * (len(encoded.ids) - given)
        assert encoded.prompt.ids == []


def test_a_merge_across_the_border_is_undone() -> None:
    chat = chat_of("chatml")
    joint = chat.tokenizer("Q: yes")["input_ids"]
    prompt = chat.tokenizer("Q: ")["input_ids"]
    assert joint[: len(prompt)] != prompt  # " yes" is one token: this tokenizer does merge here
    encoded = chat.encode(Demonstration("Q: ", "yes"))
    assert encoded.apart
    assert encoded.ids == prompt + chat.tokenizer("yes")["input_ids"] + [chat.tokenizer.eos_token_id]
    assert chat.tokenizer.decode(encoded.ids, skip_special_tokens=True) == "Q: yes"


def test_a_merge_across_the_border_of_a_template_is_undone() -> None:
    tokenizer = tiny.llama3(gpt2_words=True)  # the prompt's last "\n\n" is one token; before an answer Hugging Face sees two
    chat = ChatFormat(tokenizer, tiny.ids_of(tokenizer, "<|eot_id|>"))
    assert hf_ids(chat, [HELLO, THERE], ask=False)[: len(chat.render_prompt([HELLO]).ids)] != chat.render_prompt([HELLO]).ids
    encoded = chat.encode(Demonstration([HELLO], [THERE]))
    assert encoded.apart and encoded.prompt.ids == hf_ids(chat, [HELLO], ask=True)
    assert encoded.ids == encoded.prompt.ids + tokenizer("hello there<|eot_id|>", add_special_tokens=False)["input_ids"]


def test_string_pairs_as_chat_and_system_prompt() -> None:
    chat = chat_of("chatml", string_prompts="chat", system_prompt="Be brief.")
    want = chat_of("chatml").encode(Demonstration([SYSTEM, HELLO], [THERE]))
    assert chat.encode(Demonstration("hello", "hello there")) == want
    assert chat.render_prompt("hello") == want.prompt
    own = {"role": "system", "content": "Mine."}
    assert "Be brief." not in chat.render_prompt([own, HELLO]).text


CONVERSATION = [HELLO, THERE, ASK, PARIS, HELLO]


@pytest.mark.parametrize("style, name", [("llama3", "llama3"), ("gemma", "gemma"), ("chatml", "qwen3_instruct_2507")])
def test_assistant_turns_by_growth_equal_the_generation_marks(style: str, name: str) -> None:
    """TRL's training templates render the same text with {% generation %} marks; Hugging Face's mask of them is the reference."""
    build, ends, _ = STYLES[style]
    by_growth = ChatFormat(tokenizer := build(tiny.trl_template(name)), tiny.ids_of(tokenizer, *ends), loss_on="assistant")
    marked_tokenizer = build(tiny.trl_template(f"{name}_training"))
    by_marks = ChatFormat(marked_tokenizer, tiny.ids_of(marked_tokenizer, *ends), loss_on="assistant")
    encoded = by_growth.encode(Demonstration(CONVERSATION, [THERE]))
    assert encoded == by_marks.encode(Demonstration(CONVERSATION, [THERE]))
    out = marked_tokenizer.apply_chat_template([*CONVERSATION, THERE], return_dict=True, return_assistant_tokens_mask=True)
    # HF marks what stands between the tags; with a line break after the end token there (Gemma, Qwen), ours leaves that out.
    after_end = {n + 1 for n, i in enumerate(out["input_ids"]) if i in by_growth.eos_ids}
    want = [0 if n in after_end else m for n, m in enumerate(out["assistant_masks"])][: len(encoded.ids)]
    assert encoded.ids == out["input_ids"][: len(encoded.ids)]
    assert encoded.target_mask == want
    learned = [by_growth.tokenizer.convert_ids_to_tokens(i) for i, m in zip(encoded.ids, encoded.target_mask) if m]
    end = by_growth.tokenizer.convert_ids_to_tokens(encoded.ids[-1])
    assert learned.count(end) == 3  # each of the three assistant turns is taught to end


def test_marks_that_leave_the_end_token_out_are_extended_by_it() -> None:
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tiny.chatml(marked)
    encoded = ChatFormat(tokenizer, [tokenizer.eos_token_id], loss_on="assistant").encode(Demonstration([HELLO, THERE, ASK], [THERE]))
    learned = tokenizer.decode([i for i, m in zip(encoded.ids, encoded.target_mask) if m])
    assert learned == "hello there<|im_end|>hello there<|im_end|>"


def test_loss_on_response_learns_the_last_turn_only() -> None:
    chat = chat_of("llama3")
    encoded = chat.encode(Demonstration(CONVERSATION, [THERE]))
    assert sum(encoded.target_mask) == len(chat.tokenizer("hello there", add_special_tokens=False)["input_ids"]) + 1


def test_templates_that_rewrite_history_are_refused_for_assistant_loss_only() -> None:
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nParis"}  # Qwen 3 drops earlier thoughts
    with pytest.raises(Unusable, match="rewrites earlier turns"):
        chat_of("qwen3", loss_on="assistant").encode(Demonstration([ASK, thought, HELLO], [THERE]))
    chat_of("qwen3").encode(Demonstration([ASK, thought, HELLO], [THERE]))


def test_a_thought_in_the_answer_is_learned() -> None:
    chat = chat_of("qwen3")
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nParis"}
    encoded = chat.encode(Demonstration([ASK], [thought]))
    response = encoded.ids[len(encoded.prompt.ids) :]
    assert chat.tokenizer.decode(response) == "<think>\nhm\n</think>\n\nParis<|im_end|>"


def test_a_generation_prompt_that_answers_do_not_show() -> None:
    tokenizer = tiny.deepseek()
    chat = ChatFormat(tokenizer, [tokenizer.eos_token_id])
    encoded = chat.encode(Demonstration([ASK], [THERE]))
    assert encoded.apart and encoded.prompt.ids == hf_ids(chat, [ASK], ask=True)
    assert tokenizer.decode(encoded.ids[len(encoded.prompt.ids) :]) == "hello there<｜end▁of▁sentence｜>"
    with pytest.raises(Unusable, match="does not show the answer"):  # it would cut the thought away and teach the rest
        chat.encode(Demonstration([ASK], [{"role": "assistant", "content": "hm</think>Paris"}]))


def test_end_of_turn_that_is_no_eos_of_the_model() -> None:
    tokenizer = tiny.chatml()
    chat = ChatFormat(tokenizer, tiny.ids_of(tokenizer, "<|endoftext|>"))
    encoded = chat.encode(Demonstration([ASK], [THERE]))
    assert tokenizer.decode(encoded.ids[len(encoded.prompt.ids) :]) == "hello there<|im_end|><|endoftext|>"
    assert chat.eos_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_plain_template() -> None:
    tokenizer = tiny.chatml()
    tokenizer.chat_template = None
    chat = ChatFormat(tokenizer, [tokenizer.eos_token_id], loss_on="assistant")
    assert chat.template_name == "plain"
    assert chat.render_prompt([SYSTEM, HELLO, THERE, ASK]).text == (
        "System: Be brief.\n\nUser: hello\n\nAssistant: hello there<|im_end|>\n\nUser: What is the capital of France?\n\nAssistant:"
    )
    encoded = chat.encode(Demonstration([HELLO, THERE, ASK], [THERE]))
    learned = tokenizer.decode([i for i, m in zip(encoded.ids, encoded.target_mask) if m])
    assert learned == " hello there<|im_end|> hello there<|im_end|>"
    assert not encoded.apart
    tokenizer.chat_template = chat.template  # as saved with the model: it renders the same for whoever loads it
    assert hf_ids(chat, [HELLO], ask=True) == chat.render_prompt([HELLO]).ids


def test_the_plain_template_is_the_documented_one() -> None:
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    assert PLAIN_TEMPLATE.strip() in text


def test_plain_template_with_an_eos_only_the_model_names() -> None:
    tokenizer = tiny.chatml()
    tokenizer.chat_template = tokenizer.eos_token = None
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    chat = ChatFormat(tokenizer, [end])
    assert chat.render_prompt([HELLO, THERE, ASK]).ids.count(end) == 1
    encoded = chat.encode(Demonstration([HELLO], [THERE]))
    assert encoded.ids[-1] == end and encoded.ids.count(end) == 1


@pytest.mark.parametrize(
    "demonstration, reason",
    [
        (Demonstration([ASK], [{"role": "assistant", "content": " \n"}]), "empty response"),
        (Demonstration("Q:", "  "), "empty response"),
        (Demonstration(None, ""), "empty text"),
        (Demonstration("", "yes"), "empty prompt"),
        (Demonstration([], [THERE]), "empty prompt"),
        (Demonstration([ASK], [HELLO]), "does not end with an assistant"),
        (Demonstration("Q:", "yes<|im_end|>no"), "end-of-sequence token inside"),
        (Demonstration([ASK], [{"role": "assistant", "content": "a<|im_end|>b"}]), "end-of-sequence token inside"),
    ],
)
def test_unusable(demonstration: Demonstration, reason: str) -> None:
    chat = chat_of("chatml")
    with pytest.raises(Unusable, match=reason):
        chat.encode(demonstration)


def test_the_templates_own_refusals_are_told() -> None:
    with pytest.raises(Unusable, match="System role not supported"):
        chat_of("gemma", system_prompt="Be brief.").render_prompt([ASK])
    tokenizer = tiny.chatml("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ConfigError, match="does what no template may, and was stopped"):  # by transformers' sandbox
        ChatFormat(tokenizer, [1]).render_prompt([ASK])


def test_a_template_that_fails_is_named() -> None:
    with pytest.raises(ConfigError, match="the chat template is broken: TypeError: can only concatenate") as caught:
        ChatFormat(tiny.chatml("{{ messages[0].content + 1 }}"), [1]).render_prompt([ASK])
    assert isinstance(caught.value.__cause__, TypeError)


def test_template_files(tmp_path: Path) -> None:
    path = tmp_path / "my.jinja"
    path.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}", encoding="utf-8")
    tokenizer = tiny.chatml()
    assert ChatFormat.from_config(tokenizer, [1], DataConfig(chat_template=str(path))).render_prompt([HELLO]).text == "<hello>"
    path.write_text("{% for m in messages %}\n{{ m.content }", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid Jinja, line 2"):
        ChatFormat(tokenizer, [1], chat_template=str(path)).render_prompt([HELLO])
    with pytest.raises(ConfigError, match="neither auto, tokenizer nor plain"):
        ChatFormat(tokenizer, [1], chat_template=str(tmp_path / "none.jinja"))
    with pytest.raises(ConfigError, match="names an end-of-sequence token"):
        ChatFormat(tokenizer, [])
