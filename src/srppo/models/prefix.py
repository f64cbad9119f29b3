"""The layers below the first adapter say the same for every role and every step: run once, their states are used again.

`prefix` is what enters layer number `depth` of the decoder. Only for flat rows, and for models that give with it the states they
give without (tried once, see roles.prefix_depth).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from srppo.models.compiled import layers_of, uncompiled
from srppo.models.flat import FlatRow
from srppo.models.plan import flat_arguments


class _Reached(Exception):
    def __init__(self, states: Tensor):
        self.states = states


def run_prefix(model: PreTrainedModel, row: FlatRow, depth: int) -> Tensor:
    """[tokens, H]: what enters the decoder layer of this number. The layers above are not run; no gradient."""
    trunk: Any = model.get_decoder()

    def stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    handle = layers_of(model)[depth].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), uncompiled(model):
            trunk(input_ids=row.ids[None], use_cache=False, **flat_arguments(row.positions[None], row.layout))
    except _Reached as reached:
        return reached.states[0]
    finally:
        handle.remove()
    raise AssertionError("the decoder ran without calling its layers")


def run_above(model: PreTrainedModel, states: Tensor, row: FlatRow, depth: int) -> Tensor:
    """[1, tokens, H] states after the final norm, from what enters layer `depth` [tokens, H]. Differentiable."""
    with _only_above(model, depth) as trunk:
        out = trunk(inputs_embeds=states[None], use_cache=False, **flat_arguments(row.positions[None], row.layout))
    found: Tensor = out.last_hidden_state
    return found


@contextmanager
def _only_above(model: PreTrainedModel, depth: int) -> Iterator[Any]:
    trunk: Any = model.get_decoder()
    layers = layers_of(model)
    name = next(n for n, child in trunk.named_children() if child is layers)
    trunk._modules[name] = layers[depth:]
    try:
        yield trunk
    finally:
        trunk._modules[name] = layers
