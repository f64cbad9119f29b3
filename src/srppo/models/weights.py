"""Naming, copying and hashing weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from srppo.errors import ModelError
from srppo.models.sharding import whole


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model's input embedding has rows for."""
    return cast(Tensor, model.get_input_embeddings().weight).shape[0]


def distinct_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once (under their first name). The tensors themselves, not copies."""
    parameters = dict(module.named_parameters())
    saved = set(module.state_dict(keep_vars=True))
    return {**parameters, **{n: b for n, b in module.named_buffers() if n in saved}}


def sketch(module: nn.Module) -> str:
    """Of some values of each parameter: tells models that were trained apart, not ones in which little was changed."""
    sums = hashlib.blake2b(digest_size=16)
    for name, parameter in module.named_parameters():
        values = parameter.detach().reshape(-1)
        values = values[:: max(1, values.numel() // 64)].cpu().contiguous()
        sums.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode() + values.view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clones that later training does not touch: on the CPU, but for tensors that are spread over processes."""
    return {name: t.detach().clone() if isinstance(t, DTensor) else t.detach().to("cpu", copy=True) for name, t in tensors.items()}


def copy_into(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], role: str) -> None:
    """Overwrite tensors in place with a snapshot of the same names and shapes. Raises ModelError before anything is written."""
    if tensors.keys() != state.keys():
        odd = sorted(tensors.keys() ^ state.keys())
        raise ModelError(f"the saved weights of {role} are of another model or tuning: {len(odd)} names differ, such as {odd[0]}")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise ModelError(f"the saved weights of {role} do not fit: {name} is {list(state[name].shape)}, not {list(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            value = state[name]
            if isinstance(tensor, DTensor) and not isinstance(value, DTensor):  # each process takes its part of the whole
                value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.copy_(value)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """blake2b (128 bits) over names, types, shapes and bytes, in the order of the names: equal exactly for equal weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = whole(tensors[name].detach()).to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
