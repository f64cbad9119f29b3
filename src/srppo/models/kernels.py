"""Fused kernels of other libraries in place of a model's own layers, tried before they are trusted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srppo.errors import ModelError
from srppo.models.modes import undisturbed
from srppo.models.plan import same_states


def use_liger(model: PreTrainedModel, device: torch.device) -> None:
    """Let Liger's Triton kernels (Hsu et al. 2024, arXiv 2410.10989) compute norms, rotary positions and gated MLPs of a model on a GPU.

    Not its losses: log-probabilities have their own path (logprobs.py). A few tokens are run forward and backward before and after;
    raises ModelError where the results differ, where there is no GPU, no liger-kernel, or nothing for this architecture. Liger also puts
    its layers into transformers' module of the architecture, so that what is loaded later has them from the start: only the first
    model of an architecture is compared with plain layers.
    """
    if device.type != "cuda":
        raise ModelError(f"model.kernels: liger needs a GPU, and the model is on {device.type}; use model.kernels: plain")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance as apply
    except ImportError as error:
        raise ModelError(f"model.kernels: liger needs liger-kernel ({error}); install it: pip install 'srppo[liger]'") from None
    before = _tried(model)
    apply(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    kind = type(model).__name__
    if not any("forward" in vars(module) for module in model.modules()):
        raise ModelError(f"model.kernels: liger has no kernels for {kind}; use model.kernels: plain")
    for what, a, b in zip(("states", "gradients"), _tried(model), before):
        if not same_states(a, b):
            raise ModelError(f"model.kernels: with liger's kernels {kind} gives other {what} than its own layers; use model.kernels: plain")


def _tried(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """States of sixteen tokens, and the gradient that reaches their embeddings."""
    trunk: Any = model.get_decoder()
    embedding: Any = model.get_input_embeddings()
    ids = (torch.arange(16, device=model.device).reshape(2, 8) * 7 + 1) % embedding.weight.shape[0]
    with undisturbed(list(model.modules())), torch.enable_grad(), torch.autocast(model.device.type, enabled=False):
        entering = embedding(ids).detach().requires_grad_()
        states = trunk(inputs_embeds=entering, use_cache=False).last_hidden_state
        direction = torch.linspace(-1, 1, states.numel(), device=states.device, dtype=states.dtype).view_as(states)
        (gradient,) = torch.autograd.grad((states * direction).sum(), entering)
    return states.detach(), gradient
