"""A GGUF model becomes an ordinary one."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)

from srppo.config import ModelConfig
from srppo.errors import ModelError
from srppo.models.load import (
    SpecialTokens,
    load_model,
    make_ordinary,
)
from srppo.models.source import find_source
from tiny_models import BOS, EOS, SPECIALS, UNK, save_tiny, tiny_model, tiny_roles


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama"))


def load(place: Path | str, **settings: Any) -> PreTrainedModel:
    return load_model(ModelConfig(name=str(place), device="cpu", **settings))


def write_gguf(path: Path) -> PreTrainedModel:
    """A tiny Llama as llama.cpp would store it (queries and keys with their rotary halves interleaved), pad = eos, as usual there."""
    model = tiny_model("llama_tied")
    c, weights = model.config, {k: v.detach().numpy() for k, v in model.state_dict().items()}
    letters = sorted(ByteLevel.alphabet())[:94]
    w = gguf.GGUFWriter(path, "llama")
    w.add_name("Some title")
    w.add_context_length(512)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_count(c.head_dim)
    w.add_vocab_size(103)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("default")
    w.add_token_list([*SPECIALS, *letters, letters[0] + letters[1], letters[2] + letters[3]])
    w.add_token_types([3] * 7 + [1] * 96)
    w.add_token_merges([f"{letters[0]} {letters[1]}", f"{letters[2]} {letters[3]}"])
    w.add_bos_token_id(BOS)
    w.add_eos_token_id(EOS)
    w.add_unk_token_id(UNK)
    w.add_pad_token_id(EOS)

    def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
        return np.ascontiguousarray(x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape))

    w.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    w.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for i in range(c.num_hidden_layers):
        layer = {n.removeprefix(f"model.layers.{i}."): x for n, x in weights.items() if n.startswith(f"model.layers.{i}.")}
        w.add_tensor(f"blk.{i}.attn_q.weight", interleaved(layer["self_attn.q_proj.weight"], c.num_attention_heads))
        w.add_tensor(f"blk.{i}.attn_k.weight", interleaved(layer["self_attn.k_proj.weight"], c.num_key_value_heads))
        for theirs, ours in (("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"), ("attn_norm", "input_layernorm")):
            w.add_tensor(f"blk.{i}.{theirs}.weight", layer[f"{ours}.weight"])
        for theirs, ours in (("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")):
            w.add_tensor(f"blk.{i}.{theirs}.weight", layer[f"{ours}.weight"])
        w.add_tensor(f"blk.{i}.ffn_norm.weight", layer["post_attention_layernorm.weight"])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return model


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_gguf_model_becomes_an_ordinary_one(gguf_file: tuple[Path, PreTrainedModel], tmp_path: Path, kind: str) -> None:
    path, original = gguf_file
    roles = tiny_roles(path.parent, kind)  # type: ignore[arg-type]
    ids = torch.arange(7, 30).unsqueeze(0)
    with roles.use("base") as model:
        torch.testing.assert_close(model(ids).logits, original(ids).logits, atol=1e-5, rtol=0)
        assert not any(hasattr(model, n) for n in ("hf_quantizer", "is_quantized")) and not hasattr(model.config, "quantization_config")
    assert roles.special == SpecialTokens(UNK, (EOS,)) and len(roles.tokenizer) == 103
    assert (roles.tokenizer.bos_token, roles.tokenizer.eos_token) == ("<s>", "</s>")
    roles.create("sft", "base")
    for p in roles.parameters("sft").values():
        p.data += 0.01
    roles.save("sft", tmp_path / "sft")
    if kind == "full":
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
        assert "gguf" not in (tmp_path / "sft/config.json").read_text() and "Some title" not in (tmp_path / "sft/config.json").read_text()
    else:
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file="tiny.gguf", dtype="float32")
        again = PeftModel.from_pretrained(base, tmp_path / "sft")
        card = (tmp_path / "sft/README.md").read_text()
        assert 'gguf_file="tiny.gguf"' in card and "must be loaded first" in card
    with torch.no_grad(), roles.use("sft") as model:
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "sft").get_vocab() == roles.tokenizer.get_vocab()


def test_loading_is_silent(gguf_file: tuple[Path, PreTrainedModel], capfd: pytest.CaptureFixture[str]) -> None:
    bar = modeling_gguf_pytorch_utils.tqdm
    load(gguf_file[0])
    assert "tensors" not in capfd.readouterr().err
    assert modeling_gguf_pytorch_utils.tqdm is bar


def test_ways_to_name_a_gguf_model(gguf_file: tuple[Path, PreTrainedModel], llama: Path, tmp_path: Path) -> None:
    path, _ = gguf_file
    for source in (find_source(str(path)), find_source(str(path.parent)), find_source(str(path.parent), "tiny.gguf")):
        assert (source.location, source.gguf_file, source.local) == (str(path.parent), "tiny.gguf", True)
    shutil.copy(path, tmp_path / "a.gguf")
    shutil.copy(path, tmp_path / "b.gguf")
    with pytest.raises(ModelError, match=r"2 GGUF files \(a.gguf, b.gguf\).*model.gguf_file"):
        find_source(str(tmp_path))
    both = Path(shutil.copytree(llama, tmp_path / "both"))
    shutil.copy(path, both / "tiny.gguf")
    assert find_source(str(both)).gguf_file is None  # a folder with config.json is an ordinary one
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(path.parent, gguf_file="other.gguf")
    (tmp_path / "torn.gguf").write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(tmp_path / "torn.gguf")


def test_gguf_leftovers_would_break_saving(gguf_file: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    """Why make_ordinary exists: without it transformers refuses to save. When this fails at the first assertion, it can go."""
    path, _ = gguf_file
    raw = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file="tiny.gguf", dtype="float32")
    with pytest.raises(ValueError, match=r"(?i)quant|serial"):
        copy.deepcopy(raw).save_pretrained(tmp_path / "raw")
    make_ordinary(raw)
    raw.save_pretrained(tmp_path / "made")
