"""The shapes a row can have, recognised by its fields. A shape is a small function from a row to demonstrations, or to prompts."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from srppo.config import DataConfig
from srppo.data.messages import Demonstration, Message, Unusable, check_messages, check_text, kind
from srppo.data.sources import Source
from srppo.errors import ConfigError

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """fields: what a row must hold. optional: what is read besides. build: one row to its demonstrations (self-instruct has several).

    meaning: what the report says a row of this shape was read as.
    """

    name: str
    fields: tuple[str, ...]
    build: Callable[[Row], list[Demonstration]]
    meaning: str
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({self.meaning})"


@dataclass(frozen=True)
class Record:
    """One demonstration or prompt with its origin. In a prompt record the completion is the reference answer, "" where there is none."""

    item: Demonstration
    shape: str  # name and meaning
    row: int  # 0-based row of its source
    group: str
    fields: Row  # the row as it was read
    unusable: str | None = None  # why it is to be dropped, where the row itself shows it


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _from_messages(row: Row) -> list[Demonstration]:
    messages = check_messages(row["messages"], "messages")
    if not messages or messages[-1]["role"] != "assistant":
        raise Unusable("the conversation does not end with an assistant message")
    return [Demonstration(messages[:-1], messages[-1:])]


def _from_pair(row: Row) -> list[Demonstration]:
    prompt, completion = row["prompt"], row["completion"]
    if {type(prompt), type(completion)} == {str, list}:
        raise ValueError("prompt and completion must be both strings or both lists of messages")
    if isinstance(prompt, list):
        return [Demonstration(_prompt_messages(prompt), check_messages(completion, "completion"))]
    return [Demonstration(check_text(prompt, "prompt"), check_text(completion, "completion"))]


def _prompt_messages(value: Any) -> list[Message]:
    messages = check_messages(value, "prompt")
    if messages and messages[-1]["role"] == "assistant":
        raise Unusable("the prompt ends with an assistant message")
    return messages


def _from_question(row: Row) -> list[Demonstration]:
    return [Demonstration(_user(check_text(row["question"], "question")), _assistant(check_text(row["answer"], "answer")))]


def _instruction(row: Row, given: Any) -> list[Message]:
    instruction = check_text(row["instruction"], "instruction")
    given = "" if given is None else check_text(given, "input")
    return _user(f"{instruction}\n\n{given}" if given.strip() else instruction)


def _from_instruction(row: Row) -> list[Demonstration]:
    return [Demonstration(_instruction(row, row.get("input")), _assistant(check_text(row["output"], "output")))]


def _from_instances(row: Row) -> list[Demonstration]:
    instances = row["instances"]
    if not isinstance(instances, list) or not all(isinstance(i, dict) and "output" in i for i in instances):
        raise ValueError("field 'instances' must be a list of objects {input, output}")
    return [
        Demonstration(_instruction(row, i.get("input")), _assistant(check_text(i["output"], f"instances[{n}].output")))
        for n, i in enumerate(instances)
    ]


def _from_text(row: Row) -> list[Demonstration]:
    return [Demonstration(None, check_text(row["text"], "text"))]


def _prompt_of_messages(row: Row) -> list[Demonstration]:
    messages = check_messages(row["messages"], "messages")
    if messages and messages[-1]["role"] == "assistant":
        return [Demonstration(messages[:-1], messages[-1:])]
    return [Demonstration(messages, "")]


def _prompt_only(row: Row) -> list[Demonstration]:
    prompt, completion = row["prompt"], row.get("completion")
    if not isinstance(prompt, (str, list)):
        raise ValueError(f"field 'prompt' must be a string or a list of messages, found {kind(prompt)}")
    checked = check_text(prompt, "prompt") if isinstance(prompt, str) else _prompt_messages(prompt)
    return [Demonstration(checked, check_messages(completion, "completion") if isinstance(completion, list) else _answer(completion))]


def _prompt_of_question(row: Row) -> list[Demonstration]:
    return [Demonstration(_user(check_text(row["question"], "question")), _answer(row.get("answer")))]


def _prompt_of_instruction(row: Row) -> list[Demonstration]:
    return [Demonstration(_instruction(row, row.get("input")), _answer(row.get("output")))]


def _answer(value: Any) -> str:
    return value if isinstance(value, str) else ""  # a prompt needs no answer, and its row may hold any other thing there


DEMONSTRATION_SHAPES = (
    Shape("messages", ("messages",), _from_messages, "the last assistant message is the response"),
    Shape("prompt/completion", ("prompt", "completion"), _from_pair, "a prompt and its response"),
    Shape("question/answer", ("question", "answer"), _from_question, "a user message and the assistant's answer"),
    Shape("instruction/output", ("instruction", "output"), _from_instruction, "instruction and input are the user message", ("input",)),
    Shape("instruction/instances", ("instruction", "instances"), _from_instances, "one demonstration an instance"),
    Shape("text", ("text",), _from_text, "the whole text is learned; it has no prompt"),
)
PROMPT_SHAPES = (
    Shape("messages", ("messages",), _prompt_of_messages, "the conversation up to its last assistant message"),
    Shape("prompt", ("prompt",), _prompt_only, "a prompt alone", ("completion",)),
    Shape("question", ("question",), _prompt_of_question, "a user message", ("answer",)),
    Shape("instruction/instances", ("instruction", "instances"), _from_instances, "one prompt an instance"),
    Shape("instruction", ("instruction",), _prompt_of_instruction, "instruction and input are the user message", ("input", "output")),
)


def read_records(source: Source, data: DataConfig, shapes: Sequence[Shape], *, strict: bool) -> list[Record]:
    """Every row of a source as records, whatever its shape.

    strict (demonstrations): columns and group_column must exist; otherwise (prompts, whose source may have other columns than the
    demonstrations) those that do are used. Raises ConfigError for a column map with unknown fields, and DataError with file and
    line for missing fields (listing what was found and expected) and wrong types.
    """
    _check_columns(data, shapes)
    present = {key for row in source.rows for key in row}
    mapped = {ours: theirs for ours, theirs in data.columns.items() if theirs in present or strict}
    for name, key in [*((v, f"data.columns: {k}") for k, v in mapped.items()), (data.group_column, "data.group_column")]:
        if strict and name is not None and name not in present:
            close = difflib.get_close_matches(name, sorted(present), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise source.error(f"no column {name!r} ({key}); found {', '.join(sorted(present))}{hint}", 0)
    group_column = data.group_column if data.group_column in present else "group" if "group" in present and not data.group_column else None
    # Shapes that use a mapped field come first: the user chose them.
    ordered = sorted(shapes, key=lambda s: -len({*s.fields, *s.optional} & mapped.keys()))
    records = []
    for index, row in enumerate(source.rows):
        view = {**row, **{ours: row.get(theirs) for ours, theirs in mapped.items()}}
        shape = next((s for s in ordered if all(view.get(f) is not None for f in s.fields)), None)
        if shape is None:
            raise source.error(_unrecognised(row, shapes, mapped), index)
        group = "all" if group_column is None else _group(source, data, row, group_column, index)
        try:
            records += [Record(item, str(shape), index, group, row) for item in shape.build(view)]
        except Unusable as drop:
            records.append(Record(Demonstration(None, ""), str(shape), index, group, row, drop.reason))
        except ValueError as error:
            raise source.error(str(error), index) from None
    return records


def _group(source: Source, data: DataConfig, row: Row, column: str, index: int) -> str:
    value = row.get(column)
    if value is None and data.group_column is None:
        return "all"
    if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
        return str(value)
    raise source.error(f"the group column {column!r} must hold a name, found {value!r}", index)


def _check_columns(data: DataConfig, shapes: Iterable[Shape]) -> None:
    known = {f for s in (*DEMONSTRATION_SHAPES, *PROMPT_SHAPES, *shapes) for f in (*s.fields, *s.optional)}
    for name in data.columns:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"data.columns maps our fields to yours, and {name!r} is none of ours ({', '.join(sorted(known))}){hint}")


def _unrecognised(row: Row, shapes: Sequence[Shape], mapped: dict[str, str]) -> str:
    found = ", ".join(f"{k} (null)" if v is None else k for k, v in row.items()) or "none"
    expected = "; ".join(" + ".join(s.fields) for s in shapes)
    through = f" (data.columns maps {', '.join(f'{a} to {b}' for a, b in mapped.items())})" if mapped else ""
    text = (
        ""
        if "text" not in row or any("text" in s.fields for s in shapes)
        else '. Rows of {"text"} have no prompt, so they cannot start a rollout'
    )
    return f"missing fields. Found: {found}{through}. Expected one of: {expected}. Other names can be mapped with data.columns{text}"
