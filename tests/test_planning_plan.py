"""The plan's formulas against closed forms, its remedies, and what the command prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from srppo.cli import cli
from srppo.config import RunConfig, build, dump
from srppo.errors import ConfigError
from srppo.planning.architecture import read_architecture
from srppo.planning.clock import Times
from srppo.planning.dryrun import Footprint
from srppo.planning.inputs import Lengths, changed, micro_rows, read_settings
from srppo.planning.lengths import find_lengths, limits
from srppo.planning.machine import Machine, find_machine, from_table, parse_bytes
from srppo.planning.memory import Phase, cache_bytes, pass_peak, phases, with_holes
from srppo.planning.plan import Plan, describe, make_plan, planned_passes
from srppo.planning.remedy import find_remedy
from srppo.planning.tell import fragment, verdict
from tiny_job import tiny_job
from tiny_models import save_tiny

LENGTHS = Lengths(40, 24, 30.0, 20.0, 64, 50.0)
GPU = Machine("X", True, int(1e12), None, 1e14, 1e12, 1e-5, 0, False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


def config(folder: Path, **changes: Any) -> RunConfig:
    return tiny_job(folder, **changes)


def plan_of(folder: Path, machine: Machine = GPU, **changes: Any) -> Plan:
    job = config(folder, **changes)
    return make_plan(job, read_architecture(job.model), LENGTHS, machine)


def phase(plan: Plan, name: str) -> Phase:
    return next(p for p in plan.phases if p.name == name)


def sums(found: Phase, purpose: str) -> int:
    return sum(i.bytes for i in found.items if i.purpose == purpose)


def test_full_tuning_holds_four_models_and_two_optimizers(folder: Path) -> None:
    plan = plan_of(folder)
    counts = read_architecture(config(folder).model).counts
    update = phase(plan, "policy update")
    assert sums(update, "weights") == 4 * (3 * counts.total + counts.trunk)
    assert sums(update, "optimizer") == 8 * (counts.total + counts.trunk)
    assert sums(update, "gradients") == 4 * counts.total
    assert sums(phase(plan, "critic update"), "gradients") == 4 * counts.trunk
    assert not sums(phase(plan, "ppo checkpoint"), "checkpoint copy")  # a tensor is written after the other
    background = phase(plan_of(folder, background_checkpoints=True), "ppo checkpoint")
    assert sums(background, "checkpoint copy") == 12 * (counts.total + counts.trunk)
    half = phase(plan_of(folder, model__frozen_dtype="bfloat16"), "policy update")
    assert sums(update, "weights") - sums(half, "weights") == 2 * 2 * counts.total


def test_lora_holds_one_model_and_adapters(folder: Path) -> None:
    plan = plan_of(folder, kind="lora")
    update = phase(plan, "policy update")
    assert plan.adapter
    assert sums(update, "weights") == 4 * plan.parameters + 3 * 4 * plan.adapter
    assert sums(update, "optimizer") == 2 * 8 * plan.adapter
    grouped = plan_of(folder, kind="lora", ppo__baseline="group", ppo__critic_warmup=0)
    assert sums(phase(grouped, "policy update"), "optimizer") == 8 * plan.adapter


def test_offloading_leaves_one_frozen_model_on_the_gpu(folder: Path) -> None:
    job = config(folder)
    architecture = read_architecture(job.model)
    settings = replace(read_settings(job), offload_frozen=True)
    model = describe(architecture, settings)
    work, micros = planned_passes(settings, LENGTHS, False)
    found = phases(model, settings, LENGTHS, dict.fromkeys(work, Footprint()), micros, gpu=True)
    by_name = {p.name: p for p in found}
    n = model.counts.total
    frozen = [i for i in by_name["policy update"].items if i.role in ("base", "sft")]
    assert all(i.host for i in frozen) and sum(i.bytes for i in frozen) == 8 * n
    assert sum(i.bytes for i in by_name["scoring"].items if i.role in ("base", "sft") and not i.host) == 4 * n


def test_a_fitted_critic_has_no_trunk_but_the_sums_of_its_fit(folder: Path) -> None:
    job = config(folder)
    settings = replace(read_settings(job), critic="least_squares")
    model = describe(read_architecture(job.model), settings)
    work, micros = planned_passes(settings, LENGTHS, False)
    found = phases(model, settings, LENGTHS, dict.fromkeys(work, Footprint()), micros, gpu=True)
    update = next(p for p in found if p.name == "policy update")
    assert "critic update" not in {p.name for p in found}
    assert sum(i.bytes for i in update.items if i.role == "critic") == 8 * 32 * 32
    fit = next(p for p in found if p.name == "critic fit")
    assert sums(fit, "kept states") == settings.rollouts * 24 * 32 * 4  # of response tokens, let go before the update
    assert sums(update, "kept states") == 0 and [p.name for p in found].index("critic fit") < [p.name for p in found].index("policy update")


def test_first_micro_batch_makes_gradients_while_activations_go() -> None:
    f = Footprint(kept=70, forward=75, head=90, backward=80, embedding=10)
    assert pass_peak(f, 100, 5, micro_batches=2) == 190
    assert pass_peak(f, 100, 5, micro_batches=1) == 110
    assert pass_peak(f, 20, 5, micro_batches=1) == 90
    assert with_holes(f, 2.0) == Footprint(140, 150, 180, 160, 10)


def test_cache_by_its_closed_form(folder: Path) -> None:
    job = config(folder)
    model = describe(read_architecture(job.model), read_settings(job))
    assert cache_bytes(model, 3, 10, 2) == 3 * 10 * (2 * 2 * 2 * 8) * 2  # layers, keys and values, heads, head size


def test_rows_of_a_micro_batch() -> None:
    assert micro_rows(500, 64, 8192) == 16
    assert micro_rows(9000, 64, 8192) == 1
    assert micro_rows(500, 3, 8192) == 3


def test_sizes_and_tables() -> None:
    assert parse_bytes("80GB") == 80_000_000_000 and parse_bytes("24 GiB") == 24 * 2**30 and parse_bytes("16") == 16_000_000_000
    for wrong in ("much", "0GB", "-1GB"):
        with pytest.raises(ConfigError, match="80GB"):
            parse_bytes(wrong)
    assert from_table("RTX 4090", "float32").memory == 24e9
    assert from_table("h100", "bfloat16").flops > from_table("h100", "float32").flops
    with pytest.raises(ConfigError, match="not in the table"):
        from_table("abacus", "float32")
    assert find_machine("cpu", "float32", gpu="h100", gpus=4, gpu_memory="94GB").memory == 94e9


def test_roofline_takes_the_slower_side() -> None:
    m = Machine("m", False, 1, 1, flops=100.0, bandwidth=10.0, kernel=0.5, libraries=0, measured=False)
    assert (m.seconds(1000, 1), m.seconds(1, 1000), m.seconds(1, 1)) == (10.0, 100.0, 0.5)


def test_checkpointing_and_small_batches_need_less(folder: Path) -> None:
    whole = phase(plan_of(folder, ppo__minibatches=1), "policy update").total()
    small = phase(plan_of(folder, ppo__minibatches=1, ppo__micro_batch_tokens=1), "policy update").total()
    again = phase(plan_of(folder, ppo__minibatches=1, model__gradient_checkpointing=True), "policy update").total()
    assert small < whole and again < whole


def test_the_mildest_remedy_that_fits(folder: Path) -> None:
    job = config(folder, ppo__minibatches=1, rollout__batch_size=8, evaluation__batch_size=8)
    architecture = read_architecture(job.model)
    plan = make_plan(job, architecture, LENGTHS, GPU)
    enough = replace(GPU, memory=round(plan.need / 0.9) + 1)
    assert make_plan(job, architecture, LENGTHS, enough).fits
    tight = replace(GPU, memory=round(0.97 * plan.need / 0.9))
    found = find_remedy(job, architecture, LENGTHS, tight)
    assert found is not None and found.plan.fits
    assert set(found.changes) <= {"ppo.micro_batch_tokens", "sft.micro_batch_tokens"}
    assert make_plan(changed(job, found.changes), architecture, LENGTHS, tight).need == found.plan.need
    assert find_remedy(job, architecture, LENGTHS, replace(GPU, memory=1000)) is None


def test_where_full_tuning_cannot_fit_lora_is_proposed(folder: Path) -> None:
    save_tiny(folder / "wide", "llama", hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64)
    job = tiny_job(folder, "wide")
    architecture, short = read_architecture(job.model), Lengths(4, 4, 4.0, 4.0, 8, 8.0)
    n = 4 * architecture.counts.total
    found = find_remedy(job, architecture, short, replace(GPU, memory=round(3.5 * n / 0.9)))  # policy, gradients and moments are four
    assert found is not None and found.changes["tuning.kind"] == "lora"
    assert set(found.changes) <= {"tuning.kind", "evaluation.batch_size"}  # what was tried before is needless with adapters


def test_words_say_what_to_do(folder: Path) -> None:
    job = config(folder)
    architecture = read_architecture(job.model)
    tight = replace(GPU, memory=round(0.6 * make_plan(job, architecture, LENGTHS, GPU).need / 0.9))
    plan, remedy = make_plan(job, architecture, LENGTHS, tight), find_remedy(job, architecture, LENGTHS, tight)
    assert verdict(plan, remedy)[0].startswith("DOES NOT FIT") and remedy is not None
    build_changes = yaml.safe_load(fragment(remedy.changes))
    assert all(isinstance(section, dict) for section in build_changes.values())
    assert verdict(make_plan(job, architecture, LENGTHS, GPU), None)[0].startswith("FITS")
    assert "Nothing that srppo can change" in verdict(plan, None)[1]


def test_lengths_from_data_and_from_limits(folder: Path) -> None:
    job = config(folder)
    architecture = read_architecture(job.model)
    found, words = find_lengths(job, architecture)
    assert words == "the recipe's data"
    assert found.max_prompt == len("say 19?") and found.max_response == 8 and found.demonstrations == 16
    asked, words = find_lengths(build({"model": {"name": job.model.name}, "data": {"demonstrations": "owner/set"}}), architecture)
    assert "limits" in words and asked == limits(build({}), 512)
    assert asked.max_prompt == 512 - 256


def test_total_time() -> None:
    assert Times(10.0, 1.0, 2.0, 3.0, 0, 0, 5).total == 40.0


def test_the_command(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(dump(config(folder)))
    told = CliRunner().invoke(cli, ["plan", str(recipe), "--gpu", "h100"])
    assert told.exit_code == 0, told.output
    assert told.output.startswith("FITS: ") and "Memory by phase" in told.output and max(map(len, told.output.splitlines())) <= 100
    asked = CliRunner().invoke(cli, ["plan", str(recipe), "--gpu", "h100", "--gpu-memory", "1.0005GB", "--json"])
    content = json.loads(asked.output)
    assert content["fits"] is False and content["peak_bytes"] == max(p["bytes"] for p in content["phases"]) + content["libraries_bytes"]
    wrong = CliRunner().invoke(cli, ["plan", str(recipe), "--gpu", "abacus"])
    assert wrong.exit_code == 2 and "not in the table" in wrong.output
