"""Refilled decoding against decoding in fixed batches, static shapes against growing ones, and what the engine says it cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel, Qwen3NextConfig

from srppo.records import Rollout
from srppo.rollout import decode as decode_module
from srppo.rollout import refill as refill_module
from srppo.rollout import replay as replay_module
from srppo.rollout import torch_engine as engine_module
from srppo.rollout.attention import grouped
from srppo.rollout.cache import new_cache
from srppo.rollout.engine import Sampling
from srppo.rollout.replay import Replay, bucket
from srppo.rollout.slots import Places, fits
from srppo.rollout.torch_engine import TorchEngine
from tiny_models import tiny_model

VOCAB = 48
ARCHITECTURES = ["llama", "gpt2", "mistral", "gemma3"]  # the last two with windows of 4 tokens


@dataclass(frozen=True)
class Special:
    pad_id: int = 0
    eos_ids: tuple[int, ...] = (3, 7, 11)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    positions = {"n_positions" if request.param == "gpt2" else "max_position_embeddings": 96}
    return tiny_model(request.param, vocabulary=VOCAB, spread=0.3, **positions).double()  # rounding cannot flip a token


def some_prompts(count: int = 40) -> list[list[int]]:
    """Lengths 1 to 19, each prompt twice (not side by side)."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (count // 2,), generator=generator).tolist()
    half = [torch.randint(12, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return half + half


def generate(model: PreTrainedModel, batch_size: int = 8, limit: int = 24, eos: tuple[int, ...] = (3, 7, 11), **options: Any) -> Rollout:
    prompts = some_prompts()
    return TorchEngine(Special(eos_ids=eos), batch_size, **options).generate(model, prompts, range(len(prompts)), Sampling(limit))


def equal(a: Rollout, b: Rollout) -> None:
    assert a.prompt_ids == b.prompt_ids and torch.equal(a.responses, b.responses)
    assert torch.equal(a.mask, b.mask) and torch.equal(a.ended, b.ended)
    torch.testing.assert_close(a.behaviour_logprobs, b.behaviour_logprobs, atol=1e-5, rtol=0)


@pytest.fixture
def widths(model: PreTrainedModel) -> Any:
    """(rows, queries) of each forward pass."""
    seen: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    yield seen
    hook.remove()


@pytest.mark.parametrize(("batch_size", "share"), [(5, 8), (8, 1), (40, 8)])
def test_refilling_changes_no_token(
    model: PreTrainedModel, batch_size: int, share: int, widths: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin decodes batch by batch, each alone in a cache that grows, its rows aligned at the right."""
    monkeypatch.setattr(refill_module, "REFILL_SHARE", share)
    twin = generate(model, batch_size, refill=False)
    widths.clear()
    rollout = generate(model, batch_size)
    equal(rollout, twin)
    assert len(set(rollout.lengths.tolist())) > 5
    passes = [q for _, q in widths]
    if batch_size == 5:  # prompts were read while others went on
        assert sum(q > 1 for q in passes) > 5 and passes.count(1) < generate_steps(twin, batch_size)


def generate_steps(rollout: Rollout, batch_size: int) -> int:
    """Steps that fixed batches in the engine's order would take."""
    order = sorted(range(len(rollout.prompt_ids)), key=lambda r: (-len(rollout.prompt_ids[r]), rollout.prompt_ids[r]))
    lengths = rollout.lengths.tolist()
    return sum(max(lengths[r] for r in order[i : i + batch_size]) - 1 for i in range(0, len(order), batch_size))


@pytest.mark.parametrize("columns", [7, 1000])
def test_static_shapes_change_no_token(model: PreTrainedModel, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU captures, run plainly: fixed buffers, few shapes, halves of the rows, and ended rows noticed late."""
    twin = generate(model, refill=False)
    shapes: set[tuple[int, int]] = set()

    class Watched(Replay):
        def __call__(self) -> None:
            shapes.add((self.places.rows, self.places.seen))
            super().__call__()

    def static(*args: Any) -> Any:
        return refill_module.decode_refilled(*args[:8], static=True)

    monkeypatch.setattr(engine_module, "decode_refilled", static)
    monkeypatch.setattr(refill_module, "Replay", Watched)
    monkeypatch.setattr(refill_module, "checks_every", lambda device: 8)
    monkeypatch.setattr(replay_module, "COLUMNS", columns)
    equal(generate(model), twin)
    assert {rows for rows, _ in shapes} <= {8, 4, 2, 1} and len(shapes) > 1
    assert all(seen % columns == 0 or seen == max(s for _, s in shapes) for _, seen in shapes)


def test_the_limit_alone_ends_rows(model: PreTrainedModel) -> None:
    rollout = generate(model, 16, limit=9, eos=())
    assert rollout.mask.all() and rollout.responses.shape == (40, 9) and not rollout.ended.any()
    equal(rollout, generate(model, 16, limit=9, eos=(), refill=False))
    equal(generate(model, limit=1), generate(model, limit=1, refill=False))


def test_reading_in_several_passes(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = generate(model, refill=False)
    monkeypatch.setattr(decode_module, "PREFILL_TOKENS", 30)
    equal(generate(model, 16), twin)


@pytest.mark.parametrize("refill", [False, True])
@pytest.mark.parametrize("every", [1, 8])
def test_what_it_cost(
    model: PreTrainedModel, refill: bool, every: int, widths: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from outside: the shapes of the forward passes, and the tokens that were kept."""
    for module in (decode_module, refill_module):
        monkeypatch.setattr(module, "checks_every", lambda device: every)
    prompts = [[*p, 20] for p in some_prompts()]  # two tokens or more, so that a pass of one token is a step
    engine = TorchEngine(Special(), 8, refill=refill)
    before = engine.last
    rollout = engine.generate(model, prompts, range(40), Sampling(24))
    stats = engine.last
    assert stats is not before and stats.seconds > 0
    assert stats.row_steps == sum(rows for rows, queries in widths if queries == 1)
    assert stats.prefill_tokens + stats.padding_tokens == sum(rows * queries for rows, queries in widths if queries > 1)
    assert stats.padding_tokens > 0 and stats.row_steps - stats.idle_row_steps == int(rollout.mask.sum()) - 40
    assert stats.idle_share == stats.idle_row_steps / stats.row_steps
    if every == 1:
        assert stats.idle_row_steps == 0  # of eight rows each that ends makes room at once
    else:
        assert stats.idle_share > 0


def test_recurrent_layers_are_decoded_in_fixed_batches() -> None:
    config = Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    assert not fits(new_cache(config), config)
    assert fits(new_cache(LlamaConfig(num_hidden_layers=2)), LlamaConfig(num_hidden_layers=2))


def test_windows_need_our_mask() -> None:
    """transformers' masks know columns, not the tokens of rows that differ in age."""
    windowed = tiny_model("mistral", attn_implementation="eager")
    assert not fits(new_cache(windowed.config), windowed.config)
    usual = tiny_model("mistral", attn_implementation="sdpa")
    with grouped(usual):
        assert fits(new_cache(usual.config), usual.config)


def test_buckets() -> None:
    assert [bucket(n, 700) for n in (1, 256, 257, 512, 513, 700)] == [256, 256, 512, 512, 700, 700]


class Failing:
    """torch.cuda.graph on a model that cannot be captured."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __enter__(self) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    def __exit__(self, *args: object) -> None: ...


class Recorded:
    """A graph whose replay is noted."""

    made: list[Recorded]

    def __init__(self) -> None:
        self.replays = 0
        self.made.append(self)

    def replay(self) -> None:
        self.replays += 1


def replay_of(advance: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capture: Any) -> Replay:
    Recorded.made = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return Replay(advance, Places(torch.zeros(4), torch.arange(4), 4, 256, 512), torch.device("cuda"))


def test_a_failed_capture_is_said_once_and_decoding_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    replay = replay_of(lambda: calls.append(1), monkeypatch, Failing)
    replay()
    with pytest.warns(UserWarning, match=r"without CUDA graphs.*stream is capturing.*rollout\.cuda_graphs") as said:
        replay()
        replay.places.rows = 2
        replay()
        replay()
    assert len(calls) == 5 - 1 and len(said) == 1


def test_each_shape_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a GPU, only the bookkeeping: a plain call, a capture with its replay, then replays."""
    from contextlib import nullcontext

    calls: list[int] = []
    replay = replay_of(lambda: calls.append(1), monkeypatch, lambda *args, **kwargs: nullcontext())
    for rows in (4, 4, 4, 2, 2, 4):
        replay.places.rows = rows
        replay()
    assert len(calls) == 4 and [g.replays for g in Recorded.made] == [3, 1]  # two plain calls, two captures


def test_rows_that_ended_unnoticed_write_nothing_beyond_the_buffers(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the ends are looked at every eighth step: rows at the limit go on a little, and harm nobody."""
    prompts = [[12 + i, 13, 14] for i in range(9)]
    fixed = TorchEngine(Special(eos_ids=(99,)), 4, refill=False).generate(model, prompts, range(9), Sampling(10))
    monkeypatch.setattr(refill_module, "checks_every", lambda device: 8)
    equal(TorchEngine(Special(eos_ids=(99,)), 4).generate(model, prompts, range(9), Sampling(10)), fixed)
