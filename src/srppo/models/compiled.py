"""torch.compile for the layers of a model, one graph for all of a kind."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

FOLLOWS_ADAPTERS = (2, 13)  # the first torch on which that was seen


def compiles_adapters() -> bool:
    """Whether this torch's compiled layers notice that another adapter is active. 2.11's do not: every role would speak as the base."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= FOLLOWS_ADAPTERS


def compile_layers(model: PreTrainedModel) -> None:
    """Let each decoder layer run compiled; a model whose layers are not found is left as it is.

    Layer by layer, so that one graph serves them all and the start takes seconds. Shapes are dynamic: each micro-batch has another
    number of tokens. Decoding switches it off (rollout.torch_engine): a step of one token a row would compile anew as its cache grows.
    """
    layers = layers_of(model)
    if len(layers):  # a graph a role, mode and precision; torch gives up at eight
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.compile(dynamic=True)


def layers_of(model: PreTrainedModel) -> Any:
    """The decoder's layers (a ModuleList), under the names transformers uses; empty where there are none."""
    trunk: Any = model.get_decoder() if hasattr(model, "get_decoder") else model
    return getattr(trunk, "layers", None) or getattr(trunk, "h", None) or nn.ModuleList()


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """A context in which compiled layers run plainly; nothing, and no import of the compiler, for a model without any."""
    if all(module._compiled_call_impl is None for module in model.modules()):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
