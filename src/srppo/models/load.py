"""Loading a causal language model so that it is ready to be scored, copied, trained and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_gguf_pytorch_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from srppo.config import ModelConfig
from srppo.errors import ModelError
from srppo.models.kernels import use_liger
from srppo.models.source import (
    Source,
    find_source,
    model_source,
    read_config,
    refuse_absurd,
    refuse_encoder_decoder,
    refuse_foreign_code,
    refuse_pickle,
    unreachable,
)
from srppo.models.tokens import SpecialTokens, check_fit, check_same_vocabulary, load_tokenizer, special_tokens
from srppo.world import world

__all__ = ["SpecialTokens", "check_fit", "check_same_vocabulary", "load_model", "load_tokenizer", "resolve_device", "special_tokens"]

_KEPT = "_srppo_config"  # the attribute of a model with its config's own values: it travels with every copy of the model
_NOISE = ("drop", "jitter")  # parts of the names under which configs and modules keep their random regularisers


def resolve_device(device: str) -> torch.device:
    """model.device as a torch device; auto is cuda where there is one, else cpu. Raises ModelError."""
    if device == "auto":
        return _own_card(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"model.device is {device!r}, which is no device: {str(error).splitlines()[0]}") from None
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise ModelError(f"model.device is {device!r}, but torch sees {torch.cuda.device_count()} CUDA devices; use auto or cpu")
    return _own_card(found)


def _own_card(device: torch.device) -> torch.device:
    """Of several processes each has the GPU of its number, whatever the recipe says."""
    return device if world().alone or device.type != "cuda" else torch.device("cuda", world().local_rank)


def load_model(model: ModelConfig, *, name: str | None = None, dtype: str | None = None) -> PreTrainedModel:
    """A causal language model on its device, in eval mode, no parameter asking for gradients, dropout off for good.

    name: another place than model.name (a fine-tuned model); dtype: another precision than model.dtype.
    A GGUF model is dequantised into an ordinary one. Weights are read from safetensors or GGUF only, unless model.allow_pickle.
    Raises ModelError: not found, unreadable, pickle or foreign code, an adapter, not a causal language model, weights missing.
    """
    source = model_source(model) if name is None else find_source(name)
    device = resolve_device(model.device)
    if source.gguf_file is None:
        _refuse(source, model)
    arguments = source.arguments() | {"dtype": getattr(torch, dtype or model.dtype)}
    if model.attention is not None:
        arguments["attn_implementation"] = model.attention
    if source.gguf_file is None and not model.allow_pickle:
        arguments["use_safetensors"] = True
    if source.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Newer transformers keep GGUF weights packed where kernels are installed: those can be neither trained nor saved.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with quiet():
            loaded, info = cast(
                tuple[PreTrainedModel, dict[str, Any]],
                AutoModelForCausalLM.from_pretrained(
                    source.location, trust_remote_code=model.trust_remote_code, output_loading_info=True, **arguments
                ),
            )
    except Exception as error:  # damaged files make the readers under transformers raise whatever they meet
        raise ModelError(unreachable(source, error)) from error
    _refuse_missing(source, info)
    if source.gguf_file is not None:
        make_ordinary(loaded)
    loaded.config._name_or_path = source.location
    _refuse_not_dense(source, loaded)
    silence_noise(loaded)
    nn.Module.to(loaded, device)
    loaded.eval().requires_grad_(False)
    if model.gradient_checkpointing:
        if not loaded.supports_gradient_checkpointing:
            raise ModelError(f"{source}: {type(loaded).__name__} has no gradient checkpointing; set model.gradient_checkpointing: false")
        loaded.gradient_checkpointing_enable({"use_reentrant": False})
    if model.kernels == "liger":
        use_liger(loaded, device)
    return loaded


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars: srppo shows its own progress, and logs stay readable."""
    shown, bar = transformers.utils.logging.is_progress_bar_enabled(), getattr(modeling_gguf_pytorch_utils, "tqdm", None)
    transformers.utils.logging.disable_progress_bar()
    if bar is not None:  # the GGUF reader's own, which does not ask whether bars are wanted
        modeling_gguf_pytorch_utils.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        if bar is not None:
            modeling_gguf_pytorch_utils.tqdm = bar
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _refuse(source: Source, model: ModelConfig) -> None:
    config = read_config(source)
    refuse_foreign_code(source, config, model.trust_remote_code)
    refuse_absurd(source, config)
    refuse_encoder_decoder(source, config)
    if config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "auto_map" not in config:
        raise ModelError(f"{source}: {config.get('model_type')!r} models are not causal language models")
    refuse_pickle(source, model.allow_pickle)


def _refuse_missing(source: Source, info: dict[str, Any]) -> None:
    """A checkpoint of another task (a classifier, a bare encoder) would load with a random head: an error, not a warning."""
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"{source}: its files lack {len(missing)} of the weights of a causal language model (such as {missing[0]}); "
            "it was made for another task, or saved incompletely"
        )


def _refuse_not_dense(source: Source, model: PreTrainedModel) -> None:
    quantised = getattr(model.config, "quantization_config", None)
    if quantised is not None:
        raise ModelError(f"{source}: the weights are quantised, and cannot be trained or copied exactly; use the model they were made from")


def make_ordinary(model: PreTrainedModel) -> None:
    """Remove what a GGUF load leaves behind in a model whose weights are plain by now.

    Left there, save_pretrained refuses to save ("not serializable"), and the saved config would claim a quantised model.
    """
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
        (model.config, "quantization_config"),
    ):
        if name in vars(holder):
            delattr(holder, name)
    for name in ("_model_name_or_path", "gguf_file"):  # the GGUF's own title and the file, written into config.json otherwise
        if name in vars(model.config):
            delattr(model.config, name)


def silence_noise(model: PreTrainedModel) -> None:
    """Turn dropout and router noise off in modules and config, and padding_idx too; remember the config's values for saving.

    PPO compares probabilities before and after a step, so the same weights must give the same probabilities in train mode.
    An embedding with padding_idx drops the gradient of that row, wrong where the pad token is also the EOS token.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and any(part in key.lower() for part in _NOISE):
                setattr(module, key, 0.0)
    kept = {}
    for where, config in (("", model.config), ("text", model.config.get_text_config())):
        for key, value in list(vars(config).items()):
            if isinstance(value, float) and value != 0.0 and any(part in key.lower() for part in _NOISE):
                kept[where, key] = value
                setattr(config, key, 0.0)
    vars(model)[_KEPT] = kept


def remember_config_values(part: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Let a part taken out of a model save the whole's original config values too."""
    vars(part)[_KEPT] = vars(whole).get(_KEPT, {})


def restored_config_values(model: PreTrainedModel) -> list[tuple[Any, str, float]]:
    """(config, key, value) of what silence_noise zeroed, for the saved config.json to be the original's."""
    kept = vars(model).get(_KEPT, {})
    return [(model.config if where == "" else model.config.get_text_config(), key, value) for (where, key), value in kept.items()]
