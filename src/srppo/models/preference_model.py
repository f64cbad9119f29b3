"""A reward model: any Hugging Face sequence classifier, asked for its score of prompts and responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from srppo.config import RunConfig
from srppo.errors import ConfigError, ModelError
from srppo.masking import length_sorted_chunks
from srppo.models.load import quiet, resolve_device
from srppo.models.source import find_source, read_json, refuse_foreign_code, refuse_pickle, unreachable
from srppo.records import Prompt, Rollout, pad_sequences

Known = dict[tuple[int, ...], Prompt]


class PreferenceModel:
    """f(x, y) of a reward model: its one output, or the log-odds of one of its labels. Frozen.

    What it reads: the policy's own token ids, where its tokenizer and chat template are the policy's. Otherwise text, tokenized anew:
    the conversation by the classifier's chat template where it has one, else the prompt as rendered and the response after it.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[Prompt],
        policy_tokenizer: PreTrainedTokenizerBase,
        decode: Callable[[list[int]], str],
    ):
        """prompts: every prompt whose responses will be judged. decode: response ids to text.

        Raises ModelError where the classifier cannot be loaded, has several labels and none is chosen, or is too short for a prompt
        and the longest response; ConfigError where it has no such label.
        """
        assert config.reward.preference_model is not None
        self.name = config.reward.preference_model
        self._prompts: Known = {tuple(p.ids): p for p in prompts}
        self._decode, self._autocast = decode, config.model.autocast
        self._model = _load(self.name, config)
        self._tokenizer = _load_tokenizer(self.name, config)
        self._same = _same(self._tokenizer, policy_tokenizer)
        self._label = _label(self._model, config.reward.preference_label, self.name)
        self._limit = _positions(self._model)
        longest = max((self._text_ids(p, "") if not self._same else p.ids for p in prompts), key=len, default=[])
        if self._limit is not None and len(longest) + config.rollout.max_new_tokens > self._limit:
            raise ModelError(
                f"{self.name}: the preference model reads {self._limit} tokens, but a prompt has {len(longest)} and its response up to "
                f"{config.rollout.max_new_tokens} (rollout.max_new_tokens); lower data.max_prompt_tokens, or take another model"
            )

    def scores(self, rollout: Rollout, rows: int) -> Tensor:
        """[B] float32 on the CPU: the score of each response with its prompt. rows: sequences in memory at once."""
        texts = [self._ids(rollout, row) for row in range(len(rollout.prompt_ids))]
        out = torch.zeros(len(texts))
        for chunk in length_sorted_chunks([len(t) for t in texts], rows):
            out[chunk] = self._score([texts[i] for i in chunk]).cpu()
        return out

    def _ids(self, rollout: Rollout, row: int) -> list[int]:
        prompt, response = rollout.prompt_ids[row], rollout.response_ids(row)
        if self._same:
            return [*prompt, *response]
        return self._text_ids(self._prompts[tuple(prompt)], self._decode(response))[-(self._limit or 0) :]

    def _text_ids(self, prompt: Prompt, answer: str) -> list[int]:
        if self._tokenizer.chat_template:
            asked = prompt.messages or [{"role": "user", "content": prompt.text}]
            talk = [*asked, {"role": "assistant", "content": answer}]
            return list(cast(list[int], self._tokenizer.apply_chat_template(talk, return_dict=False)))
        return list(cast(list[int], self._tokenizer(prompt.text + answer, verbose=False)["input_ids"]))

    @torch.no_grad()
    def _score(self, texts: list[list[int]]) -> Tensor:
        """[b] of a batch, padded at the right."""
        pad = self._model.config.get_text_config().pad_token_id
        self._model.config.get_text_config().pad_token_id = fill = _unused(texts) if pad is None else pad
        try:
            ids = pad_sequences(texts, fill)
            seen = pad_sequences([[1] * len(t) for t in texts])
            device = self._model.device
            with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast == "bfloat16"):
                logits = self._model(input_ids=ids.to(device), attention_mask=seen.to(device)).logits.float()
        finally:
            self._model.config.get_text_config().pad_token_id = pad
        if self._label is None:
            return cast(Tensor, logits[:, 0])
        others = torch.cat([logits[:, : self._label], logits[:, self._label + 1 :]], 1)
        return logits[:, self._label] - others.logsumexp(1)


def _load(name: str, config: RunConfig) -> PreTrainedModel:
    source, settings = find_source(name), config.model
    description = read_json(source, "config.json")
    if description is None:
        raise ModelError(f"{name}: reward.preference_model has no config.json; give a Hugging Face sequence classifier")
    refuse_foreign_code(source, description, settings.trust_remote_code)
    refuse_pickle(source, settings.allow_pickle)
    safe: dict[str, Any] = {} if settings.allow_pickle else {"use_safetensors": True}
    try:
        with quiet():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source.location,
                trust_remote_code=settings.trust_remote_code,
                dtype=getattr(torch, settings.dtype),
                output_loading_info=True,
                **safe,
            )
    except Exception as error:  # damaged files make the readers under transformers raise whatever they meet
        raise ModelError(unreachable(source, error)) from error
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"{name}: its files lack {len(missing)} of the weights of a sequence classifier (such as {missing[0]}), so its scores would "
            "be random; reward.preference_model takes a model trained as a reward model or classifier"
        )
    nn.Module.to(model, resolve_device(settings.device))
    model.eval().requires_grad_(False)
    return cast(PreTrainedModel, model)


def _load_tokenizer(name: str, config: RunConfig) -> PreTrainedTokenizerBase:
    source = find_source(name)
    try:
        found = AutoTokenizer.from_pretrained(source.location, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:
        raise ModelError(
            f"{name}: the tokenizer of reward.preference_model cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    return cast(PreTrainedTokenizerBase, found)


def _same(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same ids to the same conversations, as far as vocabulary and template tell."""
    return one.get_vocab() == other.get_vocab() and one.chat_template == other.chat_template


def _label(model: PreTrainedModel, wanted: str | int | None, name: str) -> int | None:
    """The index of the label that is the score; None for a model with one output."""
    count, names = int(model.config.num_labels or 0), {int(i): str(n) for i, n in (model.config.id2label or {}).items()}
    listed = ", ".join(f"{i} ({n})" for i, n in sorted(names.items())[:8])
    if count == 1:
        if wanted is not None:
            raise ConfigError(f"reward.preference_label is {wanted!r}, but {name} has a single output, which is the score; remove it")
        return None
    if wanted is None:
        raise ConfigError(f"{name} has {count} labels, {listed}; say with reward.preference_label which one's log-odds are the reward")
    found = [i for i, n in names.items() if wanted in (i, n, str(i))]
    if not found:
        raise ConfigError(f"reward.preference_label is {wanted!r}, but the labels of {name} are {listed}")
    return found[0]


def _positions(model: PreTrainedModel) -> int | None:
    """Tokens the classifier can read, where its configuration says."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if most is None:
        return None
    first = (config.pad_token_id or 0) + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return int(most) - first


def _unused(texts: list[list[int]]) -> int:
    """A token id that is in none of the texts: what a model without a pad token may take for padding."""
    present = {i for text in texts for i in text}
    return next(i for i in range(len(present) + 1) if i not in present)
