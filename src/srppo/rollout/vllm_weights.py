"""What vLLM is given of the trainer's live model: its weights, its active LoRA adapter, and whether either changed since last time."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from srppo.files import share_tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Mark:
    """Recognises tensors that have not been written to since: the same objects and memory, version counters and contents.

    PyTorch raises a tensor's counter at most in-place operations, but not in a fused AdamW on a CPU, nor for writes through `.data`:
    so the bits are looked at too (an XOR over them, some tenths of a second a gigabyte). Holds no weights alive.
    """

    def __init__(self, tensors: Iterable[Tensor], note: object = None):
        """note: anything else that must be equal."""
        self._seen = [(weakref.ref(t), *_state(t)) for t in tensors]
        self._note = note

    def holds(self, tensors: Iterable[Tensor], note: object = None) -> bool:
        """Whether these are the marked tensors, unchanged."""
        now = list(tensors)
        if len(now) != len(self._seen) or note != self._note:
            return False
        return all(seen[0]() is t and seen[1:] == _state(t) for seen, t in zip(self._seen, now, strict=True))


def _state(tensor: Tensor) -> tuple[int, int, int]:
    return tensor._version, tensor.data_ptr(), int(torch.hash_tensor(tensor.detach()).view(torch.int64))


@dataclass(frozen=True)
class Adapter:
    """The LoRA adapters a model is using now (srppo uses one at a time), as PEFT's layers by their names in the model."""

    layers: Mapping[str, Any]  # LoraLayer, which is a mixin of modules
    names: tuple[str, ...]

    @property
    def tensors(self) -> list[Tensor]:
        own = [(n.split("."), p) for layer in self.layers.values() for n, p in layer.named_parameters()]
        return [p for parts, p in own if parts[0].startswith("lora_") and parts[1] in self.names]

    @property
    def scales(self) -> list[float]:
        return [layer.scaling[name] for layer in self.layers.values() for name in self.names if name in layer.scaling]

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max((layer.r[name] for layer in self.layers.values() for name in self.names if name in layer.r), default=0)

    @property
    def servable(self) -> bool:
        """Whether vLLM can apply it beside the weights: one plain adapter, on linear layers other than the output head."""
        return len(self.names) == 1 and all(
            isinstance(layer.get_base_layer(), nn.Linear)
            and self.names[0] in layer.lora_A
            and not layer.use_dora.get(self.names[0], False)
            and name.split(".")[-1] != "lm_head"
            for name, layer in self.layers.items()
        )

    def write(self, folder: Path) -> None:
        """As a PEFT adapter folder. The scale is multiplied into B, so that alpha equals the rank and layers may differ."""
        (name,) = self.names
        tensors: dict[str, Tensor] = {}
        for module, layer in self.layers.items():
            a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
            tensors[f"base_model.model.{module}.lora_A.weight"] = a.cpu().contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = (b * layer.scaling[name]).cpu().contiguous()
        targets = sorted({module.split(".")[-1] for module in self.layers})
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.rank, "lora_alpha": self.rank, "target_modules": targets}
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        share_tree(folder)


def active_adapter(model: PreTrainedModel) -> Adapter | None:
    """The adapter that is switched on; None for a model without, or with adapters off."""
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    on = {n: layer for n, layer in layers.items() if not layer.disable_adapters}
    names = {name for layer in on.values() for name in layer.active_adapters}
    used = {n: layer for n, layer in on.items() if names & (set(layer.lora_A) | set(layer.lora_embedding_A))}
    return Adapter(used, tuple(sorted(names))) if used else None


def plain_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's own weights and saved buffers without any adapter, under the names they have without PEFT. Not copies."""
    tensors = model.state_dict(keep_vars=True)
    return {n.replace(".base_layer.", "."): t for n, t in tensors.items() if not any(part.startswith("lora_") for part in n.split("."))}


def named_weights(model: PreTrainedModel, merge: Adapter | None = None) -> dict[str, Tensor]:
    """The weights under the names of a published checkpoint, which vLLM reads; with `merge` the adapter's change added to them.

    Tensors are the model's own, without gradient, except merged ones.
    """
    weights = {n: t.detach() for n, t in plain_tensors(model).items()}
    if merge is not None:
        with torch.no_grad():
            for module, layer in merge.layers.items():
                weight = weights[f"{module}.weight"]
                for name in merge.names:
                    if name in layer.scaling:
                        weight = weight + layer.get_delta_weight(name).to(weight)  # in its precision, where it is
                weights[f"{module}.weight"] = weight
        _retie(model, weights, merge)
    return revert_weight_conversion(model, weights)


def _retie(model: PreTrainedModel, weights: dict[str, Tensor], merge: Adapter) -> None:
    """Where a tied weight was merged under one of its names, its other names stay as they are: PEFT adapts one use of it alone.

    vLLM stores a tied weight once, so it cannot hold the two; such an adapter is refused.
    """
    tied = bool(getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False))
    ends = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    if tied and any(id(layer) in ends for layer in merge.layers.values()):
        raise TiedAdapter


class TiedAdapter(ValueError):
    """An adapter on one use of a weight that two modules share."""


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """config.json as vLLM reads it, without weights. The architecture is named: a config made in memory does not say it."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.save_pretrained(str(folder))
