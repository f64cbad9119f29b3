"""The folder through which vLLM servers are given weights: what every server has to hold now, written only where it has changed."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from srppo.errors import ConfigError, ModelError
from srppo.files import current_umask, share_tree, write_errors
from srppo.rollout.vllm_weights import Adapter, Mark, active_adapter, named_weights, plain_tensors, write_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Wanted:
    """What every server has to hold: the version of its weights, and the adapter asked for beside them."""

    version: str
    weights: Path
    adapter: Path | None = None  # its name is the folder's


class Handover:
    """Writes a model's weights and its active adapter below `place`, which the servers see under the same path."""

    def __init__(self, place: str | Path):
        self.written = 0  # how often weights or an adapter were
        self._place = Path(place).absolute()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._run = uuid.uuid4().hex[:8]
        self._wanted: Wanted | None = None
        self._weights: Mark | None = None
        self._adapter: Mark | None = None
        self._old: set[Path] = set()  # that servers may still be reading

    @property
    def place(self) -> Path:
        return self._place

    def write(self, model: PreTrainedModel, beside: bool) -> Wanted:
        """The folders with what the model holds now. beside: the servers take adapters, so one that they can apply is not merged.

        Raises ConfigError where the folder cannot be made, RunFolderError for a full disk, ModelError for weights that no server can hold.
        """
        adapter = active_adapter(model)
        separate = adapter if adapter is not None and beside and adapter.servable else None
        merge = None if separate else adapter
        tensors, note = list(plain_tensors(model).values()), None
        if merge is not None:
            tensors, note = tensors + merge.tensors, (merge.names, merge.scales)
        before = wanted = self._wanted
        if wanted is None or self._weights is None or not self._weights.holds(tensors, note):
            self._weights = None
            path = self._new("weights")
            with write_errors(path):
                write_weights(model, merge, path)
            self._weights = Mark(tensors, note)
            wanted = Wanted(path.name, path)
        if separate is None:
            self._adapter, wanted = None, Wanted(wanted.version, wanted.weights)
        else:
            note = (separate.names, separate.scales)
            if wanted.adapter is None or self._adapter is None or not self._adapter.holds(separate.tensors, note):
                path = self._new("adapter")
                with write_errors(path):
                    separate.write(path)
                self._adapter = Mark(separate.tensors, note)
                wanted = Wanted(wanted.version, wanted.weights, path)
        if before is not None:
            self._old |= {p for p in (before.weights, before.adapter) if p is not None}
        self._wanted = wanted
        return wanted

    def tidy(self) -> None:
        """Remove what no server needs any more. What cannot be removed now goes with the whole folder."""
        now = self._wanted
        for path in self._old - ({now.weights, now.adapter} if now else set()):
            shutil.rmtree(path, ignore_errors=True)
        self._old.clear()

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
        self._folder = self._wanted = self._weights = self._adapter = None

    def _new(self, kind: str) -> Path:
        """A path no other run and no earlier time has used."""
        if self._folder is None:
            try:
                self._place.mkdir(parents=True, exist_ok=True)
                self._folder = tempfile.TemporaryDirectory(prefix="srppo-", dir=self._place)
            except OSError as error:
                raise ConfigError(f"rollout.shared_folder: {self._place} cannot be written ({error}); name another folder") from error
            Path(self._folder.name).chmod(0o777 & ~current_umask())  # the server may be another user's
        self.written += 1
        return Path(self._folder.name) / f"{kind}-{self._run}-{self.written}"


def write_weights(model: PreTrainedModel, merge: Adapter | None, folder: Path) -> None:
    """config.json and model.safetensors, a tied weight once."""
    folder.mkdir(parents=True)
    try:
        weights, seen = {}, set()
        for name, tensor in named_weights(model, merge).items():
            key = (tensor.data_ptr(), tensor.shape)
            if key not in seen:
                weights[name] = tensor.detach().cpu().contiguous()
            seen.add(key)
    except ValueError as error:
        raise ModelError(str(error)) from error
    write_config(model, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    share_tree(folder)
