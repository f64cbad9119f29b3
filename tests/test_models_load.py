"""Loading: what is accepted, what is refused and with which words, which tokens end a response."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
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
    GenerationConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)

from srppo.config import ModelConfig
from srppo.errors import ModelError
from srppo.models.load import (
    SpecialTokens,
    check_fit,
    check_same_vocabulary,
    load_model,
    load_tokenizer,
    make_ordinary,
    resolve_device,
    special_tokens,
)
from srppo.models.source import find_source
from tiny_models import BOS, EOS, EOT, IM_END, PAD, SPECIALS, UNK, save_tiny, tiny_model, tiny_roles, tiny_tokenizer


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


# --- vocabularies


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    check_fit(tiny_tokenizer(), tiny_model(vocabulary=103))
    check_fit(tiny_tokenizer(), tiny_model(vocabulary=128))  # spare rows are usual
    with pytest.raises(ModelError, match=r"103 tokens.*only 102"):
        check_fit(tiny_tokenizer(), tiny_model(vocabulary=102))
    place = save_tiny(tmp_path / "small", vocabulary=90)
    with pytest.raises(ModelError, match="do not belong together"):
        tiny_roles(place)


def test_models_of_different_vocabularies() -> None:
    a, b = tiny_tokenizer(), tiny_tokenizer(pad="none")
    check_same_vocabulary(a, b, 103, 103)
    with pytest.raises(ModelError, match="base embeds 103 tokens and sft 128"):
        check_same_vocabulary(a, b, 103, 128)
    b.add_tokens(["hello"])
    with pytest.raises(ModelError, match=r"103 and 104 tokens; 1 differ, such as 'hello'"):
        check_same_vocabulary(a, b, 103, 103)


def test_a_tokenizer_of_its_own_place(tmp_path: Path) -> None:
    tiny_tokenizer(eos="<|eot|>").save_pretrained(tmp_path / "tok")
    place = save_tiny(tmp_path / "m")
    assert load_tokenizer(ModelConfig(name=place)).eos_token == "</s>"
    assert load_tokenizer(ModelConfig(name=place, tokenizer=str(tmp_path / "tok"))).eos_token == "<|eot|>"


# --- special tokens


def model_with(eos: Any = None, generation_eos: Any = None, pad: Any = None) -> PreTrainedModel:
    model = tiny_model(eos_token_id=eos, pad_token_id=None)
    model.config.pad_token_id = pad
    model.generation_config = GenerationConfig(eos_token_id=generation_eos, pad_token_id=pad)
    return model


@pytest.mark.parametrize(
    ("tokenizer", "model", "expected"),
    [
        (lambda: tiny_tokenizer("own", chat=False), lambda: model_with(EOS), SpecialTokens(PAD, (EOS,))),
        (lambda: tiny_tokenizer("own"), lambda: model_with(EOS), SpecialTokens(PAD, (EOS, IM_END))),
        # the usual trap: pad = eos. EOS still ends a response, and padding is some other token
        (lambda: tiny_tokenizer("eos", chat=False), lambda: model_with(EOS, pad=EOS), SpecialTokens(UNK, (EOS,))),
        (lambda: tiny_tokenizer("none", chat=False), lambda: model_with(EOS), SpecialTokens(UNK, (EOS,))),
        (lambda: tiny_tokenizer("none", chat=False), lambda: model_with(EOS, pad=PAD), SpecialTokens(PAD, (EOS,))),
        # several: Llama 3's generation config names three
        (lambda: tiny_tokenizer("own", chat=False), lambda: model_with(EOS, [EOS, EOT]), SpecialTokens(PAD, (EOS, EOT))),
        (lambda: tiny_tokenizer("own", chat=False), lambda: model_with([EOT, BOS], [EOS, EOT]), SpecialTokens(PAD, (EOS, EOT, BOS))),
        (lambda: tiny_tokenizer("eos", eos="<|im_end|>"), lambda: model_with(EOS), SpecialTokens(UNK, (IM_END, EOS))),
        # a config's pad of -1 or beyond the vocabulary is no token
        (lambda: tiny_tokenizer("none", chat=False), lambda: model_with(EOS, pad=-1), SpecialTokens(UNK, (EOS,))),
        (lambda: tiny_tokenizer("none", chat=False), lambda: model_with(EOS, pad=5000), SpecialTokens(UNK, (EOS,))),
        (lambda: tiny_tokenizer("own", chat=False, eos=None), lambda: model_with(None, EOT), SpecialTokens(PAD, (EOT,))),
        (lambda: tiny_tokenizer("none", eos=None), lambda: None, SpecialTokens(UNK, (IM_END,))),
    ],
)
def test_special_tokens(tokenizer: Callable[[], Any], model: Callable[[], Any], expected: SpecialTokens) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert special_tokens(tokenizer(), model()) == expected


def test_a_configs_eos_that_is_an_ordinary_word_is_ignored() -> None:
    """Llama's config says eos 2 by default, also where 2 is a letter."""
    with pytest.warns(UserWarning, match=r"\[20\].*ordinary tokens"):
        assert special_tokens(tiny_tokenizer(chat=False), model_with(20)).eos_ids == (EOS,)


def test_no_end_at_all() -> None:
    with pytest.raises(ModelError, match="no response could ever end"):
        special_tokens(tiny_tokenizer(chat=False, eos=None), model_with(None))


def test_templates_that_close_with_words_or_fail() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    assert special_tokens(tokenizer).eos_ids == (EOS,)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{{ '<|eot|>' }}<|im_end|>{% endfor %}"
    assert special_tokens(tokenizer).eos_ids == (EOS, EOT)
    tokenizer.chat_template = "{{ raise_exception('needs tools') }}"
    with pytest.warns(UserWarning, match="needs tools"):
        assert special_tokens(tokenizer).eos_ids == (EOS,)


# --- GGUF


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
