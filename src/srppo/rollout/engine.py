"""What every rollout engine takes and gives, and how far its log-probabilities may be trusted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from srppo.errors import ConfigError, TrainingStopped
from srppo.masking import masked_mean
from srppo.records import Rollout
from srppo.seeding import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]  # (rows finished, rows in all)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy. Raises ConfigError for values no distribution has."""

    max_new_tokens: int  # the response limit, EOS included
    temperature: float = 1.0
    top_p: float = 1.0  # nucleus; 1 is off
    top_k: int = 0  # 0 is off
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"rollout.max_new_tokens is {self.max_new_tokens}; a response has at least one token")
        if not self.temperature >= 0:
            raise ConfigError(f"rollout.temperature is {self.temperature}; it must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"rollout.top_p is {self.top_p}; it must be in (0, 1], 1 is off")
        if self.top_k < 0:
            raise ConfigError(f"rollout.top_k is {self.top_k}; it must be 0 (off) or above")

    @property
    def deterministic(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.greedy or self.temperature == 0

    @property
    def biased(self) -> bool:
        """Whether tokens come from another distribution than the model's own, which behaviour_logprobs describes."""
        return self.deterministic or self.temperature != 1 or self.top_p < 1 or self.top_k > 0


class EngineLost(TrainingStopped):
    """The engine's servers are gone: no response can be sampled, but nothing that is held here is wrong."""


class RolloutEngine(Protocol):
    """Samples responses. Row b's randomness is seeds[b] alone, so it does not matter which rows are decoded together."""

    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        prompt_index: Sequence[int] | None = None,
        on_progress: Progress | None = None,
    ) -> Rollout:
        """One response a row, in the order of the rows; a prompt to be answered k times is given k times, with k seeds.

        prompts: B lists of token ids. prompt_index: what Rollout.prompt_index shall say, row numbers by default.
        behaviour_logprobs are those of the model's untempered and unfiltered distribution, whatever the sampling.
        """
        ...


def bias_warning(sampling: Sampling) -> str | None:
    """What to tell the user where sampling biases the PPO ratio; None where it does not."""
    if not sampling.biased:
        return None
    options = [
        ("greedy", sampling.deterministic),
        (f"temperature {sampling.temperature:g}", not sampling.deterministic and sampling.temperature != 1),
        (f"top_p {sampling.top_p:g}", not sampling.deterministic and sampling.top_p < 1),
        (f"top_k {sampling.top_k}", not sampling.deterministic and sampling.top_k > 0),
    ]
    names = ", ".join(name for name, on in options if on)
    return (
        f"rollouts are sampled with {names}: they do not come from the policy itself, while the ratio and the KL take their "
        "log-probabilities from it, so both are biased. Use temperature 1, top_p 1 and top_k 0 for training; evaluation may differ"
    )


def mismatch(behaviour_logprobs: Tensor, trainer_logprobs: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the engine's log-probabilities are from the trainer's, for the same weights and tokens. All [B, T].

    mean_abs, max_abs: of the difference d = trainer - behaviour on the mask, nats.
    k3: mean of exp(d) - 1 - d, the low-variance estimate of KL(engine || trainer) a token
        (Schulman 2020, http://joschu.net/blog/kl-approx.html, k3), nats. 0 throughout where nothing is masked in.
    """
    difference = (trainer_logprobs - behaviour_logprobs).double().masked_fill(~mask.bool(), 0.0)
    size = difference.abs()
    return {
        "mean_abs": float(masked_mean(size, mask)),
        "max_abs": float(size.max()) if size.numel() else 0.0,
        "k3": float(masked_mean(difference.expm1() - difference, mask)),
    }


def repeated(prompts: Sequence[list[int]], each: int, seed: int, *stream: int | str) -> tuple[list[list[int]], list[int], list[int]]:
    """What `generate` needs for `each` samples a prompt: rows (a prompt's samples one after the other), their seeds, their prompts.

    seed, stream: what names the random streams; prompt and sample are added to it.
    """
    index = [p for p in range(len(prompts)) for _ in range(each)]
    seeds = [stream_seed(seed, *stream, p, s) for p in range(len(prompts)) for s in range(each)]
    return [prompts[p] for p in index], seeds, index
