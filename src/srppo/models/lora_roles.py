"""LoRA tuning: one base in memory, every other role a named adapter on it.

PEFT's switches have side effects: set_adapter asks for gradients on the chosen adapter and takes them from the others,
disabling and enabling adapters does the same. So each use records what it finds and puts it back, whatever happens inside.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from srppo.config import TuningConfig
from srppo.errors import ModelError
from srppo.models.adapters import read_adapter
from srppo.models.compiled import layers_of
from srppo.models.flat import flat_row
from srppo.models.lora_linear import install
from srppo.models.modes import set_mode, undisturbed
from srppo.models.plan import plan, run_trunk, same_states
from srppo.models.prefix import run_above, run_prefix
from srppo.models.saving import save_adapter
from srppo.models.sharding import posing_as_whole
from srppo.models.source import Source
from srppo.models.weights import copy_into, distinct_tensors, embedding_rows
from srppo.records import TokenBatch
from srppo.seeding import stream_seed
from srppo.world import world


class LoraRoles:
    """Holds one model and an adapter for each role but base. See roles.Store for the methods."""

    kind = "lora"

    def __init__(
        self,
        base: PreTrainedModel,
        tuning: TuningConfig,
        source: Source,
        seed: int,
        allow_pickle: bool = False,
    ):
        """The base may be spread over the processes; the adapters are whole in each."""
        self._model, self._tuning, self._source, self._seed, self._allow_pickle = base, tuning, source, seed, allow_pickle
        self._peft: Any = None  # a PeftModel, made with the first adapter
        self._frozen = {"base"}
        self._depth: int | None = None
        self._recount()
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

    def extrapolate(self, role: str, source: str, alpha: float) -> None:
        """The source's adapter with B (1 + alpha): its change of the base, scale B A, is linear in B."""
        self.create(role, source)
        with torch.no_grad():
            for name, parameter in self.tensors(role).items():
                if "lora_B" in name or "lora_embedding_B" in name:
                    parameter.mul_(1 + alpha)

    def load(self, role: str, place: str) -> None:
        """An adapter saved by PEFT. Raises ModelError if it is not plain LoRA, or does not fit the base."""
        config, weights = read_adapter(place, self._source, self._allow_pickle)
        self._add(role, config)
        try:
            assert self._peft is not None
            result: Any = set_peft_model_state_dict(self._peft, weights, adapter_name=role)
            missing = [k for k in result.missing_keys if f".{role}" in k and "lora_" in k]
            if result.unexpected_keys or missing:
                odd = (list(result.unexpected_keys) + missing)[0]
                raise ModelError(f"{place}: this adapter was made for another model than {self._source} ({odd} does not match)")
        except Exception as error:
            self.drop(role)
            if isinstance(error, RuntimeError):  # PyTorch's, for shapes that differ
                raise ModelError(f"{place}: this adapter does not fit {self._source}: {' '.join(str(error).split())[:300]}") from None
            raise

    def _new_config(self) -> LoraConfig:
        t = self._tuning
        alpha: Any = t.lora_alpha  # PEFT asks for an int, and only divides it by r
        return LoraConfig(
            r=t.lora_rank,
            lora_alpha=alpha,
            lora_dropout=t.lora_dropout,
            target_modules=t.lora_targets if t.lora_layers is None else self._last_layers(t.lora_layers),
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in self._model.modules()),
            task_type="CAUSAL_LM",
        )

    def _last_layers(self, count: int) -> list[str]:
        """Full names of the modules that tuning.lora_targets means, in the last `count` layers of the decoder."""
        layers, asked = layers_of(self._model), self._tuning.lora_targets
        if len(layers) < count:
            raise ModelError(
                f"tuning.lora_layers is {count}, but {self._source} has {len(layers)} decoder layers"
                + ("" if len(layers) else " that can be told apart; leave it unset")
            )
        inside = {id(m) for layer in layers[len(layers) - count :] for m in layer.modules()}
        plain = {n: m for n, m in self._model.named_modules() if id(m) in inside and not any(p.startswith("lora_") for p in n.split("."))}
        named = {n.removesuffix(".base_layer"): m for n, m in plain.items() if not isinstance(m, BaseTunerLayer)}
        if asked == "all-linear":
            found = [n for n, m in named.items() if isinstance(m, (nn.Linear, Conv1D))]
        elif isinstance(asked, str):
            found = [n for n in named if re.fullmatch(asked, n)]
        else:
            found = [n for n in named if any(n == t or n.endswith(f".{t}") for t in asked)]
        if not found:
            raise ModelError(f"tuning.lora_targets {asked} names nothing in the last {count} layers of {self._source}")
        return found

    def prefix_depth(self) -> int:
        """The first adapted layer's number, if the layers below can be run apart: tried once with the present adapters."""
        if self._depth is None:
            self._depth = self._find_depth()
        return self._depth

    def _find_depth(self) -> int:
        if not world().alone:  # the states of a row would have to follow it from process to process
            return 0
        layers = layers_of(self._model)
        inside = {id(m): number for number, layer in enumerate(layers) for m in layer.modules()}
        numbers = [inside.get(id(m), 0) for m in self._layers]  # an adapter outside the layers: nothing is shared
        depth = min(numbers, default=0)
        found = plan(self._model)
        if depth == 0 or not (found.flat and found.direct_head):
            return 0
        ids = torch.arange(1, 9, device=self._model.device)[None] % embedding_rows(self._model)
        row = flat_row(TokenBatch(ids, torch.ones_like(ids), ids.new_ones(ids.shape).bool() & (ids.cumsum(1) > 1)))
        with self.use("base", False) as model:
            whole = run_trunk(model, row.ids[None], row.positions[None], row.layout)
            try:
                parted = run_above(model, run_prefix(model, row, depth), row, depth)
            except Exception:  # whatever its code makes of it
                return 0
        return depth if same_states(parted, whole) else 0

    def _config_of(self, role: str) -> PeftConfig:
        assert self._peft is not None
        return copy.deepcopy(self._peft.peft_config[role])

    def _add(self, role: str, config: PeftConfig) -> None:
        if any(role in name.split(".") for name, _ in self._model.named_modules()):
            raise ModelError(f"{role!r} is the name of a part of the model, so no adapter can have it")
        config.base_model_name_or_path = self._source.location
        config.revision = self._source.revision
        config.inference_mode = False
        with self._undisturbed(), posing_as_whole(self._model), torch.random.fork_rng():
            torch.manual_seed(stream_seed(self._seed, "adapter", role))
            try:
                if self._peft is None:
                    self._peft = get_peft_model(self._model, config, adapter_name=role)
                else:
                    self._peft.add_adapter(role, config)
            except (ValueError, TypeError) as error:
                targets = config.to_dict().get("target_modules")
                raise ModelError(f"tuning.lora_targets {targets} does not fit {self._source}: {error}") from None
            finally:
                known = set(self._modules)
                self._recount()
                set_mode([m for m in self._modules if m not in known], False)
        for parameter in self.tensors(role).values():
            parameter.requires_grad_(True)

    def drop(self, role: str) -> None:
        assert self._peft is not None
        with self._undisturbed(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
            self._activate("base")
            if set(self._peft.peft_config) == {role}:
                self._peft.unload()
                self._peft = None
            else:
                self._peft.delete_adapter(role)
            self._recount()
        self._frozen.discard(role)

    def freeze(self, role: str) -> None:
        self._frozen.add(role)
        for parameter in self.tensors(role).values():
            parameter.requires_grad_(False).grad = None

    def frozen(self, role: str) -> bool:
        return role in self._frozen

    @contextmanager
    def use(self, role: str, train: bool) -> Iterator[PreTrainedModel]:
        with self._undisturbed(), torch.set_grad_enabled(train):
            self._activate(role)
            set_mode(self._modules, train)
            if train:
                for parameter in self.parameters(role).values():
                    parameter.requires_grad_(True)
            yield self._model

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Active adapter, requires_grad flags and train/eval modes are after the block what they were before it."""
        active = self._active()
        with undisturbed(self._modules, self._parameters):
            try:
                yield
            finally:
                self._activate(active if active in self.names() else "base")

    def _recount(self) -> None:
        """Note the model's parts anew: walking its tree at every switch would cost more than the switch."""
        self._modules = list(self._model.modules())
        self._parameters = list(self._model.parameters())
        self._layers = [m for m in self._modules if isinstance(m, BaseTunerLayer)]
        install(self._layers)
        self._depth = None  # another adapter may reach further down

    def _active(self) -> str:
        if not self._layers or self._layers[0].disable_adapters or not self._layers[0].active_adapters:
            return "base"
        return self._layers[0].active_adapters[0]

    def _activate(self, role: str) -> None:
        """Switch every adapted layer, without touching requires_grad."""
        if self._active() == role:
            return
        # What PEFT's set_adapter and enable_adapters come down to. They also turn all adapters' requires_grad over,
        # which takes longer than a decoding step.
        for layer in self._layers:
            layer._disable_adapters = role == "base"
            if role != "base":
                layer._active_adapter = [role]
        if role != "base":  # PEFT's own note of the active adapter, which its other methods read
            self._peft.active_adapter = self._peft.base_model.active_adapter = role

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """Called by torch's checkpoint at forward time: contexts for the forward pass and for its recomputation."""
        return nullcontext(), self._again(self._active())

    @contextmanager
    def _again(self, role: str) -> Iterator[None]:
        if self._active() == role:
            yield
            return
        with self.use(role, True):
            yield

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        if role in self._frozen:
            return {}
        return {name: p for name, p in self._adapter(role).items() if isinstance(p, nn.Parameter)}

    def tensors(self, role: str) -> dict[str, Tensor]:
        """base: the model's weights under their own names; else the adapter's, without its name in them."""
        if role != "base":
            return self._adapter(role)
        plain = {n: t for n, t in distinct_tensors(self._model).items() if not any(part.startswith("lora_") for part in n.split("."))}
        return {n.replace(".base_layer.", "."): t for n, t in plain.items()}

    def _adapter(self, role: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            parts = name.split(".")
            where = [i for i, part in enumerate(parts) if part == role and parts[i - 1].startswith("lora_")]
            if where:
                found[".".join(parts[: where[0]] + parts[where[0] + 1 :])] = parameter
        return found

    def load_state(self, role: str, state: Mapping[str, Tensor]) -> None:
        copy_into(self.tensors(role), state, role)

    def vocabulary_rows(self, role: str) -> int:
        return embedding_rows(self._model)

    def gather(self, role: str) -> dict[str, Tensor] | None:
        return None

    def write(self, role: str, folder: str, weights: dict[str, Tensor] | None) -> None:
        if self._peft is None or role == "base":
            raise ModelError(f"base is not changed by LoRA tuning and is not saved again; it is at {self._source}")
        save_adapter(self._peft, role, folder)

    def model(self, role: str) -> PreTrainedModel:
        return self._model
