"""The configuration: strict, with errors that say which key, why and what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from srppo.config import RunConfig, build, dump, load_recipe, merge, nearest_key, parse_yaml, valid_keys
from srppo.errors import ConfigError
from srppo.flags import leaves, template


def recipe(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def message(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        build(values, source="r.yaml")
    return str(error.value)


# --- what is accepted


def test_dump_is_a_recipe_of_the_same_values() -> None:
    config = build(
        {"ppo": {"learning_rate": 1e-7}, "data": {"columns": {"prompt": "β"}}, "sft": {"keep": 0.5}, "reward": {"checkpoint": 0.25}}
    )
    assert build(yaml.safe_load(dump(config))) == config
    assert build(parse_yaml(dump(config))) == config


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.e-5", ".1e-4", "0.1e-4", "+1e-5", "0.00001", "1.0e-5", "'1e-5'"])
def test_numbers_as_people_write_them(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads 1e-5 as a string; a learning rate must not be one."""
    config = load_recipe(recipe(tmp_path, f"ppo:\n  learning_rate: {text}\n"))
    assert config.ppo.learning_rate == pytest.approx(1e-5, rel=1e-12)


def test_exponents_in_unions_with_text(tmp_path: Path) -> None:
    """reward.checkpoint may be a path, so a number left as text would be taken for one."""
    text = "sft: {checkpoints_at: [5e-1, 1], keep: 5e-1}\nreward: {checkpoint: 5e-1}\ndata: {heldout: 2e-1}\n"
    config = load_recipe(recipe(tmp_path, text))
    assert (config.sft.keep, config.reward.checkpoint, config.data.heldout) == (0.5, 0.5, 0.2)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_read_as_itself(value: float) -> None:
    assert parse_yaml(repr(value)) == value and parse_yaml(f"{value:e}") == float(f"{value:e}")


@pytest.mark.parametrize("text", ["run-1e5x", "1e", "e5", "2024-01-01e", "sha1e5", "1e5.2", "a/1e-5"])
def test_text_that_looks_like_a_number_stays_text(text: str) -> None:
    assert parse_yaml(text) == text


def test_heldout_keeps_the_kind_it_is_given() -> None:
    assert type(build({"data": {"heldout": 16}}).data.heldout) is int
    assert type(build({"data": {"heldout": 0.25}}).data.heldout) is float
    assert type(build({"data": {"heldout": 16.0}}).data.heldout) is int


def test_shares_in_quotes_are_shares() -> None:
    config = build({"sft": {"keep": "0.5"}, "reward": {"checkpoint": "0.25"}})
    assert (config.sft.keep, config.reward.checkpoint) == (0.5, 0.25)
    assert build({"reward": {"checkpoint": "runs/nan"}}).reward.checkpoint == "runs/nan"


@pytest.mark.parametrize("text", ["ppo:\nsft: {}\n", "ppo: ~\n", "ppo:\n  # clip: 0.1\n"])
def test_section_with_everything_commented_out(tmp_path: Path, text: str) -> None:
    assert load_recipe(recipe(tmp_path, text)) == build({})


def test_overrides_win_and_leave_their_input_alone(tmp_path: Path) -> None:
    values = {"ppo": {"clip": 0.1}}
    assert merge(values, {"ppo.clip": 0.3, "sft.steps": 5, "seed": 7}) == {"ppo": {"clip": 0.3}, "sft": {"steps": 5}, "seed": 7}
    assert values == {"ppo": {"clip": 0.1}}
    assert load_recipe(recipe(tmp_path, "ppo: {clip: 0.1}\n"), {"ppo.clip": 0.3}).ppo.clip == 0.3


def test_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        build({}).ppo.clip = 0.5  # type: ignore[misc]


# --- what is refused


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"ppo": {"lerning_rate": 1}}, "unknown key 'ppo.lerning_rate'; did you mean 'ppo.learning_rate'?"),
        ({"modle": {"name": "x"}}, "unknown key 'modle'; did you mean 'model'?"),
        ({"ppo": {"kl_coef": 1}}, "unknown key 'ppo.kl_coef'; did you mean 'reward.kl_coef'?"),
        ({"learning_rate": 1}, "learning_rate'?"),
        ({"zzz": 1}, "unknown key 'zzz' (`srppo config` lists them all)"),
        ({"ppo.clip": 0.1}, "unknown key 'ppo.clip' at the top level; write 'clip' inside the section 'ppo'"),
        ({"ppo": {"clip": -1}}, "ppo.clip: input should be greater than 0, got -1"),
        ({"ppo": {"iterations": 2.5}}, "ppo.iterations: input should be a valid integer, got a number with a fractional part, got 2.5"),
        ({"ppo": {"learning_rate": "fast"}}, "ppo.learning_rate: input should be a valid number, got 'fast'"),
        ({"ppo": [1]}, "ppo: input should be a section: keys and values of its own, got [1]"),
        ({"tuning": {"kind": "lorra"}}, "tuning.kind: input should be 'full' or 'lora', got 'lorra'"),
        ({"data": {"heldout": "abc"}}, "data.heldout: input should be a valid number or a valid integer, got 'abc'"),
        ({"sft": {"keep": "worst"}}, "sft.keep: input should be 'auto', 'best' or 'last' or a valid number, got 'worst'"),
        ({"sft": {"checkpoints_at": [0.5, "x"]}}, "sft.checkpoints_at: input should be a valid number, got 'x'"),
        ({"sft": {"keep": 0.3}}, "sft.keep is 0.3, which is not among sft.checkpoints_at"),
        ({"reward": {"checkpoint": 0.3}}, "reward.checkpoint is 0.3, which is not among"),
        ({"sft": {"checkpoints_at": [0.0]}}, "shares of the training in (0, 1]"),
        ({"ppo": {"prompts_per_iteration": 2, "minibatches": 4}}, "a round has only 2 rollouts"),
        ({"data": {"max_prompt_tokens": 100, "max_tokens": 100}}, "leaves no room for a response"),
        ({"model": {"trust_remote_code": "perhaps"}}, "model.trust_remote_code: input should be a valid boolean"),
        ({3: 4}, "the key 3 is not text"),
        ({"ppo": {True: 4}}, "the key ppo.true is not text"),
        ({"sft": {"epochs": float("inf")}}, "sft.epochs: input should be a finite number, got inf"),
        ({"reward": {"checkpoint": float("nan")}}, "reward.checkpoint: input should be 'auto' or 'sft' or a finite number"),
        ({"ppo": {"iterations": True}}, "ppo.iterations: input should be a number, not true or false, got True"),
        ({"sft": {"checkpoints_at": [0.5, True]}}, "sft.checkpoints_at: input should be a number, not true or false"),
        ({"data": {"system_prompt": "a\0b"}}, "data.system_prompt: input should be text, without NUL characters"),
        ({"data": {"columns": {"prompt": "a\udc80"}}}, "data.columns: input should be text, without NUL characters"),
        ({"output": "a\udc80"}, "output: input should be text, without NUL characters and undecodable bytes, got 'a\\udc80'"),
        ({"data": {"heldout": 1.5}}, "data.heldout: input should be a share below 1 or a whole number of demonstrations, got 1.5"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], expected: str) -> None:
    text = message(values)
    assert text.startswith("r.yaml: ") and expected in text and "\n" not in text
    assert "pydantic" not in text.lower() and "Config" not in text


def test_several_mistakes_are_told_at_once_a_line_each() -> None:
    lines = message({"ppo": {"clip": -1, "gama": 1}, "sft": {"keep": "worst"}}).splitlines()
    assert lines[0] == "r.yaml:" and len(lines) == 4
    assert [line.split(":")[0].strip() for line in lines[1:3]] == ["sft.keep", "ppo.clip"]


@settings(deadline=None)
@given(st.sampled_from([k for k in valid_keys() if "." in k and len(k.split(".")[1]) > 4]), st.data())
def test_one_slip_of_the_finger_finds_the_key(key: str, data: st.DataObject) -> None:
    """A letter dropped from a key's name brings back that key, or one with the same name."""
    section, leaf = key.split(".")
    at = data.draw(st.integers(0, len(leaf) - 1))
    slip = leaf[:at] + leaf[at + 1 :]
    if f"{section}.{slip}" not in valid_keys():
        found = nearest_key(f"{section}.{slip}")
        assert found is not None and (found == key or found.split(".")[0] == section)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("ppo:\n  clip: 0.1\nsft: {}\nppo:\n  gamma: 1\n", r"r\.yaml, line 4: not valid YAML: the key 'ppo' is given twice"),
        ("ppo:\n  clip: 0.1\n  clip: 0.2\n", r"line 3: not valid YAML: the key 'clip' is given twice"),
        ("ppo: {clip: 0.1\nsft: {}\n", r"r\.yaml, line 2: not valid YAML"),
        ("ppo:\n\tclip: 1\n", r"r\.yaml, line 2: not valid YAML"),
        ("- a\n- b\n", r"a recipe is a YAML mapping of sections, found list"),
        ("", r"the recipe is empty: give it keys"),
        ("# ppo:\n#   clip: 0.1\n", r"the recipe is empty: give it keys"),
        ("seed: 2026-13-45\n", r"not valid YAML: ValueError: month must be in 1\.\.12"),
        ("seed: " + "[" * 5000, r"not valid YAML: it is nested too deeply"),
        ("!!python/object/apply:os.system ['true']\n", r"not valid YAML"),
        (b"\xff\xfe\x00", r"cannot be read as UTF-8 text"),
    ],
)
def test_bad_recipes(tmp_path: Path, content: str | bytes, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_recipe(recipe(tmp_path, content))


def test_missing_recipe_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path)


# --- documentation


def sections(model: type[BaseModel] = RunConfig) -> list[type[BaseModel]]:
    inner = [f.annotation for f in model.model_fields.values() if isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel)]
    return [model, *(s for i in inner for s in sections(i))]


def test_every_key_is_documented() -> None:
    assert [leaf.key for leaf in leaves() if not leaf.doc.endswith((".", ")", "…"))] == []
    assert {leaf.key for leaf in leaves()} == {
        k for k in valid_keys() if k not in {"model", "tuning", "data", *(s.split(".")[0] for s in valid_keys() if "." in s)}
    }


def test_template_is_a_recipe_of_the_defaults_with_every_key(tmp_path: Path) -> None:
    text = template()
    assert load_recipe(recipe(tmp_path, text)) == build({})
    values = parse_yaml(text)
    named = {k for k in values if not isinstance(values[k], dict)} | {
        f"{s}.{k}" for s, inner in values.items() if isinstance(inner, dict) for k in inner
    }
    assert named == {leaf.key for leaf in leaves()}
