"""The embedded base model: what ships, and that pretraining remakes its kind."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from srppo.lab import pretrain as lab_pretrain
from srppo.lab import tasks
from srppo.lab.world import base_folder

PER_FAMILY = 24


def test_assets_are_small_and_loadable_without_pickle() -> None:
    files = [f for f in base_folder().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 3_000_000
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".jinja"}


@pytest.fixture(scope="module")
def answers() -> dict[bool, list[bool]]:
    """{greedy?: whether each response is exactly right}, by plain Hugging Face generation, one prompt length at a time: no padding."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    model = AutoModelForCausalLM.from_pretrained(base_folder())
    rng = random.Random(2024)
    asked = [(family, tasks.random_word(rng)) for family in tasks.FAMILIES for _ in range(PER_FAMILY)]
    by_length: dict[int, list[tuple[str, str]]] = {}
    for family, word in asked:
        by_length.setdefault(len(tasks.prompt_text(family, word)), []).append((family, word))
    torch.manual_seed(0)
    right: dict[bool, list[bool]] = {True: [], False: []}
    for length, group in by_length.items():
        ids = torch.tensor([tokenizer(tasks.prompt_text(*pair))["input_ids"] for pair in group])
        for greedy in right:
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=not greedy, top_k=0, max_new_tokens=16)
            texts = tokenizer.batch_decode(out[:, length:])
            right[greedy] += [text.split("<pad>")[0] == tasks.answer_text(*pair) + "<eos>" for text, pair in zip(texts, group)]
    return right


def test_greedy_answers_are_mostly_right(answers: dict[bool, list[bool]]) -> None:
    assert sum(answers[True]) / len(answers[True]) > 0.75


def test_samples_are_right_about_a_third_of_the_time(answers: dict[bool, list[bool]]) -> None:
    assert 0.2 < sum(answers[False]) / len(answers[False]) < 0.5


def test_pretraining_is_deterministic_and_learns(tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    facts = lab_pretrain.pretrain(tmp_path / "a", seed=5, steps=4, progress=lambda *report: seen.append(report))
    again = lab_pretrain.pretrain(tmp_path / "b", seed=5, steps=4)
    other = lab_pretrain.pretrain(tmp_path / "c", seed=6, steps=4)
    assert facts == again
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert facts["loss"] != other["loss"]
    assert [(step, steps) for step, steps, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen[-1][2] < seen[0][2]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a").num_parameters() == facts["parameters"] == 665_600


def test_training_batches_hold_whole_documents_of_one_author() -> None:
    tokenizer = lab_pretrain.build_tokenizer()
    ids, weights = lab_pretrain.training_batch(tokenizer, random.Random(0), 8)
    assert ids.shape == weights.shape == (8, lab_pretrain.WINDOW)
    for row, row_weights in zip(ids, weights):
        documents = tokenizer.decode(row).split("<eos>")[:-1]  # the last may be cut
        assert len(documents) >= 2
        for text in documents:
            family, rest = text.split(" ", 1)
            assert family in tasks.FAMILIES
            assert "=" in rest
        first = documents[0].index("=") + 1
        assert row_weights[:first].unique().tolist() == pytest.approx([lab_pretrain.PROMPT_WEIGHT])
        assert row_weights[first : len(documents[0]) + 1].unique().tolist() == [1.0]  # the response and its EOS
