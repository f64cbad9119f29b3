"""The plan of several processes: rings by their closed forms, flows and memory against real FSDP2 on a process group that sends nothing."""

from __future__ import annotations

import json
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from srppo.cli import cli
from srppo.config import RunConfig, dump
from srppo.errors import ConfigError
from srppo.models.sharding import Sharding, gathered, run_on
from srppo.planning.architecture import Architecture, read_architecture
from srppo.planning.dryrun import Footprint
from srppo.planning.inputs import Lengths, Settings, changed, read_settings
from srppo.planning.machine import Machine, card_of, find_machine
from srppo.planning.memory import Phase, phases
from srppo.planning.plan import Plan, describe, make_plan, planned_passes
from srppo.planning.processes import Links, Processes, links_of, processes_of, replica_ring, shard_ring, world_ring
from srppo.planning.reliability import LEAST_WRITE, reliability
from srppo.planning.remedy import find_enough, find_remedy
from srppo.planning.traffic import Flow, Micros, Network, flows
from srppo.profiling.traffic import BESIDE, Traffic, counted
from srppo.records import LossOutput
from srppo.train.learner import Learner
from tiny_job import tiny_job
from tiny_models import save_tiny

LENGTHS = Lengths(40, 24, 40.0, 24.0, 64, 64.0)
GPU = Machine("X", True, int(1e12), None, 1e14, 1e12, 1e-5, 0, False)
LINKS = Links(100.0, 40.0, 1.0, 10.0, 0.5)
SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 6,
    "tie_word_embeddings": False,
}


def on(count: int, nodes: int = 1, machine: Machine = GPU) -> Machine:
    return replace(machine, count=count, nodes=nodes)


def plan_of(config: RunConfig, machine: Machine = GPU, **options: Any) -> Plan:
    return make_plan(config, read_architecture(config.model), LENGTHS, machine, **options)


def phase(plan: Plan, name: str) -> Phase:
    return next(p for p in plan.phases if p.name == name)


def sums(found: Phase, *purposes: str, host: bool = False) -> int:
    return sum(i.bytes for i in found.items if i.purpose in purposes and i.host == host)


# --- rings


def test_what_a_ring_sends_and_how_long_it_takes() -> None:
    inside = shard_ring(Processes(4, 4, 4), LINKS)
    assert (inside.gather(800), inside.reduce(800)) == (600, 1200)
    assert inside.seconds(600, 2) == 600 / 100 + 2 * (0.5 + 3 * 1.0)
    assert inside.seconds(1200, 1, 2) == 1200 / 100 + 0.5 + 2 * 3 * 1.0
    across = shard_ring(Processes(8, 4, 8), LINKS)  # seven steps, one of them between machines; the network's 40 is the slowest link
    assert across.seconds(700, 1) == 700 / 40 + 0.5 + 6 * 1.0 + 1 * 10.0
    alone = shard_ring(Processes(), LINKS)
    assert (alone.gather(800), alone.seconds(0, 5)) == (0, 0)


def test_copies_on_machines_are_joined_by_side_by_side_rings() -> None:
    p = Processes(32, 8, 8)
    assert (p.replicas, p.machines) == (4, 4)
    assert (shard_ring(p, LINKS).machines, shard_ring(p, LINKS).rate) == (1, 100.0)
    assert (replica_ring(p, LINKS).size, replica_ring(p, LINKS).machines, replica_ring(p, LINKS).rate) == (4, 4, 40 / 8)
    two = Processes(8, 8, 2)  # four copies on one machine
    assert (replica_ring(two, LINKS).size, replica_ring(two, LINKS).machines, replica_ring(two, LINKS).rate) == (4, 1, 100.0)
    plain = Processes(16, 8, 1)  # each holds a whole copy
    assert (shard_ring(plain, LINKS).size, replica_ring(plain, LINKS).size, replica_ring(plain, LINKS).rate) == (1, 16, 40.0)
    assert world_ring(p, LINKS).machines == 4


def test_shares_of_rows_and_weights() -> None:
    p = processes_of(6, 2, 3, True)
    assert (p.shards, p.replicas, p.cpu_offload, p.rows(13), p.holds(900)) == (3, 2, True, 3, 300)
    assert p.share(13) == 3 / 13 and p.share(12) == 1 / 6
    assert processes_of(6, 2, None, True).shards == 6
    assert not processes_of(6, 2, 1, True).cpu_offload  # whole copies are no FSDP2
    with pytest.raises(ConfigError, match=r"shard_size is 4, which does not divide the number of processes, 6"):
        processes_of(6, 2, 4, False)


def test_machines_and_their_links() -> None:
    m = find_machine("cpu", "float32", gpu="h100", gpus=8, nodes=4)
    assert (m.count, m.nodes, m.local) == (32, 4, 8)
    assert (m.links.inside, m.links.between) == (0.8 * 450e9, 0.8 * 400e9)
    assert links_of("h100", 8, network=100).between == 0.8 * 12.5e9
    assert links_of("l4", 4).inside < links_of("a100", 4).inside < links_of("b200", 4).inside
    assert card_of("NVIDIA H100 80GB HBM3") == "h100" and card_of("NVIDIA GeForce RTX 4090") == "rtx4090"
    assert card_of("NVIDIA A10G") == "a10g" and card_of("Voodoo") == "voodoo"
    for wrong in ({"gpus": 0}, {"nodes": 0}, {"network": -1.0}):
        with pytest.raises(ConfigError, match=r"at least one|above 0"):
            find_machine("cpu", "float32", gpu="h100", **wrong)
    with pytest.raises(ConfigError, match="processes on this machine"):
        find_machine("cpu", "float32", gpus=2, nodes=2)


def test_processes_on_a_cpu_share_its_memory() -> None:
    one, two = find_machine("cpu", "float32"), find_machine("cpu", "float32", gpus=2)
    assert (two.count, two.memory) == (2, one.memory // 2)


# --- flows, against FSDP2


@contextmanager
def pretended(size: int, replicas: int = 1) -> Iterator[Any]:
    """A mesh of so many processes in this one: collectives are called and send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        shape = (size,) if replicas == 1 else (replicas, size // replicas)
        yield init_device_mesh("cpu", shape, mesh_dim_names=("shard",) if replicas == 1 else ("replicate", "shard"))
    finally:
        dist.destroy_process_group()


def spread(model: Any, mesh: Any) -> Any:
    return Sharding(mesh, torch.device("cpu"), False).shard(model.train())


def states(model: Any) -> torch.Tensor:
    """What a pass over eight tokens ends with: of a model its logits, of a trunk its states."""
    trunk = model.get_decoder() if hasattr(model, "lm_head") else model
    found: torch.Tensor = trunk(torch.zeros(1, 8, dtype=torch.int64), use_cache=False).last_hidden_state
    return model.lm_head(found) if trunk is not model else found


def model_of(architecture: Architecture) -> Any:
    return AutoModelForCausalLM.from_config(architecture.config, dtype=torch.float32)


def settings_of(folder: Path, **changes: Any) -> Settings:
    return read_settings(tiny_job(folder, **changes))


def by_kind(found: list[Flow]) -> tuple[Counter[str], Counter[str]]:
    sent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for flow in found:
        sent[flow.collective] += flow.bytes
        calls[flow.collective] += flow.calls
    return sent, calls


@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize("role", ["policy", "tied policy", "critic"])
def test_a_training_step_sends_what_is_planned(size: int, replicas: int, role: str, tmp_path: Path) -> None:
    """Two steps of three micro-batches."""
    architecture = Architecture(CONFIG_MAPPING["llama"](**SHAPE | {"tie_word_embeddings": role.startswith("tied")}))
    settings = settings_of(tmp_path)
    with pretended(size, replicas) as mesh, counted(Traffic()) as traffic:
        whole = model_of(architecture)
        model = spread(whole.get_decoder() if role == "critic" else whole, mesh)
        traffic.take()
        learner = Learner(dict(model.named_parameters()), 0.1, 1e9)
        for _ in range(2):
            learner._accumulate([lambda: LossOutput(run_on(model, states).sum(), {})] * 3, 1)
    network = Network(describe(architecture, settings), settings, Processes(size, size, size // replicas), LINKS)
    assert by_kind(network.training("update", role.split()[-1], 2, 3)) == (traffic.bytes, traffic.calls)


def test_scoring_sends_what_fsdp_sends(tmp_path: Path) -> None:
    """Base, SFT and critic, two micro-batches each."""
    architecture, settings = Architecture(CONFIG_MAPPING["llama"](**SHAPE)), settings_of(tmp_path)
    with pretended(4) as mesh, counted(Traffic()) as traffic, torch.no_grad():
        models = [spread(m, mesh) for m in (model_of(architecture), model_of(architecture), model_of(architecture).get_decoder())]
        traffic.take()
        for model in models * 2:
            run_on(model, states)
    network = Network(describe(architecture, settings), settings, Processes(4, 4, 4), LINKS)
    assert by_kind(network.scoring(2)) == (traffic.bytes, traffic.calls)


def test_a_rollout_gathers_the_policy_once(tmp_path: Path) -> None:
    architecture, settings = Architecture(CONFIG_MAPPING["llama"](**SHAPE)), settings_of(tmp_path)
    with pretended(4) as mesh, counted(Traffic()) as traffic, torch.no_grad():
        model = spread(model_of(architecture), mesh)
        traffic.take()
        with gathered(model):
            for _ in range(3):
                states(model)
    weights = Network(describe(architecture, settings), settings, Processes(4, 4, 4), LINKS).rollout(LENGTHS)[0]
    assert by_kind([weights]) == (traffic.bytes, traffic.calls)


@pytest.mark.parametrize(("name", "counts"), [("autograd", 1), (BESIDE, 0)])
def test_what_other_threads_send_counts_but_for_checkpoints(name: str, counts: int) -> None:
    """A GPU's backward pass has a thread of its own."""
    with pretended(2), counted(Traffic()) as traffic:
        traffic.take()
        thread = threading.Thread(target=lambda: dist.all_reduce(torch.ones(8)), name=name)
        thread.start()
        thread.join()
    assert traffic.calls["all-reduce"] == counts


def test_with_whole_copies_gradients_alone_are_summed_once_a_step(tmp_path: Path) -> None:
    architecture, settings = Architecture(CONFIG_MAPPING["llama"](**SHAPE)), settings_of(tmp_path)
    model = describe(architecture, settings)
    network = Network(model, settings, Processes(4, 4, 1), LINKS)
    found = network.training("update", "policy", 5, 3)
    assert [f.collective for f in found] == ["all-reduce"] and found[0].bytes == 5 * 2 * 3 / 4 * 4 * model.counts.total
    assert network.scoring(3) == [] and [f.what for f in network.rollout(LENGTHS)] == ["records", "records"]


def test_lora_gathers_the_base_and_sums_adapters(tmp_path: Path) -> None:
    architecture = Architecture(CONFIG_MAPPING["llama"](**SHAPE))
    settings = settings_of(tmp_path, kind="lora")
    model = describe(architecture, settings)
    inner, n = model.counts.layers, model.counts.total
    network = Network(model, settings, Processes(4, 4, 4), LINKS)
    gathered, summed = network.training("update", "policy", 5, 3)
    assert gathered.bytes == 15 * 3 / 4 * 4 * (n + inner) and gathered.calls == 15 * (7 + 6)
    assert summed.bytes == 5 * 2 * 3 / 4 * 4 * model.adapter and summed.calls == 10
    (word,) = network.scoring(2)
    assert word.bytes == 2 * 3 * 3 / 4 * 4 * n and word.calls == 2 * 3 * 7  # base, sft and critic
    few = replace(settings, lora_layers=2, alone=False)
    above = Network(describe(architecture, few), few, Processes(4, 4, 4), LINKS)
    assert above.training("update", "policy", 1, 1)[0].bytes == 3 / 4 * 4 * (n + inner // 3)  # back to the first adapter


def test_what_a_rollout_moves(tmp_path: Path) -> None:
    architecture, settings = Architecture(CONFIG_MAPPING["llama"](**SHAPE)), settings_of(tmp_path)
    model, p = describe(architecture, settings), Processes(4, 4, 4)
    n, rows = model.counts.total, settings.rollouts
    weights, records, columns = Network(model, settings, p, LINKS).rollout(LENGTHS)
    assert weights.bytes == 3 * n and weights.calls == 7
    assert records.bytes == 3 / 4 * rows * 24 * 12  # to the longest
    assert columns.bytes == 2 * 3 / 4 * 3 * rows * 24 * 4  # base, sft and critic
    served = replace(settings, engine="server")
    assert {(f.what, f.bytes) for f in Network(model, served, p, LINKS).rollout(LENGTHS)} >= {("policy: to the servers", 4 * n)}
    lora = settings_of(tmp_path, kind="lora", rollout__engine="vllm", rollout__server="http://x:1")
    small = describe(architecture, lora)
    assert next(f.bytes for f in Network(small, lora, p, LINKS).rollout(LENGTHS)) == 4 * small.adapter


def test_micro_batches_of_a_process(tmp_path: Path) -> None:
    settings = replace(
        settings_of(tmp_path), prompts=64, samples_per_prompt=1, minibatches=4, micro_tokens=256, sft_batch=8, sft_micro_tokens=512
    )
    assert Micros.of(settings, LENGTHS, Processes()) == Micros(16, 4, 1)  # four rows of 64 tokens each
    assert Micros.of(settings, LENGTHS, Processes(8, 8, 8)) == Micros(2, 1, 1)
    assert Micros.of(settings, LENGTHS, Processes(64, 8, 8)) == Micros(1, 1, 1)


def test_one_process_sends_nothing(tmp_path: Path) -> None:
    config = tiny_job(tmp_path)
    plan = plan_of(config)
    assert plan.traffic == () and plan.sent == 0 and "traffic" not in plan.to_dict()
    settings = read_settings(config)
    assert flows(describe(read_architecture(config.model), settings), settings, LENGTHS, Processes(), LINKS, 3) == []
    gone = changed(config, {"parallel.cpu_offload": True, "parallel.shard_size": 1})
    assert plan_of(gone).phases == plan.phases and plan_of(gone).times == plan.times


# --- memory


def test_weights_gradients_and_moments_are_divided_adapters_are_not(tmp_path: Path) -> None:
    config = tiny_job(tmp_path)
    whole = changed(config, {"parallel.shard_size": 1})
    one, two, copies = (plan_of(c, on(n), activations=False) for c, n in ((config, 1), (config, 2), (whole, 2)))
    for purpose in ("weights", "gradients", "optimizer"):
        assert 0 <= sums(phase(one, "policy update"), purpose) - 2 * sums(phase(two, "policy update"), purpose) <= 16
        assert sums(phase(copies, "policy update"), purpose) == sums(phase(one, "policy update"), purpose)
    assert sums(phase(copies, "policy update"), "gathered weights", "unsharded gradients") == 0
    lora = tiny_job(tmp_path, kind="lora")
    alone, half = (plan_of(lora, on(n), activations=False) for n in (1, 2))
    assert sums(phase(alone, "policy update"), "weights") - sums(phase(half, "policy update"), "weights") == 4 * alone.parameters // 2
    for purpose in ("gradients", "optimizer"):
        assert sums(phase(alone, "policy update"), purpose) == sums(phase(half, "policy update"), purpose)


def test_a_rollout_holds_one_whole_policy_but_for_servers(tmp_path: Path) -> None:
    for kind in ("full", "lora"):
        config = tiny_job(tmp_path, kind=kind)
        plan = plan_of(config, on(4), activations=False)
        assert sums(phase(plan, "rollout"), "gathered copy") == 4 * plan.parameters
        served = changed(config, {"rollout.engine": "vllm", "rollout.server": "http://x:1"})
        assert sums(phase(plan_of(served, on(4), activations=False), "rollout"), "gathered copy") == 0
        whole = changed(config, {"parallel.shard_size": 1})
        assert sums(phase(plan_of(whole, on(4), activations=False), "rollout"), "gathered copy") == 0
    with pytest.raises(ConfigError, match=r"rollout\.server"):
        plan_of(tiny_job(tmp_path, rollout__engine="vllm"), on(4))


def test_off_load_moves_the_shares_to_the_cpu(tmp_path: Path) -> None:
    config = tiny_job(tmp_path)
    moved = changed(config, {"parallel.cpu_offload": True})
    there, away = (plan_of(c, on(4), activations=False) for c in (config, moved))
    purposes = ("weights", "gradients", "optimizer")
    assert sums(phase(away, "policy update"), *purposes) == 0
    assert sums(phase(away, "policy update"), *purposes, host=True) == sums(phase(there, "policy update"), *purposes)
    assert away.host_total(phase(away, "policy update")) == 4 * sums(phase(away, "policy update"), *purposes, host=True)


def test_the_model_that_is_saved_lies_in_one_process(tmp_path: Path) -> None:
    plan = plan_of(tiny_job(tmp_path), on(4, 2), activations=False)
    assert plan.host_total(phase(plan, "saving")) == 4 * plan.parameters
    assert "saving" not in {p.name for p in plan_of(tiny_job(tmp_path), activations=False).phases}


def test_more_processes_never_need_more(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, ppo__prompts_per_iteration=64, ppo__minibatches=1)
    needs = [plan_of(config, on(n)).need for n in (2, 16)]
    assert needs == sorted(needs, reverse=True)
    sizes = [plan_of(changed(config, {"parallel.shard_size": s}), on(16), activations=False).need for s in (2, 4, 8, 16)]
    assert sizes == sorted(sizes, reverse=True)


class Alive(TorchDispatchMode):
    """The most bytes in storages at any operation. Their sizes are looked at again and again: FSDP2 changes them in place."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.peak, self._known, self._met = 0, known, dict[int, weakref.ref[Any]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and type(tensor) is not DTensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._met[storage._cdata] = weakref.ref(storage)
        storages = [storage for ref in self._met.values() if (storage := ref()) is not None]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in storages))
        return out


@pytest.mark.parametrize("vocabulary", [64, 2048])
@pytest.mark.parametrize("train", [False, True])
def test_in_flight_is_what_fsdp_holds(vocabulary: int, train: bool, tmp_path: Path) -> None:
    """A pass of eight tokens, whose activations are nothing, with every storage counted while it lives."""
    shape = SHAPE | {"hidden_size": 128, "intermediate_size": 512, "vocab_size": vocabulary}
    architecture, settings = Architecture(CONFIG_MAPPING["llama"](**shape)), settings_of(tmp_path)
    model, p = describe(architecture, settings), Processes(8, 8, 8)
    with pretended(8) as mesh:
        real = spread(model_of(architecture), mesh)
        known = {q.to_local().untyped_storage()._cdata for q in real.parameters()} | {b.untyped_storage()._cdata for b in real.buffers()}
        with Alive(known) as alive, torch.set_grad_enabled(train):
            out = run_on(real, states).sum()
            if train:
                out.backward()
    work, micros = planned_passes(settings, LENGTHS, False, p)
    found = {x.name: x for x in phases(model, settings, LENGTHS, dict.fromkeys(work, Footprint()), micros, gpu=False, processes=p)}
    planned = found["policy update" if train else "scoring"]
    total = sums(planned, "gathered weights", "unsharded gradients", "gradients")
    assert total == pytest.approx(alive.peak, rel=0.12)


# --- time


def test_time_is_the_longer_of_computing_and_sending_on_gpus_and_the_sum_on_cpus(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, ppo__prompts_per_iteration=64, ppo__minibatches=1)
    fast = Links(1e15, 1e15, 0.0, 0.0, 0.0)
    one = plan_of(config).times
    four = plan_of(config, replace(on(4), links=fast)).times
    assert four.score == pytest.approx(one.score / 4, rel=0.3) and four.update < one.update
    slow = replace(on(4), links=Links(1e3, 1e3, 0.0, 0.0, 0.0))
    times = plan_of(config, slow).times
    assert times.score == times.network["scoring"] > four.score
    assert times.rollout == pytest.approx(four.rollout + times.network["rollout"], rel=1e-6)
    gloo = replace(slow, gpu=False)
    summed = plan_of(config, gloo).times
    assert summed.score > summed.network["scoring"]


def test_where_communication_is_hidden(tmp_path: Path) -> None:
    """The tokens a micro-batch needs are those at which computing takes as long as what it sends."""
    config = tiny_job(tmp_path, ppo__prompts_per_iteration=64, ppo__minibatches=1)
    plan = plan_of(config, replace(on(4), links=Links(1e9, 1e9, 0.0, 0.0, 0.0)))
    computing = plan_of(config, replace(on(4), links=Links(1e30, 1e30, 0.0, 0.0, 0.0))).times.score
    h = plan.hidden["scoring"]
    assert h.needed / h.there == pytest.approx(plan.times.network["scoring"] / computing, rel=1e-6)


def test_the_interval_loses_least() -> None:
    found = reliability(256, 32, 64 * 10**9)
    mean = 54 * 24 * 3600 * 16384 / 419 / 256
    assert found.between_failures == pytest.approx(mean) and found.checkpoint_seconds == 2.0
    lost = [c + t / 2 for c, t in ((2 / (f * found.interval), f * found.interval / mean) for f in (0.5, 0.9, 1.0, 1.1, 2.0))]
    assert min(lost) == lost[2] == pytest.approx(found.lost)
    assert reliability(1, 1, 0).checkpoint_seconds == LEAST_WRITE


# --- what is proposed


def test_on_how_many_gpus_it_fits(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, ppo__prompts_per_iteration=64, ppo__minibatches=1)
    architecture = read_architecture(config.model)
    four = plan_of(config, on(4)).need
    small = replace(GPU, memory=round(four / 0.9) + 1)
    assert find_enough(config, architecture, LENGTHS, small) == (4, 1)
    assert find_enough(config, architecture, LENGTHS, replace(small, memory=10)) is None
    two_each = replace(GPU, memory=round(plan_of(config, on(16)).need / 0.9) + 1)
    assert find_enough(config, architecture, LENGTHS, two_each) in {(8, 1), (8, 2)}


def test_weights_are_spread_further_before_anything_that_is_learned_changes(tmp_path: Path) -> None:
    save_tiny(tmp_path / "wide", "llama", hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64)
    config, short = tiny_job(tmp_path, "wide", parallel__shard_size=2, diagnose__enabled=False), Lengths(4, 4, 4.0, 4.0, 8, 8.0)
    architecture = read_architecture(config.model)
    spread_out = make_plan(changed(config, {"parallel.shard_size": None}), architecture, short, on(8))
    found = find_remedy(config, architecture, short, replace(on(8), memory=round(1.02 * spread_out.need / 0.9)))
    assert found is not None and found.changes == {"parallel.shard_size": None}


def test_where_one_policy_is_too_large_for_a_gpu_servers_are_proposed(tmp_path: Path) -> None:
    save_tiny(tmp_path / "wide", "llama", hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64, num_hidden_layers=12)
    config, short = tiny_job(tmp_path, "wide"), Lengths(4, 4, 4.0, 4.0, 8, 8.0)
    architecture = read_architecture(config.model)
    served = changed(config, {"rollout.engine": "vllm", "rollout.server": "http://HOST:8000"})
    machine = replace(on(64, 8), memory=round(1.02 * make_plan(served, architecture, short, on(64, 8)).need / 0.9))
    found = find_remedy(config, architecture, short, machine)
    assert found is not None and found.changes == {"rollout.engine": "vllm", "rollout.server": "http://HOST:8000"}


def test_the_command_on_several_machines(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(dump(tiny_job(tmp_path, parallel__shard_size=4)))
    arguments = ["plan", str(recipe), "--gpu", "h100", "--gpus", "4", "--nodes", "2", "--network", "100"]
    told = CliRunner().invoke(cli, arguments)
    assert told.exit_code == 0, told.output
    assert "2 copies of the weights, each on 4: 2 × 4 × H100" in told.output and "what each process sends" in told.output
    assert max(map(len, told.output.splitlines())) <= 100
    content = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).output)
    assert content["processes"] == {"size": 8, "local": 4, "shards": 4, "cpu_offload": False}
    assert content["sent_bytes_per_round"] == sum(f["bytes"] for f in content["traffic"] if f["phase"] != "sft")
    wrong = CliRunner().invoke(cli, [*arguments, "--parallel.shard_size", "3"])
    assert wrong.exit_code == 2 and "does not divide the number of processes, 8" in wrong.output
