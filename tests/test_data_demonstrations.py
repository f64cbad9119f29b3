"""From files to examples: limits, drops, the held-out split, prompts, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_tokenizers as tiny
from srppo.config import DataConfig
from srppo.data.chat import ChatFormat
from srppo.data.demonstrations import Demonstrations, load_demonstrations
from srppo.data.prompts import load_prompts
from srppo.data.report import Lengths, data_summary
from srppo.errors import ConfigError, DataError

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def load(path: Path, rows: Rows, seed: int = 0, context: int | None = None, **options: Any) -> Demonstrations:
    data = DataConfig(demonstrations=write(path / "d.jsonl", rows), **options)
    tokenizer = tiny.chatml()
    return load_demonstrations(data, ChatFormat.from_config(tokenizer, [tokenizer.eos_token_id], data), seed, context=context)


def chat(**options: Any) -> ChatFormat:
    tokenizer = tiny.chatml()
    return ChatFormat(tokenizer, [tokenizer.eos_token_id], **options)


def count(text: str) -> int:
    return len(tiny.chatml()(text)["input_ids"])


QA = [{"question": f"Add {i} and {i}.", "answer": f"{2 * i}"} for i in range(40)]
RAW = [{"prompt": f"Q{i}: ", "completion": f"A{i}"} for i in range(20)]


def test_examples_are_the_rows_in_order_tokenised(tmp_path: Path) -> None:
    out = load(tmp_path, QA, heldout=0)
    assert [e.row for e in out.train] == list(range(40)) and out.heldout == [] and out.heldout_prompts == []
    for example in out.train:
        encoded = chat().tokenizer.apply_chat_template(
            [{"role": "user", "content": QA[example.row]["question"]}, {"role": "assistant", "content": QA[example.row]["answer"]}],
            return_dict=False,
        )
        assert example.ids == encoded[: len(example.ids)]
        learned = [i for i, m in zip(example.ids, example.target_mask) if m]
        assert chat().response_text(learned) == QA[example.row]["answer"]


def test_heldout_never_shares_a_prompt_with_training(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{i % 12}: ", "completion": f"A{i}"} for i in range(60)]  # five answers a prompt
    out = load(tmp_path, rows, heldout=0.2)
    train, held = ({rows[e.row]["prompt"] for e in side} for side in (out.train, out.heldout))
    assert not train & held and len(train | held) == 12
    assert len(out.heldout) == 15  # 12 asked for, whole prompts taken
    assert {p.text for p in out.heldout_prompts} == held and len(out.heldout_prompts) == 3
    assert {p.text for p in out.train_prompts} == train and len(out.train_prompts) == 9
    again, other = load(tmp_path, rows, heldout=0.2), load(tmp_path, rows, heldout=0.2, seed=1)
    assert again == out and {rows[e.row]["prompt"] for e in other.heldout} != held


def test_heldout_takes_every_group_in_proportion(tmp_path: Path) -> None:
    rows = [{**r, "group": "big" if i < 30 else "small"} for i, r in enumerate(QA)]
    out = load(tmp_path, rows, heldout=8)
    groups = [e.group for e in out.heldout]
    assert (groups.count("big"), groups.count("small")) == (6, 2)
    assert out.report.groups == {"big": 30, "small": 10}
    assert len(load(tmp_path, rows, heldout=0.1).heldout) == 4
    assert len(load(tmp_path, QA[:3], heldout=0.1).heldout) == 1  # a share is at least one
    assert len(load(tmp_path, QA[:1] * 3, heldout=0.1).heldout) == 0  # of a single prompt, none
    with pytest.raises(DataError, match="leaves nothing of 40 demonstrations"):
        load(tmp_path, QA, heldout=40)


def test_fields_of_heldout_prompts(tmp_path: Path) -> None:
    out = load(tmp_path, [{**r, "extra": [1]} for r in QA], heldout=4)
    for prompt in out.heldout_prompts:
        assert prompt.fields == {**QA[prompt.row], "extra": [1], "reference": QA[prompt.row]["answer"]}
        assert prompt.ids == chat().render_prompt([{"role": "user", "content": QA[prompt.row]["question"]}]).ids
    own = load(tmp_path, [{**r, "reference": "mine"} for r in RAW], heldout=1)
    assert own.heldout_prompts[0].fields["reference"] == "mine"


def test_limits(tmp_path: Path) -> None:
    rows = [
        {"prompt": "yes " * 20, "completion": "no"},
        {"prompt": "yes ", "completion": "no " * 20},
        {"prompt": "yes ", "completion": "no"},
    ]
    long = count("yes " * 20)
    out = load(tmp_path, rows, heldout=0, max_prompt_tokens=long - 1, max_tokens=long)
    assert [e.row for e in out.train] == [1, 2]
    cut, whole = out.train
    assert len(cut.ids) == len(cut.target_mask) == long
    assert cut.ids[-1] != tiny.chatml().eos_token_id and whole.ids[-1] == tiny.chatml().eos_token_id
    report = out.report
    assert report.truncated.count == 1 and report.truncated.places == ["line 2"]
    (reason, dropped), *rest = report.dropped.items()
    assert not rest and reason == f"the prompt fills the context of {long} tokens" and dropped.places == ["line 1"]
    assert any(f"cut at {long} tokens" in line for line in report.lines())
    only_prompt = load(tmp_path, rows, heldout=0, max_prompt_tokens=long - 1, max_tokens=200).report
    assert list(only_prompt.dropped) == [f"the prompt is longer than data.max_prompt_tokens ({long - 1})"]
    by_model = load(tmp_path, rows, heldout=0, max_prompt_tokens=100, max_tokens=200, context=long).report
    assert by_model.limits["max_tokens"] == long and by_model.truncated.count == 1 and len(by_model.dropped) == 1
    assert any("shorter than data.max_tokens (200)" in note for note in by_model.notes)


def test_drops_are_counted_with_their_lines(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
    rows = [
        *RAW[:1],
        {"prompt": "Q:", "completion": " "},
        {"question": "a", "answer": ""},
        {"messages": turns[:1]},
        {"prompt": "Q:", "completion": "a<|im_end|>b"},
        {"messages": turns},
    ]
    out = load(tmp_path, rows, heldout=0)
    assert {reason: a.places for reason, a in out.report.dropped.items()} == {
        "empty response": ["line 2", "line 3"],
        "the conversation does not end with an assistant message": ["line 4"],
        "an end-of-sequence token inside the response": ["line 5"],
    }
    assert [e.row for e in out.train] == [0, 5]
    assert out.report.formats == {"raw text": 1, "conversation": 1}
    assert sum(out.report.shapes.values()) == 6
    with pytest.raises(DataError, match=r"no demonstration is left of 2\. Dropped, empty response: 2 \(line 1, line 2\)"):
        load(tmp_path, rows[1:3])


def test_counts_of_the_report(tmp_path: Path) -> None:
    rows = [RAW[0], RAW[0], {**RAW[0], "completion": "other"}, RAW[1]]
    report = load(tmp_path, rows, heldout=0).report
    assert (report.rows, report.used, report.duplicates, report.repeated_prompts) == (4, 4, 1, 2)
    prompts, responses = zip(*((count(r["prompt"]), count(r["completion"]) + 1) for r in rows))
    assert report.prompt_tokens is not None and report.prompt_tokens.total == sum(prompts)
    assert report.response_tokens is not None and report.response_tokens.total == sum(responses) == report.learned_tokens
    json.dumps(report.to_dict())
    assert load(tmp_path, rows, heldout=0).report.fingerprint == report.fingerprint
    assert load(tmp_path, rows[::-1], heldout=0).report.fingerprint != report.fingerprint


def test_quantiles() -> None:
    assert Lengths.of(range(1, 101)) == Lengths(1, 50, 90, 99, 100, 5050)
    assert Lengths.of([7]) == Lengths(7, 7, 7, 7, 7, 7)
    assert Lengths.of([3, 1]) == Lengths(1, 1, 3, 3, 3, 4)
    assert Lengths.of([]) is None


def test_max_demonstrations(tmp_path: Path) -> None:
    rows: Rows = [{"question": "a", "answer": ""}, *QA]
    out = load(tmp_path, rows, heldout=0, max_demonstrations=10)
    assert len(out.train) == 10 and [e.row for e in out.train] == sorted(e.row for e in out.train)
    assert out.report.left_out + 10 + sum(a.count for a in out.report.dropped.values()) == 41
    other = load(tmp_path, rows, heldout=0, max_demonstrations=10, seed=1)
    assert {e.row for e in out.train} != {e.row for e in other.train}
    assert len(load(tmp_path, rows, heldout=0, max_demonstrations=100).train) == 40


def test_text_rows(tmp_path: Path) -> None:
    out = load(tmp_path, [{"text": f"hello {i}"} for i in range(5)], heldout=1)
    assert out.train_prompts == out.heldout_prompts == [] and len(out.heldout) == 1
    assert out.report.template == "none" and out.report.prompt_tokens is None
    assert any("cannot start a rollout" in note for note in out.report.notes)


def test_notes(tmp_path: Path) -> None:
    glued = load(tmp_path, [{"prompt": "Q:", "completion": "A"}], heldout=0, system_prompt="s").report.notes
    assert any("touch their completions" in n for n in glued) and any("system_prompt is not used" in n for n in glued)
    assert load(tmp_path, RAW, heldout=0).report.notes == []
    dated = ChatFormat(tokenizer := tiny.chatml("{{ strftime_now('%Y') }}{{ messages[-1].content }}"), [tokenizer.eos_token_id])
    data = DataConfig(demonstrations=write(tmp_path / "d.jsonl", QA))
    assert any("today's date" in n for n in load_demonstrations(data, dated, 0).report.notes)


def test_source_not_set() -> None:
    with pytest.raises(ConfigError, match=r"data\.demonstrations is not set"):
        load_demonstrations(DataConfig(), chat(), 0)


def test_prompts_and_overlap(tmp_path: Path) -> None:
    demonstrations = load(tmp_path, RAW, heldout=5)
    held = {p.text for p in demonstrations.heldout_prompts}
    new = [{"prompt": f"New{i}: "} for i in range(6)]
    path = write(tmp_path / "p.jsonl", [*new, {"prompt": RAW[0]["prompt"]}, *[{"prompt": r["prompt"]} for r in RAW], {"prompt": " "}])
    prompts = load_prompts(path, "train", DataConfig(), chat(), 0)
    assert sorted(p.row for p in prompts.prompts) == list(range(27))  # the seeded order, not the file's
    assert [p.row for p in prompts.prompts] != list(range(27))
    assert prompts.report.dropped["empty prompt"].places == ["line 28"] and prompts.report.repeated_prompts == 1
    summary = data_summary(demonstrations, prompts)
    assert summary.overlap is not None and len(held) == 5
    assert (summary.overlap.prompts, summary.overlap.with_train, summary.overlap.with_heldout) == (26, 15, 5)
    assert "overlap: 15 of 26 distinct prompts (57.7 %) have a training demonstration" in summary.lines()
    assert json.loads(json.dumps(summary.to_dict()))["overlap"]["with_heldout"] == 5
    assert data_summary(demonstrations, None).lines()[-1].startswith("prompts: those of the training")


def test_prompts_in_another_format_are_pointed_out(tmp_path: Path) -> None:
    demonstrations = load(tmp_path, QA)
    path = write(tmp_path / "p.jsonl", [{"prompt": "Add 2 and 2."}])
    notes = data_summary(demonstrations, load_prompts(path, "train", DataConfig(), chat(), 0)).notes
    assert notes == ["prompts come as raw text, but demonstrations as conversation; see data.string_prompts"]
    as_chat = DataConfig(string_prompts="chat")
    assert data_summary(demonstrations, load_prompts(path, "train", as_chat, chat(string_prompts="chat"), 0)).notes == []


def test_prompt_choice(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{**r, "group": "a" if i < 30 else "b"} for i, r in enumerate(QA)])
    few = load_prompts(path, "train", DataConfig(), chat(), 0, 8)
    assert len(few.prompts) == 8 and few.report.left_out == 32
    every = load_prompts(path, "train", DataConfig(), chat(), 0)
    assert few.prompts == every.prompts[:8]
    per_group = load_prompts(path, "train", DataConfig(), chat(), 0, 8, per_group=True)
    assert per_group.report.groups == {"a": 8, "b": 8} or per_group.report.groups == {"b": 8, "a": 8}
    assert per_group.prompts[0].fields["reference"] == QA[per_group.prompts[0].row]["answer"]
    limit = len(every.prompts[0].ids) - 1
    with pytest.raises(DataError, match=r"no prompt is left of 40\. Dropped, the prompt is longer than"):
        load_prompts(path, "train", DataConfig(max_prompt_tokens=limit - 5), chat(), 0)
    with pytest.raises(DataError, match="no prompt is left"):
        load_prompts(path, "train", DataConfig(), chat(), 0, context=limit - 5)
