"""The least arithmetic of a PPO round, and how long it takes at a measured rate.

Counted are multiplications and additions of matrix products, real tokens only, the LM head on response positions only:
generation with a key-value cache, the two frozen models' log-probabilities, the critic's values, and in each epoch forward and
backward of policy and critic. A response of T tokens after a prompt of P needs L = P + T - 1 states.
Backward is twice forward; with LoRA once forward plus the adapters' own, as the base's weights need no gradients.
Not counted: normalisations, softmax, the optimizer, memory traffic. No implementation can do less; ours, no paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.race.shapes import Model, Shape


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by kind of matrix product, as these run at different rates."""

    decode: float = 0.0  # one row a response: blocks
    decode_head: float = 0.0
    forward: float = 0.0  # whole sequences: blocks and attention
    forward_head: float = 0.0
    backward: float = 0.0  # likewise
    backward_head: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(self.parts(), other.parts())))

    def times(self, factor: float) -> Flops:
        return Flops(*(factor * a for a in self.parts()))

    def parts(self) -> tuple[float, ...]:
        return (self.decode, self.decode_head, self.forward, self.forward_head, self.backward, self.backward_head)

    @property
    def total(self) -> float:
        return sum(self.parts())


def block_flops(model: Model) -> float:
    """Of all blocks' linear layers, forward, one token."""
    return model.layers * sum(2.0 * a * b for _, a, b in model.linears())


def adapter_flops(model: Model, rank: int) -> float:
    """Of LoRA adapters on all of them."""
    return model.layers * sum(2.0 * rank * (a + b) for _, a, b in model.linears())


def attention_flops(model: Model, first: int, last: int) -> float:
    """Scores and weighted values of the tokens first + 1 … last of a sequence, each over itself and all before it."""
    seen = (last * (last + 1) - first * (first + 1)) / 2
    return model.layers * 4.0 * model.heads * model.head_dim * seen


def head_flops(model: Model, tokens: int) -> float:
    return 2.0 * model.hidden * model.vocab * tokens


def generation(model: Model, prompt: int, response: int) -> Flops:
    """One response: the prompt read at once, then a token at a time. LoRA's policy is merged."""
    length = prompt + response - 1
    return Flops(
        forward=block_flops(model) * prompt + attention_flops(model, 0, prompt),
        decode=block_flops(model) * (response - 1) + attention_flops(model, prompt, length),
        decode_head=head_flops(model, response),
    )


def scoring(model: Model, prompt: int, response: int, head: bool) -> Flops:
    """A forward pass of one model; the critic's has no head."""
    length = prompt + response - 1
    return Flops(
        forward=block_flops(model) * length + attention_flops(model, 0, length),
        forward_head=head_flops(model, response) if head else 0.0,
    )


def training(model: Model, prompt: int, response: int, head: bool, rank: int | None) -> Flops:
    """Forward and backward of one model. rank: of LoRA, None for full tuning."""
    forward, length = scoring(model, prompt, response, head), prompt + response - 1
    attention = attention_flops(model, 0, length)
    if rank is None:
        return Flops(0, 0, forward.forward, forward.forward_head, 2 * forward.forward, 2 * forward.forward_head)
    adapters = adapter_flops(model, rank) * length
    idle = sum(2.0 * a * b for name, a, b in model.linears() if name in "qkv") * length  # nothing below the first block learns
    back = block_flops(model) * length - idle + 2 * attention + 2 * adapters
    return Flops(0, 0, forward.forward + adapters, forward.forward_head, back, forward.forward_head)


def round_flops(shape: Shape, prompts: Sequence[int], response: int, tuning: str, critic: bool = True) -> dict[str, Flops]:
    """By phase, of a round whose responses follow prompts of these lengths."""
    model, rank = shape.model, None if tuning == "full" else shape.rank
    phases = {"rollout": Flops(), "score": Flops(), "update": Flops()}
    for prompt in prompts:
        phases["rollout"] += generation(model, prompt, response)
        phases["score"] += scoring(model, prompt, response, head=True).times(2)
        phases["update"] += training(model, prompt, response, True, rank).times(shape.epochs)
        if critic:
            phases["score"] += scoring(model, prompt, response, head=False)
            phases["update"] += training(model, prompt, response, False, rank).times(shape.epochs)
    return phases


def seconds(flops: Flops, rates: Flops) -> float:
    """rates: operations a second of each kind."""
    return sum(work / rate for work, rate in zip(flops.parts(), rates.parts()) if work)
