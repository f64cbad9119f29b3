"""Where a model's files are, and what is refused before any of them is read: pickle, foreign code, adapters, encoder-decoders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srppo.config import ModelConfig
from srppo.errors import ModelError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Source:
    """A model's place. location is an absolute folder where local is true, a hub id otherwise."""

    location: str
    local: bool
    gguf_file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return self.location if self.gguf_file is None else f"{self.location}/{self.gguf_file}"

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that every from_pretrained of transformers takes for this place."""
        out: dict[str, Any] = {}
        if self.gguf_file is not None:
            out["gguf_file"] = self.gguf_file
        if self.revision is not None and not self.local:
            out["revision"] = self.revision
        return out


def find_source(name: str, gguf_file: str | None = None, revision: str | None = None, *, key: str = "model.name") -> Source:
    """Where `name` is: a local folder, a GGUF file, a folder whose only model is one GGUF file, or a hub id.

    Raises ModelError for an empty name, a path that does not exist, or a folder with several GGUF files and no config.json.
    """
    if not name:
        raise ModelError(f"{key} is empty; set it to a hub id, a local folder or a GGUF file")
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name}: this is a file; {key} takes a folder, a .gguf file or a hub id")
        return Source(str(path.parent.resolve()), True, path.name)
    if path.is_dir():
        return Source(str(path.resolve()), True, gguf_file or _only_gguf(path))
    if path.is_absolute() or name.startswith((".", "~")) or "\\" in name or not _HUB_ID.fullmatch(name):
        raise ModelError(f"{name}: no such file or folder (and it cannot be a hub id, which looks like owner/name); check {key}")
    if path.parent != Path() and path.parent.is_dir():  # a slip in a path: asking the network for it would take a minute
        raise ModelError(f"{name}: no such folder in {path.parent}; check the name (for a hub id, run where no folder {path.parent} lies)")
    return Source(name, False, gguf_file, revision)


def model_source(model: ModelConfig) -> Source:
    """The base model's place."""
    return find_source(model.name, model.gguf_file, model.revision)


def _only_gguf(folder: Path) -> str | None:
    """The GGUF file of a folder without config.json; None where the folder is an ordinary one, or holds none."""
    if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
        return None
    files = sorted(f.name for f in folder.glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(f"{folder}: holds {len(files)} GGUF files ({', '.join(files)}); say which with model.gguf_file")
    return files[0] if files else None


def read_json(source: Source, name: str) -> dict[str, Any] | None:
    """A JSON object among the model's files, from the folder or the hub; None where there is no such file. Raises ModelError."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(
            source.location,
            name,
            revision=None if source.local else source.revision,
            _raise_exceptions_for_gated_repo=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=True,
        )
    except OSError as error:
        raise ModelError(unreachable(source, error)) from None
    if path is None:
        return None
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source}: {name} is not valid JSON: {error}") from None
    except OSError as error:
        raise ModelError(f"{source}: {name} cannot be read: {error.strerror or error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{source}: {name} holds a {type(value).__name__} where an object is expected")
    return value


def read_config(source: Source) -> dict[str, Any]:
    """config.json of a model. Raises ModelError where there is none: for an adapter, another folder, a hub that cannot be reached."""
    config = read_json(source, "config.json")
    if config is not None:
        return config
    if read_json(source, "adapter_config.json") is not None:
        raise ModelError(
            f"{source}: this is an adapter, not a model; give its base as model.name, and the adapter as sft.checkpoint "
            "with tuning.kind: lora"
        )
    if source.local:
        raise ModelError(f"{source}: holds no model (neither config.json nor a .gguf file); check the path")
    from huggingface_hub import constants

    cause = "neither the hub nor this machine's cache gave a config.json"
    if constants.HF_HUB_OFFLINE:
        cause = "HF_HUB_OFFLINE is set, so the hub is not asked, and this machine's cache has no config.json of it"
    raise ModelError(unreachable(source, FileNotFoundError(cause)))


def refuse_foreign_code(source: Source, config: dict[str, Any], trust_remote_code: bool) -> None:
    """ModelError for a model whose architecture exists only in Python code that comes with it, or that asks for kernels from the hub
    (its config.json can choose them as its attention), unless that is allowed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if trust_remote_code:
        return
    kernel = next(_kernels(config), None)
    if kernel is not None:
        raise ModelError(
            f"{source}: config.json asks for code from the hub ({kernel}), which is refused by default; remove it, or set "
            "model.trust_remote_code: true if you trust it"
        )
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise ModelError(
            f"{source}: the architecture {model_type!r} runs Python code that comes with the model, which is refused by default; "
            "read that code, then set model.trust_remote_code: true if you trust it"
        )
    raise ModelError(
        f"{source}: config.json names the architecture {model_type!r}, unknown to the installed transformers; a newer one may know it"
    )


def _kernels(value: Any, key: str = "") -> Iterator[str]:
    """What a configuration, or a part of it, names as its implementation of attention or experts that has the form of a hub id."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _kernels(inner, key if key.endswith("_implementation") else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _kernels(inner, key)
    elif isinstance(value, str) and "/" in value and "_implementation" in key:
        yield f"{key}: {value}"


MOST = {  # of what no model has more; far more would be built in memory, or layer by layer, before anything is compared with the weights
    "num_hidden_layers": 10_000,
    "n_layer": 10_000,
    "num_layers": 10_000,
    "num_experts": 100_000,
    "num_local_experts": 100_000,
    "n_routed_experts": 100_000,
    "hidden_size": 10_000_000,
    "n_embd": 10_000_000,
    "intermediate_size": 100_000_000,
    "vocab_size": 1_000_000_000,
    "max_position_embeddings": 1_000_000_000,
    "n_positions": 100_000_000,
    "num_attention_heads": 1_000_000,
    "num_key_value_heads": 1_000_000,
    "n_head": 1_000_000,
    "head_dim": 1_000_000,
}


def refuse_absurd(source: Source, config: dict[str, Any]) -> None:
    """ModelError for sizes that no model has: a slip, or a configuration made to fill the memory."""
    for part in [config, *(inner for inner in config.values() if isinstance(inner, dict))]:
        for key, most in MOST.items():
            size = part.get(key)
            if isinstance(size, (int, float)) and not -1 <= size <= most:
                raise ModelError(f"{source}: config.json says {key}: {size:.6g}, which no model has; the file is damaged")


def refuse_encoder_decoder(source: Source, config: dict[str, Any]) -> None:
    """ModelError for a model with an encoder: srppo needs a decoder-only causal language model."""
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{source}: this is an encoder-decoder model ({config.get('model_type')}); srppo aligns decoder-only causal language models"
        )


def refuse_pickle(source: Source, allow_pickle: bool) -> None:
    """ModelError for a local folder whose only weights are pickle files. (Hub models: transformers is told to take safetensors only.)"""
    if allow_pickle or source.gguf_file is not None:
        return
    _refuse_pickle_shards(source)
    if not source.local:
        return
    folder = Path(source.location)
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLE and f.name != "training_args.bin")
    if pickles:
        raise ModelError(
            f"{source}: the weights are pickle files ({', '.join(pickles[:3])}), which can run code when loaded: refused by default; "
            "convert them to safetensors, or set model.allow_pickle: true if you trust them"
        )
    raise ModelError(f"{source}: holds no weights (*.safetensors)")


def _refuse_pickle_shards(source: Source) -> None:
    """ModelError where safetensors' own index leads to other files, or out of the folder: transformers would unpickle what it names."""
    index = read_json(source, "model.safetensors.index.json") or {}
    shards = index.get("weight_map", {})
    named = (read_json(source, "config.json") or {}).get("transformers_weights")
    for name in [*(shards.values() if isinstance(shards, dict) else [shards]), *([] if named is None else [named])]:
        plain = isinstance(name, str) and re.fullmatch(r"(?!\.)[^/\\\0]+\.safetensors(\.index\.json)?", name)
        if not plain:
            raise ModelError(
                f"{source}: its files name {str(name)[:80]!r} as weights, which is no safetensors file of that folder: refused"
            )


def is_adapter(source: Source) -> bool:
    """Whether the place holds a PEFT adapter and no model of its own."""
    if source.gguf_file is not None:
        return False
    return read_json(source, "adapter_config.json") is not None and read_json(source, "config.json") is None


def unreachable(source: Source, error: Exception) -> str:
    """The message for a model that cannot be read: what transformers or the hub said, and what to do."""
    said = " ".join(str(error).split())[:400]
    absent = "no local folder has this name, and the hub did not provide it: check name, revision and network, or give a folder's path"
    hint = "check the files of this folder" if source.local else absent
    return f"{source}: cannot be loaded ({hint}). Cause: {said}"
