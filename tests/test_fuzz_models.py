"""Model and adapter folders, chat templates: of any content they load, or are refused in words that name the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from srppo.config import build
from srppo.data.chat import ChatFormat
from srppo.data.messages import Unusable
from srppo.errors import ConfigError, ModelError
from srppo.models.load import load_model, load_tokenizer, special_tokens
from srppo.models.roles import build_roles
from srppo.planning.architecture import read_architecture
from tiny_fuzz import SCALARS, VALUES, bounded, damaged, json_bytes, spoil, used_or_refused
from tiny_models import EOS, save_tiny, standard_roles, tiny_tokenizer

SMALL = st.one_of(SCALARS.filter(lambda v: not isinstance(v, (int, float)) or isinstance(v, bool) or not 300 < abs(v) < 10**12), VALUES)
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "m"
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    roles = standard_roles(str(model), "lora")
    roles.save("policy", model.parent / "adapter")
    return model.parent / "adapter"


def settings(folder: Path, kind: str = "full") -> Any:
    return build({"model": {"name": str(folder), "device": "cpu"}, "tuning": {"kind": kind, "lora_rank": 4}})


def replaced(path: Path, content: bytes, use: Any) -> None:
    """Use the folder with another content of one of its files, which must be left as it is then."""
    whole = path.read_bytes()
    try:
        path.unlink()  # weights may be mapped
        path.write_bytes(content)
        used_or_refused(use, path.parent)
    finally:
        path.unlink()
        path.write_bytes(whole)


def load(folder: Path) -> None:
    config = settings(folder)
    model = load_model(config.model)
    tokenizer = load_tokenizer(config.model)
    special_tokens(tokenizer, model)


@bounded(50)
@given(data=st.data())
def test_any_value_in_a_models_files(model: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*FILES[:3], "config.json"]))
    content = json_bytes(spoil(data, json.loads((model / name).read_bytes()), SMALL))
    replaced(model / name, content, lambda: load(model))


@bounded(30)
@given(data=st.data())
def test_any_bytes_in_a_models_files(model: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    replaced(model / name, data.draw(damaged((model / name).read_bytes())), lambda: load(model))


@bounded(40)
@given(data=st.data())
def test_the_plan_of_any_config(model: Path, data: st.DataObject) -> None:
    content = json_bytes(spoil(data, json.loads((model / "config.json").read_bytes()), SMALL))
    replaced(model / "config.json", content, lambda: read_architecture(settings(model).model))


@bounded(30)
@given(data=st.data())
def test_any_adapter(model: Path, adapter: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"]))
    path = adapter / name
    if name.endswith(".json") and data.draw(st.booleans()):
        content = json_bytes(spoil(data, json.loads(path.read_bytes()), SMALL))
    else:
        content = data.draw(damaged(path.read_bytes()))

    def use() -> None:
        roles = build_roles(settings(model, "lora"))
        roles.load("sft", adapter)

    replaced(path, content, use)


PIECES = (
    ["{{ messages }}", "{{ messages[0]['content'] }}", "{% for m in messages %}", "{% endfor %}", "{{ m.role }}", "{{ m.content }}"]
    + ["{{ eos_token }}", "{{ bos_token }}", "{% if add_generation_prompt %}", "{% endif %}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}"]
    + ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[9] }}", "{{ x.y.z }}", "{% set a = 5 %}", "{{ a | tojson }}"]
    + ["{% include 'x' %}", "{% import 'x' as y %}", "{{ cycler.__init__.__globals__ }}", "{{ range(10 ** 9) }}", "{%- generation -%}"]
    + ["{% endgeneration %}", "{{ strftime_now('%Y') }}", "{{ '%c' % 5000000 }}", "{{ 'x' | foo }}", "{{ none + 1 }}", "{% macro f() %}"]
    + ["{% endmacro %}", "{{ f() }}", "{{ self }}", "{{ messages | map('upper') | list }}", "{% break %}", "\ud800", "text", "{#", "{{"]
)


@bounded(150)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=6), loss_on=st.sampled_from(["response", "assistant"]))
@example(pieces=["{% macro f() %}", "{{ f() }}", "{% endmacro %}", "{{ f() }}"], loss_on="response")
def test_any_chat_template(pieces: list[str], loss_on: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "".join(pieces)
    assume(tokenizer.chat_template)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2

    def use() -> None:
        chat = ChatFormat(tokenizer, [EOS], loss_on=loss_on)
        try:
            chat.render_prompt(talk[:-1])
            chat._encode_chat(talk)
        except Unusable as dropped:
            assert dropped.reason

    used_or_refused(use)


# Found by the tests above.
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1e\\+09, which no model has"),
        ({"hidden_size": 10**12}, "hidden_size: 1e\\+12, which no model has"),
        ({"model_type": ["llama"]}, "names the architecture"),
        ({"vocab_size": "many"}, "cannot be loaded"),
    ],
)
def test_configs_that_no_model_has(model: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    for use in (lambda: load(folder), lambda: read_architecture(settings(folder).model)):
        with pytest.raises(ModelError, match=said) as caught:
            use()
        assert str(folder) in str(caught.value)


def test_a_template_that_is_half_a_character() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}\ud800"
    with pytest.raises((ConfigError, ModelError)):
        ChatFormat(tokenizer, [EOS]).render_prompt([{"role": "user", "content": "a"}])
