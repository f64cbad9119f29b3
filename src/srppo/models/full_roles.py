"""Full tuning: every role is a model of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from srppo.errors import ArchitectureError, ModelError
from srppo.models.compiled import compile_layers
from srppo.models.load import remember_config_values
from srppo.models.modes import set_mode, undisturbed
from srppo.models.offload import Offloaded
from srppo.models.plan import plan, share_plan
from srppo.models.saving import save_model
from srppo.models.sharding import Sharding, own, whole_on_main
from srppo.models.weights import copy_into, distinct_tensors, embedding_rows

_HEADLESS = "critic"


class FullRoles:
    """Holds one model a role. base is frozen from the start; others learn until frozen. See roles.Store for the methods."""

    kind = "full"

    def __init__(
        self,
        base: PreTrainedModel,
        load: Callable[[str | None], PreTrainedModel],
        dtype: torch.dtype,
        frozen_dtype: torch.dtype,
        offload: bool = False,
        compiled: bool = False,
        sharding: Sharding | None = None,
    ):
        """load(None) reads the base again, load(folder) another model; both in the trained precision `dtype`.

        offload: frozen models live in the machine's memory. compiled: decoder layers go through torch.compile.
        sharding: how the models are spread over the processes; base is already, and so is what `load` gives.
        """
        self._sharding = sharding
        self._load, self._dtype, self._frozen_dtype, self._offload, self._compiled = load, dtype, frozen_dtype, offload, compiled
        self._models: dict[str, PreTrainedModel] = {"base": base}
        self._frozen = {"base"}
        self._away: dict[str, Offloaded] = {}
        self._device = sharding.device if sharding else base.device
        if compiled:
            compile_layers(base)
        if offload and sharding is None:
            self._away["base"] = Offloaded(base, self._device)

    def names(self) -> set[str]:
        return set(self._models)

    def create(self, role: str, source: str) -> None:
        if source == "base" and self._dtype != self._frozen_dtype:
            model = self._load(None)  # the base in memory is rounded to the frozen precision
        else:
            model = self._copy(source, self._dtype)
        self._add(role, model, source)

    def create_critic(self, source: str) -> None:
        model = self._models[source]
        part = (self._sharding.frame(model) if self._sharding else model).get_decoder()
        trunk = copy.deepcopy(part)  # no copy of the LM head, except where it is tied to the embedding
        cast_parameters(trunk, self._dtype)
        trunk.config._name_or_path = model.name_or_path
        remember_config_values(trunk, model)
        if self._sharding:
            trunk = self._sharding.copied(trunk, model.get_decoder())
        self._add(_HEADLESS, trunk, source)

    def _copy(self, source: str, dtype: torch.dtype) -> PreTrainedModel:
        """The source's weights in some precision."""
        model = self._models[source]
        new = copy.deepcopy(self._sharding.frame(model) if self._sharding else model)
        cast_parameters(new, dtype)
        return self._sharding.copied(new, model) if self._sharding else new

    def extrapolate(self, role: str, source: str, alpha: float) -> None:
        """Computed in float32, one weight after the other, from the source as it is and the base in the source's precision: were
        only one of the two rounded, its rounding would pass for training."""
        origin, base = self._models[source], self._models["base"]
        if origin.dtype != base.dtype:
            base = self._load(None)
        weights, starts = dict(origin.named_parameters()), dict(base.named_parameters())
        if {n: p.shape for n, p in weights.items()} != {n: p.shape for n, p in starts.items()}:
            raise ArchitectureError(f"{source} cannot be extrapolated away from base: it is of another architecture, with other weights")
        model = self._copy(source, self._dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                weight = own(weights[name].detach()).float()
                own(parameter.detach()).copy_(weight + alpha * (weight - own(starts[name].detach()).to(weight.device).float()))
        self._add(role, model, source)

    def load(self, role: str, place: str) -> None:
        model = self._load(place)
        plan(model)  # may be of another architecture than base
        self._add(role, model)

    def _add(self, role: str, model: PreTrainedModel, source: str | None = None) -> None:
        if source is not None:
            share_plan(model, self._models[source])
        if self._compiled:
            compile_layers(model)
        if self._sharding is None:
            nn.Module.to(model, self._device)
        self._models[role] = model.eval().requires_grad_(True)

    def drop(self, role: str) -> None:
        del self._models[role]
        self._away.pop(role, None)
        self._frozen.discard(role)

    def freeze(self, role: str) -> None:
        self._frozen.add(role)
        model = self._models[role].requires_grad_(False)
        model.zero_grad(set_to_none=True)
        if self._sharding is None:
            cast_parameters(model, self._frozen_dtype)
        elif model.dtype != self._frozen_dtype:
            rounded = self._copy(role, self._frozen_dtype)
            share_plan(rounded, model)
            self._models[role] = model = rounded.eval().requires_grad_(False)
        if self._offload and role not in self._away and self._sharding is None:
            self._away[role] = Offloaded(model, self._device)

    def frozen(self, role: str) -> bool:
        return role in self._frozen

    @contextmanager
    def use(self, role: str, train: bool) -> Iterator[PreTrainedModel]:
        model = self._models[role]
        modules, parameters = list(model.modules()), list(model.parameters())
        visit = self._away[role].visiting() if role in self._away else nullcontext()
        with visit, undisturbed(modules, parameters), torch.set_grad_enabled(train):
            set_mode(modules, train)
            if train:
                model.requires_grad_(True)
            yield model

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        return {} if role in self._frozen else dict(self._models[role].named_parameters())

    def tensors(self, role: str) -> dict[str, Tensor]:
        return distinct_tensors(self._models[role])

    def load_state(self, role: str, state: Mapping[str, Tensor]) -> None:
        copy_into(self.tensors(role), state, role)

    def vocabulary_rows(self, role: str) -> int:
        return embedding_rows(self._models[role])

    def gather(self, role: str) -> dict[str, Tensor] | None:
        return whole_on_main(self.tensors(role)) if self._sharding else None

    def write(self, role: str, folder: str, weights: dict[str, Tensor] | None) -> None:
        model = self._models[role]
        save_model(self._sharding.frame(model) if self._sharding else model, folder, weights)

    def prefix_depth(self) -> int:
        return 0  # every layer of every role is its own

    def model(self, role: str) -> PreTrainedModel:
        return self._models[role]


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the precision of the floating parameters in place; buffers keep theirs.

    (Rotary frequencies are a buffer, which model.to(bfloat16) would round, and transformers would not.)
    """
    if all(p.dtype == dtype for p in model.parameters() if p.is_floating_point()):
        return
    keep = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in keep):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def refuse_adapter(place: str) -> ModelError:
    """The error for an adapter given where full tuning needs a model."""
    return ModelError(
        f"{place}: this is an adapter, but tuning.kind is full, where each role is a whole model; "
        "set tuning.kind: lora, or merge it into its base"
    )
