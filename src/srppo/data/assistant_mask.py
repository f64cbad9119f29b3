"""Which tokens of a conversation's history the assistant said, for loss on every assistant turn."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from srppo.data.messages import Message, Unusable
from srppo.limits import bounded

if TYPE_CHECKING:
    from srppo.data.chat import ChatFormat, RenderedPrompt

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def earlier_answers(chat: ChatFormat, messages: list[Message], prompt: RenderedPrompt) -> list[int]:
    """A 0/1 mask over prompt.ids, 1 on what the assistant said in `messages` (the prompt's), each end token included.

    Read from the template's {% generation %} marks where it has them, otherwise from how the text grows as messages are added.
    Raises Unusable where the template rewrites earlier turns as the conversation goes on, so that growth tells nothing.
    """
    if not any(m["role"] == "assistant" for m in messages):
        return [0] * len(prompt.ids)
    if GENERATION_TAG.search(chat.template):
        with bounded():
            out: Any = chat.tokenizer.apply_chat_template(
                messages,
                chat_template=chat.template,
                add_generation_prompt=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **chat.template_tokens,
            )
        assert out["input_ids"] == prompt.ids
        mask = list(out["assistant_masks"])
    else:
        offsets = chat.tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        mask = [0] * len(prompt.ids)
        for start, end in _grown_spans(chat, messages, prompt.text):
            for n, (first, last) in enumerate(offsets):
                if first < last and first < end and last > start:
                    mask[n] = 1
    return _up_to_end_tokens(prompt.ids, mask, chat.eos_ids)


def _grown_spans(chat: ChatFormat, messages: list[Message], text: str) -> list[tuple[int, int]]:
    """Character spans [start, end) of the assistant turns: from the generation prompt before a turn to the text after it."""
    spans = []
    for n, message in enumerate(messages):
        if message["role"] == "assistant" and n > 0:  # a conversation opened by the assistant: that greeting had no prompt
            before = chat.render(messages[:n], generation_prompt=True)
            after = chat.render(messages[: n + 1], generation_prompt=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise Unusable(
                    "the chat template rewrites earlier turns, so their tokens cannot be told apart "
                    "(use data.loss_on: response, or a template with generation marks)"
                )
            spans.append((len(before), len(after.rstrip())))
    return spans


def _up_to_end_tokens(ids: list[int], mask: list[int], eos_ids: Iterable[int]) -> list[int]:
    """Each run of ones ends with its end token: cut behind it, or extended by it where it follows directly."""
    ends, out, n = set(eos_ids), list(mask), 0
    while n < len(ids):
        if not mask[n]:
            n += 1
            continue
        stop = n
        while stop < len(ids) and mask[stop]:
            stop += 1
        inside = [k for k in range(n, stop) if ids[k] in ends]
        if inside:
            out[inside[-1] + 1 : stop] = [0] * (stop - inside[-1] - 1)
        elif stop < len(ids) and ids[stop] in ends:
            out[stop] = 1
        n = stop
    return out
