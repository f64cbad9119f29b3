"""A reward model: any Hugging Face sequence classifier, asked for its score of prompts and responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from srppo.config import RunConfig
from srppo.errors import ConfigError, ModelError
from srppo.limits import bounded
from srppo.masking import token_chunks
from srppo.memory_limit import limits
from srppo.models.load import quiet, resolve_device
from srppo.models.over_rollout import KEY as TOKENS
from srppo.models.source import find_source, read_json, refuse_foreign_code, refuse_pickle, unreachable
from srppo.models.tokens import vocabulary_size
from srppo.records import Prompt, Rollout, pad_sequences
from srppo.world import deal, world

KEY = "reward.preference_model"
_ONE_BY_ONE = ("regression", "multi_label_classification")  # problem types whose outputs do not compete


class PreferenceModel:
    """f(x, y) of a reward model: its one output, or what one of its labels says. Frozen.

    Of several labels that exclude each other the score is the log-odds of the chosen one; of a multi-label classifier its logit (which
    is its log-odds), of a regression its value.
    What it reads: the policy's own token ids, where its tokenizer and chat template are the policy's. Otherwise text, tokenized anew:
    the conversation by the classifier's chat template where it has one, else the prompt as rendered and the response after it.
    What is longer than it can read loses its beginning, but for leading special tokens; `cut` counts these.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[Prompt],
        policy_tokenizer: PreTrainedTokenizerBase,
        decode: Callable[[list[int]], str],
        *,
        policy_templates: Sequence[str | None] = (),
    ):
        """prompts: those whose responses will be judged. decode: response ids to text. policy_templates: further chat templates that are
        as good as the policy's, such as the one (or none) that the run has put its own in place of.

        Raises ModelError where the classifier cannot be loaded or used, its chat template refuses a prompt, or it is too short for a
        prompt and the longest response; ConfigError where several labels leave open which one counts, or there is no such label.
        """
        assert config.reward.preference_model is not None
        self.name, self.cut = config.reward.preference_model, 0
        self._prompts = {tuple(p.ids): p for p in prompts}
        self._decode, self._autocast = decode, config.model.autocast
        self._model = _load(self.name, config)
        self._tokenizer = _load_tokenizer(self.name, config)
        self._rows = cast(nn.Embedding, self._model.get_input_embeddings()).num_embeddings
        if vocabulary_size(self._tokenizer) > self._rows:
            raise ModelError(
                f"{self.name}: its tokenizer has {vocabulary_size(self._tokenizer)} tokens but the classifier embeds only {self._rows}: "
                f"they do not belong together; check {KEY}"
            )
        templates = (policy_tokenizer.chat_template, *policy_templates)
        self._same = self._tokenizer.get_vocab() == policy_tokenizer.get_vocab() and self._tokenizer.chat_template in templates
        self._label = _label(self._model, config.reward.preference_label, self.name)
        self._limit = _positions(self._model)
        longest = max((p.ids if self._same else self._text_ids(p, "") for p in prompts), key=len, default=[])
        if self._limit is not None and len(longest) + config.rollout.max_new_tokens > self._limit:
            raise ModelError(
                f"{self.name}: the preference model reads {self._limit} tokens, but a prompt has {len(longest)} and its response up to "
                f"{config.rollout.max_new_tokens} (rollout.max_new_tokens); lower data.max_prompt_tokens, or take another model"
            )

    def scores(self, rollout: Rollout, tokens: int) -> Tensor:
        """[B] float32 on the CPU: the score of each response with its prompt. tokens: in memory at once.

        Raises ModelError for scores that are not finite.
        """
        texts = [self._shortened(self._ids(rollout, row)) for row in range(len(rollout.prompt_ids))]
        out, here = torch.zeros(len(texts)), world()
        mine = deal([len(t) for t in texts], here.size)[here.rank]

        def run(size: int) -> None:
            for chunk in token_chunks([len(texts[i]) for i in mine], size):
                rows = [mine[i] for i in chunk]
                out[rows] = self._score([texts[i] for i in rows]).cpu()

        limits.within(TOKENS, tokens, max((len(texts[i]) for i in mine), default=1), run, alone=True)
        here.sum_(out)
        if not out.isfinite().all():
            raise ModelError(f"{self.name}: the preference model gave NaN or infinite scores; use model.dtype float32, or another model")
        return out

    def _ids(self, rollout: Rollout, row: int) -> list[int]:
        prompt, response = rollout.prompt_ids[row], rollout.response_ids(row)
        if self._same and max(prompt + response) < self._rows:  # a policy may have spare embedding rows
            return [*prompt, *response]
        known = self._prompts.get(tuple(prompt)) or Prompt(prompt, self._decode(prompt), -1)
        return self._text_ids(known, self._decode(response))

    def _text_ids(self, prompt: Prompt, answer: str) -> list[int]:
        tokenizer = self._tokenizer
        if not tokenizer.chat_template:
            return _tokenized(tokenizer, prompt.text + answer)
        asked = prompt.messages or [{"role": "user", "content": prompt.text}]
        talk = [*asked, {"role": "assistant", "content": answer}]
        try:
            with bounded():
                return list(cast(list[int], tokenizer.apply_chat_template(talk, return_dict=False)))
        except Exception as error:  # whatever the template raises: some take no system message, or ask for turns in order
            raise ModelError(
                f"{self.name}: the preference model's chat template refuses the prompt of row {prompt.row} ({error}); change the prompt "
                "or data.system_prompt, or take another model"
            ) from None

    def _shortened(self, ids: list[int]) -> list[int]:
        if self._limit is None or len(ids) <= self._limit:
            return ids
        self.cut += 1
        special = set(self._tokenizer.all_special_ids)
        head = next((i for i, token in enumerate(ids) if token not in special), 0)
        return ids[:head] + ids[len(ids) - self._limit + head :]

    @torch.no_grad()
    def _score(self, texts: list[list[int]]) -> Tensor:
        """[b] of a batch, padded at the right."""
        config = self._model.config.get_text_config()
        pad = config.pad_token_id
        config.pad_token_id = fill = pad if pad is not None and 0 <= pad < self._rows else _unused(texts)
        try:
            ids = pad_sequences(texts, fill)
            seen = pad_sequences([[1] * len(t) for t in texts])
            device = self._model.device
            with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast == "bfloat16"):
                logits = self._model(input_ids=ids.to(device), attention_mask=seen.to(device)).logits.float()
        finally:
            config.pad_token_id = pad
        label = self._label or 0
        if logits.shape[1] == 1 or self._model.config.problem_type in _ONE_BY_ONE:
            return cast(Tensor, logits[:, label])
        others = torch.cat([logits[:, :label], logits[:, label + 1 :]], 1)
        return logits[:, label] - others.logsumexp(1)


def _load(name: str, config: RunConfig) -> PreTrainedModel:
    source, settings = find_source(name, key=KEY), config.model
    if source.gguf_file is not None:
        raise ModelError(f"{name}: {KEY} takes a Hugging Face folder or hub id; a GGUF file holds no classifier")
    description = read_json(source, "config.json")
    if description is None:
        raise ModelError(f"{name}: {KEY} has no config.json; give a Hugging Face sequence classifier")
    refuse_foreign_code(source, description, settings.trust_remote_code)
    if description.get("is_encoder_decoder"):
        raise ModelError(f"{name}: {KEY} is an encoder-decoder model ({description.get('model_type')}); take an encoder or a decoder")
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
            f"be random; {KEY} takes a model trained as a reward model or classifier"
        )
    nn.Module.to(model, resolve_device(settings.device))
    model.eval().requires_grad_(False)
    return cast(PreTrainedModel, model)


def _load_tokenizer(name: str, config: RunConfig) -> PreTrainedTokenizerBase:
    source = find_source(name, key=KEY)
    try:
        found = AutoTokenizer.from_pretrained(source.location, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:
        raise ModelError(f"{name}: the preference model's tokenizer cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    if len(found.get_vocab()) <= len(set(found.all_special_ids)):  # invented, where the folder has no tokenizer files
        raise ModelError(f"{name}: holds no tokenizer files; save the classifier's tokenizer beside it")
    return cast(PreTrainedTokenizerBase, found)


def _tokenized(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Plain text with the tokenizer's own special tokens; a BOS that the text starts with is not put there twice."""
    ids = list(cast(list[int], tokenizer(text, verbose=False)["input_ids"]))
    twice = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
    return ids[1:] if twice else ids


def _label(model: PreTrainedModel, wanted: str | None, name: str) -> int | None:
    """The index of the label that is the score; None for a model with one output."""
    count, names = int(model.config.num_labels or 0), {int(i): str(n) for i, n in (model.config.id2label or {}).items()}
    listed = ", ".join(f"{i} ({n})" for i, n in sorted(names.items())[:8])
    if count == 1:
        if wanted is not None:
            raise ConfigError(f"reward.preference_label is {wanted!r}, but {name} has a single output, which is the score; remove it")
        return None
    if wanted is None:
        raise ConfigError(f"{name} has {count} labels, {listed}; say with reward.preference_label which one is the reward")
    found = [i for i, n in names.items() if wanted == n] or [i for i in names if wanted == str(i)]
    if len(found) != 1:
        raise ConfigError(f"reward.preference_label is {wanted!r}, but the labels of {name} are {listed}")
    return found[0]


def _positions(model: PreTrainedModel) -> int | None:
    """Tokens the classifier can read, where its configuration says; position tables with a padding row begin after that."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if most is None or most <= 0:
        return None
    tables = (m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and n.endswith("position_embeddings"))
    return int(most) - max((t.padding_idx + 1 for t in tables if t.padding_idx is not None), default=0)


def _unused(texts: list[list[int]]) -> int:
    """A token id that is in none of the texts: what a model without a pad token may take for padding."""
    present = {i for text in texts for i in text}
    return next(i for i in range(len(present) + 1) if i not in present)
