"""LoRA tuning: one base in memory, every other role a named adapter on it.

PEFT's switches have side effects: set_adapter asks for gradients on the chosen adapter and takes them from the others,
disabling and enabling adapters does the same. So each use records what it finds and puts it back, whatever happens inside.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from srppo.config import TuningConfig
from srppo.errors import ModelError
from srppo.models.adapters import read_adapter
from srppo.models.saving import save_adapter
from srppo.models.source import Source
from srppo.models.weights import copy_into, distinct_tensors
from srppo.seeding import stream_seed


class LoraRoles:
    """Holds one model and an adapter for each role but base. See roles.Store for the methods."""

    kind = "lora"

    def __init__(self, base: PreTrainedModel, tuning: TuningConfig, source: Source, seed: int):
        self._model, self._tuning, self._source, self._seed = base, tuning, source, seed
        self._peft: PeftModel | None = None  # made with the first adapter
        self._frozen = {"base"}
        self._in_use: list[tuple[str, bool]] = []  # (role, train) of the uses now open, innermost last
        if base.is_gradient_checkpointing:
            # Recomputation in the backward pass must meet the adapter of the forward pass, even after its `use` has ended.
            base.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": self._checkpoint_contexts})

    def names(self) -> set[str]:
        return {"base"} | (set(self._peft.peft_config) if self._peft else set())

    def create(self, role: str, source: str) -> None:
        """A copy of the source's adapter; from base, a new one, which changes nothing until it is trained."""
        self._add(role, self._new_config() if source == "base" else self._config_of(source))
        if source != "base":
            copy_into(self.tensors(role), self.tensors(source), role)

    def create_critic(self, source: str) -> None:
        self.create("critic", source)

    def load(self, role: str, place: str) -> None:
        """An adapter saved by PEFT. Raises ModelError if it is not plain LoRA, or does not fit the base."""
        config, weights = read_adapter(place, self._source)
        self._add(role, config)
        try:
            assert self._peft is not None
            result = set_peft_model_state_dict(self._peft, weights, adapter_name=role)
            missing = [k for k in result.missing_keys if f".{role}" in k and "lora_" in k]
            if result.unexpected_keys or missing:
                odd = (list(result.unexpected_keys) + missing)[0]
                raise ModelError(f"{place}: this adapter was made for another model than {self._source} ({odd} does not match)")
        except RuntimeError as error:
            self.drop(role)
            raise ModelError(f"{place}: this adapter does not fit {self._source}: {' '.join(str(error).split())[:300]}") from None
        except ModelError:
            self.drop(role)
            raise

    def _new_config(self) -> LoraConfig:
        t = self._tuning
        return LoraConfig(
            r=t.lora_rank,
            lora_alpha=t.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides it by r
            lora_dropout=t.lora_dropout,
            target_modules=t.lora_targets,
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in self._model.modules()),
            task_type="CAUSAL_LM",
        )

    def _config_of(self, role: str) -> PeftConfig:
        assert self._peft is not None
        config = self._peft.peft_config[role]
        return type(config).from_peft_type(**config.to_dict())

    def _add(self, role: str, config: PeftConfig) -> None:
        if any(role in name.split(".") for name, _ in self._model.named_modules()):
            raise ModelError(f"{role!r} is the name of a part of the model, so no adapter can have it")
        config.base_model_name_or_path = self._source.location
        config.revision = self._source.revision
        config.inference_mode = False
        with self._undisturbed(), torch.random.fork_rng():
            torch.manual_seed(stream_seed(self._seed, "adapter", role))
            try:
                if self._peft is None:
                    self._peft = get_peft_model(self._model, config, adapter_name=role)
                else:
                    self._peft.add_adapter(role, config)
            except (ValueError, TypeError) as error:
                raise ModelError(f"tuning.lora_targets {config.to_dict().get('target_modules')} does not fit {self._source}: {error}") from None
        self._activate("base")
        for parameter in self.tensors(role).values():
            parameter.requires_grad_(True)

    def drop(self, role: str) -> None:
        assert self._peft is not None
        with self._undisturbed():
            if set(self._peft.peft_config) == {role}:
                self._peft.unload()
                self._peft = None
            else:
                self._peft.delete_adapter(role)
        self._activate("base")
        self._frozen.discard(role)

    def freeze(self, role: str) -> None:
        self._frozen.add(role)
        for parameter in self.tensors(role).values():
            parameter.requires_grad_(False)

    def frozen(self, role: str) -> bool:
        return role in self._frozen

    @contextmanager
    def use(self, role: str, train: bool) -> Iterator[PreTrainedModel]:
        with self._undisturbed():
            self._activate(role)
            self._model.train(train)
            ...
            yield self._model
