"""What a model's architecture allows, found out once by asking it: where its head is, and how sequences may lie in memory.

Reading an architecture's name would be right for those we know; a few tokens through the model are right for all.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from srppo.errors import ModelError
from srppo.logprobs import Head
from srppo.models.attention import NAME, Layout, layout_of, noting, set_attention, uses_plain_attention
from srppo.models.modes import set_mode, undisturbed
from srppo.models.weights import embedding_rows

_PLANS: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Plan:
    """How to run one model."""

    width: int  # H of the states that enter the head
    packs: bool  # several examples a row, kept apart by position ids: same states as one a row
    flat: bool  # all sequences in one row, kept apart by our attention: same states as one a row
    direct_head: bool  # logits = softcap tanh(multiplier (W h + b) / softcap) reproduces the model's own
    softcap: float | None = None
    multiplier: float = 1.0


def plan(model: PreTrainedModel) -> Plan:
    """The model's plan, made at the first call. Raises ModelError for a model that is not causal or has no trunk."""
    if model not in _PLANS:
        modules = list(model.modules())
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False), undisturbed(modules):
            set_mode(modules, False)
            _PLANS[model] = _probe(model)
        set_attention(model, NAME if _PLANS[model].flat else "sdpa")
    return _PLANS[model]


def share_plan(copy: PreTrainedModel, original: PreTrainedModel) -> None:
    """Give a copy its original's plan, so that it is not probed again."""
    _PLANS[copy] = plan(original)
    set_attention(copy, NAME if _PLANS[copy].flat else "sdpa")


def head_of(model: PreTrainedModel) -> Head | None:
    """The model's head as a formula over its weights; None where only the model's own forward is right (its head is not
    a plain linear layer, or carries an adapter)."""
    found = plan(model)
    out = model.get_output_embeddings()
    if not found.direct_head or type(out) is not nn.Linear:
        return None
    return Head(out.weight, out.bias, found.softcap, found.multiplier)


def run_trunk(model: PreTrainedModel, ids: Tensor, positions: Tensor | None = None, layout: Layout | None = None) -> Tensor:
    """[B, L, H] states after the final norm. ids [B, L], right-padded; no padding mask is needed, see forward.target_states.

    layout: of a flat row, where plan(model).flat; then ids and positions are [1, tokens].
    """
    out = model.get_decoder()(input_ids=ids, use_cache=False, **flat_arguments(positions, layout))
    states = getattr(out, "last_hidden_state", None)
    if states is None:
        raise ModelError(f"{model.name_or_path}: unsupported architecture: the decoder of {type(model).__name__} returns no hidden states")
    return states


def run_logits(model: PreTrainedModel, ids: Tensor, positions: Tensor | None = None, layout: Layout | None = None) -> Tensor:
    """[B, L, V] logits by the model's own forward; arguments as in run_trunk."""
    return model(input_ids=ids, use_cache=False, **flat_arguments(positions, layout)).logits


def flat_arguments(positions: Tensor | None, layout: Layout | None) -> dict[str, Any]:
    """Keyword arguments of a decoder for these positions and, with a layout, for a flat row."""
    given: dict[str, Any] = {} if positions is None else {"position_ids": positions}
    return given if layout is None else given | {"attention_mask": layout.marker, "srppo_layout": layout}


def _probe(model: PreTrainedModel) -> Plan:
    vocabulary = embedding_rows(model)
    ids = (torch.arange(16, device=model.device).reshape(2, 8) * 7 + 1) % vocabulary
    states = run_trunk(model, ids)
    _check_causal(model, ids, states)
    packs, flat = _packs(model, ids, states), _flat(model, ids, states)
    if model.get_output_embeddings() is None:  # a bare trunk, such as a critic's
        return Plan(states.shape[-1], packs, flat, False)
    softcap, multiplier = _logit_settings(model)
    trial = Plan(states.shape[-1], packs, flat, True, softcap, multiplier)
    if not _head_agrees(model, trial, ids, states):
        warnings.warn(
            f"{type(model).__name__}: its logits are not those of a plain output layer, so log-probabilities are taken "
            "from its full forward (right, but with more memory)",
            stacklevel=3,
        )
        return Plan(states.shape[-1], packs, flat, False)
    return trial


def _check_causal(model: PreTrainedModel, ids: Tensor, states: Tensor) -> None:
    changed = ids.clone()
    changed[:, -1] = ids[:, 0]
    if not same_states(run_trunk(model, changed)[:, :-1], states[:, :-1]):
        raise ModelError(
            f"{model.name_or_path}: {type(model).__name__} is not causal: a later token changes what it says at earlier ones, "
            "so it cannot write from left to right"
        )


def _packs(model: PreTrainedModel, ids: Tensor, states: Tensor) -> bool:
    if getattr(model.config.get_text_config(), "attention_chunk_size", None):
        return False  # chunks are counted from the row's start, which a short probe cannot see
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]], device=ids.device)
    try:
        packed = run_trunk(model, ids, positions)
    except TypeError:
        return False  # takes no position ids
    apart = torch.cat([run_trunk(model, ids[:1, :3]), run_trunk(model, ids[:1, 3:])], dim=1)
    return same_states(packed, torch.cat([apart, states[1:]]))


def _flat(model: PreTrainedModel, ids: Tensor, states: Tensor) -> bool:
    """Whether three tokens of the first row and the whole second one give in a flat row the states that they give apart."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    if (
        not uses_plain_attention(model)
        or getattr(text, "attention_chunk_size", None)
        or any("attention" not in k or "linear" in k for k in kinds)
    ):
        return False  # convolutions and recurrent layers cross borders, by how much a probe may not see
    layout = layout_of(torch.tensor([3, 8], device=ids.device))
    tokens, places = torch.cat([ids[0, :3], ids[1]]), torch.cat([torch.arange(3), torch.arange(8)]).to(ids.device)
    windows: set[int | None] = set()
    set_attention(model, NAME, noting(windows))
    try:
        flat = run_trunk(model, tokens[None], places[None], layout)[0]
    except Exception:  # whatever its code makes of it: it does not hand our arguments down, or cannot do without a mask
        return False
    finally:
        set_attention(model, "sdpa")
    slides = getattr(text, "sliding_window", None) and (not kinds or any("sliding" in k for k in kinds))
    if slides and windows <= {None}:
        return False  # its windows are in the mask alone, and longer than a probe
    return same_states(flat, torch.cat([states[0, :3], states[1]]))


def _logit_settings(model: PreTrainedModel) -> tuple[float | None, float]:
    """Soft cap and multiplier under the names transformers' configs give them (Gemma, RecurrentGemma; Cohere, Granite, Falcon-H1)."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    multiplier = (getattr(config, "logit_scale", None) or 1.0) * (getattr(config, "lm_head_multiplier", None) or 1.0)
    return softcap, multiplier / (getattr(config, "logits_scaling", None) or 1.0)


def _head_agrees(model: PreTrainedModel, trial: Plan, ids: Tensor, states: Tensor) -> bool:
    out = model.get_output_embeddings()
    if type(out) is not nn.Linear or out.weight.shape[1] != states.shape[-1]:
        return False
    ours = Head(out.weight, out.bias, trial.softcap, trial.multiplier).logits(states)
    return same_states(ours, run_logits(model, ids))


def same_states(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of their precision, which is far below the effect of a wrong formula."""
    tolerance = 1e-4 if torch.promote_types(a.dtype, b.dtype) == b.dtype and b.dtype in (torch.float32, torch.float64) else 5e-2
    a, b = a.float(), b.float()
    each = (a - b).norm(dim=-1) <= tolerance * b.norm(dim=-1).clamp(min=1e-6)  # token by token: one large state must not hide another
    return bool(each.all())
