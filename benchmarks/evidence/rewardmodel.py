"""A reward model trained on preferences: pairs of the SFT model's own samples, a right answer preferred to a wrong one.

It is the paper's comparison, and sees what SRPPO does not: which answers are right, on at most PAIRS prompts. Bradley-Terry loss
(Ouyang et al. 2022, arXiv 2203.02155, eq. 1), the classifier initialised from the SFT model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from srppo.records import pad_sequences
from srppo.rollout.engine import Sampling
from srppo.seeding import stream_seed
from srppo.workspace import Workspace

PAIRS = 256
SAMPLES = 8  # a prompt, until one is right and another wrong
EPOCHS = 4
BATCH = 32
RATE = 3e-4
HELD_OUT = 0.125  # share of the pairs, for the accuracy that the row reports


def make_pairs(space: Workspace, seed: int) -> list[tuple[list[int], list[int]]]:
    """(prompt + right response, prompt + wrong response) as token ids, at most PAIRS, at most one a prompt."""
    loaded, roles = space.loaded, space.loaded.roles
    assert loaded.scorer is not None
    pairs = []
    for first in range(0, len(loaded.prompts), 128):
        asked = loaded.prompts[first : first + 128]
        index = [i for i in range(len(asked)) for _ in range(SAMPLES)]
        seeds = [stream_seed(seed, "pairs", first + i, s) for i in range(len(asked)) for s in range(SAMPLES)]
        with roles.use("sft") as model:
            rollout = loaded.engine.generate(model, [asked[i].ids for i in index], seeds, Sampling(loaded.sampling.max_new_tokens), index)
        for i, prompt in enumerate(asked):
            rows = range(i * SAMPLES, (i + 1) * SAMPLES)
            right = {row: loaded.scorer(loaded.decode(rollout.response_ids(row)), prompt.fields) > 0.5 for row in rows}
            good, bad = ([row for row in rows if right[row] is wanted] for wanted in (True, False))
            if good and bad:
                pairs.append((prompt.ids + rollout.response_ids(good[0]), prompt.ids + rollout.response_ids(bad[0])))
            if len(pairs) == PAIRS:
                return pairs
    return pairs


def train_reward_model(pairs: list[tuple[list[int], list[int]]], sft: Path, folder: Path, seed: int, rate: float = RATE) -> dict[str, Any]:
    """Write the classifier to `folder`; the figures of its training."""
    if len(pairs) < BATCH:
        raise SystemExit(f"only {len(pairs)} prompts had a right and a wrong sample; a reward model needs {BATCH} at least")
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(sft, num_labels=1)
    model.config.pad_token_id = pad = 0 if model.config.pad_token_id is None else model.config.pad_token_id
    cut = len(pairs) - round(HELD_OUT * len(pairs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)

    def margins(some: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        rows = [row for pair in some for row in pair]
        seen = pad_sequences([[1] * len(row) for row in rows])
        scores = model(input_ids=pad_sequences(rows, pad), attention_mask=seen).logits[:, 0]
        return scores[0::2] - scores[1::2]

    for epoch in range(EPOCHS):
        order = torch.randperm(cut, generator=torch.Generator().manual_seed(stream_seed(seed, "reward model", epoch) % 2**31)).tolist()
        for first in range(0, cut, BATCH):
            optimizer.zero_grad()
            (-logsigmoid(margins([pairs[i] for i in order[first : first + BATCH]])).mean()).backward()
            optimizer.step()
    with torch.no_grad():
        agreed = float((margins(pairs[cut:]) > 0).float().mean()) if cut < len(pairs) else float("nan")
    model.save_pretrained(folder)
    return {"pairs": len(pairs), "held_out_agreement": agreed}
