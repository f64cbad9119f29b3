"""masking.py and the padding helpers of records.py, against hand values, TRL's whitening and Hugging Face's shifted loss."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from srppo.logprobs import token_logprobs
from srppo.losses.supervised import cross_entropy
from srppo.masking import (
    example_batch,
    masked_mean,
    masked_sum,
    masked_whiten,
    predicting,
    rollout_batch,
    target_ids,
    token_chunks,
    unflatten,
)
from srppo.records import Example, Rollout, pad_sequences

NAN = float("nan")


def test_masked_sum_and_mean_by_hand_with_poison_off_the_mask() -> None:
    x = torch.tensor([[1.0, 2.0, NAN], [float("inf"), -NAN, 5.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    assert masked_sum(x, mask) == 8
    assert masked_sum(x, mask, dim=1).tolist() == [3, 5]
    assert masked_sum(x, mask, dim=0).tolist() == [1, 2, 5]
    assert masked_mean(x, mask.bool()) == pytest.approx(8 / 3)
    assert masked_mean(x, mask.float(), dim=1).tolist() == [1.5, 5]
    assert masked_mean(x, torch.zeros_like(mask)) == 0


def test_poison_off_the_mask_reaches_no_gradient() -> None:
    x = torch.tensor([1.0, NAN, 3.0], requires_grad=True)
    masked_mean(x, torch.tensor([True, False, True])).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.5, 0, 0.5]


def random_case(seed: int, rows: int = 6, columns: int = 7) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(rows, columns, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, columns + 1, (rows,), generator=g)
    return x, torch.arange(columns) < lengths.unsqueeze(1)


@pytest.mark.parametrize("seed", range(3))
def test_whitened_mean_is_zero_and_variance_one(seed: int) -> None:
    x, mask = random_case(seed)
    white = masked_whiten(torch.where(mask, x, NAN), mask)
    assert abs(white[mask].mean()) < 1e-12
    assert white[mask].var(correction=0) == pytest.approx(1, abs=1e-7)
    assert (white[~mask] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_whitening_agrees_with_trl_up_to_its_sample_variance(seed: int) -> None:
    trl = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    x, mask = random_case(seed)
    n = int(mask.sum())
    theirs = trl.masked_whiten(x, mask) * (n / (n - 1)) ** 0.5  # TRL divides by n - 1
    torch.testing.assert_close(masked_whiten(x, mask)[mask], theirs[mask], atol=1e-6, rtol=1e-6)


def test_whitening_without_shift_only_rescales() -> None:
    x, mask = random_case(0)
    white = masked_whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(white[mask], x[mask] / x[mask].std(correction=0), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("values", [[], [4.0], [4.0, 4.0, 4.0]])
def test_whitening_nothing_one_or_equal_values_is_finite(values: list[float]) -> None:
    x = torch.tensor([*values, NAN])
    mask = torch.tensor([True] * len(values) + [False])
    assert masked_whiten(x, mask).tolist() == [0] * (len(values) + 1)
    assert masked_whiten(x, mask, shift_mean=False).tolist() == [*values, 0]


def test_pad_sequences_by_hand() -> None:
    assert pad_sequences([[1, 2, 3], [], [4]], value=9).tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]]
    assert pad_sequences([]).shape == (0, 0)
    assert pad_sequences([[], []]).shape == (2, 0)


def test_example_batch_by_hand() -> None:
    examples = [Example([5, 6, 7, 2], [1, 0, 1, 1], row=0), Example([8, 2], [0, 1], row=1)]
    batch = example_batch(examples, pad_id=2)  # the pad id is the EOS id, as in many tokenizers
    assert batch.ids.tolist() == [[5, 6, 7, 2], [8, 2, 2, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.target_mask.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert target_ids(batch).tolist() == [7, 2, 2]
    assert batch.targets == 3


def test_predicting_takes_the_state_before_each_target() -> None:
    states = torch.arange(8).reshape(2, 4)
    target_mask = torch.tensor([[False, False, True, True], [False, True, False, False]])
    assert predicting(states, target_mask).tolist() == [1, 2, 4]
    assert predicting(states.unsqueeze(-1).expand(2, 4, 3), target_mask).shape == (3, 3)


def rollout() -> Rollout:
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    responses = torch.tensor([[11, 12, 1], [1, 0, 0], [13, 14, 0]])
    return Rollout([[3], [4, 5, 6], [7, 8]], [0, 1, 2], responses, mask, torch.zeros(3, 3), torch.tensor([True, True, False]))


def test_rollout_batch_by_hand() -> None:
    batch = rollout_batch(rollout(), [2, 0, 1], pad_id=9)
    assert batch.ids.tolist() == [[7, 8, 13, 14], [3, 11, 12, 1], [4, 5, 6, 1]]
    assert batch.attention_mask.tolist() == [[1] * 4] * 3
    assert batch.target_mask.int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]]
    assert rollout().lengths.tolist() == [3, 1, 2]


def test_flat_and_padded_views_are_inverse() -> None:
    r = rollout()
    flat = target_ids(rollout_batch(r, [0, 1, 2], pad_id=0))
    assert unflatten(flat, r.mask).tolist() == r.responses.tolist()


def test_token_chunks_hold_every_row_once_longest_first() -> None:
    lengths = [3, 9, 1, 9, 4]
    chunks = token_chunks(lengths, 18)
    assert sorted(r for c in chunks for r in c) == [0, 1, 2, 3, 4]
    assert [[lengths[r] for r in c] for c in chunks] == [[9, 9], [4, 3, 1]]
    assert token_chunks(lengths, 8) == [[1], [3], [4, 0], [2]]  # a longer row is alone; 4 + 4 + 4 would be one too many
    assert token_chunks([], 4) == []


def test_shifted_loss_is_hugging_faces_and_padding_of_any_length_changes_nothing() -> None:
    """transformers' own label loss is the outside value for the project's only shift by one."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes)).eval()
    examples = [Example([3, 4, 5, 6, 1], [0, 0, 1, 1, 1], row=0), Example([7, 8, 1], [0, 1, 1], row=1)]
    batch = example_batch(examples, pad_id=1)
    with torch.no_grad():
        labels = torch.where(batch.target_mask, batch.ids, -100)
        theirs = model(input_ids=batch.ids, attention_mask=batch.attention_mask, labels=labels).loss
        for extra in (0, 1, 5):
            longer = example_batch([*examples, Example([1] * (5 + extra), [0] * (5 + extra), row=2)], pad_id=1)
            logits = model(input_ids=longer.ids, attention_mask=longer.attention_mask).logits
            scores = token_logprobs(predicting(logits, longer.target_mask), target_ids(longer))
            torch.testing.assert_close(cross_entropy(scores.logprobs).loss / longer.targets, theirs, atol=1e-6, rtol=1e-6)
