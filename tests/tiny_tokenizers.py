"""Tiny tokenizers of the two common builds, trained here, and real chat templates: TRL's package carries several."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Add two and three. The answer is five, for two and three are five.",
    "User: hello\n\nAssistant: hello there, how are you?\n\n",
    "Q: yes or no? A: yes yes yes no no",
] * 3

# Llama-2 and Mistral style: no generation prompt, the answer follows the bracket, </s> ends it.
INST_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant here') }}{% endif %}{% endfor %}"
)


def trl_template(name: str) -> str:
    spec = importlib.util.find_spec("trl")
    assert spec and spec.origin
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


# In the manner of Llama 3 and Qwen: line breaks stay together, whatever follows them.
WORDS = Regex(r" ?[^\s\w]+[\r\n]*|[^\r\n\w]?\w+|\s*[\r\n]+|\s+(?!\S)|\s+")


@cache
def _byte_level(special: tuple[str, ...], gpt2_words: bool = False) -> Tokenizer:
    core = Tokenizer(models.BPE())
    # GPT-2's own word pattern splits "\n\nThe" into "\n", "\n", "The", but "\n\n" at the end of a text is one word.
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2_words)
    if not gpt2_words:
        core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(WORDS, "isolated"), core.pre_tokenizer])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return core


@cache
def _sentencepiece_like(special: tuple[str, ...]) -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = [*map(chr, range(32, 127)), "\n", "—", "ï"]
    special_tokens = ["<unk>", *special]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    return core


def _wrap(core: Tokenizer, template: str | None, bos: str | None, eos: str, adds_bos: bool) -> PreTrainedTokenizerFast:
    core = Tokenizer.from_str(core.to_str())
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def chatml(template: str | None = None) -> PreTrainedTokenizerFast:
    """Qwen and SmolLM: byte-level, no BOS, <|im_end|> ends turns."""
    core = _byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"))
    return _wrap(core, template or trl_template("qwen2_5"), None, "<|im_end|>", adds_bos=False)


def llama3(template: str | None = None, gpt2_words: bool = False) -> PreTrainedTokenizerFast:
    """Llama 3: byte-level, BOS added by the tokenizer and printed by the template."""
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    core = _byte_level(special, gpt2_words)
    return _wrap(core, template or trl_template("llama3"), "<|begin_of_text|>", "<|eot_id|>", adds_bos=True)


def gemma(template: str | None = None) -> PreTrainedTokenizerFast:
    """Gemma: sentencepiece-like, BOS, <end_of_turn> beside <eos>, no system role."""
    core = _sentencepiece_like(("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"))
    return _wrap(core, template or trl_template("gemma"), "<bos>", "<eos>", adds_bos=True)


def llama2(template: str | None = INST_TEMPLATE) -> PreTrainedTokenizerFast:
    """Llama 2 and Mistral: sentencepiece-like, <s>, </s>."""
    return _wrap(_sentencepiece_like(("<s>", "</s>")), template, "<s>", "</s>", adds_bos=True)


def deepseek(template: str | None = None) -> PreTrainedTokenizerFast:
    """DeepSeek-R1 distills: the generation prompt opens a thought that answered conversations do not show."""
    core = _byte_level(("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"))
    tokens = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    return _wrap(core, template or trl_template("deepseek_r1_distill"), *tokens, adds_bos=True)


def ids_of(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(t) for t in tokens]
