"""Putting train modes and requires_grad flags back as they were. Writes only what differs: PyTorch's module attributes are slow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def undisturbed(modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Each module's train mode and each parameter's requires_grad are after the block what they were before, also after an exception."""
    modes = [module.training for module in modules]
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            if module.training != mode:
                module.training = mode
        for parameter, flag in zip(parameters, flags, strict=True):
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def set_mode(modules: Sequence[nn.Module], train: bool) -> None:
    """module.train(train) for each module by itself."""
    for module in modules:
        if module.training != train:
            module.training = train
