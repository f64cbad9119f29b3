"""Pretraining of the embedded world's base model: a tiny Llama on documents by the authors of authors.py."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from srppo.lab.authors import document, draw_author
from srppo.lab.tokenizer import build_tokenizer
from srppo.seeding import stream_seed

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

STEPS = 1600
"""Optimizer steps of the shipped base."""
SEQUENCES = 32
"""Sequences a step, each of documents by one author."""
WINDOW = 96
"""Tokens a sequence."""
PEAK_LR, FINAL_LR, WARMUP_STEPS = 2.5e-3, 3e-5, 100
PROMPT_WEIGHT = 0.1
"""Weight of prompt tokens in the loss: their words are random letters, of which nothing can be learned but the format."""


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of 0.66 million parameters with weights drawn from the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(stream_seed(seed, "lab", "weights"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        attention_dropout=0.0,
    )
    return LlamaForCausalLM(config)


def training_batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random, sequences: int) -> tuple[Tensor, Tensor]:
    """Sequences of whole and, at the end, cut documents: ids [B, WINDOW] int64 and each token's loss weight [B, WINDOW] float32."""
    texts: list[str] = []
    spans: list[tuple[int, int]] = []  # how many documents each sequence holds
    for _ in range(sequences):
        author, length, first = draw_author(rng), 0, len(texts)
        while length < WINDOW:
            prompt, response = document(rng, author)
            texts += [prompt, response]
            length += len(prompt) + len(response) + 1  # one token a character, and EOS
        spans.append((first, len(texts)))
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids, weights = torch.zeros(sequences, WINDOW, dtype=torch.int64), torch.zeros(sequences, WINDOW)
    for row, (first, last) in enumerate(spans):
        tokens: list[int] = []
        token_weights: list[float] = []
        for i in range(first, last, 2):
            prompt_ids, response_ids = encoded[i], encoded[i + 1] + [tokenizer.eos_token_id]
            tokens += prompt_ids + response_ids
            token_weights += [PROMPT_WEIGHT] * len(prompt_ids) + [1.0] * len(response_ids)
        ids[row], weights[row] = torch.tensor(tokens[:WINDOW]), torch.tensor(token_weights[:WINDOW])
    return ids, weights


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from PEAK_LR to FINAL_LR."""
    warmup = min(WARMUP_STEPS, steps)
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    return FINAL_LR + 0.5 * (PEAK_LR - FINAL_LR) * (1 + math.cos(math.pi * share))


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Next-token cross entropy, the mean over tokens under `weights` (nats a token)."""
    logits = model(input_ids=ids).logits[:, :-1]
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    kept = weights[:, 1:].flatten()
    return (losses * kept).sum() / kept.sum()


def pretrain(
    output: str | Path, seed: int = 0, steps: int = STEPS, progress: Callable[[int, int, float], None] | None = None
) -> dict[str, Any]:
    """Train a base model and write it to `output` as a Hugging Face folder (config, safetensors, tokenizer).

    progress(step, steps, loss) is called after each step. Deterministic for a seed, a thread count and a torch build.
    Returns {"seed", "steps", "parameters", "loss"}, loss being the mean of the last 50 steps; the folder's pretraining.json holds the same.
    """
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    model.train()
    rng = random.Random(stream_seed(seed, "lab", "documents"))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=PEAK_LR, betas=(0.9, 0.98)
    )
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = weighted_loss(model, *training_batch(tokenizer, rng, SEQUENCES))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, steps, losses[-1])
    last = losses[-50:]
    facts = {"seed": seed, "steps": steps, "parameters": model.num_parameters(), "loss": sum(last) / max(len(last), 1)}
    save_base(model, tokenizer, Path(output), facts)
    return facts


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, facts: dict[str, Any]) -> None:
    """Write the Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
