"""Recipes and flags of any content: they give a configuration, or an error in words that names the recipe, the flag or the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from srppo.cli import cli
from srppo.config import build, dump, load_recipe
from srppo.errors import ConfigError
from srppo.flags import leaves
from srppo.run_config import load_run_config, refuse_changes
from srppo.run_folder import MARK
from tiny_fuzz import TEXTS, VALUES, bounded, damaged, spoil, used_or_refused

WHOLE = dump(build({"model": {"name": "m"}, "data": {"demonstrations": "d.jsonl", "columns": {"prompt": "q"}}})).encode()
# eight times itself, nine times over: 8^10 values in ten lines
LAUGHS = b"a: &a [x]\n" + b"".join(b"k%d: &%c [%s]\n" % (i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 8)) for i in range(9))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def check(path: Path) -> None:
    """Read as a recipe it works or is refused; what works is the same again after writing and reading it."""

    def use() -> None:
        config = load_recipe(path)
        assert build(yaml.safe_load(dump(config))) == config

    used_or_refused(use, path.parent, str(path))


@bounded(100)
@given(content=damaged(WHOLE))
@example(content=b"&a [*a]")
@example(content=b"a: &a [x]\nb: *a\n<<: *a")
@example(content=b"!!python/object/apply:os.system [echo]")
@example(content=b"model: !!python/name:os.system {}")
@example(content=LAUGHS)
@example(content=b"- " * 3000)
@example(content=b"[" * 3000)
@example(content=b"{a: " * 500)
@example(content=b"seed: 0x" + b"f" * 6000)
@example(content=b"seed: " + b"9" * 6000)
@example(content=b"seed: 1_000\n")
@example(content=b"seed: 1:20:30\n")
@example(content=b"seed: 2026-13-45\n")
@example(content=b"? {a: b}\n: c\n")
@example(content=b"? [a, b]\n: c\n")
@example(content=b"<<: 5\n")
@example(content=b"<<: [1]\n")
@example(content=b"---\na: 1\n---\nb: 2\n")
@example(content=b"%YAML 9.9\n---\nseed: 1\n")
@example(content=b"seed: !!int x\n")
@example(content=b"seed: !!timestamp x\n")
@example(content=b"seed: !!float x\n")
@example(content=b"seed: !!bool x\n")
@example(content=b"seed: !!binary '\xff'\n")
@example(content=b"seed: !!binary x\n")
@example(content=b"seed: !!set {a}\n")
@example(content=b"seed: !!omap [a: b]\n")
@example(content=b"seed: !!pairs [a]\n")
def test_any_bytes(place: Path, content: bytes) -> None:
    path = place / "r.yaml"
    path.write_bytes(content)
    check(path)


@bounded(70)
@given(data=st.data())
def test_any_value_anywhere(place: Path, data: st.DataObject) -> None:
    values = spoil(data, yaml.safe_load(WHOLE))
    path = place / "r.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=False), encoding="utf-8")
    check(path)


@bounded(100)
@given(text=st.text(st.sampled_from("ab:-[]{}#&*!|>'\"%@`,?\n \t0.e~<"), max_size=60))
def test_any_yaml_like_text(place: Path, text: str) -> None:
    path = place / "r.yaml"
    path.write_text(text, encoding="utf-8")
    check(path)


@bounded(100)
@given(key=st.sampled_from([leaf.key for leaf in leaves()]), text=st.one_of(TEXTS, VALUES.map(str)))
@example(key="ppo.clip", text="[" * 2000)
@example(key="seed", text="9" * 5000)
@example(key="sft.checkpoints_at", text="[&a [*a]]")
@example(key="data.columns", text="{? [a]: b}")
def test_any_flag(key: str, text: str) -> None:
    result = CliRunner().invoke(cli, ["config", f"--{key}", text], prog_name="srppo")
    assert result.exit_code in (0, 2), (result.exception, result.output)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 0 or key in result.output or "the flags" in result.output, result.output
    assert "Traceback" not in result.output


@bounded(60)
@given(data=st.data())
def test_the_config_of_a_run_folder(place: Path, data: st.DataObject) -> None:
    content = data.draw(damaged(WHOLE)) if data.draw(st.booleans()) else yaml.safe_dump(spoil(data, yaml.safe_load(WHOLE))).encode()
    folder = place / "run"
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_bytes(MARK.encode() + b"\n" + content)
    used_or_refused(lambda: load_run_config(folder, lambda text: None), folder, str(folder))
    used_or_refused(lambda: refuse_changes(folder, WHOLE.decode(), ()), folder, str(folder))


# Found by the tests above.
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: !!bool x", "line|KeyError"),
        ("seed: !!timestamp x", "AttributeError"),
        ("a: &a [*a]", "an alias stands inside what it names"),
        (LAUGHS.decode(), "its aliases mean more than 100000 values"),
        ("seed: 0x" + "f" * 6000, "seed: input should be a number of at most 64 bits, got a number too long to be shown"),
        ("ppo: {iterations: 99999999999999999999}", r"ppo\.iterations: input should be a number of at most 64 bits"),
        ("? {a: b}\n: c", "not valid YAML"),
    ],
)
def test_what_once_was_a_traceback(place: Path, text: str, said: str) -> None:
    path = place / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000
