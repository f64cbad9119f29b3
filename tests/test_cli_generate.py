"""srppo generate: against Hugging Face's own generation, many prompts at a time, and its mistakes in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, AutoTokenizer

from srppo.cli import cli
from srppo.config import build, dump
from srppo.generate import generate_text
from srppo.run_folder import RunFolder
from tiny_models import save_tiny


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), prog_name="srppo")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "llama"
    save_tiny(path, "llama")
    return path


def test_generate_greedy_equals_hugging_face(model: Path) -> None:
    result = call("generate", str(model), "--prompt", "ab", "--greedy", "--raw", "--max-new-tokens", "6", "--json")
    assert result.exit_code == 0, result.output
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = tokenizer("ab", return_tensors="pt")
    expected = network.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    record = json.loads(result.stdout)
    assert record["completion"] == tokenizer.decode(expected, skip_special_tokens=True) and record["tokens"] == len(expected)


def test_generate_many(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    for name in ("p.txt", "p.jsonl"):
        options = ["--samples", "2", "--raw", "--max-new-tokens", "3", "--json"]
        result = call("generate", str(model), "--prompts", str(tmp_path / name), *options)
        assert result.exit_code == 0, result.output
        assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["one", "one", "two", "two"]
    same = [generate_text(str(model), ["one"], max_new_tokens=5, seed=4)[0].completion for _ in range(2)]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{model}x", "--prompt", "a"], "no such folder"),
        (["{model}", "--prompt", " ", "--raw"], "prompt 1: empty prompt"),
        (["{model}", "--prompts", "{tmp}/none.txt"], "none.txt: cannot be read"),
        (["{model}", "--prompts", "{tmp}/empty.txt"], "holds no prompt"),
        (["{model}", "--prompts", "{tmp}/latin.txt"], "not UTF-8"),
        (["{model}", "--prompt", "caf\udce9"], "prompt 1: 'caf\\udce9' holds bytes that are not UTF-8"),
        (["{model}", "--prompt", "a", "--base", "x"], "a whole model, not an adapter; leave --base out"),
        (["{run}", "--prompt", "a"], "this run holds no model yet"),
    ],
)
def test_generate_errors(model: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    RunFolder.open(tmp_path / "run", dump(build({}))).close()
    filled = [a.format(model=model, tmp=tmp_path, run=tmp_path / "run") for a in arguments]
    result = call("generate", *filled)
    assert result.exit_code == 2 and expected in result.output, result.output


def test_generated_control_characters_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from srppo import generate

    hostile = generate.Completion("p\x1b[2J", "p", "\x1b]0;x\x07a\x1b[31mb", 3, True)
    monkeypatch.setattr(generate, "generate_text", lambda *_, **__: [hostile, hostile])
    result = call("generate", "m", "--prompt", "p")
    assert result.output == "[1] p\nab\n\n[2] p\nab\n\n"
    assert json.loads(call("generate", "m", "--prompt", "p", "--json").output.splitlines()[0])["completion"] == hostile.completion
