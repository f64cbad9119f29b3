"""Conversations: what a message is, and what a demonstration is before it is tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]  # {"role": ..., "content": ...} and whatever else the template reads

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the answer to learn, both strings or both message lists. prompt None: the whole text is learned."""

    prompt: str | list[Message] | None
    completion: str | list[Message]


class Unusable(Exception):
    """A well-formed row that cannot teach or ask anything; its reason goes into the data report."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


def answer_text(completion: str | list[Message]) -> str:
    """The final answer of a completion, the reference for scorers."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1]["content"]) if completion else ""


def check_text(value: Any, field: str) -> str:
    """value as a string. Raises ValueError that says what it is instead."""
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be a string, found {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; tokenizers cannot read it
        raise ValueError(f"field {field!r} holds half a surrogate pair (\\u{ord(value[error.start]):04x}), which is not text") from None
    return value


def check_messages(value: Any, field: str) -> list[Message]:
    """value as messages, without keys whose value is null (Arrow tables fill absent keys so). Raises ValueError naming the message."""
    if not isinstance(value, list):
        raise ValueError(f"field {field!r} must be a list of messages, found {kind(value)}")
    return [_check_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def _check_message(message: Any, field: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{field} must be a message {{role, content}}, found {kind(message)}")
    missing = [key for key in ("role", "content") if message.get(key) is None]
    if missing:
        raise ValueError(f"{field} has no {' and no '.join(missing)}; it has {', '.join(map(str, message)) or 'nothing'}")
    if message["role"] not in ROLES:
        raise ValueError(f"{field} has the role {message['role']!r}; known are {', '.join(ROLES)}")
    check_text(message["content"], f"{field}.content")
    return {key: part for key, part in message.items() if part is not None}


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), type(value).__name__)
