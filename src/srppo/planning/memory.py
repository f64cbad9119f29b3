"""Memory of a run, phase by phase: formulas over parameter counts and the footprints of single passes. Bytes. Ours throughout.

W weights of a role, G gradients, O AdamW's two moments (Kingma and Ba 2015, arXiv 1412.6980): G = W and O = 2 W in the trained precision.
Activations, logits and temporary tensors of a pass come from dryrun.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from srppo.planning.architecture import Counts
from srppo.planning.dryrun import Footprint
from srppo.planning.inputs import BYTES, Card, Lengths, Settings
from srppo.planning.processes import Processes

ROOM = 64  # columns by which rollout/cache.py lets a layer's buffers grow
BLOCK = 256  # rollout/sampling.py pads the vocabulary to a multiple of it
# glibc leaves holes between tensors that stay: resident over live bytes of activations on a CPU, as measured (docs/plan.md)
HOLES = {"full": 1.4, "lora": 1.6}
HOLES_CHECKPOINTING = 2.3  # where a layer's activations are made and let go again and again
PREFILL_TOKENS = 8192  # rollout/decode.py: prompt tokens of one pass
VLLM_BLOCK = 128  # tokens by which vLLM's cache is divided on a CPU (rollout/vllm_engine.py)
# Layers whose full weights are there at once, buffers of all-gathers included: of a forward pass (while a layer is copied out of its
# buffer that of the layer before is still there), of a backward pass; and layers whose full gradients are, with the buffer from which
# they are scattered. FSDP2 of torch 2.13 on a CPU, counted (tests); on a GPU, not measured, its streams may keep one more.
FORWARD, BACKWARD, SCATTERED = 3, 2, 2
FILE, SAVED = "file", "saved model"  # in the CPU's memory of one process at a time, and of rank 0 alone
FIT_TOKENS = 4096  # records.Features.parts: tokens of which a critic's fit holds the features at once


@dataclass(frozen=True)
class Item:
    """One use of memory in one phase."""

    role: str  # base | sft | policy | critic | vllm | all
    # weights | gradients | optimizer | statistics | activations | kv cache | logits | merged copy | kept states | checkpoint copy
    # | file | memory taken; of several processes: gathered weights | unsharded gradients | gathered copy | saved model
    purpose: str
    bytes: int
    host: bool = False  # in the CPU's memory while the device has its own


@dataclass(frozen=True)
class Phase:
    """What is alive at the worst moment of a part of the run."""

    name: str
    items: tuple[Item, ...]

    def total(self, host: bool = False) -> int:
        return sum(item.bytes for item in self.items if item.host == host)


@dataclass(frozen=True)
class Model:
    """Sizes that the formulas need of a model."""

    counts: Counts
    layers: int
    cache_elements: int  # of the key-value cache, a token
    state_elements: int  # of recurrent states, a row
    adapter: int  # parameters of one LoRA adapter
    adapted: int  # parameters of the layers that an adapter adapts

    @property
    def layer(self) -> int:
        """Parameters of a decoder layer, which is what several processes gather at once."""
        return self.counts.layers // self.layers

    @property
    def root(self) -> int:
        """Parameters outside the layers: embedding, last norm, head."""
        return self.counts.total - self.counts.layers


def with_holes(footprint: Footprint, factor: float) -> Footprint:
    """The footprint as a process on a CPU holds it.

    Activations take `factor` of their size, and the heap that they needed at their most is not given back while the head runs, whose
    logits have mappings of their own.
    """
    f = footprint
    kept, forward, backward = (round(factor * x) for x in (f.kept, f.forward, f.backward))
    return replace(f, kept=kept, forward=forward, backward=backward, head=f.head - f.kept + max(kept, forward, backward))


def pass_peak(footprint: Footprint, gradients: int, head_gradient: int, micro_batches: int) -> int:
    """Peak of forward and backward beyond weights and optimizer.

    From the second micro-batch on, all gradients are there while activations are. With one micro-batch a gradient appears
    where the activations of its layer go, so only the ends of the backward pass count: all activations, or all gradients and
    what the first layer makes (with gradient checkpointing its activations, computed anew).
    """
    if micro_batches > 1:
        return gradients + footprint.peak
    start = max(footprint.forward, footprint.head, footprint.backward + head_gradient)
    return max(start, gradients + max(footprint.embedding, footprint.backward - footprint.kept))


def cache_bytes(model: Model, rows: int, columns: int, each: int) -> int:
    """Keys and values of `rows` sequences of so many tokens, and recurrent states."""
    return rows * (columns * model.cache_elements + model.state_elements) * each


def decoding_peak(
    model: Model, rows: int, distinct: int, lengths: Lengths, each: int, prefill: Footprint, step: Footprint
) -> dict[str, int]:
    """Of decoding a batch: reading the prompts, or the last steps with full caches and the logits [R, V] of two steps in float32."""
    read = cache_bytes(model, distinct, lengths.max_prompt, each) + cache_bytes(
        model, rows if distinct < rows else 0, lengths.max_prompt + ROOM, each
    )
    full = cache_bytes(model, rows, lengths.max_prompt + lengths.max_response + ROOM, each)
    moved = full // max(1, model.layers)  # a layer's old keys or values while they are copied into wider buffers: half of it, twice
    vocabulary = model.counts.vocabulary
    logits = rows * vocabulary * 4 * (3 if vocabulary % BLOCK else 2) + (rows * vocabulary * each if each < 4 else 0)
    at_start = {"kv cache": read, "activations": prefill.peak}
    at_end = {"kv cache": full + moved, "logits": logits, "activations": step.forward}
    return max(at_start, at_end, key=lambda d: sum(d.values()))


def phases(
    model: Model,
    settings: Settings,
    lengths: Lengths,
    passes: Mapping[str, Footprint],
    micro_batches: Mapping[str, int],
    *,
    gpu: bool,
    processes: Processes | None = None,
    vllm: int = 0,
) -> list[Phase]:
    """The phases of a run in their order, of one process. processes: among which rows are dealt and weights divided.
    vllm: bytes that vLLM takes when it is first asked, for the base's evaluation, and keeps to the end."""
    s, n, p = settings, model.counts.total, processes or Processes()
    trained = {"sft": n if s.full else model.adapter, "policy": n if s.full else model.adapter}
    if s.critic == "own":
        trained["critic"] = model.counts.trunk if s.full else model.adapter
    each, frozen = s.trained_bytes, s.frozen_bytes
    sharded, away = p.shards > 1, gpu and p.cpu_offload

    def held(count: int) -> int:
        """Trained weights that this process holds; adapters are small and whole in each."""
        return p.holds(count * each) if s.full else count * each

    def trainee(role: str) -> list[Item]:
        size, host = held(trained[role]), away and s.full
        return [Item(role, "weights", size, host), Item(role, "optimizer", 2 * size, host)]

    beside = [Item("vllm", "memory taken", vllm)] if vllm else []
    cache_each = 2 if gpu and s.autocast != "none" else BYTES[s.dtype]

    def update(role: str, name: str) -> list[Item]:
        gradients = held(trained[role])
        own_head = 0 if not s.full or role == "critic" else model.counts.head * each
        peak = pass_peak(passes[name], gradients, p.holds(own_head), micro_batches[name])
        peak = max(peak, gradients)  # the fused AdamW makes nothing on its way
        activations = max(0, peak - gradients)
        items = [Item(role, "gradients", gradients, away and s.full), Item(role, "activations", activations)]
        if not sharded:
            return items
        root = model.root - (model.counts.head if role == "critic" else 0)
        head = 0 if role == "critic" else model.counts.head or model.counts.embedding  # its gradient waits for the embedding's
        return items + in_flight(model, root, each if s.full else frozen, activations, head if s.full else None)

    def copies(*roles: str) -> list[Item]:
        """saver.py: weights and moments of what is trained, copied to the CPU; without the background one tensor at a time."""
        if not s.background_saves:
            return []
        return [Item(role, "checkpoint copy", 3 * held(trained[role]), host=gpu) for role in roles]

    def decoding(role: str, rows: int, distinct: int) -> list[Item]:
        """Decoding in this process; in vLLM's share, or on a server, it takes no more here than the adapter or weights handed over."""
        merged = [Item(role, "merged copy", model.adapted * BYTES[s.dtype])] if s.merges(gpu) else []
        if s.engine != "torch":
            handed = [Item(role, SAVED, n * (each if s.full else frozen), host=gpu)] if sharded else []
            return merged + handed
        copy = [Item(role, "gathered copy", n * (each if s.full else frozen))] if sharded else []
        parts = decoding_peak(model, rows, distinct, lengths, cache_each, passes["prefill"], passes["decode"])
        return copy + merged + [Item(role, purpose, size) for purpose, size in parts.items()]

    def looking(card: Card) -> list[Item]:
        """The reward card: the SFT, which is frozen later, and other checkpoints in the trained precision; and what it decodes with one of
        them or, for its preview, with several together, or the base once more, from which it extrapolates."""
        one = held(trained["sft"])
        checkpoints = [Item("sft", "weights", size, away and s.full) for size in (one, card.loads * one)]
        rows = min(s.evaluation_rows, p.rows(card.rows))
        ways = [decoding("sft", rows, -(-rows // card.samples))]
        if card.together and s.full and each != frozen:
            ways.append([Item("base", "weights", one, away)])
        if card.together and not (sharded and s.engine != "torch"):
            rows = min(max(1, s.evaluation_rows // card.together), rows)  # keys and values of each model
            parts = decoding_peak(model, rows, rows, lengths, cache_each, passes["prefill"], passes["decode"])
            parts["kv cache"] *= card.together
            parts["logits"] = parts.get("logits", 0) + 4 * rows * model.counts.vocabulary  # of the one before, weighted
            parts["gathered copy"] = sharded * n * (frozen + ((card.together - 1) * each if s.full else 0))
            ways.append([Item("sft", purpose, size) for purpose, size in parts.items() if size])
        return [*checkpoints, *max(ways, key=lambda items: sum(i.bytes for i in items if not i.host))]

    base = Item("base", "weights", p.holds(n * frozen), away)
    first = base if gpu else Item("base", "weights", n * frozen)  # spread when all of it is there
    file = [Item("base", FILE, n * frozen, host=gpu)] if not gpu or sharded else []  # read by one process of a machine after the other
    out = [Phase("load", (first, *file))]
    sft_state = [base, *trainee("sft"), *beside]
    if s.sft_steps != 0:
        out.append(Phase("sft", (*sft_state, *update("sft", "sft"))))
        if s.sft_saves:
            out.append(Phase("sft checkpoint", (*sft_state, *copies("sft"))))
    if not s.rounds:
        return out
    frozen_roles = ["base", "sft", *(["reward"] if s.reward_model else [])]
    resting = [Item(r, "weights", p.holds(n * frozen), away) if s.full else Item(r, "weights", trained["sft"] * each) for r in frozen_roles]
    if not s.full:
        resting[0] = base
    if s.offload_frozen and gpu and not sharded:
        gone = tuple(replace(i, host=True) for i in resting)
        scoring = (resting[0], *gone[1:])
        resting = list(gone)
    else:
        scoring = tuple(resting)
    if s.card is not None:
        out.append(Phase("reward card", (base, *beside, *looking(s.card))))
    learners = [item for role in ("policy", "critic") if role in trained for item in trainee(role)]
    rows = min(s.rollout_rows, p.rows(s.rollouts))
    asked = lengths.evaluated * s.samples if lengths.evaluated is not None else s.evaluation_rows
    judged = min(s.evaluation_rows, p.rows(asked))
    width, fitted = model.counts.width, s.critic == "least_squares"
    sums = 8 * width * width  # float64
    statistics = [Item("critic", "statistics", sums)] if fitted else []
    everyone = (*resting, *learners, *beside, *statistics)
    prefixes, states = kept_states(model, settings, lengths, p)
    passing = passes["score"].peak
    flying = in_flight(model, model.root, max(frozen, each if s.full and s.critic == "own" else 0), passing) if sharded else []
    word = (Item("all", "activations", passing), *flying)
    out += [
        Phase("rollout", (*everyone, *decoding("policy", rows, -(-rows // s.samples_per_prompt)))),
        Phase("scoring", (*scoring, *learners, *beside, *statistics, *word, *prefixes, *states)),
    ]
    if fitted:  # before the update, which then has room
        fit = fit_peak(width, min(s.rollouts * lengths.max_response, FIT_TOKENS + lengths.max_response))
        out.append(Phase("critic fit", (*everyone, *prefixes, *states, Item("critic", "activations", fit))))
    out.append(Phase("policy update", (*everyone, *prefixes, *update("policy", "policy"))))
    if s.critic == "own":
        out.append(Phase("critic update", (*everyone, *prefixes, *update("critic", "critic"))))
    kept = [Item("critic", "checkpoint copy", sums, host=gpu)] if fitted and s.background_saves else []
    out.append(Phase("ppo checkpoint", (*everyone, *copies(*(r for r in ("policy", "critic") if r in trained)), *kept)))
    if sharded and s.full:
        out.append(Phase("saving", (*everyone, Item("policy", SAVED, n * each, host=gpu))))
    idle = tuple(i for i in everyone if i.purpose != "optimizer")
    out.append(Phase("evaluation", (*idle, *decoding("policy", judged, -(-judged // s.samples)))))
    return out


def in_flight(model: Model, root: int, each: int, activations: int, head: int | None = None) -> list[Item]:
    """What FSDP2 holds beyond its shares while a pass runs: the root's weights, those of a few layers, and in a training pass (head:
    parameters whose gradient comes first and is kept to the end) gradients that are not scattered yet.

    Before the first layer and after the last, when activations are not there yet or gone, the root is there twice: with the buffer
    it was gathered into, or as gradients and the buffer from which they are scattered.
    """
    layers = FORWARD if head is None else BACKWARD
    gathered = (root + layers * model.layer) * each
    gradients = 0 if head is None else (head + SCATTERED * model.layer) * each
    ends = 2 * root * each + (2 * model.layer * each if head is None else 0)
    beyond = max(0, ends - gathered - gradients - activations)
    items = [Item("all", "gathered weights", gathered + beyond)]
    return items if head is None else [*items, Item("all", "unsharded gradients", gradients)]


def fit_peak(width: int, tokens: int) -> int:
    """Of fitting a critic by least squares, beyond what it keeps: `tokens` features in float32 and float64, and five matrices in float64
    (the round's sums, the covariance, that with its ridge, two Cholesky factors)."""
    return 5 * 8 * width * width + tokens * width * (4 + 8)


def kept_states(model: Model, settings: Settings, lengths: Lengths, processes: Processes) -> tuple[list[Item], list[Item]]:
    """Hidden states [tokens, H] of a round that are kept: of whole rows where the lower layers are run once a rollout, and those of the
    responses that a fitted critic reads."""
    below = lengths.max_prompt + lengths.max_response if settings.prefix_layers is not None else 0
    read = lengths.max_response if settings.critic == "least_squares" else 0
    each = processes.rows(settings.rollouts) * model.counts.width * BYTES[settings.dtype]
    prefixes, states = ([Item("all", "kept states", tokens * each)] if tokens else [] for tokens in (below, read))
    return prefixes, states


def vllm_memory(model: Model, settings: Settings, lengths: Lengths, memory: int, *, gpu: bool) -> tuple[int, int]:
    """What vLLM in this process takes of a device with so much memory, and what it needs at least: its weights and one longest sequence.

    On a GPU it takes its share whole, for weights, keys and values; on a CPU keys and values of all rows, the share at most.
    """
    s, columns = settings, lengths.max_prompt + lengths.max_response
    each = BYTES[s.vllm_dtype if gpu else s.dtype]
    weights, share = model.counts.total * each, int(s.vllm_share * memory)
    least = weights + cache_bytes(model, 1, columns, each)
    if gpu:
        return share, least
    blocks = s.rollout_rows * -(-columns // VLLM_BLOCK) + 1
    return weights + min(share, cache_bytes(model, 1, blocks * VLLM_BLOCK, each)), least
