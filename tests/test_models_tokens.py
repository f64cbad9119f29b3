"""Which tokens end a response, which pads, and whether tokenizers and models fit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    GenerationConfig,
    PreTrainedModel,
)

from srppo.config import ModelConfig
from srppo.errors import ModelError
from srppo.models.load import (
    SpecialTokens,
    check_fit,
    check_same_vocabulary,
    load_tokenizer,
    special_tokens,
)
from tiny_models import BOS, EOS, EOT, IM_END, PAD, UNK, save_tiny, tiny_model, tiny_roles, tiny_tokenizer


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    check_fit(tiny_tokenizer(), tiny_model(vocabulary=103))
    check_fit(tiny_tokenizer(), tiny_model(vocabulary=128))  # spare rows are usual
    with pytest.raises(ModelError, match=r"103 tokens.*only 102"):
        check_fit(tiny_tokenizer(), tiny_model(vocabulary=102))
    place = save_tiny(tmp_path / "small", vocabulary=90)
    with pytest.raises(ModelError, match="do not belong together"):
        tiny_roles(place)


def test_models_of_different_vocabularies() -> None:
    a, b = tiny_tokenizer(), tiny_tokenizer(pad="none")
    check_same_vocabulary(a, b, 103, 103)
    with pytest.raises(ModelError, match="base embeds 103 tokens and sft 128"):
        check_same_vocabulary(a, b, 103, 128)
    b.add_tokens(["hello"])
    with pytest.raises(ModelError, match=r"103 and 104 tokens; 1 differ, such as 'hello'"):
        check_same_vocabulary(a, b, 103, 103)


def test_a_tokenizer_of_its_own_place(tmp_path: Path) -> None:
    tiny_tokenizer(eos="<|eot|>").save_pretrained(tmp_path / "tok")
    place = save_tiny(tmp_path / "m")
    assert load_tokenizer(ModelConfig(name=place)).eos_token == "</s>"
    assert load_tokenizer(ModelConfig(name=place, tokenizer=str(tmp_path / "tok"))).eos_token == "<|eot|>"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_tokenizer_of_another_model_is_refused(kind: str, tmp_path: Path) -> None:
    """Of the same size, with its characters in another order: nothing else would tell."""
    place = save_tiny(tmp_path / "m")
    shuffled = json.loads((tmp_path / "m/tokenizer.json").read_text())
    words = shuffled["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(shuffled))
    with pytest.raises(ModelError, match=r"2 of the 103 tokens of the model's own have other ids there, or none \(such as 'a', 'b'\)"):
        tiny_roles(place, kind, tokenizer=str(tmp_path / "other"))  # type: ignore[arg-type]
    tiny_tokenizer(eos="<|eot|>").save_pretrained(tmp_path / "same")
    assert tiny_roles(place, kind, tokenizer=str(tmp_path / "same")).special.eos_ids  # type: ignore[arg-type]


# --- special tokens


def model_with(eos: Any = None, generation_eos: Any = None, pad: Any = None) -> PreTrainedModel:
    model = tiny_model(eos_token_id=eos, pad_token_id=None)
    model.config.pad_token_id = pad
    model.generation_config = GenerationConfig(eos_token_id=generation_eos, pad_token_id=pad)
    return model


@pytest.mark.parametrize(
    ("tokenizer", "model", "expected"),
    [
        (lambda: tiny_tokenizer("own", chat=False), lambda: model_with(EOS), SpecialTokens(PAD, (EOS,))),
        (lambda: tiny_tokenizer("own"), lambda: model_with(EOS), SpecialTokens(PAD, (EOS, IM_END))),
        # the usual trap: pad = eos. EOS still ends a response, and padding is some other token
        (lambda: tiny_tokenizer("eos", chat=False), lambda: model_with(EOS, pad=EOS), SpecialTokens(UNK, (EOS,))),
        (lambda: tiny_tokenizer("none", chat=False), lambda: model_with(EOS), SpecialTokens(UNK, (EOS,))),
        (lambda: tiny_tokenizer("none", chat=False), lambda: model_with(EOS, pad=PAD), SpecialTokens(PAD, (EOS,))),
        # several: Llama 3's generation config names three
        (lambda: tiny_tokenizer("own", chat=False), lambda: model_with(EOS, [EOS, EOT]), SpecialTokens(PAD, (EOS, EOT))),
        (lambda: tiny_tokenizer("own", chat=False), lambda: model_with([EOT, BOS], [EOS, EOT]), SpecialTokens(PAD, (EOS, EOT, BOS))),
        (lambda: tiny_tokenizer("eos", eos="<|im_end|>"), lambda: model_with(EOS), SpecialTokens(UNK, (IM_END, EOS))),
        # a config's pad of -1 or beyond the vocabulary is no token
        (lambda: tiny_tokenizer("none", chat=False), lambda: model_with(EOS, pad=-1), SpecialTokens(UNK, (EOS,))),
        (lambda: tiny_tokenizer("none", chat=False), lambda: model_with(EOS, pad=5000), SpecialTokens(UNK, (EOS,))),
        (lambda: tiny_tokenizer("own", chat=False, eos=None), lambda: model_with(None, EOT), SpecialTokens(PAD, (EOT,))),
        (lambda: tiny_tokenizer("none", eos=None), lambda: None, SpecialTokens(UNK, (IM_END,))),
    ],
)
def test_special_tokens(tokenizer: Callable[[], Any], model: Callable[[], Any], expected: SpecialTokens) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert special_tokens(tokenizer(), model()) == expected


def test_a_configs_eos_that_is_an_ordinary_word_is_ignored() -> None:
    """Llama's config says eos 2 by default, also where 2 is a letter."""
    with pytest.warns(UserWarning, match=r"\[20\].*ordinary tokens"):
        assert special_tokens(tiny_tokenizer(chat=False), model_with(20)).eos_ids == (EOS,)


def test_no_end_at_all() -> None:
    with pytest.raises(ModelError, match="no response could ever end"):
        special_tokens(tiny_tokenizer(chat=False, eos=None), model_with(None))


def test_templates_that_close_with_words_or_fail() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    assert special_tokens(tokenizer).eos_ids == (EOS,)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{{ '<|eot|>' }}<|im_end|>{% endfor %}"
    assert special_tokens(tokenizer).eos_ids == (EOS, EOT)
    tokenizer.chat_template = "{{ raise_exception('needs tools') }}"
    with pytest.warns(UserWarning, match="needs tools"):
        assert special_tokens(tokenizer).eos_ids == (EOS,)
