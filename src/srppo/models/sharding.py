"""Models whose weights are spread over the processes of a run, by PyTorch's FSDP2 (Zhao et al. 2023, arXiv 2304.11277).

Each decoder layer is gathered when it is run, and what is outside the layers (embedding, last norm, head) when the model is. Gradients
are summed over the processes, not averaged: the losses are sums, divided by the global number of tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from srppo.config import ParallelConfig
from srppo.errors import ConfigError
from srppo.models.compiled import layers_of
from srppo.world import TIMEOUT, world

T = TypeVar("T")
_RUN = "_srppo_run"
_IN_COPIES: WeakSet[FSDPModule] = WeakSet()  # models of which there are several copies, each spread


class Sharding:
    """How the weights of a run's models are spread. None of it exists where every process holds whole copies (see `sharding_of`)."""

    def __init__(self, mesh: DeviceMesh, device: torch.device, cpu_offload: bool):
        self.mesh, self.device = mesh, device
        self._offload = CPUOffloadPolicy() if cpu_offload and device.type != "cpu" else OffloadPolicy()
        self._frames: WeakKeyDictionary[nn.Module, PreTrainedModel] = WeakKeyDictionary()

    def shard(self, model: PreTrainedModel) -> PreTrainedModel:
        """Spread a whole model, the same in all processes, in place. Its parameters are DTensors from now on."""
        frame = skeleton(model)
        for layer in layers_of(model):
            self._apply(layer)
        return self._finish(model, frame)

    def load(self, read: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """Read a whole model and spread it. A machine's processes take turns, so that it holds one whole model at a time."""
        return world().in_turn(lambda: self.shard(read()))

    def frame(self, model: PreTrainedModel) -> PreTrainedModel:
        """The `skeleton` of a spread model."""
        return self._frames[model]

    def _finish(self, model: PreTrainedModel, frame: PreTrainedModel) -> PreTrainedModel:
        self._apply(model)
        setattr(model, _RUN, MethodType(_call, model))
        register_fsdp_forward_method(model, _RUN)
        self._frames[model] = frame
        if self.mesh.ndim == 2:
            assert isinstance(model, FSDPModule)
            _IN_COPIES.add(model)
        return model

    def _apply(self, module: nn.Module) -> None:
        fully_shard(module, mesh=self.mesh, offload_policy=self._offload)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums

    def copied(self, frame: PreTrainedModel, source: nn.Module) -> PreTrainedModel:
        """A spread model made of a `skeleton`, in its precision, with the values of another (or part of it) of the same parameters."""
        model = copy.deepcopy(frame)
        made: dict[int, nn.Parameter] = {}
        for part in [*layers_of(model), model]:  # whole weights of one layer at a time
            for module in part.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and parameter.is_meta:
                        if id(parameter) not in made:
                            values = torch.empty_like(parameter, device=self.device)
                            made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                        module._parameters[name] = made[id(parameter)]
            if part is not model:
                self._apply(part)
        self._finish(model, frame)
        with torch.no_grad():
            for new, old in zip(model.parameters(), source.parameters(), strict=True):
                own(new.detach()).copy_(own(old.detach()))
        return model


def sharding_of(config: ParallelConfig, device: torch.device) -> Sharding | None:
    """The run's sharding; None with one process, or where shard_size is 1. Raises ConfigError where it does not divide the world."""
    here = world()
    if here.alone:
        return None
    size = config.shard_size or here.size
    if here.size % size:
        raise ConfigError(f"parallel.shard_size is {size}, which does not divide the number of processes, {here.size}")
    if size == 1:
        return None
    shape, names = ((size,), ("shard",)) if size == here.size else ((here.size // size, size), ("replicate", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    if len(shape) == 2:  # groups of their own, which would wait ten minutes, or thirty
        for name in names:
            torch.distributed.distributed_c10d._set_pg_timeout(TIMEOUT, mesh.get_group(name))
    return Sharding(mesh, device, config.cpu_offload)


def _call(model: nn.Module, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return work(model, *args, **kwargs)


def run_on(model: nn.Module, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """work(model, …) with the weights outside the layers at hand. Its result: a tensor, or a tuple or list of them, which may carry a
    gradient back. For a model that is not spread it is the plain call."""
    if not isinstance(model, FSDPModule):
        return work(model, *args, **kwargs)
    out: T = getattr(model, _RUN)(work, *args, **kwargs)
    if not torch.is_grad_enabled():
        put_back(model)
    return out


def put_back(model: nn.Module) -> None:
    """Free the gathered weights, and forget forward passes that no backward pass will follow."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
            for group in _groups(module):
                group._post_forward_indices.clear()
                getattr(group.comm_ctx, "post_forward_order", []).clear()  # made by the first pass; a process without rows has none


def _groups(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.13
    if groups is None:
        groups = [g for g in [state._fsdp_param_group] if g is not None]
    return [g for g in groups if hasattr(g, "comm_ctx")]


def sum_between_copies(now: bool) -> None:
    """Whether backward passes from here on sum gradients between the copies of spread weights (HSDP): a step needs it in its last
    micro-batch alone. Until then FSDP2 keeps this copy's sums."""
    for model in _IN_COPIES:
        model.set_requires_all_reduce(now)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within, each process holds all weights of the model, and runs it without a word to the others. No gradients.

    Uses nest. Entering and leaving is the business of all processes together."""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    if not parts or getattr(model, "_srppo_gathered", False):
        yield
        return
    vars(model)["_srppo_gathered"] = True
    try:
        for part in parts:
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
        put_back(model)
        vars(model)["_srppo_gathered"] = False


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model (not spread) without its parameters' values: they are on the meta device, tied ones once. Buffers are copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


@contextmanager
def posing_as_whole(model: nn.Module) -> Iterator[None]:
    """Within, spread weights look whole, with the right shape, type and device and no values: for code that only asks for those."""
    hidden: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in model.modules():
            held: dict[str, Any] = module._parameters
            for name, parameter in held.items():
                if isinstance(parameter, DTensor):
                    hidden.append((module, name, parameter))
                    pose = torch.empty((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
                    module._parameters[name] = nn.Parameter(pose, requires_grad=parameter.requires_grad)
        yield
    finally:
        for module, name, parameter in hidden:
            module._parameters[name] = parameter


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread: gathered, by all processes together; a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be spread; all of a plain one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_on_main(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies of all of the tensors in rank 0, one gathered after the other; empty in the others."""
    out = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if world().main:
            out[name] = full.to("cpu", copy=True)
    return out


def squared_norm(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum of squares over all processes, float32 scalar. Plain tensors are the same in all and counted once."""
    plain, spread = torch.zeros((), device=device), torch.zeros((), device=device)
    meshes: list[DeviceMesh] = []
    for tensor in tensors:
        part = own(tensor).float().square().sum()
        if isinstance(tensor, DTensor):
            spread = spread + part
            meshes.append(tensor.device_mesh)
        else:
            plain = plain + part
    if meshes:
        torch.distributed.all_reduce(spread, group=meshes[0].get_group("shard"))
    return plain + spread
