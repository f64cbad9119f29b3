"""Tiny random models of several architectures and a tiny character tokenizer, for tests that need real ones without a network."""

from __future__ import annotations

import string
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from srppo.config import build
from srppo.models.roles import Roles, build_roles
from srppo.records import TokenBatch

SPECIALS = ["<unk>", "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>"]
UNK, PAD, BOS, EOS, IM_START, IM_END, EOT = range(len(SPECIALS))
CHARACTERS = [c for c in string.printable if c not in "\t\r\x0b\x0c"]  # 96
VOCABULARY = len(SPECIALS) + len(CHARACTERS)  # 103

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_ROPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_ROPE, "tie_word_embeddings": False}),
    "llama_tied": ("llama", {**_ROPE, "tie_word_embeddings": True}),
    "gpt2": (
        "gpt2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    ),
    "qwen2": ("qwen2", {**_ROPE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_ROPE, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {**_ROPE, "sliding_window": 4, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    ),
    "gemma3": (
        "gemma3_text",
        {**_ROPE, "num_hidden_layers": 3, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "mistral": ("mistral", {**_ROPE, "sliding_window": 4}),
    "cohere": ("cohere", {**_ROPE, "logit_scale": 0.25}),
    "granite": ("granite", {**_ROPE, "logits_scaling": 3.0}),
}
ARCHITECTURES = ("llama", "gpt2", "qwen2", "qwen3", "gemma2", "gemma3", "mistral")
"""What the pipeline is tested with. cohere, granite and llama_tied can be built too."""


def tiny_model(
    architecture: str = "llama", *, seed: int = 0, vocabulary: int = VOCABULARY, spread: float = 0.2, **changes: Any
) -> PreTrainedModel:
    """A random model in eval mode, float32, about 20 k parameters.

    spread: standard deviation of the weights, wide enough that the logits of different tokens and contexts differ.
    """
    kind, sizes = _SIZES[architecture]
    settings = {"vocab_size": vocabulary, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None, "initializer_range": spread}
    if kind != "gpt2":
        settings["max_position_embeddings"] = 512
    config = CONFIG_MAPPING[kind](**{**settings, **sizes, **changes})
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():  # norms and biases start at 1 and 0, which hides mistakes
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_tokenizer(
    pad: Literal["own", "eos", "none"] = "own", *, chat: bool = True, eos: str | None = "</s>", bos: bool = False
) -> PreTrainedTokenizerFast:
    """One token a character, ids 7..102; the ids 0..6 are SPECIALS.

    pad: a token of its own, the EOS token, or no pad token at all. chat: a ChatML template, whose turns end with <|im_end|>,
    which is not the eos token (so there are two ends). eos None: no EOS token.
    """
    words = {token: i for i, token in enumerate(SPECIALS + CHARACTERS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    names: dict[str, Any] = {"unk_token": "<unk>", "eos_token": eos, "bos_token": "<s>" if bos else None}
    names["pad_token"] = {"own": "<pad>", "eos": eos, "none": None}[pad]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        additional_special_tokens=["<s>", "<|im_start|>", "<|im_end|>", "<|eot|>"],
        clean_up_tokenization_spaces=False,
        **{k: v for k, v in names.items() if v is not None},
    )
    if chat:
        tokenizer.chat_template = CHATML
    return tokenizer


def save_tiny(
    folder: str | Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    eos_ids: list[int] | None = None,
    **changes: Any,
) -> str:
    """Write a tiny model and its tokenizer as a Hugging Face folder; its path. eos_ids: written to generation_config.json."""
    model = tiny_model(architecture, seed=seed, **changes)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=eos_ids if eos_ids is not None else EOS)
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


def tiny_roles(
    folder: str | Path, kind: Literal["full", "lora"] = "full", *, seed: int = 0, lora: dict[str, Any] | None = None, **model: Any
) -> Roles:
    """The roles on a folder of save_tiny, only base there. lora: settings of `tuning`; the rest are settings of `model`."""
    tuning = {"kind": kind, "lora_rank": 4, "lora_alpha": 8.0, **(lora or {})}
    return build_roles(build({"seed": seed, "model": {"name": str(folder), "device": "cpu", **model}, "tuning": tuning}))


def tiny_batch(seed: int = 0) -> TokenBatch:
    """Three rows of ten ordinary tokens, the second cut to seven; targets are all but the first three."""
    ids = torch.randint(7, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(seed))
    attention = torch.ones_like(ids)
    attention[1, 7:] = 0
    return TokenBatch(ids, attention, attention.bool() & (torch.arange(10) >= 3))


def standard_roles(place: str, kind: str, **settings: Any) -> Roles:
    """base, sft (trained away from base, then frozen), policy (a copy of sft) and critic."""
    roles = tiny_roles(place, kind, **settings)  # type: ignore[arg-type]
    roles.create("sft", "base")
    train_role(roles, "sft", steps=2)
    roles.create("policy", "sft")
    roles.create_critic("sft")
    roles.freeze("sft")
    return roles


def train_role(roles: Roles, role: str, steps: int = 1) -> None:
    """Some optimizer steps up the likelihood of a fixed batch."""
    optimizer = torch.optim.AdamW(roles.parameters(role).values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        with roles.use(role, train=True):
            (-roles.score(role, tiny_batch(1), train=True).logprobs.sum()).backward()
        optimizer.step()
