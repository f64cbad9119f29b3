"""Batches are a pure function of seed and epoch, see every example once, pad little; packed examples do not see each other."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, OPTConfig, Qwen3Config

from srppo.data.batching import micro_batches, pack, packed_batch, sft_batches, step_batch, steps_per_epoch
from srppo.masking import example_batch, target_ids
from srppo.models.forward import token_scores
from srppo.records import Example


def examples(n: int, seed: int = 0, longest: int = 60) -> list[Example]:
    draw = random.Random(seed)
    out = []
    for row in range(n):
        length, prompt = draw.randint(4, longest), draw.randint(1, 3)
        out.append(Example([draw.randint(5, 90) for _ in range(length)], [0] * prompt + [1] * (length - prompt), row))
    return out


@pytest.mark.parametrize("batching", ["length_grouped", "packed"])
@pytest.mark.parametrize("n, batch_size", [(1, 4), (4, 4), (5, 4), (33, 16), (100, 8), (103, 8)])
def test_every_example_once_in_batches_of_even_size(n: int, batch_size: int, batching: str) -> None:
    batches = sft_batches(examples(n), batch_size=batch_size, seed=3, epoch=1, batching=batching)
    assert sorted(i for b in batches for i in b) == list(range(n))
    sizes = [len(b) for b in batches]
    assert len(batches) == steps_per_epoch(n, batch_size) == (n + batch_size - 1) // batch_size
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("batching", ["length_grouped", "packed"])
def test_steps_walk_through_the_epochs(batching: str) -> None:
    data = examples(37)
    options = {"batch_size": 5, "seed": 2, "batching": batching}
    per_epoch = steps_per_epoch(37, 5)
    walked = [[e.row for e in step_batch(data, step=s, **options)] for s in range(3 * per_epoch)]
    assert walked == [b for epoch in range(3) for b in sft_batches(data, epoch=epoch, **options)]
    assert walked[per_epoch + 2] == [e.row for e in step_batch(data, step=per_epoch + 2, **options)]  # whatever was asked before


def test_epochs_and_seeds_differ() -> None:
    data = [Example([1, 2, 3], [0, 1, 1], row) for row in range(32)]  # all of one length: grouping must not fix the batches
    sets = [
        {frozenset(b) for b in sft_batches(data, batch_size=8, seed=seed, epoch=epoch)} for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert all(not a & b for i, a in enumerate(sets) for b in sets[:i])
    lengths = examples(32)
    sets = [{frozenset(b) for b in sft_batches(lengths, batch_size=4, seed=0, epoch=epoch)} for epoch in (0, 1)]
    assert not sets[0] & sets[1]


def test_length_grouping_pads_little() -> None:
    data = examples(256, longest=200)

    def padding(batching: str) -> float:
        batches = sft_batches(data, batch_size=16, seed=0, epoch=0, batching=batching)
        lengths = [[len(data[i].ids) for i in b] for b in batches]
        return 1 - sum(map(sum, lengths)) / sum(len(row) * max(row) for row in lengths)

    assert padding("length_grouped") < 0.5 * padding("packed")
    one_step = step_batch(data, step=0, batch_size=64, seed=0)
    micro = micro_batches(one_step, 200, "length_grouped", 0)
    widths = [b.ids.shape[1] for b in micro]
    assert widths == sorted(widths, reverse=True) and sum(b.attention_mask.sum() for b in micro) / sum(b.ids.numel() for b in micro) > 0.8


@pytest.mark.parametrize("batching", ["length_grouped", "packed"])
@pytest.mark.parametrize("tokens", [1, 90, 10_000])
def test_micro_batches_hold_the_steps_targets(batching: str, tokens: int) -> None:
    data = examples(11)
    batches = micro_batches(data, tokens, batching, pad_id=0, max_tokens=80)
    assert all((b.ids.numel() <= tokens or len(b.ids) == 1) and not b.target_mask[:, 0].any() for b in batches)
    assert sum(b.targets for b in batches) == sum(sum(e.target_mask) for e in data)
    found = sorted(i for b in batches for i in target_ids(b).tolist())
    assert found == sorted(i for e in data for i, m in zip(e.ids, e.target_mask) if m)
    assert sum(int(b.attention_mask.sum()) for b in batches) == sum(len(e.ids) for e in data)


def test_pack() -> None:
    assert pack([5, 3, 4, 2, 2], 8) == [[0, 1], [2, 3, 4]]
    assert pack([9, 3], 8) == [[0], [1]]  # longer than a row: alone in one
    lengths = [random.Random(1).randint(1, 50) for _ in range(200)]
    rows = pack(lengths, 100)
    assert sorted(i for r in rows for i in r) == list(range(200)) and max(sum(lengths[i] for i in r) for r in rows) <= 100
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 100) + 1


def test_layout_of_a_packed_batch() -> None:
    a, b, c = Example([5, 6, 7], [1, 1, 1], 0), Example([8, 9], [0, 1], 1), Example([4], [1], 2)
    batch = packed_batch([[a, b], [c]], pad_id=3)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 3, 3, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert batch.segment_ids is not None and batch.segment_ids.tolist() == [[1, 1, 1, 2, 2], [1, 0, 0, 0, 0]]
    assert batch.position_ids is not None and batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    # an example's first token is predicted by its neighbour, so it is no target, whatever its mask says
    assert batch.target_mask.int().tolist() == [[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]
    assert batch.to("cpu").segment_ids is not None
    assert example_batch([a], 0).position_ids is None


SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 1}
ROPE = {
    **SIZES,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
APART = {
    "llama": LlamaConfig(**ROPE),
    "qwen3": Qwen3Config(**ROPE, head_dim=8),
    "gpt2": GPT2Config(**SIZES, n_positions=128, initializer_range=0.3),
    "mistral_sliding": MistralConfig(**ROPE, sliding_window=5),  # a ready 4-D mask would switch its window off
    "gemma2_sliding": Gemma2Config(**{**ROPE, "initializer_range": 0.1}, head_dim=8, sliding_window=5),
}
LEAKING = {
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=128, init_std=0.3, pad_token_id=0),
    "falcon": FalconConfig(**SIZES, initializer_range=0.3),
}


def model_of(config: object, attention: str = "sdpa") -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", APART)
def test_transformers_keeps_packed_examples_apart(name: str, attention: str) -> None:
    """The mechanism itself: positions that restart, no mask, no cache. Each example's logits equal those it has alone."""
    model, data = model_of(APART[name], attention), examples(4, longest=20)
    batch = packed_batch([data[:3], data[3:]], pad_id=0)
    with torch.no_grad():
        packed = model(input_ids=batch.ids, attention_mask=None, position_ids=batch.position_ids, use_cache=False).logits
        alone = [model(input_ids=torch.tensor([e.ids]), use_cache=False).logits[0] for e in data]
    torch.testing.assert_close(packed[0, : sum(len(e.ids) for e in data[:3])], torch.cat(alone[:3]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed[1, : len(data[3].ids)], alone[3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "opt"])
def test_packed_and_padded_batches_score_alike(name: str) -> None:
    model, data = model_of({**APART, **LEAKING}[name]), examples(9, longest=30)

    def scores(batching: str) -> tuple[list[float], torch.Tensor]:
        model.zero_grad()
        total = torch.zeros(())
        values: list[float] = []
        for batch in micro_batches(data, 80, batching, pad_id=0, max_tokens=40):
            logprobs = token_scores(model, batch).logprobs
            values += logprobs.tolist()
            total = total + logprobs.sum()
        total.backward()
        return sorted(values), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (padded, padded_grad), (packed, packed_grad) = scores("length_grouped"), scores("packed")
    torch.testing.assert_close(torch.tensor(packed), torch.tensor(padded), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed_grad, padded_grad, atol=1e-3, rtol=1e-3)
