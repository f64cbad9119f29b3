"""Options that change a plan, each against what the code really does: merged adapters, vLLM, adapters on few layers, a fitted critic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from srppo.config import RunConfig
from srppo.errors import ModelError
from srppo.models.least_squares import LeastSquaresValues
from srppo.models.roles import Roles
from srppo.planning.architecture import read_architecture
from srppo.planning.dryrun import Ledger
from srppo.planning.inputs import Lengths, read_settings
from srppo.planning.machine import Machine
from srppo.planning.memory import Phase, fit_peak, vllm_memory
from srppo.planning.plan import Plan, describe, make_plan
from srppo.planning.remedy import Remedy
from srppo.planning.tell import verdict
from srppo.records import Features, Rollout
from srppo.rollout.engine import Sampling
from srppo.rollout.merging import merged
from srppo.rollout.torch_engine import TorchEngine
from srppo.rollout.vllm_engine import VLLMEngine
from srppo.train.compute import Compute
from srppo.train.experience import score
from tiny_job import tiny_job
from tiny_models import tiny_model, tiny_roles

LENGTHS = Lengths(40, 24, 40.0, 24.0, 64, 64.0)
GPU = Machine("X", True, int(1e12), None, 1e14, 1e12, 1e-5, 0, False)
COUNTING = replace(GPU, flops=1.0, bandwidth=float("inf"), kernel=0.0)  # a second is a floating operation


def plan_of(config: RunConfig, machine: Machine = GPU, **options: Any) -> Plan:
    return make_plan(config, read_architecture(config.model), LENGTHS, machine, **options)


def phase(plan: Plan, name: str) -> Phase:
    return next(p for p in plan.phases if p.name == name)


def sums(found: Phase, purpose: str) -> int:
    return sum(i.bytes for i in found.items if i.purpose == purpose)


@pytest.mark.parametrize(("architecture", "layers"), [("llama", None), ("llama", 1), ("gpt2", None)])
def test_the_merged_copy_is_what_a_rollout_is_lent(architecture: str, layers: int | None, tmp_path: Path) -> None:
    config = tiny_job(tmp_path, architecture, "lora", tuning__lora_layers=layers)
    roles = tiny_roles(config.model.name, "lora", lora={"lora_layers": layers})
    roles.create("sft", "base")
    with roles.use("sft") as model:
        before = {p.data_ptr() for p in model.parameters()}
        with merged(model):
            lent = sum(p.nbytes for p in model.parameters() if p.data_ptr() not in before)
    assert lent > 0
    for name in ("rollout", "evaluation"):
        assert sums(phase(plan_of(config, activations=False), name), "merged copy") == lent


def test_where_adapters_are_not_merged(tmp_path: Path) -> None:
    def copied(gpu: bool = True, kind: str = "lora", **changes: Any) -> bool:
        config = tiny_job(tmp_path, kind=kind, **changes)
        return sums(phase(plan_of(config, replace(GPU, gpu=gpu), activations=False), "rollout"), "merged copy") > 0

    assert copied() and copied(gpu=False)
    assert not copied(rollout__merge_adapters=False)
    assert not copied(kind="full")
    assert not copied(model__dtype="bfloat16")
    assert not copied(model__autocast="bfloat16") and copied(gpu=False, model__autocast="bfloat16")  # as TorchEngine.generate decides
    vllm = {"rollout__engine": "vllm"}
    assert copied(**vllm) and not copied(**vllm, model__autocast="bfloat16")  # as VLLMEngine does
    assert not copied(**vllm, rollout__server="http://127.0.0.1:1")


def test_vllm_takes_its_share_from_the_first_evaluation_on(tmp_path: Path) -> None:
    plain, config = (tiny_job(tmp_path, **c) for c in ({}, {"rollout__engine": "vllm", "rollout__memory": 0.25}))
    plan = plan_of(config)
    taken = {p.name: sums(p, "memory taken") for p in plan.phases}
    assert taken.pop("load") == 0 and set(taken.values()) == {int(0.25 * GPU.memory)}
    assert sums(phase(plan, "rollout"), "kv cache") == 0 and sums(phase(plan_of(plain), "rollout"), "kv cache") > 0
    served = plan_of(tiny_job(tmp_path, rollout__engine="vllm", rollout__server="http://127.0.0.1:1", diagnose__preview=False))
    assert not any(i.role == "vllm" or i.purpose == "kv cache" for p in served.phases for i in p.items)


def test_vllm_needs_its_weights_and_a_sequence(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, rollout__engine="vllm")
    weights = read_architecture(config.model).counts.total * 4
    least = weights + (40 + 24) * (2 * 2 * 2 * 8) * 4  # layers, keys and values, heads, head size
    enough = plan_of(config, replace(GPU, memory=int(least / 0.3) + 4))
    assert (enough.vllm_needs, "vllm" in enough.over) == (least, False)
    tight = plan_of(config, replace(GPU, memory=int(least / 0.3) - 4))
    assert "vllm" in tight.over and not tight.fits
    assert "raise rollout.memory" in verdict(tight, None)[0] and "vllm" in tight.to_dict()["over_bytes"]
    assert "With these settings it does" in verdict(tight, Remedy({"rollout.engine": "torch"}, enough))[1]


def test_vllm_on_a_cpu_takes_weights_and_the_cache_it_asks_for(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, rollout__engine="vllm", rollout__batch_size=5)
    architecture, settings = read_architecture(config.model), read_settings(config)
    engine = VLLMEngine(tiny_roles(config.model.name).special, 5, max_tokens=40 + 24)
    wanted = engine._cpu_cache(tiny_model("llama"))
    taken, _ = vllm_memory(describe(architecture, settings), settings, LENGTHS, int(1e12), gpu=False)
    assert taken == 4 * architecture.counts.total + wanted


def passes_by_layer(roles: Roles, rollout: Rollout, config: RunConfig) -> list[int]:
    """How often a rollout's tokens went through each decoder layer while it was scored."""
    tokens = [0, 0]
    assert roles.prefix_depth in (0, 1)  # tries on its own whether the layers can be parted

    def count(number: int, states: torch.Tensor) -> None:
        tokens[number] += states.shape[1]

    with roles.use("base") as model:
        for number, layer in enumerate(model.get_decoder().layers):
            layer.register_forward_hook(lambda *call, number=number: count(number, call[1][0]))
    score(roles, rollout, config, Compute())
    whole = sum(len(p) for p in rollout.prompt_ids) + int(rollout.mask.sum()) - len(rollout.prompt_ids)  # the last token predicts nothing
    return [n // whole for n in tokens]


@pytest.mark.parametrize(("critic", "models"), [("own", 3), ("least_squares", 2)])
@pytest.mark.parametrize("layers", [None, 1])
def test_scoring_time_is_that_of_the_passes_that_are_run(critic: str, models: int, layers: int | None, tmp_path: Path) -> None:
    """Counted in floating operations, layer by layer, against the real scoring of a rollout."""
    config = tiny_job(tmp_path, kind="lora", tuning__lora_layers=layers, tuning__critic=critic)
    roles = tiny_roles(config.model.name, "lora", lora={"lora_layers": layers, "critic": critic})
    roles.create("sft", "base")
    roles.create_critic("sft", trunk=critic == "own")
    with roles.use("sft") as model:
        rollout = TorchEngine(roles.special, 8).generate(model, [[5, 6], [7, 8, 9]], range(2), Sampling(4))
    run = passes_by_layer(roles, rollout, config)
    assert run == [models if layers is None else 1, models]

    real, rollouts = tiny_model("llama"), read_settings(config).rollouts
    products = sum(p.numel() for p in real.get_decoder().layers[0].parameters() if p.dim() == 2)
    attention = 2 * 2 * 64 * 64 * 32 // 2  # two products of queries, keys and width, half of it masked
    head = 24 * 2 * real.get_output_embeddings().weight.numel()
    expected = rollouts * (sum(run) * (2 * 64 * products + attention) + models * head)  # the critic is planned as if it had an LM head
    assert plan_of(config, COUNTING).times.score == pytest.approx(expected, rel=1e-6)


def test_sft_goes_through_the_layers_below_too(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, kind="lora", tuning__lora_layers=1)
    without = tiny_job(tmp_path, kind="lora")
    shallow, deep = plan_of(config, COUNTING).times, plan_of(without, COUNTING).times
    model = tiny_model("llama")
    layer = sum(p.numel() for p in model.get_decoder().layers[0].parameters() if p.dim() == 2)
    forward = 3 * 8 * (2 * layer * 64 + 2 * 2 * 64 * 64 * 32 // 2)  # steps, rows
    assert shallow.sft is not None and deep.sft is not None
    saved = deep.sft - shallow.sft  # a layer's backward pass and its adapter
    assert saved < 2.5 * forward and shallow.sft > 2 * forward


def test_a_fitted_critic_costs_no_update(tmp_path: Path) -> None:
    own, fitted, none = (
        plan_of(tiny_job(tmp_path, **c), COUNTING).times
        for c in ({}, {"tuning__critic": "least_squares"}, {"ppo__baseline": "group", "ppo__critic_warmup": 0})
    )
    assert fitted.update == none.update < own.update
    assert fitted.score == none.score and fitted.score == pytest.approx(2 / 3 * own.score, rel=0.2)  # the critic has no LM head
    assert fitted.rollout == own.rollout


def test_what_a_fit_needs_is_what_the_fit_makes() -> None:
    """The slow twin: a real fit, every storage counted while it lives."""
    width, tokens = 128, 512
    values = LeastSquaresValues(width, 1, torch.device("cpu"))
    features = Features([torch.randn(64, width) for _ in range(8)], [torch.randn(64) for _ in range(8)])
    returns = [torch.randn(64) for _ in range(8)]
    ledger = Ledger()
    ledger.know(iter([*values.tensors().values(), *features.states, *features.so_far, *returns]))
    with ledger:
        assert values.fit((x, torch.cat([returns[r] for r in part])) for part, x in features.parts(range(8)))
    assert fit_peak(width, tokens) == pytest.approx(ledger.peak, rel=0.05)


def test_more_layers_than_there_are_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lora_layers is 3, but .* has 2 decoder layers"):
        plan_of(tiny_job(tmp_path, kind="lora", tuning__lora_layers=3))


MIXED = {"model__dtype": "float32", "model__frozen_dtype": "bfloat16"}


@pytest.mark.parametrize("size", [1, 2])
def test_the_reward_card_is_planned(size: int, tmp_path: Path) -> None:
    """SFT, another start and the preview's weights in float32, base in bfloat16; three models decode the preview, a third of the rows."""
    config = tiny_job(tmp_path, **MIXED, diagnose__heldout=64, diagnose__samples=8, evaluation__batch_size=60)
    plan = plan_of(config, replace(GPU, count=size), activations=False)
    architecture = read_architecture(config.model)
    n, found = architecture.counts.total, phase(plan, "reward card")
    assert sums(found, "weights") == (2 + 3 * 4) * n // size
    assert sums(found, "gathered copy") == (0 if size == 1 else (2 + 4 + 4) * n)
    rows = 20
    assert sums(found, "kv cache") >= 3 * rows * (40 + 24) * architecture.cache_elements * 4
    assert sums(found, "kv cache") < 4 * rows * (40 + 24 + 2 * 64) * architecture.cache_elements * 4
    for off in ({"diagnose__enabled": False}, {"reward__kind": "preference_model", "reward__preference_model": "x"}):
        assert all(p.name != "reward card" for p in plan_of(tiny_job(tmp_path, **off), activations=False).phases)
    alone = phase(plan_of(tiny_job(tmp_path, **MIXED, diagnose__preview=False), activations=False), "reward card")
    assert sums(alone, "weights") == (2 + 2 * 4) * n


def test_together_models_decode_so_many_times_fewer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    said = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2)
    monkeypatch.setattr(TorchEngine, "_decode", lambda *given: (widths.append(given[-1]), said)[1])
    engine = TorchEngine(tiny_roles(tiny_job(tmp_path).model.name, "full").special, 7)
    for models in (1, 2, 3, 9):
        engine.generate_by(None, None, [[8]] * 4, [1] * 4, Sampling(2), models=models)  # type: ignore[arg-type]
    assert widths == [7, 3, 2, 1]
