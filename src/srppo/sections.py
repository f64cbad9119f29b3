"""The sections of the configuration: every key with its type, bounds, default and documentation. Imports no torch.

Every field's docstring is its documentation: `srppo config` prints them, and the command derives its flags from them.
Defaults not published for Self-Rewarding PPO (arXiv 2510.21090) are ours; methods/srppo.py says which.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator

from srppo.section import Section

SMALLEST = 1e-6  # KL coefficient that the logit extrapolation, 1 / beta, can be computed with in float32


class ModelConfig(Section):
    name: str = ""
    """Hub id, local Hugging Face folder, or folder (or file) of a GGUF model. The base model."""
    gguf_file: str | None = None
    """Name of the GGUF file inside the folder or hub repository, where the model is a GGUF one."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; the model's own by default."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the trained weights."""
    frozen_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the frozen copies (base, sft) in full tuning; `dtype` by default."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Matrix products of forward and backward in bfloat16, weights and log-probabilities in float32."""
    attention: str | None = None
    """transformers' attn_implementation (sdpa, eager, flash_attention_2); its own choice by default."""
    device: str = "auto"
    """auto (cuda if there is one, else cpu), cpu, cuda, cuda:1 …"""
    compile: bool = False
    """torch.compile each decoder layer for scoring and training: some seconds to start, then faster. Rollouts are not compiled.
    In LoRA tuning it needs torch 2.13."""
    kernels: Literal["plain", "liger"] = "plain"
    """liger: Liger's fused Triton kernels for norms, rotary positions and gated MLPs, on a GPU (needs liger-kernel). They are tried on a
    few tokens, forward and backward, before they are used."""
    offload_frozen: bool = False
    """Full tuning on a GPU: the frozen copies (base, sft) stay in the machine's memory and visit the GPU when they are asked."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off: such a model is refused."""
    allow_pickle: bool = False
    """Load weights from pickle files (.bin, .pt), which can run code. Off: only safetensors and GGUF."""


class TuningConfig(Section):
    kind: Literal["full", "lora"] = "full"
    """full: separate copies of the model for each role. lora: one base in memory, each role an adapter on it."""
    lora_rank: int = Field(default=16, ge=1)
    """Rank r of the adapters."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """Scale alpha of the adapters (their output is multiplied by alpha / r)."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout inside the adapters during training. Above 0 the PPO ratio at the first step is no longer 1."""
    lora_targets: str | list[str] = "all-linear"
    """PEFT target modules."""
    lora_layers: int | None = Field(default=None, ge=1)
    """Adapters on the last so many decoder layers only; all of them if unset. What is below is then the same for all roles and steps:
    PPO runs it once a rollout and keeps its states (tokens x hidden size)."""
    critic: Literal["own", "least_squares"] = "own"
    """own: the critic has a trunk, a copy of the SFT model or an adapter, trained by gradient steps. least_squares: its values are a
    linear function, fitted in closed form, of the frozen SFT model's states and of the reward's terms so far, which scoring computes
    anyway: half of the update's time and memory or less, at a small price in quality where a trained critic learns (docs/method.md)."""


class DataConfig(Section):
    demonstrations: str = ""
    """Demonstrations: a jsonl, json, csv or parquet file, a folder saved by `datasets`, or a hub id."""
    demonstrations_split: str = "train"
    """Split of a hub data set or saved DatasetDict."""
    prompts: str | None = None
    """Prompts without answers for PPO, same kinds of source; the demonstrations' prompts by default."""
    prompts_split: str = "train"
    """Split of the prompts' source."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Maps our field names to yours: {prompt: question, completion: answer}. Recognised shapes need no map."""
    group_column: str | None = None
    """Column that names a row's group in evaluations (a task, a source). A column called `group` is used by itself."""
    system_prompt: str | None = None
    """Put before every conversation that has no system message."""
    string_prompts: Literal["raw", "chat"] = "raw"
    """Prompts given as plain strings: raw text continued as it is (as in TRL), or wrapped as a user message.
    Message lists always use the template."""
    chat_template: str = "auto"
    """auto: the tokenizer's, else the plain one of the docs. tokenizer, plain, or the path of a Jinja file."""
    loss_on: Literal["response", "assistant"] = "response"
    """Learn the last assistant message only, or every assistant turn of a conversation."""
    max_prompt_tokens: int = Field(default=512, ge=1)
    """Longer prompts are dropped, and counted in the data report."""
    max_tokens: int = Field(default=1024, ge=2)
    """Longer demonstrations are cut at the end (and counted); they then teach no EOS."""
    heldout: float | int = Field(default=0.1, ge=0)
    """Demonstrations held out of training: a fraction (below 1) or a number."""
    max_demonstrations: int | None = Field(default=None, ge=1)
    """Use only this many, chosen by the seed."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Use only this many prompts, chosen by the seed."""

    @field_validator("heldout")
    @classmethod
    def _share_or_number(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("Input should be a share below 1 or a whole number of demonstrations")
        return int(value) if value >= 1 else value


class SFTConfig(Section):
    checkpoint: str | None = None
    """A finished SFT model (folder, hub id or adapter folder) to start from instead of training one."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; if unset, `epochs` decides."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over the demonstrations, where `steps` is unset."""
    batch_size: int = Field(default=16, ge=1)
    """Demonstrations an optimizer step."""
    micro_batch_tokens: int = Field(default=2048, ge=1)
    """Tokens in memory at once, those of one row at least. Decides memory and speed; the result does not depend on it."""
    batching: Literal["length_grouped", "packed"] = "length_grouped"
    """length_grouped: batches of like lengths. packed: several demonstrations in one row, kept apart by position ids and mask."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak learning rate of AdamW."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps with a linearly rising learning rate."""
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """The cosine decays to this share of the peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    checkpoints_at: list[float] = Field(default=[0.25, 0.5, 1.0])
    """Shares of the training after which the model is kept, as candidates for `keep` and `reward.checkpoint`."""
    keep: Literal["auto", "best", "last"] | float = "auto"
    """The checkpoint PPO starts from: the reward card's choice (auto; the last one where no card is made), the lowest held-out loss,
    the last, or one of the shares of `checkpoints_at`."""
    checkpoint_every: int = Field(default=100, ge=0)
    """Steps between checkpoints to resume from, of SFT and continued SFT; 0: only at the shares of `checkpoints_at`. The last two stay."""
    eval_every: int = Field(default=0, ge=0)
    """Held-out loss every so many steps; 0 means at the checkpoints only."""


class RewardConfig(Section):
    kind: Literal["coherent", "preference_model"] = "coherent"
    """coherent: log pi_sft - log pi_base, the paper's. preference_model: the score of `preference_model`, which the paper compares with;
    no reward card is made then, and `checkpoint`, `placement`, `length_normalization`, `token_shift`, `token_clip` and `include_eos`
    must keep their defaults."""
    preference_model: str | None = None
    """With kind preference_model: hub id or local folder of a Hugging Face sequence classifier."""
    preference_label: str | None = None
    """The label that is the score (its log-odds), by name or number, of a classifier with several; one with a single output needs none."""
    checkpoint: Literal["auto", "sft"] | float | str = "auto"
    """Numerator of the log-ratio: the reward card's choice (auto; sft where no card is made), the SFT model PPO starts from (sft),
    one of the shares of `sft.checkpoints_at`, or a path."""
    placement: Literal["eos", "token"] = "eos"
    """eos: the whole sum at the last response token (the paper). token: each token's log-ratio at its token. Same return at gamma 1."""
    length_normalization: Literal["none", "mean"] = "none"
    """mean: the sum is divided by the number of response tokens (then use `scale`)."""
    scale: float = Field(default=1.0, gt=0)
    """Multiplies the reward, not the KL penalty."""
    token_shift: float = Field(default=0.0, ge=0)
    """Subtracted from each token's log-ratio (CSIL's shift), a cure for length bias; nats."""
    token_clip: float | None = Field(default=None, gt=0)
    """Each token's log-ratio is clipped to [-c, c]; nats."""
    include_eos: bool = True
    """Whether the EOS token's own log-ratio counts."""
    missing_eos: Literal["penalty", "exclude", "keep"] = "penalty"
    """Rollouts cut at the length limit: subtract `missing_eos_penalty`, leave them out of the loss, or treat them like others."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Subtracted from the score of a rollout without EOS."""
    whiten: bool = False
    """Divide the rewards of an iteration by their standard deviation (mean kept)."""
    kl_anchor: Literal["sft", "base", "none"] = "sft"
    """The model the policy is held near."""
    kl_coef: Literal["auto"] | float = "auto"
    """beta: the reward card's choice (auto; 1 where no card is made, .05 for a preference model), or a number: 0, or 1e-6 and above. With
    anchor sft the optimum is pi_sft (pi_sft / pi_base)^(1/beta): smaller extrapolates further past the SFT."""
    kl_target: float | None = Field(default=None, gt=0)
    """Adapt beta so that the KL to the anchor, in nats a response, approaches this target."""
    kl_horizon: int = Field(default=1000, ge=1)
    """Episodes over which the adaptive beta changes by a factor of about 1.2 at most."""

    @field_validator("preference_label", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("Input should be a label's name or number; a name such as yes or no needs quotes")
        return str(value) if isinstance(value, int) else value

    @field_validator("kl_coef")
    @classmethod
    def _not_negative(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and value != 0 and value < SMALLEST:
            raise ValueError(f"Input should be auto, 0 or above; what is not 0 at least {SMALLEST:g}, below which r / beta overflows")
        return value

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        """A number in quotes is a share, not a path."""
        try:
            return float(value) if isinstance(value, str) and math.isfinite(float(value)) else value
        except ValueError:
            return value


class RolloutConfig(Section):
    engine: Literal["torch", "vllm"] = "torch"
    """torch: PyTorch and the model itself. vllm: vLLM (docs/vllm.md), inside the process or on the servers of `server`, also for evaluation
    (not for the reward card, which decodes with two models at once)."""
    server: str | list[str] | None = None
    """With engine vllm: address of a running vLLM server, http://host:port, or several that share the rows; by default none is needed."""
    shared_folder: str | None = None
    """With `server`: folder where weights are handed over, seen by every server under the same path; by default inside `output`."""
    memory: float = Field(default=0.3, gt=0, le=1)
    """With engine vllm and no server: share of the GPU's memory vLLM may take, its copy of the weights included."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Response limit, EOS included."""
    temperature: float = Field(default=1.0, ge=0)
    """Other than 1 the behaviour distribution is not the policy, and the PPO ratio is biased (a warning says so)."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; below 1 the ratio is biased."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens; 0 is off; otherwise the ratio is biased."""
    batch_size: int = Field(default=64, ge=1)
    """Rows decoded at once (at each server). Wide is fast; memory grows with it."""
    cuda_graphs: bool = False
    """Replay decode steps as CUDA graphs, with a warning and plain steps where a model forbids it. No effect elsewhere."""
    merge_adapters: bool = True
    """Compute rollouts with LoRA adapters merged into a second copy of the adapted weights; base is not written. float32 weights only."""


class PPOConfig(Section):
    iterations: int = Field(default=25, ge=0)
    """Rollout-and-update rounds."""
    prompts_per_iteration: int = Field(default=64, ge=1)
    """Prompts a round."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses a prompt."""
    epochs: int = Field(default=4, ge=1)
    """Passes over each round's rollouts."""
    minibatches: int = Field(default=4, ge=1)
    """Optimizer steps a pass."""
    micro_batch_tokens: int = Field(default=2048, ge=1)
    """Tokens in memory at once in scoring and update, those of one row at least. Decides memory and speed; results do not depend on it."""
    learning_rate: float = Field(default=3e-6, gt=0)
    """AdamW, policy."""
    critic_learning_rate: float = Field(default=1e-5, gt=0)
    """AdamW, of a critic that is trained (tuning.critic: own)."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon, policy and trained critic. PPO code often has 1e-5, which for billions of weights is as large as their gradients."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of both learning rates, over the iterations."""
    clip: float = Field(default=0.2, gt=0)
    """epsilon of the clipped surrogate."""
    value_clip: float = Field(default=0.2, gt=0)
    """Clip range of a trained critic's change per round, in units of the standard deviation of the first round's returns."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """lambda of generalized advantage estimation."""
    whiten_advantages: bool = True
    """Mean 0 and variance 1 over the round's response tokens."""
    baseline: Literal["critic", "group"] = "critic"
    """What a return is compared with: a learned value (GAE), or the mean of the prompt's other samples (no critic; RLOO)."""
    critic_warmup: int = Field(default=1, ge=0)
    """First rounds in which only the critic learns; none with baseline group."""
    target_kl: float | None = Field(default=None, gt=0)
    """Stop a round's epochs when the approximate KL to the rollout policy exceeds this; nats a token."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Global norm to which policy and trained critic's gradients are scaled down, each by itself."""
    behaviour_logprobs: Literal["rollout", "recompute"] = "rollout"
    """The ratio's denominator: what the engine returned, or a forward pass of the trainer before the update (exact, one pass more)."""
    importance_cap: float | None = Field(default=2.0, ge=1)
    """With behaviour_logprobs recompute: each token's advantage is weighted by trainer probability / engine probability, at most this
    (truncated importance sampling), so that an engine of other precision does not bias the update. null: not weighted."""
    entropy: bool = False
    """Also measure the policy's exact entropy in the update (policy/entropy_avg): one more pass over the vocabulary."""
    max_skipped_steps: int = Field(default=5, ge=1)
    """Consecutive steps with NaN or infinite loss or gradient after which the run stops, state saved."""
    checkpoint_every: int = Field(default=5, ge=0)
    """Iterations between checkpoints; 0: only at the end."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the last checkpoints stay."""


class EvaluationConfig(Section):
    prompts: str | None = None
    """Rows to evaluate on; by default the held-out demonstrations."""
    prompts_split: str = "train"
    """Split of their source."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Per group, chosen by the seed."""
    scorer: str = "exact_match"
    """exact_match, final_number (the number after `####`), or module:function(completion, row) -> float in 0..1, or none."""
    samples: int = Field(default=1, ge=1)
    """Samples a prompt for the sampled accuracy at temperature 1."""
    every: int = Field(default=0, ge=0)
    """Iterations between evaluations during PPO; 0: only the stages."""
    during_prompts: int = Field(default=32, ge=1)
    """Prompts per group of those evaluations."""
    batch_size: int = Field(default=128, ge=1)
    """Rows decoded at once."""
    retention_prompts: str | None = None
    """Other prompts, on which the model should stay as the base was: loss of base samples' likelihood is measured on them."""
    retention_max_prompts: int = Field(default=32, ge=1)
    """How many of those."""
    continued_sft: bool = True
    """Also train the SFT model further, with PPO's compute, and evaluate it: the baseline PPO must beat."""


class DiagnoseConfig(Section):
    enabled: bool = True
    """Make the reward card between SFT and PPO: whether the reward tells good from bad, before compute is spent."""
    on_no_go: Literal["stop", "warn"] = "stop"
    """What `srppo align` does where the card says no-go."""
    heldout: int = Field(default=64, ge=1)
    """Held-out demonstrations the card looks at, at most."""
    prompts: int = Field(default=48, ge=0)
    """PPO prompts it looks at, at most; 0: none."""
    samples: int = Field(default=8, ge=2)
    """Samples of the SFT model a prompt; the more, the further past the SFT the card can see."""
    betas: list[float] = Field(default=[0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0])
    """The KL coefficients whose effect it estimates, and among which it suggests one."""
    preview: bool = True
    """Show where PPO is heading by two extrapolations that need no training."""

    @field_validator("betas")
    @classmethod
    def _above_zero(cls, value: list[float]) -> list[float]:
        if not value or min(value) < SMALLEST:
            raise ValueError(f"Input should be one or more numbers above 0, at least {SMALLEST:g}")
        return sorted(set(value))


class GuardConfig(Section):
    every: int = Field(default=5, ge=0)
    """PPO rounds between looks at held-out demonstrations; 0: no guard."""
    samples: int = Field(default=4, ge=1)
    """Samples of the policy a held-out prompt."""
    heldout: int = Field(default=32, ge=1)
    """Held-out demonstrations, at most."""
    stop: bool = True
    """Stop PPO when `patience` looks in a row brought nothing better."""
    patience: int = Field(default=4, ge=1)
    """Looks without a better one before the stop. PPO often dips in its first rounds and recovers: two would be too few."""
    keep: Literal["best", "last"] = "best"
    """The policy that is kept: of the best look (the SFT itself included), or of the last round."""


class ParallelConfig(Section):
    shard_size: int | None = Field(default=None, ge=1)
    """Of several processes (torchrun), how many hold one copy of the weights between them: all of them if unset; 1: each holds whole
    copies; between: copies of that many processes each, such as the GPUs of a machine (HSDP)."""
    cpu_offload: bool = False
    """Several GPUs: the spread weights, gradients and optimizer states live in the machine's memory (FSDP2's CPU off-load). Slow, and not
    tried on GPUs yet."""
