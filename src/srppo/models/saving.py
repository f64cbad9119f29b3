"""Writing models and adapters to folders that are complete or absent, with the model card that says how to load them."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from srppo.errors import ModelError, RunFolderError, SrppoError
from srppo.files import current_umask, share_tree, sync_folder, sync_tree
from srppo.models.load import quiet, restored_config_values
from srppo.models.source import Source
from srppo.models.tokens import SpecialTokens
from srppo.text import clean, code


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """A new folder beside the target, renamed onto it at the end; removed, and the target untouched, if anything fails.

    Raises RunFolderError for what the disk refuses.
    """
    target = Path(target)
    work: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        work.chmod(0o777 & ~current_umask())  # mkdtemp makes private ones
        yield work
        share_tree(work)
        sync_tree(work)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            os.replace(target, old / "old")
            os.replace(work, target)
            shutil.rmtree(old)
        else:
            os.replace(work, target)
        sync_folder(target.parent)
    except SrppoError:
        raise
    except Exception as error:
        # safetensors and tokenizers report a full disk as errors of their own, with the system's number in the text
        if isinstance(error, OSError | SafetensorError) or "os error" in str(error):
            raise RunFolderError(f"{target}: cannot be written ({error}); free some space or choose another output folder") from error
        raise
    finally:
        if work is not None and work.exists():
            shutil.rmtree(work, ignore_errors=True)


def save_model(model: PreTrainedModel, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
    """Weights (safetensors) and config, in the layout that from_pretrained reads. weights: where the model itself does not hold them."""
    zeroed = [(config, key, getattr(config, key)) for config, key, _ in restored_config_values(model)]
    generation = getattr(model, "generation_config", None)
    try:
        for config, key, value in restored_config_values(model):
            setattr(config, key, value)
        if generation is not None:
            model.generation_config = valid_generation_config(generation)
        with quiet():
            model.save_pretrained(folder, state_dict=weights)
    finally:
        for config, key, value in zeroed:
            setattr(config, key, value)
        if generation is not None:
            model.generation_config = generation


def save_adapter(model: PeftModel, role: str, folder: str | Path) -> None:
    """adapter_model.safetensors and adapter_config.json, as PEFT lays them out for one adapter."""
    weights = get_peft_model_state_dict(model, adapter_name=role, save_embedding_layers=False)
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in weights.items()},
        Path(folder) / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = copy.deepcopy(model.peft_config[role])
    config.inference_mode = True
    for name, value in vars(config).items():
        if isinstance(value, set):  # whose order differs from process to process
            setattr(config, name, sorted(value))
    config.save_pretrained(str(folder))


def valid_generation_config(config: GenerationConfig, special: SpecialTokens | None = None) -> GenerationConfig:
    """A copy that transformers agrees to save (models are published with sampling flags but greedy decoding, which it refuses),
    and that, given the special tokens, stops at each of them."""
    config = copy.deepcopy(config)
    if special is not None:
        config.eos_token_id = list(special.eos_ids) if len(special.eos_ids) > 1 else special.eos_ids[0]
        if config.pad_token_id is None:
            config.pad_token_id = special.pad_id
    if not config.do_sample:
        for key in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"):
            if getattr(config, key, None) is not None:
                setattr(config, key, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ModelError(f"the model's generation_config is invalid, so the model could not be saved: {error}") from None
    return config


def model_card(card: str | None, role: str, source: Source, dtype: str, adapter: bool) -> str:
    """README.md: the given text (or a plain one), and how to load what is in the folder. A front matter is added where it has none."""
    body = card or f"# {role}\n\nThe {role} model of a Self-Rewarding PPO run (srppo), made from {code(source)}."
    if not body.startswith("---\n"):
        library = "peft" if adapter else "transformers"
        base = [] if source.local else [f"base_model: {source.location}"]  # a hub id; a path would mean nothing elsewhere
        body = "\n".join(["---", f"library_name: {library}", *base, "pipeline_tag: text-generation", "tags: [srppo]", "---", "", body])
    return body.rstrip() + "\n\n## Loading\n\n" + (_load_adapter(source, dtype) if adapter else _LOAD_MODEL)


_LOAD_MODEL = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
```
"""


def _load_adapter(source: Source, dtype: str) -> str:
    given = {"": source.location, **source.arguments(), "dtype": dtype}
    arguments = [(f"{k}=" if k else "") + json.dumps(clean(str(v)), ensure_ascii=False) for k, v in given.items()]
    gguf = (
        "The base is a GGUF file, so it must be loaded first, by itself and with `gguf_file`; PEFT's one-step classes do not know of it. "
        "Where the `kernels` package is installed, add `quantization_config=transformers.GgufConfig(dequantize=True)`.\n\n"
    )
    return (
        "This folder holds an adapter. It belongs on exactly this base model:\n\n"
        + ("" if source.gguf_file is None else gguf)
        + f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({", ".join(arguments)})
model = PeftModel.from_pretrained(base, "path/of/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
```
"""
    )
