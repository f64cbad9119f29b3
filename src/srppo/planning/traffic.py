"""What several processes send one another in a round, flow by flow, and how long that takes. Ours, but for the rings (processes.py).

FSDP2 gathers a decoder layer when it is run, and the rest of the model (root: embedding, last norm, head) for the whole of a pass:
forward and backward with full weights, gradients summed by reduce-scatter, once a micro-batch (models/sharding.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from srppo.planning.inputs import BYTES, Lengths, Settings, micro_rows
from srppo.planning.memory import Model
from srppo.planning.processes import Links, Processes, Ring, replica_ring, shard_ring, world_ring

RECORD = 8 + 4  # bytes of a response token in a rollout's record, up to the longest: its id and its log-probability
BUCKET = 64 * 2**20  # train/learner.py: bytes of gradients that are summed at once where each process holds all of them


@dataclass(frozen=True)
class Flow:
    """One use of the network in a phase of a round (of all of SFT where phase is sft)."""

    phase: str  # rollout | scoring | update | sft
    what: str
    collective: str  # all-gather | reduce-scatter | all-reduce | file
    bytes: int  # that each process sends; of a file, that rank 0 writes and every server reads
    calls: int
    seconds: float


@dataclass(frozen=True)
class Part:
    """Parameters of a model in the units in which they are gathered."""

    layers: int
    root: int
    units: int  # gathers of one pass

    @property
    def whole(self) -> int:
        return self.layers + self.root


def part(model: Model, total: int, layers: int | None = None) -> Part:
    """Of a model of so many parameters; layers: of the decoder layers only so many."""
    inner = model.counts.layers
    count = model.layers if layers is None else layers
    return Part(inner * count // model.layers, total - inner, count + 1 if inner else 1)


@dataclass(frozen=True)
class Micros:
    """Micro-batches of mean length that each process goes through."""

    score: int  # a pass over a round
    update: int  # an optimizer step
    sft: int

    @staticmethod
    def of(settings: Settings, lengths: Lengths, processes: Processes) -> Micros:
        s = settings
        each = round(lengths.mean_prompt + lengths.mean_response)

        def count(rows: int, length: int, tokens: int) -> int:
            own = processes.rows(rows)
            return -(-own // micro_rows(length, own, tokens))

        return Micros(
            count(s.rollouts, each, s.micro_tokens),
            count(s.minibatch, each, s.micro_tokens),
            count(s.sft_batch, round(lengths.mean_demonstration), s.sft_micro_tokens),
        )


def buckets(size: int) -> int:
    """Collectives in which so many bytes of gradients are summed, and one before them to see which there are."""
    return 1 + -(-size // BUCKET)


class Network:
    """The flows of a run on so many processes and such links."""

    def __init__(self, model: Model, settings: Settings, processes: Processes, links: Links):
        self.model, self.settings, self.processes = model, settings, processes
        self.shard, self.replica, self.world = (ring(processes, links) for ring in (shard_ring, replica_ring, world_ring))

    def gathers(self, phase: str, what: str, weights: float, calls: int) -> list[Flow]:
        """All-gathers of so many bytes of weights in sum."""
        return self._flow(phase, what, "all-gather", self.shard, self.shard.gather(weights), calls)

    def training(self, phase: str, role: str, steps: int, micros: int) -> list[Flow]:
        """Of training a role for so many steps."""
        s, m, n = self.settings, self.model, self.model.counts.total
        if not s.full:
            forward, backward, adapter = part(m, n), part(m, n, s.lora_layers), m.adapter * s.trained_bytes
            weights, calls = (forward.whole + backward.layers) * s.frozen_bytes, forward.units + backward.units - 1
            passes = self.gathers(phase, f"{role}: base", steps * micros * weights, steps * micros * calls)
            return [*passes, *self._summed(phase, f"{role}: adapter", self.world, steps * adapter, steps * buckets(adapter))]
        own = part(m, m.counts.trunk if role == "critic" else n)
        each, times = s.trained_bytes, steps * micros
        again = role == "critic"  # its trunk is run within itself (sharding.run_on), which has its root gathered once more
        weights, calls = (2 * own.layers + (1 + again) * own.root) * each, 2 * own.units - 1 + again
        flows = self.gathers(phase, f"{role}: weights", times * weights, times * calls)
        if self.processes.shards == 1:
            size = own.whole * each
            return self._summed(phase, f"{role}: gradients", self.world, steps * size, steps * buckets(size))
        sent = self.shard.gather(times * own.whole * each)
        flows += self._flow(phase, f"{role}: gradients", "reduce-scatter", self.shard, sent, times * own.units)
        parts = steps * own.whole * each / self.processes.shards  # with a step's last micro-batch
        return flows + self._summed(phase, f"{role}: gradients of the copies", self.replica, parts, steps * own.units)

    def scoring(self, micros: int) -> list[Flow]:
        """Of the frozen roles' and the critic's word on a round."""
        s, m, n = self.settings, self.model, self.model.counts.total
        frozen = ["base", "sft", *(["reward"] if s.reward_model else [])]
        flows: list[Flow] = []
        if s.full:
            for role in frozen:
                own = part(m, n)
                flows += self.gathers("scoring", f"{role}: weights", micros * own.whole * s.frozen_bytes, micros * own.units)
            roles = {"critic": m.counts.trunk} if s.critic == "own" else {}
            for role, total in (roles | ({"policy": n} if s.recompute else {})).items():
                own = part(m, total)
                flows += self.gathers("scoring", f"{role}: weights", micros * own.whole * s.trained_bytes, micros * own.units)
            return flows
        own, passes = part(m, n), micros * (len(frozen) + (s.critic == "own") + s.recompute)
        return self.gathers("scoring", "base", passes * own.whole * s.frozen_bytes, passes * own.units)

    def rollout(self, lengths: Lengths) -> list[Flow]:
        """The policy's weights, whole in each process or handed to the servers, and the records of what was sampled and scored."""
        s, m, n = self.settings, self.model, self.model.counts.total
        each = s.trained_bytes if s.full else BYTES[s.dtype]
        own = part(m, n)
        flows: list[Flow] = []
        if s.engine != "server" or s.full:  # servers are given the base once
            flows += self.gathers("rollout", "policy: weights" if s.full else "base", own.whole * each, own.units)
        if s.engine == "server" and self.processes.size > 1:
            size = n * each if s.full else m.adapter * s.trained_bytes
            flows.append(Flow("rollout", "policy: to the servers", "file", size, 1, 0.0))
        tokens = s.rollouts * lengths.max_response
        flows += self._flow("rollout", "records", "all-gather", self.world, self.world.gather(RECORD * tokens), 1)
        columns = 2 + s.reward_model + (s.critic == "own") + s.recompute
        return flows + self._summed("scoring", "records", self.world, 4.0 * columns * s.rollouts * lengths.max_response, columns)

    def _summed(self, phase: str, what: str, ring: Ring, whole: float, calls: int) -> list[Flow]:
        return self._flow(phase, what, "all-reduce", ring, ring.reduce(whole), calls, 2)

    def _flow(self, phase: str, what: str, collective: str, ring: Ring, sent: float, calls: int, rounds: int = 1) -> list[Flow]:
        if ring.size == 1 or not sent:
            return []
        return [Flow(phase, what, collective, round(sent), calls, ring.seconds(sent, calls, rounds))]


def flows(model: Model, settings: Settings, lengths: Lengths, processes: Processes, links: Links, sft_steps: int | None) -> list[Flow]:
    """All flows of a round, and those of SFT's steps, where it has any; none with one process."""
    if processes.size == 1:
        return []
    s, network = settings, Network(model, settings, processes, links)
    micros = Micros.of(settings, lengths, processes)
    steps = s.epochs * min(s.minibatches, s.rollouts)
    out = [*network.rollout(lengths), *network.scoring(micros.score), *network.training("update", "policy", steps, micros.update)]
    if s.critic == "own":
        out += network.training("update", "critic", steps, micros.update)
    if sft_steps:
        out += network.training("sft", "sft", sft_steps, micros.sft)
    order = {"sft": 0, "rollout": 1, "scoring": 2, "update": 3}
    return sorted(out, key=lambda f: order[f.phase])


def seconds_of(found: list[Flow]) -> Mapping[str, float]:
    """Seconds on the network by phase."""
    out: dict[str, float] = {}
    for flow in found:
        out[flow.phase] = out.get(flow.phase, 0.0) + flow.seconds
    return out
