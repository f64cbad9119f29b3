"""Today's TRL's side of the critic-free race: RLOOTrainer on the same weights, prompts and log-ratio reward.

Each choice is the cheapest for TRL: the reward's SFT model is the trainer's own reference in full tuning, no gradient
checkpointing, a generation batch decoded in one piece, one micro-batch a step. A generation batch of `minibatches` steps is used
`epochs` times (num_iterations).
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from benchmarks.race import memory
from benchmarks.race.job import KL_COEF, LEARNING_RATE, Clock, Job
from benchmarks.race.measured import Measured, noting, phases
from benchmarks.race.shapes import SHAPES, Shape
from benchmarks.race.trl_models import autocasting, lora_config, merged_sft, now, read_model
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer


class LogRatioReward:
    """log pi_sft - log pi_base of each completion, as a reward function; columns of the data set come as keywords."""

    __name__ = "log_ratio"

    def __init__(self, sft: Any, base: Any, device: str):
        self.sft, self.base, self.device = sft, base, device
        self.tokens, self.scores, self.spreads, self.finished = list[int](), list[float](), list[float](), list[float]()

    @torch.no_grad()
    def __call__(self, completion_ids: list[list[int]], ids: list[list[int]], **_: Any) -> list[float]:
        rows = [prompt + completion for prompt, completion in zip(ids, completion_ids)]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        first = min(map(len, ids))  # no response begins before
        places = torch.arange(width, device=self.device)[first:]
        starts, ends = (torch.tensor([len(x) for x in xs], device=self.device)[:, None] for xs in (ids, rows))
        real = (places >= starts) & (places < ends)

        def logprobs(model: Any) -> torch.Tensor:
            kept = width - first + 1
            logits = model(input_ids=tokens, attention_mask=attention, use_cache=False, logits_to_keep=kept).logits[:, :-1].float()
            return logits.gather(2, tokens[:, first:, None]).squeeze(2) - logits.logsumexp(2)

        scores = (logprobs(self.sft) - logprobs(self.base)).masked_fill(~real, 0.0).sum(1)
        self.tokens.append(sum(map(len, completion_ids)))
        self.scores.append(float(scores.mean()))
        self.spreads.append(float(scores.std(unbiased=False)))
        self.finished.append(now(self.device))
        return scores.tolist()


class Marks(TrainerCallback):
    """Marks the clock when training begins and after each round, which is `steps` optimizer steps."""

    def __init__(self, device: str, steps: int):
        self.clock, self.device, self.steps = Clock(), device, steps
        self.generated, self.peak = list[float](), 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            now(self.device)
            self.clock.mark()
            self.peak = memory.peak()


def settings(shape: Shape, updates: int, output: Path, job: Job) -> RLOOConfig:
    return RLOOConfig(
        output_dir=str(output),
        use_cpu=job.device == "cpu",
        bf16=job.autocast,
        seed=job.seed,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=shape.batch // shape.minibatches,
        gradient_accumulation_steps=1,
        steps_per_generation=shape.minibatches,
        num_iterations=shape.epochs,
        num_generations=shape.samples,
        max_steps=updates * shape.minibatches * shape.epochs,
        max_completion_length=shape.response,
        temperature=1.0,
        beta=KL_COEF,
        normalize_advantages=True,
        learning_rate=LEARNING_RATE,
        adam_epsilon=1e-8,
        max_grad_norm=0.0,  # no clipping
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
    )


def train_once(shape: Shape, tuning: str, materials: Path, output: Path, updates: int, job: Job) -> tuple[LogRatioReward, Marks]:
    """Load, train, and return the reward with what it saw, and the marks."""
    tokenizer = AutoTokenizer.from_pretrained(materials / "base", padding_side="left")
    rows = [json.loads(line) for line in (materials / "prompts.jsonl").read_text().splitlines()]
    marks = Marks(job.device, shape.minibatches * shape.epochs)
    policy = read_model(materials / "sft") if tuning == "full" else merged_sft(materials)
    sft = None if tuning == "full" else copy.deepcopy(policy).to(job.device).eval()
    reward = LogRatioReward(sft, read_model(materials / "base").to(job.device).eval(), job.device)
    trainer = RLOOTrainer(
        model=policy,
        reward_funcs=reward,
        args=settings(shape, updates, output, job),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[marks],
        peft_config=None if tuning == "full" else lora_config(shape),
    )
    if sft is None:
        reward.sft = trainer.ref_model
    trainer.model.generate = noting(trainer.model.generate, lambda: now(job.device), marks.generated)
    with autocasting(job):
        trainer.train()
    return reward, marks


def main() -> None:
    job = Job.load(sys.argv[1])
    work, shape = Path(job.work), job.shape
    torch.manual_seed(job.seed)
    if job.device == "cpu":
        torch.set_num_threads(1)
    train_once(SHAPES["tiny"].changed(samples=2), job.tuning, Path(job.warmup), work / "warmup", 1, job)
    measured = Measured(job)
    reward, marks = train_once(shape, job.tuning, Path(job.materials), work / "run", job.updates, job)
    answer = {
        "system": f"TRL {trl.__version__} RLOOTrainer",
        **marks.clock.rounds(),
        "phases": phases(marks.clock.wall, marks.generated, reward.finished),
        "scores": reward.scores,
        "scores_std": reward.spreads,
        "kl": [],
        "responses": [shape.batch] * len(reward.finished),
        "response_tokens": reward.tokens,
    }
    measured.answer(answer, marks.peak)


if __name__ == "__main__":
    main()
