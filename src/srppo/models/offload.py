"""A frozen model whose weights live in the machine's memory and visit the GPU while it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Offloaded:
    """Owns the weights of a model that no one trains. Within `visiting` they are on the device; its uses may nest.

    Nothing is copied back, since nothing changes: afterwards the parameters are the same host tensors as before.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self._model, self._device, self._visits = model, device, 0
        self._home: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():  # a tied weight has one name here
            host = parameter.detach().to("cpu", copy=parameter.device.type != "cpu")
            self._home[name] = host.pin_memory() if device.type == "cuda" else host
        self._leave()

    def _leave(self) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.data = self._home[name]

    @contextmanager
    def visiting(self) -> Iterator[None]:
        self._visits += 1
        try:
            if self._visits == 1:
                for name, parameter in self._model.named_parameters():
                    parameter.data = self._home[name].to(self._device, non_blocking=True, copy=True)
            yield
        finally:
            self._visits -= 1
            if self._visits == 0:
                self._leave()
