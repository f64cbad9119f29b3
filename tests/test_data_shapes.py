"""Each shape becomes the demonstrations and prompts its users mean; each malformed row is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from srppo.config import DataConfig
from srppo.data.messages import Demonstration
from srppo.data.shapes import DEMONSTRATION_SHAPES, PROMPT_SHAPES, Record, read_records
from srppo.data.sources import Source
from srppo.errors import ConfigError, DataError

USER = {"role": "user", "content": "ask"}
SAYS = {"role": "assistant", "content": "say"}


def records(rows: list[dict[str, Any]], *, prompts: bool = False, **data: Any) -> list[Record]:
    source = Source("d.jsonl", rows, list(range(1, len(rows) + 1)), ["d.jsonl"] * len(rows))
    return read_records(source, DataConfig(**data), PROMPT_SHAPES if prompts else DEMONSTRATION_SHAPES, strict=not prompts)


@pytest.mark.parametrize(
    "row, shape, want",
    [
        ({"prompt": "ask", "completion": "say"}, "prompt/completion", [Demonstration("ask", "say")]),
        ({"prompt": [USER], "completion": [SAYS]}, "prompt/completion", [Demonstration([USER], [SAYS])]),
        ({"messages": [USER, SAYS, USER, SAYS]}, "messages", [Demonstration([USER, SAYS, USER], [SAYS])]),
        ({"prompt": "x", "messages": [USER, SAYS]}, "messages", [Demonstration([USER], [SAYS])]),  # as UltraChat has it
        ({"messages": [{**USER, "name": None}, SAYS], "text": None}, "messages", [Demonstration([USER], [SAYS])]),  # as Arrow fills it
        ({"text": "all"}, "text", [Demonstration(None, "all")]),
        ({"question": "ask", "answer": "say"}, "question/answer", [Demonstration([USER], [SAYS])]),
        ({"instruction": "ask", "input": "", "output": "say"}, "instruction/output", [Demonstration([USER], [SAYS])]),
        ({"instruction": "ask", "output": "say", "text": "t"}, "instruction/output", [Demonstration([USER], [SAYS])]),
        (
            {"instruction": "ask", "input": "it", "output": "say"},
            "instruction/output",
            [Demonstration([{"role": "user", "content": "ask\n\nit"}], [SAYS])],
        ),
        (
            {"instruction": "ask", "instances": [{"input": "", "output": "say"}, {"input": "it", "output": "no"}]},
            "instruction/instances",
            [
                Demonstration([USER], [SAYS]),
                Demonstration([{"role": "user", "content": "ask\n\nit"}], [{"role": "assistant", "content": "no"}]),
            ],
        ),
    ],
)
def test_demonstration_shapes(row: dict[str, Any], shape: str, want: list[Demonstration]) -> None:
    found = records([row])
    assert [r.item for r in found] == want
    assert all(r.shape.startswith(shape + " (") and r.fields is row and r.group == "all" for r in found)


@pytest.mark.parametrize(
    "row, prompt, reference",
    [
        ({"prompt": "ask"}, "ask", ""),
        ({"prompt": "ask", "completion": "say"}, "ask", "say"),
        ({"prompt": [USER]}, [USER], ""),
        ({"messages": [USER]}, [USER], ""),
        ({"messages": [USER, SAYS, USER]}, [USER, SAYS, USER], ""),
        ({"messages": [USER, SAYS]}, [USER], [SAYS]),
        ({"question": "ask"}, [USER], ""),
        ({"question": "ask", "answer": ["a", "b"]}, [USER], ""),  # a prompt needs no answer of ours
        ({"instruction": "ask", "input": "it"}, [{"role": "user", "content": "ask\n\nit"}], ""),
    ],
)
def test_prompt_shapes(row: dict[str, Any], prompt: Any, reference: Any) -> None:
    assert [(r.item.prompt, r.item.completion) for r in records([row], prompts=True)] == [(prompt, reference)]


def test_column_map_decides_the_shape() -> None:
    row = {"question": "ask", "answer": "say", "messages": [USER, SAYS]}
    assert records([row], columns={"prompt": "question", "completion": "answer"})[0].item == Demonstration("ask", "say")
    dolly = {"instruction": "ask", "context": "it", "response": "say"}
    assert records([dolly], columns={"input": "context", "output": "response"})[0].item == Demonstration(
        [{"role": "user", "content": "ask\n\nit"}], [SAYS]
    )
    # The map is written for the demonstrations; a source of prompts may lack those columns.
    assert records([{"prompt": "ask"}], prompts=True, columns={"prompt": "question", "completion": "answer"})[0].item.prompt == "ask"


def test_groups() -> None:
    rows = [{"text": "a", "group": "g", "task": 7}, {"text": "b", "group": None, "task": "t"}]
    assert [r.group for r in records(rows)] == ["g", "all"]
    assert [r.group for r in records(rows, group_column="task")] == ["7", "t"]
    assert [r.group for r in records([{"prompt": "a"}], prompts=True, group_column="task")] == ["all"]
    with pytest.raises(DataError, match=r"d\.jsonl, line 2: the group column 'group' must hold a name, found None"):
        records(rows, group_column="group")
    with pytest.raises(DataError, match=r"no column 'tusk' \(data.group_column\); found group, task, text; did you mean 'task'"):
        records(rows, group_column="tusk")


FINE = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "completon": "b"}, "missing fields. Found: prompt, completon. Expected one of: messages; prompt + completion;"),
        ({"prompt": "a", "completion": None}, "Found: prompt, completion (null)"),
        ({"prompt": "a", "completion": 3}, "field 'completion' must be a string, found a number"),
        ({"prompt": True, "completion": "b"}, "field 'prompt' must be a string, found true or false"),
        ({"prompt": "a", "completion": [SAYS]}, "must be both strings or both lists of messages"),
        ({"prompt": [USER], "completion": {"role": "assistant"}}, "field 'completion' must be a list of messages, found an object"),
        ({"messages": "hi"}, "field 'messages' must be a list of messages, found a string"),
        ({"messages": [USER, "hi"]}, "messages[1] must be a message {role, content}, found a string"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "messages[0] has no role and no content; it has from, value"),
        ({"messages": [USER, {"role": "gpt", "content": "x"}]}, "messages[1] has the role 'gpt'; known are system"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]},
            "'messages[1].content' must be a string, found a list",
        ),
        ({"question": "a", "answer": 4}, "field 'answer' must be a string, found a number"),
        ({"instruction": "a", "input": [], "output": "b"}, "field 'input' must be a string, found a list"),
        ({"instruction": "a", "instances": ["b"]}, "field 'instances' must be a list of objects"),
        ({"text": json.loads('"\\ud800"')}, "half a surrogate pair"),
    ],
)
def test_malformed_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        records([FINE, row])
    assert message in str(caught.value)
    assert str(caught.value).startswith("d.jsonl, line 2: ")


def test_rows_without_lines_are_counted() -> None:
    source = Source("d", [FINE, FINE, {}], [None] * 3, ["a.parquet", "b.parquet", "b.parquet"])
    with pytest.raises(DataError, match=r"b\.parquet: row 2: missing fields\. Found: none"):
        read_records(source, DataConfig(), DEMONSTRATION_SHAPES, strict=True)


def test_text_rows_cannot_be_prompts() -> None:
    with pytest.raises(DataError, match="have no prompt, so they cannot start a rollout"):
        records([{"text": "a"}], prompts=True)


def test_wrong_column_maps() -> None:
    with pytest.raises(ConfigError, match=r"'promt' is none of ours .*did you mean 'prompt'"):
        records([FINE], columns={"promt": "prompt"})
    with pytest.raises(DataError, match=r"no column 'qestion' \(data.columns: prompt\); found answer, question; did you mean 'question'"):
        records([{"question": "a", "answer": "b"}], columns={"prompt": "qestion", "completion": "answer"})


def test_rows_to_drop_are_kept_with_their_reason() -> None:
    dropped = records([{"messages": [USER]}, {"messages": []}, {"prompt": [USER, SAYS], "completion": [SAYS]}])
    assert [r.unusable for r in dropped] == [
        "the conversation does not end with an assistant message",
        "the conversation does not end with an assistant message",
        "the prompt ends with an assistant message",
    ]
