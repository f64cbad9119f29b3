"""A pass of the real model code on tensors without memory: what it would allocate, compute and move, for any architecture.

PyTorch's fake tensors (those under torch.compile) have shapes and storages, but no data. The forward and backward of the transformers
model and of our own log-probabilities run on them; a dispatch mode counts each storage while it lives, and what each kernel computes.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import masking_utils

from srppo.logprobs import Head, chunked_logprobs, rows_at_once
from srppo.models.forward import autocasting
from srppo.planning.architecture import Architecture, quiet, with_adapters

aten = torch.ops.aten
_ATTENTION = (aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward)

Operations = Counter[tuple[int, int]]  # (floating operations, bytes read and written) of one kernel: how often


@dataclass(frozen=True)
class Footprint:
    """What one micro-batch needs beside weights, optimizer and the gradients that are there already. Bytes."""

    kept: int = 0  # alive when the trunk's forward pass is over: activations kept for the backward pass
    forward: int = 0  # peak of the trunk's forward pass, kept ones included
    head: int = 0  # peak while the head (logits, log-probabilities, values) runs forward and backward, kept ones included
    backward: int = 0  # peak of the trunk's backward pass down to the embedding
    embedding: int = 0  # peak of the embedding's own gradient, by when the activations are gone
    operations: Operations | None = None

    @property
    def peak(self) -> int:
        return max(self.forward, self.head, self.backward, self.embedding)

    @property
    def flops(self) -> int:
        """Floating operations of the matrix products, a multiply-add as two."""
        return sum(flops * count for (flops, _), count in (self.operations or {}).items())


class Ledger(TorchDispatchMode):
    """Counts the bytes of storages made inside it while they live, and what each kernel computes and moves."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.operations: Operations = Counter()
        self._sizes: dict[int, int] = {}

    def know(self, tensors: Iterator[Tensor]) -> None:
        """Storages that were there before: weights."""
        for tensor in tensors:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def mark(self) -> int:
        """The peak since the last mark."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:  # a question, and most of all calls
            return function(*args, **kwargs)
        if function is torch.ops.aten.nonzero.default:  # its size depends on data there is none of: all rows, an upper bound
            out = args[0].new_empty((args[0].shape[0], args[0].dim()), dtype=torch.int64)
        else:
            out = function(*args, **kwargs)
        made = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        before = {t.untyped_storage()._cdata for t in given}
        views = bool(made) and all(t.untyped_storage()._cdata in before for t in made) and not _writes(function)
        for tensor in made:
            self._meet(tensor)
        if made and not views:
            packet, flops = function._overloadpacket, 0
            if packet in _ATTENTION:
                flops = _attention_flops(args, forward=packet is aten._scaled_dot_product_flash_attention_for_cpu)
            elif packet in flop_registry:
                flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
            self.operations[flops, sum(_bytes(t) for t in given) + sum(_bytes(t) for t in made)] += 1
        return out

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention as one fused kernel, as it is on CPUs and GPUs."""
    mask = None if attn_mask is None else query.new_zeros(attn_mask.shape)  # what a boolean mask is turned into
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)[0]


def _attention_flops(args: Sequence[Any], forward: bool) -> int:
    """Two products of [Q, D] x [D, K] a head forward, five backward (one recomputed); half of it where the mask is causal."""
    query, key = (args if forward else args[1:])[:2]
    causal = bool((args[4:5] or (False,))[0]) if forward else bool(args[7])
    rows, heads, queries, size = query.shape
    return (2 if forward else 5) * 2 * rows * heads * queries * key.shape[-2] * size // (2 if causal else 1)


def _writes(function: Any) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class Pass:
    """A pass through a model: rows of so many tokens, of which the last `targets` of each row are scored."""

    rows: int
    length: int
    targets: int
    head: str = "logprobs"  # logprobs | values | last (logits of the last position only) | none
    train: bool = False
    entropy: bool = False
    device: str = "cpu"  # the kind of device it is planned for
    checkpointing: bool = False
    autocast: str = "none"
    dtype: str = "float32"
    lora_rank: int | None = None  # adapters on all linear layers (or `lora_targets`); else every weight is trained
    lora_targets: str | tuple[str, ...] = "all-linear"


def footprint(architecture: Architecture, work: Pass, layers: int | None = None) -> Footprint:
    """Of a whole model, from two short ones: what layers add is linear in their number (from the second on: the first has no state
    of an earlier one beside it), and a period of layers is short.

    layers: as if the model had so many (those an update passes through); all by default.
    """
    wanted = layers if layers is not None else architecture.layers
    period = architecture.period
    few = max(2, period)
    if wanted <= few + period:
        return _run(architecture, wanted, work)
    one, two = (_run(architecture, n, work) for n in (few, few + period))
    return extrapolate(one, two, (wanted - few) / period)


def extrapolate(one: Footprint, two: Footprint, periods: float) -> Footprint:
    """one + periods (two - one), figure by figure. The embedding's peak does not grow with the layers."""

    def line(a: int, b: int) -> int:
        return round(a + periods * (b - a))

    first, second = one.operations or Counter(), two.operations or Counter()
    counts: Operations = Counter({key: line(first[key], second[key]) for key in {*first, *second}})
    parts = {name: line(getattr(one, name), getattr(two, name)) for name in ("kept", "forward", "head", "backward")}
    return Footprint(**parts, embedding=max(one.embedding, two.embedding), operations=+counts)


def _run(architecture: Architecture, layers: int, work: Pass) -> Footprint:
    """One pass of the model's first layers, on fake tensors."""
    again = work.checkpointing and work.train
    model = _model(architecture, layers, work.dtype, work.lora_rank, work.lora_targets, again)
    with _fake(), quiet(), prepared():
        model.requires_grad_(work.train if work.lora_rank is None else False)
        if work.lora_rank is not None and work.train:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_" in name)
        model.train(work.train)
        head = nn.Linear(architecture_width(model), 1)
        trained = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
        if work.train:  # the gradients of an earlier micro-batch, so that all of a pass is what it adds
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        return _measure(model, head, work, [p.grad for p in trained if p.grad is not None])


@functools.cache
def _fake() -> FakeTensorMode:
    """The one mode whose tensors meet in a dry run, as models outlive it."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@functools.lru_cache(maxsize=16)
def _model(architecture: Architecture, layers: int, dtype: str, rank: int | None, targets: str | tuple[str, ...], again: bool) -> Any:
    """A short model on fake tensors, kept: making one takes as long as a pass through it. again: with gradient checkpointing, which
    is not switched off without a trace."""
    with torch.device("meta"):
        model = Architecture.build(architecture.shortened(layers), dtype)
        if rank is not None:
            model = with_adapters(model, rank, targets)
    with _fake(), quiet():
        model.to_empty(device="cpu")
        model.tie_weights()
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return model


@contextmanager
def prepared() -> Iterator[None]:
    """Attention is one kernel; and transformers, which looks at position ids for packed rows, finds none, as no data can answer.

    Both are replaced by name: a mode that sees every call of a tensor would take most of a dry run's time.
    """
    masks: Any = masking_utils
    plain: Any = nn.functional
    before, attention = masks.find_packed_sequence_indices, plain.scaled_dot_product_attention
    masks.find_packed_sequence_indices = lambda *_: None
    plain.scaled_dot_product_attention = fused_attention
    try:
        yield
    finally:
        masks.find_packed_sequence_indices, plain.scaled_dot_product_attention = before, attention


def architecture_width(model: Any) -> int:
    """H of the states that enter the head."""
    return int(model.config.get_text_config().hidden_size)


def _measure(model: Any, value_head: nn.Linear, work: Pass, gradients: list[Tensor]) -> Footprint:
    ids = torch.zeros(work.rows, work.length, dtype=torch.int64)
    first = work.length - 1 - work.targets
    places = torch.arange(work.rows * work.targets)  # stands for the target mask, whose count only data knows
    ledger = Ledger()
    ledger.know(iter([*model.parameters(), *model.buffers(), *value_head.parameters(), *gradients, ids, places]))
    down: list[int] = []
    # the trunk's backward pass is over where the gradient of the embedding's output is there
    watched = model.get_input_embeddings().register_forward_hook(
        lambda *a: a[-1].register_hook(lambda _: down.append(ledger.mark())) and None if a[-1].requires_grad else None
    )
    with watched, ledger, torch.set_grad_enabled(work.train), autocasting(ids.device, work.autocast):
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        kept, forward = ledger.now, ledger.mark()
        chosen = states[:, :1] if work.head == "last" else states[:, max(first, 0) : max(first, 0) + work.targets]
        chosen = chosen.reshape(-1, states.shape[-1])[places[: chosen.shape[0] * chosen.shape[1]]]
        loss: Any = None
        if work.head in ("logprobs", "last"):
            out = model.get_output_embeddings()
            if work.head == "last":
                loss = out(chosen).float()
            else:
                plain = Head(out.weight, getattr(out, "bias", None))
                chunk = rows_at_once(plain.weight.shape[0], work.device)
                loss = chunked_logprobs(chosen, plain, places, chunk=chunk, entropy=work.entropy).logprobs.sum()
        elif work.head == "values":
            with torch.autocast(ids.device.type, enabled=False):
                loss = value_head(chosen.float()).sum()
        if not work.train or loss is None:
            return Footprint(kept, forward, ledger.mark(), operations=ledger.operations)
        states.register_hook(lambda _: down.append(ledger.mark()))
        del states, chosen
        loss.backward()
        rest = ledger.mark()
    head, backward, embedding = _three(down, rest)
    return Footprint(kept, forward, head, backward, embedding, ledger.operations)


def _three(marks: list[int], rest: int) -> tuple[int, int, int]:
    """Peaks of the head, of the trunk's backward pass and of the embedding's, however many marks were met."""
    if len(marks) >= 2:
        return marks[0], marks[1], max([*marks[2:], rest])
    return (marks[0], rest, 0) if marks else (rest, 0, 0)
