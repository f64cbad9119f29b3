"""What of a recipe decides memory and time: the one place that reads configuration keys for the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from srppo.config import RunConfig, build, merge

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Lengths:
    """Tokens. max_*: what memory is planned for; mean_*: what time is."""

    max_prompt: int
    max_response: int
    mean_prompt: float
    mean_response: float
    max_demonstration: int  # prompt and answer
    mean_demonstration: float
    demonstrations: int | None = None  # that SFT trains on; None where the data were not read
    evaluated: int | None = None  # prompts of an evaluation
    measured: bool = False


@dataclass(frozen=True)
class Card:
    """The reward card."""

    rows: int  # that it samples in one go, at most
    samples: int  # of them a prompt
    loads: int  # checkpoints beside base and SFT that are in memory with them
    together: int  # models that decode together for its preview by logits; 0: none


@dataclass(frozen=True)
class Settings:
    """The keys the formulas take, by the names they have in a recipe where there is one."""

    full: bool  # tuning.kind full; else lora
    lora_rank: int
    lora_targets: str | tuple[str, ...]
    lora_layers: int | None  # adapters on the last so many layers; None: on all
    critic: str  # own | least_squares | none
    dtype: str
    frozen_dtype: str
    autocast: str
    checkpointing: bool
    offload_frozen: bool
    reward_model: bool  # a frozen reward numerator beside sft
    sft_steps: int | None
    sft_epochs: float
    sft_batch: int
    sft_micro_tokens: int
    sft_saves: bool  # a checkpoint of the training state before the last step
    engine: str  # torch | vllm (in this process) | server
    merge_adapters: bool
    vllm_share: float  # of the device's memory
    rollout_rows: int
    evaluation_rows: int
    samples: int  # of an evaluation, a prompt
    rounds: int
    prompts: int  # a round
    samples_per_prompt: int
    epochs: int
    minibatches: int
    micro_tokens: int
    entropy: bool  # exact, in the update
    recompute: bool
    saves: bool  # a checkpoint of the training state before the end
    continued_sft: bool
    shard_size: int | None = None
    cpu_offload: bool = False
    alone: bool = True  # one process
    background_saves: bool = False
    card: Card | None = None

    @property
    def prefix_layers(self) -> int | None:
        """Layers above those whose states are kept from a first pass over a rollout; None where none are, as with several processes."""
        return self.lora_layers if self.alone else None

    @property
    def rollouts(self) -> int:
        return self.prompts * self.samples_per_prompt

    @property
    def minibatch(self) -> int:
        """Rows of an optimizer step of PPO."""
        return -(-self.rollouts // min(self.minibatches, self.rollouts))

    @property
    def vllm_dtype(self) -> str:
        """Precision of vLLM's weights on a GPU; on a CPU it is the model's."""
        return "bfloat16" if self.autocast == "bfloat16" else self.dtype

    def merges(self, gpu: bool) -> bool:
        """Whether a rollout has adapters merged into a second copy of the weights they adapt (rollout/merging.py), or hands one to vLLM."""
        if self.full or self.dtype != "float32":
            return False
        if self.engine == "vllm":
            return not gpu or self.vllm_dtype == "float32"
        return self.engine == "torch" and self.merge_adapters and (self.autocast == "none" or not gpu)

    @property
    def frozen_bytes(self) -> int:
        return BYTES[self.frozen_dtype if self.full else self.dtype]

    @property
    def trained_bytes(self) -> int:
        """Of a trained weight, its gradient and each AdamW moment. PEFT keeps adapters in float32."""
        return BYTES[self.dtype] if self.full else 4


def read_settings(config: RunConfig) -> Settings:
    """The adapter between the recipe's keys and the plan."""
    model, tuning, sft, ppo, rollout = config.model, config.tuning, config.sft, config.ppo, config.rollout
    critic = "none" if ppo.baseline != "critic" else tuning.critic
    targets = tuning.lora_targets
    return Settings(
        full=tuning.kind == "full",
        lora_rank=tuning.lora_rank,
        lora_targets=targets if isinstance(targets, str) else tuple(targets),
        lora_layers=tuning.lora_layers if tuning.kind == "lora" else None,
        critic=critic,
        dtype=model.dtype,
        frozen_dtype=model.frozen_dtype or model.dtype,
        autocast=model.autocast,
        checkpointing=model.gradient_checkpointing,
        offload_frozen=tuning.kind == "full" and model.offload_frozen,
        reward_model=config.reward.checkpoint not in ("auto", "sft"),
        sft_steps=0 if sft.checkpoint is not None else sft.steps,
        sft_epochs=sft.epochs,
        sft_batch=sft.batch_size,
        sft_micro_tokens=sft.micro_batch_tokens,
        sft_saves=sft.checkpoint_every > 0 or any(share < 1 for share in sft.checkpoints_at),
        engine="server" if rollout.engine == "vllm" and rollout.server else rollout.engine,
        merge_adapters=rollout.merge_adapters,
        vllm_share=rollout.memory,
        rollout_rows=rollout.batch_size,
        evaluation_rows=config.evaluation.batch_size,
        samples=config.evaluation.samples,
        rounds=ppo.iterations,
        prompts=ppo.prompts_per_iteration,
        samples_per_prompt=ppo.samples_per_prompt,
        epochs=ppo.epochs,
        minibatches=ppo.minibatches,
        micro_tokens=ppo.micro_batch_tokens,
        entropy=ppo.entropy,
        recompute=ppo.behaviour_logprobs == "recompute",
        saves=True,  # also at the end
        continued_sft=config.evaluation.continued_sft,
        shard_size=config.parallel.shard_size,
        cpu_offload=config.parallel.cpu_offload,
        background_saves=config.background_checkpoints,
        card=_card(config),
    )


def _card(config: RunConfig) -> Card | None:
    """What diagnose/inquiry.py does by this recipe."""
    card, sft, reward = config.diagnose, config.sft, config.reward
    if not card.enabled or reward.kind != "coherent":
        return None
    several = sft.checkpoint is None and len(sft.checkpoints_at) > 1
    starts = several and sft.keep == "auto"
    elsewhere = isinstance(reward.checkpoint, str) and reward.checkpoint not in ("auto", "sft")  # a numerator of its own, loaded before
    apart = reward.checkpoint != "sft" and (several or reward.checkpoint != "auto")  # the numerator may be another than the start
    return Card(
        max(card.heldout, card.prompts) * card.samples,
        card.samples,
        loads=max(starts + card.preview, starts or apart) + elsewhere,
        together=(3 if apart else 2) if card.preview else 0,
    )


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration with some dotted keys set, checked like a recipe."""
    return build(merge(config.model_dump(), dict(changes)))


def micro_rows(length: int, available: int, tokens: int) -> int:
    """Rows of one micro-batch: as many of this length as the token budget holds, at least one, at most those there are."""
    return max(1, min(available, tokens // max(1, length)))
