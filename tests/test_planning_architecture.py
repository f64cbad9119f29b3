"""What a plan knows of a model without its weights, against the real model: parameters, adapters, cache, kept activations, operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from srppo.config import build
from srppo.errors import ModelError
from srppo.models.load import load_model
from srppo.planning.architecture import Architecture, read_architecture
from srppo.planning.dryrun import Footprint, Pass, extrapolate, footprint
from srppo.rollout.cache import new_cache
from tiny_models import ARCHITECTURES, VOCABULARY, save_tiny, tiny_model, tiny_roles

LLAMA: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}


def llama(layers: int = 5) -> Architecture:
    return Architecture(CONFIG_MAPPING["llama"](num_hidden_layers=layers, **LLAMA))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_are_those_of_the_real_model(name: str, tmp_path: Path) -> None:
    real = tiny_model(name)
    place = save_tiny(tmp_path / name, name)
    counts = read_architecture(build({"model": {"name": place}}).model).counts
    assert counts.total == sum(p.numel() for p in real.parameters())
    assert counts.embedding == VOCABULARY * 32
    out = real.get_output_embeddings().weight
    assert counts.tied == (out is real.get_input_embeddings().weight)
    assert counts.trunk == sum(p.numel() for p in real.get_decoder().parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_adapter_is_the_one_the_roles_make(name: str, tmp_path: Path) -> None:
    place = save_tiny(tmp_path / name, name)
    roles = tiny_roles(place, "lora")
    roles.create("sft", "base")
    found = read_architecture(build({"model": {"name": place}}).model).adapter_sizes(4, "all-linear")[0]
    assert found == sum(p.numel() for p in roles.parameters("sft").values())


def test_adapter_on_the_last_layers_is_their_share() -> None:
    whole = llama(6).adapter_sizes(4, "all-linear")[0]
    assert llama(6).adapter_sizes(4, "all-linear", layers=2)[0] == whole // 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_cache_is_what_decoding_fills(name: str) -> None:
    model = tiny_model(name)
    cache = new_cache(model.config)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 11, dtype=torch.int64), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert Architecture(model.config).cache_elements * 11 == held


def test_period_of_layer_kinds() -> None:
    assert llama().period == 1
    kinds = ["sliding_attention", "full_attention"] * 3
    config = CONFIG_MAPPING["gemma3_text"](num_hidden_layers=6, layer_types=kinds, **LLAMA)
    assert Architecture(config).period == 2
    assert Architecture(config).shortened(2).layer_types == kinds[:2]


@pytest.mark.parametrize("settings", [{}, {"train": True}, {"train": True, "checkpointing": True}, {"train": True, "lora_rank": 4}])
def test_two_short_runs_tell_of_the_whole(settings: dict[str, object]) -> None:
    work = Pass(2, 24, 8, **settings)  # type: ignore[arg-type]
    far, whole = footprint(llama(7), work), footprint(llama(7), work, layers=7)
    from srppo.planning import dryrun

    direct = dryrun._run(llama(7), 7, work)
    assert far == whole
    assert (far.kept, far.head, far.embedding, far.flops) == (direct.kept, direct.head, direct.embedding, direct.flops)
    assert abs(far.peak - direct.peak) <= 0.01 * direct.peak


def test_a_pass_leaves_the_short_models_as_they_were() -> None:
    """They are kept for the next pass: each against models that nothing has used."""
    changes: list[dict[str, Any]] = [
        {"train": True, "checkpointing": True},
        {"train": True},
        {},
        {"head": "last"},
        {"train": True, "head": "values"},
    ]
    passes = [Pass(2, 24, 8, **(change | lora)) for change in changes for lora in ({}, {"lora_rank": 4})]
    used = llama(4)
    for work in [*passes, *reversed(passes)]:
        assert footprint(used, work) == footprint(llama(4), work), work


def test_kept_activations_are_what_autograd_saves() -> None:
    """The slow twin: a real forward pass, each storage that autograd keeps counted once, weights aside."""
    work = Pass(2, 24, 8, train=True, head="none")
    architecture = llama(4)
    model = tiny_model(
        "llama", vocabulary=LLAMA["vocab_size"], **{k: v for k, v in LLAMA.items() if k != "vocab_size"}, num_hidden_layers=4
    )
    model.train().requires_grad_(True)
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        states = model.get_decoder()(input_ids=torch.zeros(2, 24, dtype=torch.int64), use_cache=False).last_hidden_state
    real = sum(saved.values())
    assert states.requires_grad
    assert abs(footprint(architecture, work).kept - real) <= 0.05 * real


def test_operations_are_two_a_weight_and_token_and_attention() -> None:
    architecture, rows, length, targets = llama(4), 2, 24, 8
    counts = architecture.counts
    inner = counts.total - counts.embedding - counts.head - 64 * (2 * 4 + 1)  # the norms' weights multiply element by element
    attention = 2 * 2 * rows * 4 * length * length * 16 // 2 * 4  # two products, half of them masked, a layer
    forward = 2 * rows * length * inner + attention
    assert footprint(architecture, Pass(rows, length, targets, head="none")).flops == forward
    head = 2 * rows * targets * counts.head
    assert footprint(architecture, Pass(rows, length, targets)).flops == forward + head


def test_checkpointing_keeps_one_state_a_layer() -> None:
    kept = (
        footprint(llama(6), Pass(2, 24, 8, train=True, checkpointing=True)).kept
        - footprint(llama(5), Pass(2, 24, 8, train=True, checkpointing=True)).kept
    )
    assert kept == 2 * 24 * 64 * 4


def test_autocast_with_checkpointing_holds_no_second_copy_of_the_weights() -> None:
    work = Pass(1, 4, 2, train=True, checkpointing=True, autocast="bfloat16")
    few, many = (footprint(llama(n), work) for n in (4, 8))
    layer = llama(4).counts.layers // 4
    assert many.kept - few.kept < 4 * layer * 2 / 8  # four layers more; in bfloat16 they would be 2 bytes a weight


def test_extrapolation_is_a_line() -> None:
    one, two = Footprint(10, 12, 14, 16, 5), Footprint(20, 22, 24, 26, 5)
    assert extrapolate(one, two, 3) == Footprint(40, 42, 44, 46, 5, extrapolate(one, two, 3).operations)


def test_a_gguf_file_is_refused_clearly(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"GGUF file has none of its own.*--model.name NAME, with"):
        read_architecture(build({"model": {"name": str(tmp_path / "m.gguf")}}).model)
    with pytest.raises(ModelError, match=r"--model.name NAME --model.gguf_file null"):
        read_architecture(build({"model": {"name": str(tmp_path), "gguf_file": "m.gguf"}}).model)


def test_what_has_no_configuration_is_told_as_by_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub model without network, an empty folder, an adapter: the same words as from load_model."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    said = {
        "owner/nowhere": r"check name, revision and network.*HF_HUB_OFFLINE is set.*cache has no config.json",
        str(tmp_path / "empty"): "holds no model",
        str(tmp_path / "adapter"): r"adapter, not a model.*base as model.name",
    }
    for name, words in said.items():
        config = build({"model": {"name": name}}).model
        with pytest.raises(ModelError, match=words) as planned:
            read_architecture(config)
        with pytest.raises(ModelError) as loaded:
            load_model(config)
        assert str(planned.value) == str(loaded.value)


def test_no_weights_are_needed(tmp_path: Path) -> None:
    place = Path(save_tiny(tmp_path / "m", "llama"))
    (place / "model.safetensors").unlink()
    assert read_architecture(build({"model": {"name": str(place)}}).model).layers == 2
