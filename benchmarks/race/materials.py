"""What both sides of a race are given: a random base, an SFT model near it (whole, and as an adapter), a tokenizer, the prompts."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.race.shapes import Shape

NOISE = 0.02  # of each weight's standard deviation: how far the SFT model is from the base
ADAPTER_NOISE = 0.002  # standard deviation of the SFT adapter's B
SHORTEST = 8  # tokens of the shortest prompt, or a quarter of the longest


def prompt_ids(shape: Shape, count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of ordinary tokens, of evenly drawn lengths; no two are equal."""
    rng, seen = random.Random(f"prompts {seed}"), set[tuple[int, ...]]()
    while len(seen) < count:
        length = rng.randint(max(SHORTEST, shape.prompt // 4), shape.prompt)
        seen.add(tuple(rng.randrange(4, shape.model.vocab) for _ in range(length)))
    return [list(ids) for ids in sorted(seen, key=lambda ids: rng.random())]


def prompt_text(ids: list[int]) -> str:
    """The text that the race's tokenizer reads as these ids."""
    return " ".join(f"w{i}" for i in ids)


def write_materials(
    folder: Path,
    shape: Shape,
    prompts: int,
    seed: int = 0,
    tunings: Sequence[str] = ("full", "lora"),
    device: str = "cpu",
    dtype: str = "float32",
) -> Path:
    """Write base/, sft/, sft_adapter/ (Hugging Face and PEFT folders), prompts.jsonl and demonstrations.jsonl into `folder`.

    tunings: which SFT models are wanted, the whole one (full), the adapter (lora). device: where the weights are drawn.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = word_tokenizer(shape.model.vocab)
    with torch.device(device):
        base = LlamaForCausalLM(LlamaConfig(**shape.model.config(positions=max(256, shape.prompt + shape.response))))
    base.to(getattr(torch, dtype)).generation_config.eos_token_id = tokenizer.eos_token_id
    _save(base, tokenizer, folder / "base")
    if "full" in tunings:
        sft = copy.deepcopy(base)
        with torch.no_grad():
            for weight in sft.parameters():
                if weight.ndim > 1:
                    weight.add_(NOISE * weight.std() * torch.randn_like(weight))
        _save(sft, tokenizer, folder / "sft")
        del sft
    if "lora" in tunings:
        _save_adapter(base, shape.rank, folder)
    rows = [{"prompt": prompt_text(ids), "ids": ids} for ids in prompt_ids(shape, prompts, seed)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = [{"prompt": row["prompt"], "completion": " w5"} for row in rows[:4]]  # never learned from: a recipe has to name some
    (folder / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))
    return folder


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_adapter(base: Any, rank: int, folder: Path) -> None:
    """An adapter on all linear layers whose B is small noise. The base has it afterwards."""
    import torch
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, weight in adapter.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, ADAPTER_NOISE)
        adapter.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapter.save_pretrained(folder / "sft_adapter")


def word_tokenizer(vocab: int) -> Any:
    """A tokenizer whose word w17 is the id 17, padded at the left as TRL wants its prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    core = Tokenizer(models.WordLevel({**special, **{f"w{i}": i for i in range(4, vocab)}}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )
