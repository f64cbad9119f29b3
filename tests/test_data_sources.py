"""Every kind of source read back to the same rows, and every kind of damage named with its file and line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from srppo.config import DataConfig
from srppo.data.shapes import DEMONSTRATION_SHAPES, read_records
from srppo.data.sources import read_hub, read_rows
from srppo.errors import DataError

ROWS = [{"prompt": f"p{i}\u2028é", "completion": 'line one\nline "two", three'} for i in range(3)]


def write_jsonl(path: Path) -> None:
    # ensure_ascii=False keeps the line separator U+2028 as it is: it must not end a row
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS) + "\n\n", encoding="utf-8")


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # with the byte order mark spreadsheets write
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def write_arrow(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_arrow_file(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "a.jsonl": (write_jsonl, [1, 2, 3]),
    "a.json": (lambda p: p.write_text(json.dumps(ROWS, indent=1), encoding="utf-8"), [2, 6, 10]),
    "b.json": (lambda p: p.write_text(json.dumps({"data": ROWS})), [None] * 3),
    "c.json": (lambda p: p.write_text(json.dumps({"train": ROWS})), [None] * 3),
    "d.json": (write_jsonl, [1, 2, 3]),
    "a.csv": (write_csv, [2, 4, 6]),  # each row has a line break in quotes
    "a.tsv": (write_csv, [2, 4, 6]),
    "a.parquet": (lambda p: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), p), [None] * 3),
    "a.arrow": (write_arrow, [None] * 3),
    "b.arrow": (write_arrow_file, [None] * 3),
}


@pytest.mark.parametrize("name", WRITERS)
def test_files(tmp_path: Path, name: str) -> None:
    write, lines = WRITERS[name]
    write(tmp_path / name)
    source = read_rows(str(tmp_path / name))
    assert source.rows == ROWS
    assert source.lines == lines
    assert source.files == [str(tmp_path / name)] * 3


def test_saved_datasets(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "dict"))
    assert read_rows(str(tmp_path / "one")).rows == ROWS
    assert read_rows(str(tmp_path / "dict"), "test").rows == ROWS[1:2]
    with pytest.raises(DataError, match=r"no split 'dev'; found train, test"):
        read_rows(str(tmp_path / "dict"), "dev")


def test_folders_of_files(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    write_jsonl(plain / "part1.jsonl")
    write_csv(plain / "part2.csv")
    (plain / "README.md").write_text("not data")
    source = read_rows(str(plain))
    assert source.rows == ROWS + ROWS
    assert source.place(4) == "part2.csv line 4"
    named = tmp_path / "named"
    (named / "data").mkdir(parents=True)
    write_jsonl(named / "data" / "train-00000-of-00001.jsonl")
    (named / "data" / "test.jsonl").write_text('{"prompt": "held", "completion": "out"}\n')
    assert read_rows(str(named)).rows == ROWS  # never the test rows with the training rows
    assert [r["prompt"] for r in read_rows(str(named), "test").rows] == ["held"]
    with pytest.raises(DataError, match="no split 'dev'; found test, train"):
        read_rows(str(named), "dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        read_rows(str(tmp_path / "empty"))


def test_hub_code_on_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl")
    assert [row for row, _, _ in read_hub(str(folder), "train")] == ROWS
    with pytest.raises(DataError, match="dev"):
        read_hub(str(folder), "dev")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, configuration: str | None, split: str) -> None:
        assert (name, configuration, split) == ("openai/gsm8k", "main", "test")
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"openai/gsm8k:main: no such file or folder here.*ConnectionError: Couldn't reach the Hub.*network"
    ):
        read_rows("openai/gsm8k:main", "test")


def test_rows_of_a_hub_data_set_go_through_to_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(name: str, configuration: str | None, split: str) -> datasets.Dataset:
        assert (name, configuration, split) == ("owner/name", "main", "train")
        return datasets.Dataset.from_list([{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    found = read_rows("owner/name:main", "train")
    records = read_records(found, DataConfig(), DEMONSTRATION_SHAPES, strict=True)
    assert [r.fields["answer"] for r in records] == ["2", "4"] and {r.shape.split()[0] for r in records} == {"question/answer"}


GOOD = '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    "name, content, line, message",
    [
        ("a.jsonl", "", None, "the file is empty"),
        ("a.jsonl", "\n \n", None, "holds no rows"),
        ("a.jsonl", GOOD + "\n" + '{"prompt": "a"\n' + GOOD, 3, "broken JSON at column 15"),
        ("a.jsonl", GOOD + "[1, 2]\n", 2, "expected an object with fields, found a list"),
        ("a.jsonl", '[\n{"prompt": "a"}\n]', 1, "name it .json"),
        ("a.jsonl", GOOD.encode() + b'{"prompt": "caf\xe9"}\n', 2, "not UTF-8 (byte 0xe9)"),
        ("a.csv", b"prompt\na\ncaf\xe9\n", 3, "not UTF-8"),
        ("a.json", b'[{"prompt":\n "caf\xe9"}]', 2, "not UTF-8"),
        ("a.json", "[]", None, "holds no rows"),
        ("a.json", '[{"prompt": "a"},\n{"prompt": }]', 2, "broken JSON at column 12"),
        ("a.json", '[{"prompt": "a"}\n{"prompt": "b"}]', 2, "Expecting ',' delimiter"),
        ("a.json", '[{"prompt": "a"}', 1, "broken JSON"),
        ("a.json", '[{"prompt": "a"}]\nx', 2, "Extra data"),
        ("a.json", '[{"prompt": "a"},\n\n3]', 3, "expected an object with fields, found a number"),
        ("a.json", '{"prompt": "a", "completion": "b"}', None, "found an object with the keys prompt, completion"),
        ("a.json", '{"data": [1]}', None, "item 1: expected an object"),
        ("a.json", "3", None, "expected a list of objects, found a number"),
        ("a.json", '{"data": ', 1, "broken JSON"),
        ("a.csv", "prompt,completion\na,b\nc\n", 3, "1 values, but the header has 2 columns (prompt, completion)"),
        ("a.csv", "prompt,prompt\na,b\n", 1, "names a column twice"),
        ("a.csv", 'prompt,completion\na,"b\n', 2, "broken CSV"),
        ("a.parquet", "nonsense", None, "not a readable parquet file"),
        ("a.arrow", "nonsense", None, "not a readable arrow file"),
        ("a.jsonl", GOOD + '{"prompt": ' + "9" * 5000 + "}\n", 2, "an integer of more than 4300 digits"),
        ("a.jsonl", '{"prompt": ' + "[" * 100_000, 1, "nested too deeply"),
        ("a.json", '[{"prompt": "a"},\n{"prompt": ' + "9" * 5000 + "}]", 2, "an integer of more than 4300 digits"),
        ("a.json", '[{"prompt": "a"},\n{"prompt": ' + "[" * 100_000, 2, "nested too deeply"),
        ("a.json", '\n{"data": ' + "9" * 5000 + "}", 2, "an integer of more than 4300 digits"),
        ("a.json", '{"data": ' + "[" * 100_000, 1, "nested too deeply"),
        ("a.xlsx", "nonsense", None, "unknown kind of file '.xlsx'; known are .jsonl"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str | bytes, line: int | None, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_rows(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.line == line


def test_missing_files_and_the_nearest_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"no such file or folder; did you mean .*train\.jsonl\?"):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"holds train\.jsonl"):
        read_rows(str(tmp_path / "q"))
    with pytest.raises(DataError, match=r"the folder .*dta does not exist"):
        read_rows(str(tmp_path / "dta" / "deeper" / "x.jsonl"))


def test_names_that_the_system_refuses() -> None:
    with pytest.raises(DataError, match=r"~srppo-nobody/x: no such folder"):
        read_rows("~srppo-nobody/x")
    with pytest.raises(DataError, match=r"x\.jsonl: cannot be read: File name too long"):
        read_rows("x" * 5000 + ".jsonl")


def test_a_slip_below_a_local_folder_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    with pytest.raises(DataError, match=r"did you mean data/gsm8k\?"):
        read_rows("data/gsmk")


def test_long_csv_values(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read_rows(str(path)).rows[0]["text"]) == 200_000
