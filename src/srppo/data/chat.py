"""From conversations and strings to tokens: prompts as rollouts see them, demonstrations that start with exactly those tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from srppo.config import DataConfig
from srppo.data.assistant_mask import earlier_answers
from srppo.data.messages import Demonstration, Message, Unusable
from srppo.data.templates import choose_template, render
from srppo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for an answer while we look where a template puts it. Private-use characters: no data and no template holds them.
MARKER = "\ue0f1answer\ue0f2"


class RenderedPrompt(NamedTuple):
    text: str
    ids: list[int]
    messages: list[Message] | None = None  # as rendered, system message included; None: a plain text


class Encoded(NamedTuple):
    """A tokenised demonstration, not yet cut to a length."""

    ids: list[int]  # prompt, response, end token
    target_mask: list[int]  # 1 on learned tokens; never on the first, which nothing predicts
    prompt: RenderedPrompt  # ids[:len(prompt.ids)] == prompt.ids; empty for {"text"}
    apart: bool  # prompt and response were tokenised apart


class ChatFormat:
    """How a run turns data into tokens. One object for all roles, so that base, SFT and policy read the same ids.

    tokenizer: a Hugging Face tokenizer. eos_ids: every id that ends a response in rollouts, at least one. The rest as in
    DataConfig. Raises ConfigError for an unreadable template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        *,
        chat_template: str = "auto",
        system_prompt: str | None = None,
        string_prompts: str = "raw",
        loss_on: str = "response",
    ):
        if not eos_ids:
            raise ConfigError(
                "neither model nor tokenizer names an end-of-sequence token, so no response could end; set the tokenizer's eos_token"
            )
        self.tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        own = tokenizer.eos_token_id
        self.eos_id: int = own if own in self.eos_ids else self.eos_ids[0]
        self.system_prompt, self.string_prompts, self.loss_on = system_prompt, string_prompts, loss_on
        self._prefix = _default_prefix(tokenizer)
        bos = str(tokenizer.decode(self._prefix))
        self.template_name, self.template = choose_template(tokenizer, chat_template, bos)
        # Tokens a template may print that the tokenizer itself does not name (the model's configuration did).
        given = {"eos_token": tokenizer.convert_ids_to_tokens(self.eos_id), "bos_token": bos}
        self.template_tokens: dict[str, Any] = {k: v for k, v in given.items() if k not in tokenizer.special_tokens_map}
        self._ends_of_tail: dict[str, int] = {}

    @classmethod
    def from_config(cls, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], data: DataConfig) -> ChatFormat:
        return cls(
            tokenizer,
            eos_ids,
            chat_template=data.chat_template,
            system_prompt=data.system_prompt,
            string_prompts=data.string_prompts,
            loss_on=data.loss_on,
        )

    def render_prompt(self, prompt: str | Sequence[Message]) -> RenderedPrompt:
        """A prompt as a rollout starts from it.

        Messages: the template with its generation prompt, the ids equal to
        `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`. A string: itself, with the tokenizer's BOS once (or a
        user message, with string_prompts "chat"). Raises Unusable for an empty prompt or one the template refuses.
        """
        messages = self._conversation(prompt, "user")
        if isinstance(messages, str):
            if not messages.strip():
                raise Unusable("empty prompt")
            ids = self._raw_ids(messages)
            if not ids:  # all of its characters unknown to a tokenizer that drops those
                raise Unusable("empty prompt")
            return RenderedPrompt(messages, ids)
        if not messages:
            raise Unusable("empty prompt")
        messages = self._with_system(messages)
        text = self.render(messages, generation_prompt=True)
        return RenderedPrompt(text, self._ids(text), messages)

    def encode(self, demonstration: Demonstration) -> Encoded:
        """A demonstration as ids and target mask. Its ids start with those of render_prompt and end with an EOS id.

        Raises Unusable: empty prompt or response, an end token inside the response, a conversation the template refuses.
        """
        if demonstration.prompt is None:
            assert isinstance(demonstration.completion, str)
            return self._encode_raw(None, demonstration.completion)
        prompt = self._conversation(demonstration.prompt, "user")
        completion = self._conversation(demonstration.completion, "assistant")
        if isinstance(prompt, str) or isinstance(completion, str):
            assert isinstance(prompt, str) and isinstance(completion, str)
            return self._encode_raw(prompt, completion)
        return self._encode_chat([*prompt, *completion])

    def response_text(self, ids: Sequence[int]) -> str:
        """A response as people and scorers read it: without its end token and other special tokens."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """Messages as the template's text, as they are (no system prompt is put before them)."""
        return render(self.tokenizer, self.template, messages, generation_prompt=generation_prompt, tokens=self.template_tokens)

    def _conversation(self, value: str | Sequence[Message], role: str) -> str | list[Message]:
        if isinstance(value, str):
            return value if self.string_prompts == "raw" else [{"role": role, "content": value}]
        return list(value)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self.system_prompt is None or any(m["role"] in ("system", "developer") for m in messages):
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def _ids(self, text: str) -> list[int]:
        """Text that brings its own special tokens: a template's BOS must not be followed by the tokenizer's."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _raw_ids(self, text: str) -> list[int]:
        """Plain text, with the tokenizer's BOS unless the text starts with it already."""
        ids = self._ids(text)
        return ids if ids[: len(self._prefix)] == self._prefix else self._prefix + ids

    def _encode_raw(self, prompt: str | None, completion: str) -> Encoded:
        """TRL's standard format: prompt + completion + EOS. No prompt: {"text"}, learned whole."""
        if not completion.strip():
            raise Unusable("empty text" if prompt is None else "empty response")
        rendered = RenderedPrompt("", []) if prompt is None else self.render_prompt(prompt)
        ids, apart = self._joined(rendered.ids, self._raw_ids(rendered.text + completion), completion)
        response = ids[len(rendered.ids) :]
        given = max(1, len(self._prefix)) if prompt is None else 0  # of a mere text the BOS, or else the first token, is given
        if len(response) <= given and all(i in self.eos_ids for i in response):
            raise Unusable("empty text" if prompt is None else "empty response")
        if response[-1] not in self.eos_ids:
            response.append(self.eos_id)
        if any(i in self.eos_ids for i in response[given:-1]):
            raise Unusable("an end-of-sequence token inside the response")
        mask = [0] * (len(rendered.ids) + given) + [1] * (len(response) - given)
        return Encoded(rendered.ids + response, mask, rendered, apart)

    def _encode_chat(self, messages: list[Message]) -> Encoded:
        if not messages or messages[-1]["role"] != "assistant":
            raise Unusable("the conversation does not end with an assistant message")
        if not messages[-1]["content"].strip():
            raise Unusable("empty response")
        prompt = self.render_prompt(messages[:-1])
        messages = self._with_system(messages)
        full = self.render(messages, generation_prompt=False)
        head, marked, tail = self.render([*messages[:-1], {**messages[-1], "content": MARKER}], generation_prompt=False).rpartition(MARKER)
        if not marked or not full.endswith(tail):
            raise Unusable("the chat template does not show the answer as it is")
        ending = self._ends(tail)
        if not ending:  # the template's end of turn is no EOS of this model: its white space goes, and our EOS follows
            full = full[: len(full) - len(tail)] + tail.rstrip()
        if full.startswith(prompt.text):
            ids, apart = self._joined(prompt.ids, self._ids(full), full[len(prompt.text) :])
        else:
            # The answered conversation is rendered otherwise than its own prompt (a generation prompt that opens a thought, say).
            # Rollouts start from the prompt, so the demonstration does too, and goes on from where the answer begins.
            if not full.startswith(head) or not full[len(head) :].lstrip().startswith(messages[-1]["content"].strip()):
                raise Unusable("the chat template does not show the answer as it is")
            ids, apart = prompt.ids + self._ids(full[len(head) :]), True
        response = ids[len(prompt.ids) :]
        ends = [n for n, i in enumerate(response) if i in self.eos_ids]
        if len(ends) > ending:
            raise Unusable("an end-of-sequence token inside the response")
        # What a template prints after the end token (a line break) is never sampled, for rollouts stop at it: it is not taught.
        response = response[: ends[0] + 1] if ends else [*response, self.eos_id]
        earlier = earlier_answers(self, messages[:-1], prompt) if self.loss_on == "assistant" else [0] * len(prompt.ids)
        return Encoded(prompt.ids + response, earlier + [1] * len(response), prompt, apart)

    def _ends(self, tail: str) -> int:
        """How many EOS tokens a template prints after an answer. Remembered: the tail is the same for most conversations."""
        if tail not in self._ends_of_tail:
            self._ends_of_tail[tail] = sum(i in self.eos_ids for i in self._ids(tail))
        return self._ends_of_tail[tail]

    def _joined(self, prompt: list[int], joint: list[int], rest: str) -> tuple[list[int], bool]:
        """Prompt and response as one sequence that starts with exactly the prompt's tokens, and whether they were tokenised apart.

        Tokenised together where that leaves the prompt's tokens as they are (as TRL and Hugging Face do). Some tokenizers merge
        across the border: "Q: " + "yes" gives one token " yes". A rollout could never produce that, for its prompt already ends
        with the token " "; there the two are tokenised apart.
        """
        if joint[: len(prompt)] == prompt:
            return joint, False
        return prompt + self._ids(rest), True


def _default_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids a tokenizer puts before plain text by itself: [BOS], or none."""
    for probe in ("a", "0", "."):
        bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        full = list(tokenizer(probe)["input_ids"])
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return full[:start]
    return []
