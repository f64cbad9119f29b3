"""Reading a LoRA adapter that PEFT saved, and refusing those that could not be switched off again."""

from __future__ import annotations

import warnings
from pathlib import PurePath

from peft import LoraConfig, PeftConfig
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils.hub import cached_file

from srppo.errors import ModelError
from srppo.models.source import Source, find_source, read_json, unreachable

SAFE_NAME = "adapter_model.safetensors"
_MERGE = "merge it into its base and use tuning.kind: full"


def read_adapter(place: str, base: Source, allow_pickle: bool = False) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and weights (on the CPU) of an adapter folder or hub id.

    Raises ModelError if it is no adapter, not plain LoRA, or pickled. Warns where it names another base model than `base`.
    """
    source = find_source(place)
    raw = read_json(source, "adapter_config.json")
    if raw is None:
        raise ModelError(
            f"{place}: this is a whole model, but tuning.kind is lora, where every role is an adapter on one base; "
            "set tuning.kind: full, or give an adapter folder"
        )
    _refuse_odd(place, raw)
    if not allow_pickle and cached_file(source.location, SAFE_NAME, _raise_exceptions_for_missing_entries=False) is None:
        raise ModelError(
            f"{place}: holds no {SAFE_NAME} (a pickled adapter_model.bin can run code when loaded, and is refused by default); "
            "save it as safetensors, or set model.allow_pickle: true if you trust it"
        )
    try:
        config = PeftConfig.from_pretrained(source.location)
        weights = load_peft_weights(source.location, device="cpu")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(unreachable(source, error)) from error
    assert isinstance(config, LoraConfig)
    named = str(raw.get("base_model_name_or_path") or "")
    if named and PurePath(named).name != PurePath(base.location).name:
        warnings.warn(f"{place}: this adapter says it was trained on {named}, and is now put on {base}", stacklevel=2)
    return config, weights


def _refuse_odd(place: str, raw: dict[str, object]) -> None:
    if raw.get("peft_type") != "LORA":
        raise ModelError(f"{place}: a {raw.get('peft_type')} adapter; only LoRA adapters can share the base model with the other roles")
    for key in ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters"):
        if raw.get(key):
            raise ModelError(f"{place}: this adapter also replaces parts of the base model ({key}: {raw[key]}); {_MERGE}")
    if raw.get("bias", "none") != "none":
        raise ModelError(f"{place}: this adapter trains biases of the base model, which cannot be switched off; {_MERGE}")
