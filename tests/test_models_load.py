"""Loading: what is accepted, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)

from srppo.config import ModelConfig
from srppo.errors import ModelError
from srppo.models.load import (
    load_model,
    load_tokenizer,
    resolve_device,
)
from tiny_models import EOS, save_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama"))


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(llama, tmp_path / "broken"))


def load(place: Path | str, **settings: Any) -> PreTrainedModel:
    return load_model(ModelConfig(name=str(place), device="cpu", **settings))


# --- ordinary folders


def test_a_loaded_model_is_ready(llama: Path) -> None:
    model = load(llama)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32
    expected = AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.arange(7, 20).unsqueeze(0)
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_dtype_and_attention_are_obeyed(llama: Path) -> None:
    model = load(llama, dtype="bfloat16", attention="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.config._attn_implementation == "eager"
    assert load_model(ModelConfig(name=str(llama), device="cpu"), dtype="float16").dtype == torch.float16


def test_no_progress_bars_and_no_lasting_switch(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    load(llama)
    assert "it/s" not in capfd.readouterr().err and logging.is_progress_bar_enabled() == shown


def test_the_eos_embedding_learns_even_where_it_pads(tmp_path: Path) -> None:
    """transformers passes pad_token_id to the embedding as padding_idx, whose gradient PyTorch drops."""
    model = load(save_tiny(tmp_path / "m", "llama", pad_token_id=EOS)).requires_grad_(True)
    model(torch.tensor([[8, EOS, 9]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[EOS].abs().sum() > 0


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ModelError, match="no device"):
        resolve_device("toaster")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="CUDA"):
            resolve_device("cuda:3")


# --- what is refused


def test_missing_places(tmp_path: Path) -> None:
    for name, message in (
        (str(tmp_path / "nowhere"), "no such file or folder"),
        ("./nowhere", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("", "model.name is empty"),
        (str(tmp_path), "holds no model"),
    ):
        with pytest.raises(ModelError, match=message):
            load(name)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="takes a folder"):
        load(tmp_path / "weights.safetensors")


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"nobody/nothing-here: cannot be loaded .*check name, revision and network"):
        load("nobody/nothing-here")


def test_pickle_is_refused_unless_allowed(broken: Path) -> None:
    weights = AutoModelForCausalLM.from_pretrained(broken).state_dict()
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load(broken)
    torch.save(weights, broken / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin.*pickle|pickle.*pytorch_model.bin") as caught:
        load(broken)
    assert "convert them to safetensors" in str(caught.value) and "model.allow_pickle" in str(caught.value)
    (broken / "other.safetensors").write_bytes(b"")  # a safe file beside it makes the pickle no safer
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(broken)
    assert torch.equal(load(broken, allow_pickle=True).lm_head.weight, weights["lm_head.weight"])


def test_foreign_code_is_refused(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "code.py").write_text("raise SystemExit('ran foreign code')")
    with pytest.raises(ModelError, match=r"homemade.*Python code.*model.trust_remote_code"):
        load(broken)
    del config["auto_map"]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="unknown to the installed transformers"):
        load(broken)


def test_a_known_architecture_ignores_the_code_beside_it(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "code.py").write_text("raise SystemExit('ran foreign code')")
    assert type(load(broken)).__name__ == "LlamaForCausalLM"


def test_other_kinds_of_models_are_refused(tmp_path: Path, llama: Path) -> None:
    t5 = T5Config(vocab_size=103, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="encoder-decoder"):
        load(tmp_path / "t5")
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError, match="'vit' models are not causal"):
        load(tmp_path / "vit")
    LlamaForSequenceClassification(AutoModelForCausalLM.from_pretrained(llama).config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ModelError, match=r"lack 1 of the weights.*lm_head"):
        load(tmp_path / "classifier")


def test_damaged_files(broken: Path) -> None:
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config[:-20])
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        load(broken)
    (broken / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="an object is expected"):
        load(broken)
    (broken / "config.json").write_text(config)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(broken)
    (broken / "model.safetensors").write_bytes(weights)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"no tokenizer.*model.tokenizer"):
        load_tokenizer(ModelConfig(name=str(broken)))


def test_weights_of_another_shape(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text()) | {"intermediate_size": 40}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(broken)


def test_an_unknown_attention_implementation(llama: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(llama, attention="telepathy")


def test_a_slip_in_a_path_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ModelError, match="no such folder in runs"):
        load_model(ModelConfig(name="runs/polcy"))
