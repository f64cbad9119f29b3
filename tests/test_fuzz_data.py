"""Data files of any content: rows of them are used, counted as dropped, or refused with file and line; nothing is written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from srppo.config import build
from srppo.data.chat import ChatFormat
from srppo.data.demonstrations import load_demonstrations
from srppo.data.prompts import load_prompts
from srppo.data.report import data_summary
from srppo.data.sources import read_rows
from srppo.errors import DataError
from srppo.scoring import exact_match, final_number
from tiny_fuzz import DEEP, SCALARS, TEXTS, VALUES, bounded, damaged, json_bytes, spoil, used_or_refused
from tiny_models import EOS, IM_END, tiny_tokenizer
from tiny_tokenizers import gemma

CHATS: dict[str, Callable[[], ChatFormat]] = {
    "plain": lambda: ChatFormat(tiny_tokenizer(chat=False), [EOS]),
    "chatml": lambda: ChatFormat(tiny_tokenizer(), [EOS, IM_END], loss_on="assistant", string_prompts="chat", system_prompt="Be brief."),
    "gemma": lambda: ChatFormat(gemma(), [gemma().eos_token_id], loss_on="assistant"),
}
MADE: dict[str, ChatFormat] = {}
TALK = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "say 1:", "completion": " 11", "group": "g"},
    {"prompt": TALK[:2], "completion": TALK[2:]},
    {"messages": [*TALK, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
    {"question": "q", "answer": "#### 1,000"},
    {"instruction": "i", "input": "x", "output": "o"},
    {"instruction": "i", "instances": [{"input": "x", "output": "o"}]},
    {"text": "all of it"},
]
JSONL = b"".join(json_bytes(row) + b"\n" for row in ROWS)
ROLES = st.one_of(st.sampled_from(["system", "user", "assistant", "tool", "developer"]), SCALARS)
MESSAGE = st.one_of(st.fixed_dictionaries({"role": ROLES, "content": st.one_of(TEXTS, SCALARS)}, optional={"name": VALUES}), VALUES)
FIELDS = ("prompt", "completion", "messages", "text", "question", "answer", "instruction", "input", "output", "instances", "group")
ROW = st.dictionaries(st.one_of(st.sampled_from(FIELDS), TEXTS), st.one_of(TEXTS, TEXTS, st.lists(MESSAGE, max_size=4), VALUES), max_size=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def check(path: Path, chat: str) -> None:
    """The whole way of a file: rows, demonstrations, prompts, their report, and the scorers over its fields."""
    form = MADE.get(chat) or MADE.setdefault(chat, CHATS[chat]())
    data = build({"model": {"name": "m"}, "data": {"demonstrations": str(path), "max_tokens": 200, "max_prompt_tokens": 100}}).data

    def demonstrations() -> None:
        found = load_demonstrations(data, form, 0, context=128)
        assert all(len(e.ids) <= 128 and len(e.ids) == len(e.target_mask) and e.target_mask[0] == 0 for e in found.train)
        json.dumps(data_summary(found, None, None, None).to_dict())

    def prompts() -> None:
        found = load_prompts(str(path), "train", data, form, 0, 10, per_group=True, context=64)
        assert all(0 < len(p.ids) <= 64 for p in found.prompts)
        for prompt in found.prompts:
            for scorer in (exact_match, final_number):
                used_or_refused(lambda s=scorer, p=prompt: s("#### 1", p.fields))  # type: ignore[misc]

    for use in (demonstrations, prompts):
        used_or_refused(use, path.parent, str(path))


@bounded(240)
@given(content=damaged(JSONL), chat=st.sampled_from(sorted(CHATS)))
@example(content=b"\xef\xbb\xbf" + JSONL, chat="plain")
@example(content=JSONL.replace(b"\n", b"\r\n"), chat="plain")
@example(content=JSONL.replace(b"\n", b"\r"), chat="plain")
@example(content=b'{"prompt": "a", "prompt": 3, "completion": "b"}\n', chat="plain")
@example(content=b'{"prompt": "a", "completion": "b", "group": 1' + b"0" * 5000 + b"}\n", chat="plain")
@example(content=b'{"prompt": "a", "completion": "b", "x": 1e99999}\n', chat="plain")
@example(content=b'{"prompt": "\\ud800", "completion": "b"}\n', chat="plain")
@example(content=b'{"prompt": "a\\u0000b", "completion": "b\\u0000"}\n', chat="chatml")
def test_any_bytes_as_jsonl(place: Path, content: bytes, chat: str) -> None:
    path = place / "d.jsonl"
    path.write_bytes(content)
    check(path, chat)


@bounded(140)
@given(rows=st.lists(ROW, min_size=1, max_size=5), chat=st.sampled_from(sorted(CHATS)), kind=st.sampled_from(["jsonl", "json"]))
@example(rows=[{"prompt": "a", "completion": "b", "group": 10**5000}], chat="plain", kind="jsonl")
@example(rows=[{"question": "a", "answer": 10**5000}, {"question": "a", "answer": "b"}], chat="plain", kind="jsonl")
@example(rows=[{"messages": TALK * 40}], chat="chatml", kind="json")
def test_any_rows(place: Path, rows: list[dict[str, Any]], chat: str, kind: str) -> None:
    path = place / f"d.{kind}"
    try:
        texts = [json_bytes(row) for row in rows]
    except ValueError:  # json.dumps refuses integers of thousands of digits
        texts = [b'{"prompt": "a", "completion": "b", "group": 1' + b"0" * 5000 + b"}"]
    path.write_bytes(b"\n".join(texts) if kind == "jsonl" else b"[" + b",\n".join(texts) + b"]")
    check(path, chat)


@bounded(160)
@given(data=st.data())
def test_any_value_anywhere(place: Path, data: st.DataObject) -> None:
    row = spoil(data, data.draw(st.sampled_from(ROWS)), VALUES | MESSAGE)
    path = place / "d.jsonl"
    path.write_bytes(b"\n".join(json_bytes(r) for r in (ROWS[0], row)))
    check(path, data.draw(st.sampled_from(sorted(CHATS))))


@bounded(160)
@given(content=st.one_of(damaged(json_bytes(ROWS)), damaged(json_bytes({"data": ROWS})), DEEP.map(str.encode), VALUES.map(json_bytes)))
@example(content=b"[" * 200_000)
@example(content=b'{"a": ' * 100_000)
@example(content=b"[1" + b"0" * 5000 + b"]")
@example(content=b'{"data": {"data": []}}')
@example(content=b"[{},]")
@example(content=b"{}\n{}\n")
def test_any_bytes_as_json(place: Path, content: bytes) -> None:
    path = place / "d.json"
    path.write_bytes(content)
    check(path, "plain")


def csv_bytes() -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerows([["prompt", "completion", "group"], ["a", "b\nc", "g"], ['say "hi"', "x,y", "h"], ["c", "d", ""]])
    return stream.getvalue().encode()


@bounded(160)
@given(content=damaged(csv_bytes()), kind=st.sampled_from(["csv", "tsv"]))
@example(content=b"prompt,completion\n" + b"a" * 200_000 + b",b\n", kind="csv")
@example(content=b"prompt,completion\na,b\x00c\n", kind="csv")
@example(content=b'prompt,completion\n"a,b\n', kind="csv")
@example(content=b"\n\n\nprompt,completion\na,b\n", kind="csv")
@example(content=b"=cmd|' /C calc'!A0,completion\n1,2\n", kind="csv")
def test_any_bytes_as_csv(place: Path, content: bytes, kind: str) -> None:
    path = place / f"d.{kind}"
    path.write_bytes(content)
    check(path, "plain")


def table_bytes(kind: str) -> bytes:
    table = pyarrow.Table.from_pylist([{"prompt": "a", "completion": "b", "group": str(i)} for i in range(3)])
    if kind == "arrow":
        return arrow_bytes(table)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def arrow_bytes(table: pyarrow.Table) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_any_bytes_as_a_table(place: Path, kind: str) -> None:
    whole = table_bytes(kind)

    @bounded(160)
    @given(content=damaged(whole))
    def any_bytes(content: bytes) -> None:
        path = place / f"d.{kind}"
        path.unlink(missing_ok=True)  # the one before may still be mapped
        path.write_bytes(content)
        check(path, "plain")

    any_bytes()


@bounded(80)
@given(data=st.data())
def test_any_types_in_a_parquet_file(place: Path, data: st.DataObject) -> None:
    values = data.draw(
        st.sampled_from(
            [
                pyarrow.array([b"\xff\xfe"]),
                pyarrow.array([b"bytes"], pyarrow.large_binary()),
                pyarrow.array([1], pyarrow.timestamp("ns", "UTC")),
                pyarrow.array([2**62], pyarrow.timestamp("s")),
                pyarrow.array([-(2**31)], pyarrow.date32()),
                pyarrow.array([2**40], pyarrow.time64("ns")),
                pyarrow.array([2**62], pyarrow.duration("ns")),
                pyarrow.array([None], pyarrow.null()),
                pyarrow.array([1.5], pyarrow.float16()),
                pyarrow.array([["a"]]),
                pyarrow.array([{"role": "user", "content": "x"}]),
                pyarrow.array([[{"role": "user", "content": "x"}]]),
                pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
                pyarrow.array(["a"]).dictionary_encode(),
                pyarrow.array(["text"], pyarrow.large_string()),
                pyarrow.array(["text"], pyarrow.string_view()),
            ]
        )
    )
    names = data.draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3))  # a name may come twice
    others = [pyarrow.array(["text"])] * (len(names) - 1)
    path = place / "d.parquet"
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays([values, *others], names=names), path)
    except pyarrow.ArrowException:
        return  # cannot be written at all
    check(path, "plain")


@bounded(120)
@given(source=st.one_of(TEXTS, st.sampled_from(["a/b", "a:b", "owner/name:conf", ".", "..", "/", "~", "/dev/null", "/proc/self/mem"])))
def test_any_name(source: str) -> None:
    if "\0" in source or any("\ud800" <= c <= "\udfff" for c in source):
        return  # refused by the configuration
    used_or_refused(lambda: read_rows(source))


@bounded(120)
@given(data=st.data())
def test_a_folder_that_datasets_saved(saved: Path, data: st.DataObject) -> None:
    """Any of its files is damaged."""
    path = data.draw(st.sampled_from(sorted(p for p in saved.rglob("*") if p.is_file())))
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(damaged(whole)))
        used_or_refused(lambda: read_rows(str(saved)), saved, str(saved))
    finally:
        path.unlink()  # it may be mapped
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "set"
    datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]).save_to_disk(folder)
    return folder


# Found by the tests above.
def test_a_pair_of_empty_lists(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": [], "completion": []}\n')
    data = build({"data": {"demonstrations": str(path)}}).data
    with pytest.raises(DataError, match=r"no demonstration is left of 1\. Dropped, the conversation does not end with"):
        load_demonstrations(data, CHATS["chatml"](), 0)


def test_values_that_python_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    columns = {"completion": pyarrow.array(["b"]), "prompt": pyarrow.array([-(2**31)], pyarrow.date32())}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(DataError, match=r"d\.parquet: holds values that cannot be read: OverflowError"):
        read_rows(str(path))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_named_twice(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"d.{kind}"
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["x", "x"])
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        path.write_bytes(arrow_bytes(table))
    with pytest.raises(DataError, match=r"the table names a column twice: x, x|Multiple matches for .*\(x\)"):
        read_rows(str(path))


def test_a_column_whose_name_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "d.arrow"
    path.write_bytes(arrow_bytes(pyarrow.table({"text": ["x"]})).replace(b"text", b"\x80ext"))
    with pytest.raises(DataError, match=r"d\.arrow: .*utf-8"):
        read_rows(str(path))


def test_offsets_that_point_anywhere(tmp_path: Path) -> None:
    """Arrow reads what a string's offsets say, without looking: a file could show other memory, or end the process."""
    path, offsets = tmp_path / "d.arrow", b"\0\0\0\0\x01\0\0\0"
    whole = arrow_bytes(pyarrow.table({"text": ["x"]}))
    places = [i for i in range(len(whole)) if whole.startswith(offsets, i)]
    said = []
    for at in places:
        path.unlink(missing_ok=True)
        path.write_bytes(whole[: at + 4] + b"\xff\xff\xff\x0f" + whole[at + 8 :])
        said.append(str(used_or_refused(lambda: read_rows(str(path)), None, str(path))))
    assert any("larger than values array" in text for text in said), said


def test_a_group_of_thousands_of_digits(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b", "group": 1' + b"0" * 5000 + b"}\n")
    with pytest.raises(DataError, match="line 1: JSON with an integer of more than 4300 digits"):
        read_rows(str(path))
