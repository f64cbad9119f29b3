"""The tokenizer, the special tokens that matter, and the checks that vocabularies fit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from srppo.config import ModelConfig
from srppo.errors import ModelError
from srppo.limits import bounded
from srppo.models.source import find_source, model_source, unreachable
from srppo.models.weights import embedding_rows

_MARK = "0815"  # stands for an assistant's words when a chat template is asked what follows them


@dataclass(frozen=True)
class SpecialTokens:
    """pad_id fills rows at the right; masks keep it from mattering. Sampling any of eos_ids ends a response."""

    pad_id: int
    eos_ids: tuple[int, ...]


def load_tokenizer(model: ModelConfig, *, name: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of `name`, else model.tokenizer, else of the model itself. Raises ModelError if there is none."""
    other = name or model.tokenizer
    source = find_source(other) if other else model_source(model)
    try:
        found = AutoTokenizer.from_pretrained(source.location, trust_remote_code=model.trust_remote_code, **source.arguments())
    except Exception as error:  # the tokenizers library raises plain Exceptions for broken files
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{source}: its tokenizer runs Python code that comes with it, which is refused by default; read that code, then set "
                "model.trust_remote_code: true if you trust it, or name another tokenizer with model.tokenizer"
            ) from None
        raise ModelError("no tokenizer. " + unreachable(source, error) + "; model.tokenizer can name another place") from error
    if source.gguf_file is not None:
        _drop_phantoms(found)
    return found


def _drop_phantoms(tokenizer: Any) -> None:
    """Remove the special tokens that the conversion from GGUF adds after the file's own (such as <|endoftext|> to a Llama):
    the model has no embedding for them."""
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    own = [token for token in inner["added_tokens"] if token["id"] < tokenizer.vocab_size]
    if len(own) < len(inner["added_tokens"]):
        inner["added_tokens"] = own
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(inner))


def mend_gguf_ends(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Take the tokenizer's BOS and EOS from the GGUF file's own numbers, which the model's config holds.

    transformers up to 5.17 gives the tokenizer of a Llama GGUF its BOS token as EOS.
    """
    for name in ("bos_token", "eos_token"):
        token = getattr(model.config, f"{name}_id", None)
        if isinstance(token, int) and (token in _special_ids(tokenizer) or _looks_special(tokenizer, token)):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token))


def special_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> SpecialTokens:
    """Every token that ends a response, and one to pad with.

    EOS ids: the tokenizer's, those of the model's generation config and config (one or a list), and the token with which the
    chat template closes an assistant turn. An id of the configs counts only where the tokenizer knows it as a special or added
    token, or its text has the shape of one (</s>): configs carry defaults (Llama's 2) that mean an ordinary word elsewhere;
    such an id is named in a warning.
    Padding: the tokenizer's pad token, else the config's, else unk, bos or the first id; never an EOS id where there is another.
    Raises ModelError if nothing ends a response.
    """
    special = _special_ids(tokenizer)
    eos: list[int] = _ids(tokenizer.eos_token_id)
    ordinary: list[int] = []
    for holder in _configs(model):
        for token in _ids(getattr(holder, "eos_token_id", None)):
            (eos if token in special or _looks_special(tokenizer, token) else ordinary).append(token)
    end_of_turn = _end_of_turn(tokenizer, special)
    eos_ids = tuple(dict.fromkeys([*eos, *([] if end_of_turn is None else [end_of_turn])]))
    ignored = sorted({t for t in ordinary if t >= 0 and t not in eos_ids})
    if ignored:
        warnings.warn(
            f"the model's config calls the ids {ignored} end of sequence, but to the tokenizer they are ordinary tokens: ignored",
            stacklevel=2,
        )
    if not eos_ids:
        raise ModelError(
            "the tokenizer has no end-of-sequence token and the model names none, so no response could ever end; set tokenizer.eos_token"
        )
    return SpecialTokens(_pad_id(tokenizer, model, eos_ids), eos_ids)


def _pad_id(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None, eos_ids: tuple[int, ...]) -> int:
    size = vocabulary_size(tokenizer)
    configs = [i for holder in _configs(model) for i in _ids(getattr(holder, "pad_token_id", None))]
    candidates = [
        *_ids(tokenizer.pad_token_id),
        *configs,
        *_ids(tokenizer.unk_token_id),
        *_ids(tokenizer.bos_token_id),
        *range(len(eos_ids) + 1),
    ]
    return next((i for i in candidates if 0 <= i < size and i not in eos_ids), eos_ids[0])


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, special: set[int]) -> int | None:
    """The first special token after the assistant's words in a conversation rendered by the chat template; None without one."""
    if not tokenizer.chat_template:
        return None
    try:
        with bounded():
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": "1"}, {"role": "assistant", "content": _MARK}], tokenize=False
            )
    except Exception as error:  # a Jinja template can raise anything
        warnings.warn(
            f"the chat template does not render a plain conversation ({error}); its end-of-turn token is not looked for", stacklevel=3
        )
        return None
    _, found, tail = str(text).rpartition(_MARK)
    if not found:
        return None
    return next((i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in special), None)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Special tokens and added ones. (Some tokenizers add runs of blanks, which end nothing.)"""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.content.strip())}


def _looks_special(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    text = tokenizer.convert_ids_to_tokens(token) if 0 <= token < vocabulary_size(tokenizer) else None
    return isinstance(text, str) and len(text) > 2 and text[0] == "<" and text[-1] == ">"


def _configs(model: PreTrainedModel | None) -> list[Any]:
    if model is None:
        return []
    return [c for c in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()) if c is not None]


def _ids(value: int | Iterable[int] | None) -> list[int]:
    if value is None:
        return []
    return [int(i) for i in ([value] if isinstance(value, int) else value) if i is not None]


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id the tokenizer can give."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_fit(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """ModelError if the tokenizer can give ids that the embedding has no row for. (Spare rows are usual and allowed.)"""
    rows, ids = embedding_rows(model), vocabulary_size(tokenizer)
    if ids > rows:
        raise ModelError(
            f"the tokenizer ({tokenizer.name_or_path or 'without a name'}) has {ids} tokens but the model "
            f"({model.name_or_path or 'without a name'}) embeds only {rows}: they do not belong together; check model.tokenizer"
        )


def check_own_vocabulary(given: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> None:
    """ModelError unless a tokenizer from another place gives every token of the model's own the same id. Further tokens are allowed."""
    words, other = own.get_vocab(), given.get_vocab()
    differing = sorted(token for token, i in words.items() if other.get(token) != i)
    if differing:
        shown = ", ".join(repr(t) for t in differing[:5])
        raise ModelError(
            f"the tokenizer {given.name_or_path or 'of model.tokenizer'} does not match the model {own.name_or_path}: {len(differing)} of "
            f"the {len(words)} tokens of the model's own have other ids there, or none (such as {shown}), so the model would read other "
            "words than were written; remove model.tokenizer, or name one of this model's family"
        )


def check_same_vocabulary(
    a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase, rows_a: int, rows_b: int, names: tuple[str, str] = ("base", "sft")
) -> None:
    """ModelError unless both tokenizers map the same tokens to the same ids, and both embeddings have the same number of rows.

    A log-ratio of two models is defined only over the same tokens.
    """
    words_a, words_b = a.get_vocab(), b.get_vocab()
    if words_a != words_b:
        differing = sorted(t for t in words_a.keys() | words_b.keys() if words_a.get(t) != words_b.get(t))
        sizes, shown = f"{len(words_a)} and {len(words_b)} tokens", ", ".join(repr(t) for t in differing[:5])
        raise ModelError(
            f"{names[0]} and {names[1]} have different vocabularies ({sizes}; {len(differing)} differ, such as {shown}): "
            "their log-probabilities cannot be compared; use models of one family and one tokenizer"
        )
    if rows_a != rows_b:
        raise ModelError(
            f"{names[0]} embeds {rows_a} tokens and {names[1]} {rows_b}, though their tokenizers agree: "
            "one was resized; resize the other alike"
        )
