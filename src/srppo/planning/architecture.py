"""A model known by its configuration alone: exact parameter counts, and short copies of it without weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from srppo.config import ModelConfig
from srppo.errors import ModelError
from srppo.models.compiled import layers_of
from srppo.models.source import model_source, read_config, refuse_absurd, refuse_encoder_decoder, refuse_foreign_code, unreachable


@dataclass(frozen=True)
class Counts:
    """Parameters by kind; a tied one counts once."""

    total: int
    embedding: int  # the input embedding, [V, H]
    head: int  # the LM head where it has weights of its own; 0 where it is tied
    tied: bool
    vocabulary: int  # V, rows of the output layer
    width: int  # H
    layers: int = 0  # all decoder layers together; 0 where they cannot be told apart

    @property
    def trunk(self) -> int:
        """What a critic copies: all but an LM head of its own."""
        return self.total - self.head

    @property
    def matmul(self) -> int:
        """N_matmul of one token that passes the LM head: all weights but the embedding's look-up; a tied embedding counts as the head."""
        return self.total if self.tied else self.total - self.embedding


@dataclass(frozen=True, eq=False)
class Architecture:
    """A configuration and what follows from it. Made by read_architecture or from a transformers configuration."""

    config: Any
    name: str = ""

    @property
    def text(self) -> Any:
        return self.config.get_text_config()

    @property
    def layers(self) -> int:
        return int(self.text.num_hidden_layers)

    @cached_property
    def period(self) -> int:
        """After how many layers their kinds (sliding and full attention, dense and sparse …) repeat; 1 where all are alike."""
        kinds = [v for v in vars(self.text).values() if isinstance(v, (list, tuple)) and len(v) == self.layers]
        for period in range(1, self.layers):
            if all(v[i] == v[i % period] for v in kinds for i in range(self.layers)):
                return period
        return self.layers

    def shortened(self, layers: int) -> Any:
        """The configuration with only its first layers."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        for key, value in list(vars(text).items()):
            if isinstance(value, (list, tuple)) and len(value) == self.layers and self.layers > layers:
                setattr(text, key, value[:layers])
        text.num_hidden_layers = layers
        return config

    @staticmethod
    def build(config: Any, dtype: str = "float32") -> Any:
        """The model on the device (or fake device) in force, its weights left as they come."""
        from transformers import AutoModelForCausalLM

        with quiet(), no_init():
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            model.tie_weights()  # left out with the initial values
            return model

    @cached_property
    def counts(self) -> Counts:
        """From the model on the meta device, where tensors have shapes and no memory."""
        with torch.device("meta"):
            model = self.build(self.config)
        into, out = model.get_input_embeddings().weight, model.get_output_embeddings()
        tied = out is not None and out.weight is into
        own = 0 if out is None or tied else sum(p.numel() for p in out.parameters())
        vocabulary = into.shape[0] if out is None else out.weight.shape[0]
        layers = sum(p.numel() for layer in layers_of(model) for p in layer.parameters())
        return Counts(sum(p.numel() for p in model.parameters()), into.numel(), own, tied, vocabulary, int(self.text.hidden_size), layers)

    def adapter_sizes(self, rank: int, targets: str | tuple[str, ...], layers: int | None = None) -> tuple[int, int]:
        """Parameters of one LoRA adapter, and of the linear layers it adapts; layers: on the last so many only. Counted by PEFT itself."""
        from peft.tuners.lora.layer import Linear as LoraLinear

        few = min(self.period, self.layers - 1) if self.layers > 1 else 1
        more = min(2 * few, self.layers)
        count = self.layers if layers is None else layers
        sizes = []
        for short in (few, more):
            with torch.device("meta"):
                model = with_adapters(self.build(self.shortened(short)), rank, targets)
            adapter = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
            bases: list[Any] = [m.get_base_layer() for m in model.modules() if isinstance(m, LoraLinear)]
            sizes.append((adapter, sum(base.weight.numel() for base in bases)))
        adapter, adapted = (round(a + (count - few) * (b - a) / max(1, more - few)) for a, b in zip(*sizes))
        return adapter, adapted

    @cached_property
    def cache_elements(self) -> int:
        """Numbers that the key-value cache keeps a token and row, of all layers: read off the cache itself after a short prefill.

        Layers that keep a state of fixed size instead (recurrent ones) count by it once, see `state_elements`.
        """
        return self._cache[0]

    @cached_property
    def state_elements(self) -> int:
        """Numbers that layers without a growing cache keep a row."""
        return self._cache[1]

    @cached_property
    def _cache(self) -> tuple[int, int]:
        from srppo.rollout.cache import new_cache

        few = min(self.period, self.layers)
        with torch.device("meta"), torch.no_grad():
            model = self.build(self.shortened(few)).eval()
            sizes = []
            for length in (8, 16):
                cache = new_cache(model.config)
                model.get_decoder()(input_ids=torch.zeros(1, length, dtype=torch.int64), past_key_values=cache, use_cache=True)
                sizes.append(sum(_held(layer) for layer in cache.layers))
        grows = (sizes[1] - sizes[0]) // 8
        return grows * self.layers // few, (sizes[0] - 8 * grows) * self.layers // few


def _held(layer: Any) -> int:
    """Numbers in the tensors of one cache layer."""
    found: dict[int, int] = {}
    for value in vars(layer).values():
        for tensor in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, torch.Tensor):
                found[id(tensor)] = tensor.numel()
    return sum(found.values())


def read_architecture(model: ModelConfig) -> Architecture:
    """The configuration of model.name; of a hub model config.json is all that is fetched. Raises ModelError, for GGUF files too."""
    from transformers import AutoConfig

    source = model_source(model)
    if source.gguf_file is not None:
        unset = " --model.gguf_file null" if model.gguf_file else ""
        raise ModelError(
            f"{source}: `srppo plan` reads config.json, and a GGUF file has none of its own; plan with the model it was made from: "
            f"--model.name NAME{unset}, with its hub id or a folder that holds its config.json"
        )
    raw = read_config(source)
    refuse_foreign_code(source, raw, model.trust_remote_code)
    refuse_absurd(source, raw)
    refuse_encoder_decoder(source, raw)
    try:
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=model.trust_remote_code, **source.arguments())
        if model.attention is not None:
            config._attn_implementation = model.attention
        found = Architecture(config, model.name)
        _ = found.counts  # builds it without weights: what no model can have is noticed here
        return found
    except ModelError:
        raise
    except Exception as error:  # a damaged config.json makes transformers' own code raise whatever it meets
        raise ModelError(unreachable(source, error)) from error


def with_adapters(model: Any, rank: int, targets: str | tuple[str, ...]) -> Any:
    """The model with one LoRA adapter put into it, as LoraRoles does."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    from srppo.models.lora_linear import install

    settings = LoraConfig(
        r=rank,
        target_modules=targets if isinstance(targets, str) else list(targets),
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    with quiet():
        adapted = get_peft_model(model, settings).get_base_model()
    install([m for m in adapted.modules() if isinstance(m, BaseTunerLayer)])
    return adapted


@contextmanager
def no_init() -> Iterator[None]:
    """Weights are not drawn: nobody will read them."""
    from transformers import initialization

    with initialization.no_init_weights():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: what they say of this model is said when it is loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


__all__ = ["Architecture", "Counts", "read_architecture", "with_adapters"]
