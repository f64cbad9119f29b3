"""TRL 1.12.0's side of the lab's race: python -m benchmarks.race.lab_trl JOB.json RESULT.json

PPOTrainer with the settings of the lab's recipe: the same SFT folder, prompts, batch, epochs, minibatches, learning rates of policy
and critic, KL coefficient, lambda and penalty for a missing end. What the two do not share stays each one's own: TRL clips no
gradients, its critic works in nats and learns beside the policy from the first round. The policy is evaluated by our `evaluate`, between
rounds and outside the clock; training ends once the accuracy that is raced for is reached.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import trl
from benchmarks.race.lab_ours import lab_recipe
from benchmarks.race.trl_models import read_model
from benchmarks.race.trl_ppo import LogRatio, LogRatioReward
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from srppo.config import RunConfig, build
from srppo.data.chat import ChatFormat
from srppo.data.prompts import load_prompts
from srppo.evaluate import evaluate
from srppo.models.tokens import special_tokens
from srppo.rollout.torch_engine import TorchEngine
from srppo.scoring import load_scorer


class Reached(Exception):
    """The accuracy that is raced for."""


class OnePolicy:
    """A model in the place of the roles that `evaluate` asks for one."""

    def __init__(self, model: Any):
        self.model = model

    @contextlib.contextmanager
    def use(self, role: str) -> Iterator[Any]:
        yield self.model


class Stopwatch(TrainerCallback):
    """Seconds of training, evaluations left out, and the accuracies between."""

    def __init__(self, config: RunConfig, policy: Any, tokenizer: Any, target: float):
        self.config, self.policy, self.target = config, policy, target
        special = special_tokens(tokenizer, policy)
        chat = ChatFormat.from_config(tokenizer, special.eos_ids, config.data)
        source, split = config.evaluation.prompts, config.evaluation.prompts_split
        assert source
        self.prompts = load_prompts(source, split, config.data, chat, config.seed, None, per_group=True).prompts
        self.engine, self.decode = TorchEngine(special, config.evaluation.batch_size), chat.response_text
        self.scorer = load_scorer(config.evaluation.scorer)
        self.curve, self.rounds, self.kl, self.started = list[dict[str, Any]](), list[float](), list[float](), 0.0

    def accuracies(self) -> dict[str, float]:
        found = evaluate(
            OnePolicy(self.policy),
            "policy",
            self.prompts,
            scorer=self.scorer,
            engine=self.engine,
            decode=self.decode,
            max_new_tokens=self.config.rollout.max_new_tokens,
            samples=1,
            seed=self.config.seed,
        )
        return {name: group.sampled for name, group in found.groups.items() if group.sampled is not None}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.kl += [logs["objective/kl"]] if logs and "objective/kl" in logs else []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rounds.append(time.perf_counter() - self.started)
        if state.global_step % self.config.evaluation.every == 0:
            self.curve.append({"round": state.global_step, "seconds": sum(self.rounds), **self.accuracies()})
            if self.curve[-1]["without_demonstrations"] >= self.target:
                raise Reached
        self.started = time.perf_counter()


def settings(config: RunConfig, output: Path) -> PPOConfig:
    """The recipe in PPOTrainer's words."""
    ppo, batch = config.ppo, config.ppo.prompts_per_iteration
    return PPOConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        seed=config.seed,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_mini_batches=ppo.minibatches,
        num_ppo_epochs=ppo.epochs,
        total_episodes=batch * ppo.iterations,
        local_rollout_forward_batch_size=batch,
        response_length=config.rollout.max_new_tokens,
        stop_token="eos",
        temperature=1.0,
        kl_coef=float(config.reward.kl_coef),
        missing_eos_penalty=config.reward.missing_eos_penalty,
        lam=ppo.gae_lambda,
        gamma=ppo.gamma,
        cliprange=ppo.clip,
        cliprange_value=ppo.value_clip,
        num_sample_generations=0,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=1,
    )


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(job["seed"])
    torch.set_num_threads(1)
    config = build(lab_recipe(job["world"], job["seed"], Path(job["work"]) / "run", job["sft"], job["rounds"], job["every"]))
    tokenizer = AutoTokenizer.from_pretrained(config.model.name, padding_side="left")
    texts = [json.loads(line)["prompt"] for line in Path(str(config.data.prompts)).read_text().splitlines()]
    data = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])
    longest = max(len(row["input_ids"]) for row in data)
    policy, sft, base = (read_model(Path(place)) for place in (job["sft"], job["sft"], config.model.name))
    value = AutoModelForSequenceClassification.from_pretrained(job["sft"], num_labels=1, dtype=torch.float32)
    rates = [(policy, config.ppo.learning_rate), (value, config.ppo.critic_learning_rate)]
    optimizer = torch.optim.AdamW([{"params": list(m.parameters()), "lr": rate} for m, rate in rates], weight_decay=0.0)
    watch = Stopwatch(config, policy, tokenizer, job["target"])
    trainer = PPOTrainer(
        args=settings(config, Path(job["work"]) / "run"),
        processing_class=tokenizer,
        model=policy,
        ref_model=sft,
        reward_model=LogRatioReward(LogRatio(sft, base, longest)).requires_grad_(False).eval(),
        value_model=value,
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        data_collator=DataCollatorWithPadding(tokenizer, padding="max_length", max_length=longest),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        callbacks=[watch],
    )
    with contextlib.suppress(Reached):
        trainer.train()
    answer = {"system": f"TRL {trl.__version__} PPOTrainer", "curve": watch.curve, "round_seconds": watch.rounds, "kl": watch.kl}
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
