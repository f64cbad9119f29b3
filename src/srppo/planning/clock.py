"""Time of a round, phase by phase, from the kernels of single passes, a machine's rates and what its processes send. Seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from srppo.planning.dryrun import Footprint
from srppo.planning.inputs import BYTES, Lengths, Settings
from srppo.planning.machine import Machine
from srppo.planning.memory import Model
from srppo.planning.processes import Processes

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
    network: Mapping[str, float] = field(default_factory=dict)  # of these the seconds on the network, by phase, hidden ones included

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

    With adapters on the last layers only, one process runs what is below them once ("score" less "above"); to recompute goes through all.
    """
    models = 2 + settings.reward_model + (settings.critic == "own")
    if settings.prefix_layers is None:
        return (models + settings.recompute) * token("score")
    return below(settings, token) + models * token("above") + settings.recompute * token("score")


def training(settings: Settings, token: Callable[[str], float]) -> float:
    """What a token costs in a PPO epoch, in the unit of `token`: policy and critic."""
    learners = ["policy", *(["critic"] if settings.critic == "own" else [])]
    again = below(settings, token) if settings.prefix_layers is None else 0.0
    return sum(token(name) + again for name in learners)


def below(settings: Settings, token: Callable[[str], float]) -> float:
    """A token's way through the layers below all adapters, forward."""
    return 0.0 if settings.lora_layers is None else token("score") - token("above")


def times(
    model: Model,
    settings: Settings,
    lengths: Lengths,
    passes: Mapping[str, Footprint],
    tokens_of: Mapping[str, int],
    machine: Machine,
    processes: Processes | None = None,
    network: Mapping[str, float] | None = None,
) -> Times:
    """tokens_of: tokens of each pass in `passes`; a phase's time is its tokens' share of such passes.

    processes: among which rows are dealt. network: seconds that each phase sends and waits (traffic.py). On GPUs gathering the next
    layer goes on while one computes, so that the longer of the two counts; gloo's processes do one after the other. What a rollout
    sends comes before and after it.
    """
    s, p, sent = settings, processes or Processes(), network or {}

    def token(name: str) -> float:
        return pass_seconds(passes[name], machine) / max(1, tokens_of[name])

    def step(role: str) -> float:
        trained = model.adapter if not s.full else model.counts.trunk if role == "critic" else model.counts.total
        return ADAM_PASSES * (trained / p.shards if s.full else trained) * s.trained_bytes / machine.bandwidth

    def both(computing: float, phase: str) -> float:
        return max(computing, sent.get(phase, 0.0)) if machine.gpu else computing + sent.get(phase, 0.0)

    each = lengths.mean_prompt + lengths.mean_response
    tokens = s.rollouts * each
    mine = p.rows(s.rollouts)
    batches = -(-mine // max(1, s.rollout_rows))
    rows = min(s.rollout_rows, mine)
    held = rows * (lengths.mean_prompt + lengths.mean_response / 2) * model.cache_elements * BYTES[s.dtype]
    decode = batches * lengths.mean_response * (pass_seconds(passes["decode"], machine) + held / machine.bandwidth)
    rollout = p.share(s.prompts) * s.prompts * lengths.mean_prompt * token("prefill") + decode
    score = p.share(s.rollouts) * tokens * scoring(s, token)
    steps = s.epochs * min(s.minibatches, s.rollouts)
    learned = p.share(s.minibatch) * tokens
    update = s.epochs * learned * training(s, token)
    stepped = steps * (step("policy") + (step("critic") if s.critic == "own" else 0.0))
    sft = None
    if s.sft_steps != 0 and "sft" in passes:
        count = sft_steps(s, lengths)
        if count is not None:
            taught = p.rows(s.sft_batch) * lengths.mean_demonstration * (token("sft") + below(s, token))
            sft = both(count * taught, "sft") + count * step("sft")
    sampled = round(s.rollouts * lengths.mean_response)
    return Times(
        sft,
        rollout + sent.get("rollout", 0.0),
        both(score, "scoring"),
        both(update, "update") + stepped,
        round(tokens),
        sampled,
        s.rounds,
        dict(sent),
    )


def sft_steps(settings: Settings, lengths: Lengths) -> int | None:
    """Optimizer steps of SFT; None where the number of demonstrations that decides it is not known."""
    s = settings
    if s.sft_steps is not None:
        return s.sft_steps
    if lengths.demonstrations is None:
        return None
    return max(1, round(s.sft_epochs * -(-lengths.demonstrations // s.sft_batch)))
