"""Time of a round, phase by phase, from the kernels of single passes and a machine's rates. Seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from srppo.planning.dryrun import Footprint
from srppo.planning.inputs import BYTES, Lengths, Settings
from srppo.planning.machine import Machine
from srppo.planning.memory import Model

ADAM_PASSES = 7  # AdamW reads weight, gradient and two moments, and writes all but the gradient


@dataclass(frozen=True)
class Times:
    """Seconds. sft: all of it; the others a round. tokens: prompt and response tokens of a round."""

    sft: float | None
    rollout: float
    score: float
    update: float
    tokens: int
    sampled: int  # response tokens of a round
    rounds: int

    @property
    def round(self) -> float:
        return self.rollout + self.score + self.update

    @property
    def total(self) -> float:
        """SFT and PPO. Evaluations, reward card and baselines come on top."""
        return (self.sft or 0.0) + self.rounds * self.round


def pass_seconds(footprint: Footprint, machine: Machine) -> float:
    """All kernels of a pass, one after the other."""
    return sum(count * machine.seconds(flops, moved) for (flops, moved), count in (footprint.operations or {}).items())


def scoring(settings: Settings, token: Callable[[str], float]) -> float:
    """What a token of a round costs until it is scored by all models, in the unit of `token`: the cost of a token in a pass of that name.

    With adapters on the last layers only, what is below them is run once ("score" less "above"); to recompute goes through all layers.
    """
    models = 2 + settings.reward_model + (settings.critic == "own")
    return below(settings, token) + models * token(above(settings)) + settings.recompute * token("score")


def above(settings: Settings) -> str:
    """The name of a scoring pass through the layers in which roles differ."""
    return "score" if settings.lora_layers is None else "above"


def below(settings: Settings, token: Callable[[str], float]) -> float:
    """A token's way through the layers below all adapters, forward."""
    return token("score") - token(above(settings))


def times(
    model: Model,
    settings: Settings,
    lengths: Lengths,
    passes: Mapping[str, Footprint],
    tokens_of: Mapping[str, int],
    machine: Machine,
) -> Times:
    """tokens_of: tokens of each pass in `passes`; a phase's time is its tokens' share of such passes."""
    s = settings

    def token(name: str) -> float:
        return pass_seconds(passes[name], machine) / max(1, tokens_of[name])

    def step(role: str) -> float:
        trained = model.adapter if not s.full else model.counts.trunk if role == "critic" else model.counts.total
        return ADAM_PASSES * trained * s.trained_bytes / machine.bandwidth

    each = lengths.mean_prompt + lengths.mean_response
    tokens = s.rollouts * each
    batches = -(-s.rollouts // max(1, s.rollout_rows))
    rows = min(s.rollout_rows, s.rollouts)
    held = rows * (lengths.mean_prompt + lengths.mean_response / 2) * model.cache_elements * BYTES[s.dtype]
    decode = batches * lengths.mean_response * (pass_seconds(passes["decode"], machine) + held / machine.bandwidth)
    rollout = s.prompts * lengths.mean_prompt * token("prefill") + decode
    score = tokens * scoring(s, token)
    steps = s.epochs * min(s.minibatches, s.rollouts)
    update = s.epochs * tokens * token("policy") + steps * step("policy")
    if s.critic == "own":
        update += s.epochs * tokens * token("critic") + steps * step("critic")
    sft = None
    if s.sft_steps != 0 and "sft" in passes:
        count = s.sft_steps
        if count is None and lengths.demonstrations is not None:
            count = max(1, round(s.sft_epochs * -(-lengths.demonstrations // s.sft_batch)))
        if count is not None:
            sft = count * (s.sft_batch * lengths.mean_demonstration * (token("sft") + below(s, token)) + step("sft")) / machine.count
    n = machine.count
    sampled = round(s.rollouts * lengths.mean_response)
    return Times(sft, rollout / n, score / n, update / n, round(tokens), sampled, s.rounds)
