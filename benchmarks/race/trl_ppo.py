"""TRL 1.12.0's side of a race: its PPOTrainer, the last TRL had, on the same weights, prompts and reward.

As its user would write it: policy, reference, critic, and a reward model that holds its own two models and takes their logits of
all positions, as TRL's own scoring does. The rollout batch is decoded and scored in one piece, no gradient checkpointing, one
micro-batch a minibatch (in this TRL gradient accumulation changes the number of steps). `thrifty` is the cheapest that we could make
of it: frozen models shared where they can be, logits of the response alone. The trainer reads the reward at a response's last token.
The score differs from ours in a detail of TRL: a padding token that the model samples is taken for the end of a response.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from benchmarks.race import memory
from benchmarks.race.job import KL_COEF, LAMBDA, LEARNING_RATE, Clock, Job
from benchmarks.race.measured import Measured, noting, phases
from benchmarks.race.shapes import SHAPES, Shape
from benchmarks.race.trl_models import autocasting, lora_config, merged_sft, now, read_model
from datasets import Dataset
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


class LogRatio(nn.Module):
    """log pi_sft - log pi_base of the response so far at each token, in the place of a trunk's last states [B, L, 1]."""

    def __init__(self, sft: nn.Module, base: nn.Module, prompt: int, thrifty: bool = False):
        super().__init__()
        self.sft, self.base, self.prompt, self.thrifty = sft, base, prompt, thrifty
        self.tokens: list[int] = []  # response tokens of each call
        self.finished: list[float] = []  # when each call was over

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **_: Any) -> SimpleNamespace:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
        responses = input_ids[:, self.prompt :]
        kept = responses.shape[1] + 1  # the logits that predict the response, and one more

        def logprobs(model: nn.Module) -> Tensor:
            logits = model(**inputs, logits_to_keep=kept if self.thrifty else 0).logits[:, -kept:-1].float()
            return logits.gather(2, responses[:, :, None]).squeeze(2) - logits.logsumexp(2)

        real = attention_mask[:, self.prompt :].bool()
        ratio = (logprobs(self.sft) - logprobs(self.base)).masked_fill(~real, 0.0).cumsum(1)
        states = torch.cat([ratio.new_zeros(len(ratio), self.prompt), ratio], 1)
        self.tokens.append(int(real.sum()))
        self.finished.append(now(input_ids.device))
        return SimpleNamespace(hidden_states=(states[:, :, None],))


class LogRatioReward(nn.Module):
    """What PPOTrainer takes for a reward model: a trunk under the name `model` and a score head."""

    base_model_prefix = "model"

    def __init__(self, trunk: LogRatio):
        super().__init__()
        self.model, self.score = trunk, nn.Identity()


class Marks(TrainerCallback):
    """Marks the clock when training begins and after each round."""

    def __init__(self, device: str, each_round: Any = None):
        self.clock, self.device, self.logged, self.each_round = Clock(), device, list[dict[str, float]](), each_round
        self.generated: list[float] = []
        self.peak = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now(self.device)
        self.clock.mark()
        self.peak = memory.peak()
        if self.each_round is not None:
            self.each_round(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.logged.append(dict(logs or {}))


def load_models(shape: Shape, tuning: str, materials: Path, frozen: str) -> dict[str, Any]:
    """policy, reference, reward and value as PPOTrainer takes them. frozen: precision of weights that are not trained."""
    thrifty, tuning = tuning.endswith("_thrifty"), tuning.removesuffix("_thrifty")
    base = read_model(materials / "base", frozen)
    if tuning == "full":
        sft, policy = read_model(materials / "sft", frozen), read_model(materials / "sft")
        reference = sft if thrifty else copy.deepcopy(sft)
    else:
        policy = merged_sft(materials, frozen)
        sft, reference = copy.deepcopy(policy), None  # the policy with its adapter off is the reference
    start, dtype = ("base", frozen) if tuning == "lora" and thrifty else ("sft", "float32")
    if not (materials / start).is_dir():
        start = "base"
    value = AutoModelForSequenceClassification.from_pretrained(materials / start, num_labels=1, dtype=getattr(torch, dtype))
    if tuning == "lora" and thrifty:  # PPOTrainer's peft_config reaches the policy alone; our critic is an adapter too
        value.requires_grad_(False)
        inject_adapter_in_model(lora_config(shape, None), value.model)
        for name, weight in value.named_parameters():
            if "lora_" in name or name.startswith("score"):
                weight.data = weight.data.float()
                weight.requires_grad_(True)
    reward = LogRatioReward(LogRatio(sft, base, shape.prompt, thrifty)).requires_grad_(False).eval()
    return {"model": policy, "ref_model": reference, "reward_model": reward, "value_model": value}


def settings(shape: Shape, updates: int, output: Path, job: Job) -> PPOConfig:
    return PPOConfig(
        output_dir=str(output),
        use_cpu=job.device == "cpu",
        bf16=job.autocast,
        seed=job.seed,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=shape.batch,
        gradient_accumulation_steps=1,
        num_mini_batches=shape.minibatches,
        num_ppo_epochs=shape.epochs,
        total_episodes=shape.batch * updates,
        local_rollout_forward_batch_size=shape.batch,
        response_length=shape.response,
        stop_token="eos",
        temperature=1.0,
        kl_coef=KL_COEF,
        lam=LAMBDA,
        gamma=1.0,
        learning_rate=LEARNING_RATE,
        adam_epsilon=1e-8,
        missing_eos_penalty=None,
        num_sample_generations=0,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=1,
    )


def train_once(shape: Shape, tuning: str, materials: Path, output: Path, updates: int, job: Job) -> tuple[PPOTrainer, Marks]:
    """Load, train, and return the trainer with the marks."""
    tokenizer = AutoTokenizer.from_pretrained(materials / "base", padding_side="left")
    rows = [json.loads(line)["ids"] for line in (materials / "prompts.jsonl").read_text().splitlines()]
    data = Dataset.from_list([{"input_ids": ids} for ids in rows])
    marks = Marks(job.device)
    models = load_models(shape, tuning, materials, job.frozen)
    trainer = PPOTrainer(
        args=settings(shape, updates, output, job),
        processing_class=tokenizer,
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        data_collator=DataCollatorWithPadding(tokenizer, padding="max_length", max_length=shape.prompt),
        peft_config=None if tuning.startswith("full") else lora_config(shape),
        callbacks=[marks],
        **models,
    )
    policy = trainer.policy_model
    policy.generate = noting(policy.generate, lambda: now(job.device), marks.generated)
    with autocasting(job):
        trainer.train()
    return trainer, marks


def main() -> None:
    job = Job.load(sys.argv[1])
    work, shape = Path(job.work), job.shape
    torch.manual_seed(job.seed)
    if job.device == "cpu":
        torch.set_num_threads(1)
    train_once(SHAPES["tiny"], job.tuning, Path(job.warmup), work / "warmup", 1, job)
    measured = Measured(job)
    trainer, marks = train_once(shape, job.tuning, Path(job.materials), work / "run", job.updates, job)
    reward = trainer.reward_model.model
    logs = [row for row in marks.logged if "objective/scores" in row]
    answer = {
        "system": f"TRL {trl.__version__} PPOTrainer",
        **marks.clock.rounds(),
        "phases": phases(marks.clock.wall, marks.generated, reward.finished),
        "scores": [row["objective/scores"] for row in logs],
        "kl": [row["objective/kl"] for row in logs],
        "responses": [shape.batch] * len(logs),
        "response_tokens": reward.tokens,
    }
    measured.answer(answer, marks.peak)


if __name__ == "__main__":
    main()
