"""The speed benchmarks count right, judge equal work, fit what they claim, and write their page from any results there are."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import busy_threads, growth, lab_race
from benchmarks.race import compare, memory, results, sides
from benchmarks.race.floor import Flops, adapter_flops, generation, round_flops, scoring, seconds, training
from benchmarks.race.materials import prompt_ids, prompt_text, word_tokenizer
from benchmarks.race.page import speed_page
from benchmarks.race.shapes import SHAPES, Model, Shape
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

MODEL = Model(layers=3, hidden=32, intermediate=80, heads=4, kv_heads=2, vocab=101, tied=False)
SHAPE = Shape("test", MODEL, batch=4, prompt=8, response=6, epochs=3, minibatches=2)
P, T = 5, 6
L = P + T - 1


def llama(tied: bool = False) -> LlamaForCausalLM:
    sizes = Model(**{**MODEL.__dict__, "tied": tied}).config(positions=64)
    return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="eager"))


def counted(model: LlamaForCausalLM, backward: bool, kept: int) -> float:
    """PyTorch's own count for one sequence of L tokens, the LM head on the last `kept`; eager attention is not causal-aware."""
    ids = torch.arange(L)[None] + 4
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
        if backward:
            logits.sum().backward()
    return float(counter.get_total_flops())


def unseen() -> float:
    """Attention that eager computes and causality does not need: a pair (query, key) is seen once for L (L - 1) / 2 of L L."""
    return MODEL.layers * 4.0 * MODEL.heads * MODEL.head_dim * (L * L - L * (L + 1) / 2)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_the_models(tied: bool) -> None:
    sizes = Model(**{**MODEL.__dict__, "tied": tied})
    assert sizes.parameters() == llama(tied).num_parameters()


def test_a_forward_pass_is_what_pytorch_counts() -> None:
    model = llama().requires_grad_(False)
    assert scoring(MODEL, P, T, head=True).total == pytest.approx(counted(model, False, T) - unseen())


def test_full_training_is_what_pytorch_counts() -> None:
    assert training(MODEL, P, T, True, None).total == pytest.approx(counted(llama(), True, T) - 3 * unseen())


def test_lora_training_is_what_pytorch_counts() -> None:
    from peft import LoraConfig, get_peft_model

    rank = 4
    model = get_peft_model(llama(), LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.arange(L)[None] + 4
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False, logits_to_keep=T).logits.sum().backward()
    # the first block's q, k and v learn from inputs that need no gradient: their adapters' A passes none down
    spared = sum(2.0 * rank * a for name, a, _ in MODEL.linears() if name in "qkv") * L
    measured = counter.get_total_flops() - 3 * unseen()
    assert training(MODEL, P, T, True, rank).total == pytest.approx(measured + spared)
    assert adapter_flops(MODEL, rank) == 2 * sum(w.numel() for n, w in model.named_parameters() if "lora_" in n)


def test_generation_sees_what_a_forward_pass_sees() -> None:
    """Token by token with a cache is the same arithmetic as all at once, cut elsewhere."""
    split, whole = generation(MODEL, P, T), scoring(MODEL, P, T, head=True)
    assert split.total == pytest.approx(whole.total)
    assert split.decode_head == whole.forward_head and split.forward_head == 0


def test_a_round_adds_up() -> None:
    phases = round_flops(SHAPE, [P, P], T, "full")
    assert phases["score"].total == pytest.approx(2 * (2 * scoring(MODEL, P, T, True).total + scoring(MODEL, P, T, False).total))
    both = training(MODEL, P, T, True, None).total + training(MODEL, P, T, False, None).total
    assert phases["update"].total == pytest.approx(2 * 3 * both)
    assert phases["update"].total == pytest.approx(3 * 2 * 3 * (scoring(MODEL, P, T, True) + scoring(MODEL, P, T, False)).total)
    alone = round_flops(SHAPE, [P, P], T, "full", critic=False)
    assert alone["update"].total == pytest.approx(2 * 3 * training(MODEL, P, T, True, None).total)
    assert round_flops(SHAPE.changed(rank=1), [P, P], T, "lora")["update"].total < phases["update"].total
    assert seconds(Flops(1, 2, 3, 4, 5, 6), Flops(1, 2, 1, 4, 5, 6)) == pytest.approx(8)


def test_prompts_are_read_as_the_ids_they_were_drawn_as() -> None:
    shape = SHAPES["default"]
    ids, tokenizer = prompt_ids(shape, 50), word_tokenizer(shape.model.vocab)
    assert [tokenizer(prompt_text(row))["input_ids"] for row in ids] == ids
    assert len({tuple(row) for row in ids}) == 50 and prompt_ids(shape, 50) == ids
    assert {len(row) for row in ids} <= set(range(8, 33)) and min(map(min, ids)) >= 4  # none of the special tokens


def answer(seconds: list[float], score: float, memory_mb: float, **more: Any) -> dict[str, Any]:
    rounds, steps = len(seconds), SHAPE.epochs * SHAPE.minibatches * len(seconds)
    return {
        "system": "a",
        "seconds": seconds,
        "cpu_seconds": seconds,
        "phases": {name: [s / 3 for s in seconds] for name in compare.PHASES},
        "scores": [score] * rounds,
        "scores_std": [1.0] * rounds,
        "kl": [0.0] * rounds,
        "responses": [SHAPE.batch] * rounds,
        "response_tokens": [SHAPE.batch * T] * rounds,
        "optimizer_steps": steps,
        "weights_moved": 1000 * steps,
        "rss_before_mb": 100.0,
        "rss_peak_mb": 100.0 + memory_mb,
    } | more


def test_a_row_compares_the_counted_rounds() -> None:
    ours = [answer([9.0, 1.0, 3.0], 0.1, 40, optimizer_steps=36, weights_moved=18000, rss_peak_with_saving_mb=150.0)]
    theirs = {"lora": [answer([50.0, 4.0, 4.0], 0.2, 80)], "lora_thrifty": [answer([50.0, 8.0, 8.0], 0.2, 160)]}
    rates = {"peak": 1e9, "kinds": [5e8] * 6}
    row = compare.row(SHAPE, "lora", 3, ours, theirs, rates)
    assert row["speed_ratio"] == pytest.approx(2) and row["memory_ratio"] == pytest.approx(0.5)
    assert row["other_peers"]["lora_thrifty"]["speed_ratio"] == pytest.approx(4)
    assert row["other_peers"]["lora_thrifty"]["memory_ratio"] == pytest.approx(0.25)
    assert row["over_floor_at_own_rates"] == pytest.approx(row["over_floor_at_peak"] / 2)
    lengths = [len(ids) for ids in prompt_ids(SHAPE, SHAPE.batch * 3)]
    needed = sum(work.total for work in round_flops(SHAPE, lengths, T, "lora").values()) / 3
    assert row["over_floor_at_peak"] == pytest.approx(2.0 / (needed / 1e9))
    assert row["equal_work"]["equal"]
    busy = compare.row(SHAPE, "lora", 3, [ours[0] | {"seconds": [90.0, 10.0, 30.0]}], theirs, rates)
    assert busy["over_floor_at_peak"] == row["over_floor_at_peak"]  # both in processor seconds


@pytest.mark.parametrize(
    "change",
    [
        {"responses": [4, 4, 5]},
        {"response_tokens": [24, 24, 27]},
        {"weights_moved": 18400},
        {"optimizer_steps": 17},
        {"scores": [3.0] * 3},
    ],
)
def test_unequal_work_is_said(change: dict[str, Any]) -> None:
    ours = answer([1.0] * 3, 0.1, 40, optimizer_steps=36, weights_moved=18000)
    assert compare.equal_work(SHAPE, 3, [ours], [answer([1.0] * 3, 0.2, 80)])["equal"]
    assert not compare.equal_work(SHAPE, 3, [ours], [answer([1.0] * 3, 0.2, 80, **change)])["equal"]


def test_the_power_law_is_least_squares() -> None:
    from scipy.stats import linregress

    x, y = [1.0, 3.0, 10.0, 40.0, 90.0], [2.0, 5.0, 30.0, 70.0, 400.0]
    fit, truth = growth.power_law(x, y), linregress(np.log(x), np.log(y))
    assert fit["exponent"] == pytest.approx(truth.slope) and fit["standard_error"] == pytest.approx(truth.stderr)
    assert fit["factor"] == pytest.approx(math.exp(truth.intercept))
    exact = growth.power_law(x, [3 * v**1.7 for v in x])
    assert exact["exponent"] == pytest.approx(1.7) and exact["standard_error"] == pytest.approx(0, abs=1e-9)


def test_the_peak_begins_anew() -> None:
    memory.restart_peak()
    if memory.peak() > memory.resident() + 50:
        pytest.skip("this system does not let a process restart its peak")
    before = memory.resident()
    block = torch.ones(50 * 2**18)  # 50 MiB
    assert 45 < memory.peak() - before < 80
    del block


def lab_rows() -> list[dict[str, Any]]:
    def side(times: list[float], accuracies: list[float]) -> dict[str, Any]:
        curve = [{"round": i + 1, "seconds": s, lab_race.GROUP: a} for i, (s, a) in enumerate(zip(times, accuracies))]
        return {"curve": curve, "round_seconds": [1.0, 1.0], "seconds_per_round": times[0], "reached": lab_race.reached(curve, 0.7)}

    sft = {"sft": {lab_race.GROUP: 0.6}, "target": 0.7}
    return [
        {"seed": 1, **sft, "ours": side([2.0, 4.0], [0.65, 0.7]), "trl": side([4.0, 8.0], [0.6, 0.9])},
        {"seed": 2, **sft, "ours": side([2.0, 4.0], [0.8, 0.6]), "trl": side([4.0, 8.0], [0.6, 0.9])},
        {"seed": 3, **sft, "ours": side([2.0, 4.0], [0.8, 0.6]), "trl": side([4.0, 8.0], [0.6, 0.6])},
    ]


def test_the_lab_compares_the_seeds_on_which_both_arrived() -> None:
    total = lab_race.summary(lab_rows())
    assert (total["ours"]["reached"], total["trl"]["reached"]) == (3, 2)
    assert total["time_ratio"]["mean"] == pytest.approx(math.sqrt(2 * 4))
    spread = abs(math.log(2))  # of two logarithms: their standard error is half their distance, times Student's 12.706
    assert math.log(total["time_ratio"]["high"] / total["time_ratio"]["mean"]) == pytest.approx(12.7062 * spread / 2, rel=1e-4)
    assert total["round_time_ratio"]["mean"] == pytest.approx(2)


def found() -> dict[str, Any]:
    """Results of every benchmark, as they would be written."""
    head = {"date": "2026-11-22T10:00+00:00", "environment": results.machine({"trl": "1.12.0"})}
    ours = [answer([9.0, 1.0, 3.0], 0.1, 40, optimizer_steps=36, weights_moved=18000)]
    theirs = {"lora": [answer([50.0, 4.0, 4.0], 0.2, 90)], "lora_thrifty": [answer([50.0, 8.0, 8.0], 0.2, 160)]}
    row = compare.row(SHAPE, "lora", 3, ours, theirs, {"peak": 1e6, "kinds": [5e5] * 6})
    race = head | {"rows": [{"name": "default", "date": head["date"], "load_average_before": 0.5, **row}]}
    fit = {"exponent": 1.0, "standard_error": 0.1, "factor": 2.0}
    point = {"x": 16, "cpu_seconds": 1.0, "memory_mb": 3.0}
    axis = {"title": "response length, tokens", "points": [point], "fits": {"cpu_seconds": fit, "memory_mb": fit}}
    side = compare.summary(ours) | {"update_mfu": 0.5, "decode_share": 0.4, "gpu_peak_mb": 2048.0}
    gap = {"mean": 1e-6, "largest": 1e-5, "allowed": [1e-4, 1e-3], "right": True}
    speeds = {"matmul_flop_per_second": 8e14, "bytes_per_second": 3e12}
    device = {"device": "a GPU", "correctness": {"float32": gap}, "speeds": speeds}
    named = SHAPE.to_dict() | {"name": "SmolLM2-135M"}
    return {
        "race_trl_ppo": race,
        "race_trl_rloo": race,
        "lab_race": head | {"gain": 0.1, "every": 2, "summary": lab_race.summary(lab_rows()), "rows": lab_rows()},
        "growth": head | {"shape": SHAPE.to_dict(), "axes": {"response": axis}},
        "gpu": head | {"checks": device, "rows": [{"shape": named, "tuning": "full", "ours": side, "trl_ppo_failed": "out of | memory"}]},
    }


def test_the_page_says_what_is_met() -> None:
    page = speed_page(found())
    assert "| default, 5 M shape, lora: times as fast as TRL's PPO | ≥ 2.5 | 2.00 | no |" in page
    assert "| default, 5 M shape, lora: memory over TRL's | ≤ 0.33 | 0.44 | no |" in page
    assert "| GPU, SmolLM2-135M, full: update's share of the product peak | ≥ 45% | 50.0% | yes |" in page
    assert "| GPU, SmolLM2-135M, full: decoding's share of the bandwidth limit | ≥ 50% | 40.0% | no |" in page
    assert "peer: out of / memory" in page and "Not run yet" not in page
    better = copy.deepcopy(found())
    better["race_trl_ppo"]["rows"][0]["speed_ratio"] = 2.5
    assert "| default, 5 M shape, lora: times as fast as TRL's PPO | ≥ 2.5 | 2.50 | yes |" in speed_page(better)


def test_the_page_says_what_was_equal_on_a_gpu() -> None:
    shown = found()
    assert "Equal work, as told" not in speed_page(shown)  # one side failed
    row = shown["gpu"]["rows"][0]
    row["equal_work"] = shown["race_trl_ppo"]["rows"][0]["equal_work"] | {"equal": False, "responses": [8, 8], "policy_steps": [6, 6]}
    row["tuning"] = "lora"
    assert "SmolLM2-135M lora: all but the critic, which TRL trains whole." in speed_page(shown)
    row["equal_work"]["policy_steps"] = [6, 5]
    assert "SmolLM2-135M lora: **no**." in speed_page(shown)


def test_results_lie_where_the_command_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["race", "--results", "there", "--work", "work"])
    args = sides.options(None, "race")
    assert (args.results, args.work) == (tmp_path / "there", tmp_path / "work")
    monkeypatch.chdir(results.ROOT)
    monkeypatch.setattr("sys.argv", ["race", "--results", "benchmarks/results"])
    assert results.page_of(sides.options(None, "race").results) == results.PAGE


def test_busy_threads_keeps_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"steps_per_second": 3.94, "cpu_over_wall": 0.5, "waited_share": None, "others_cores": 0.25, "warns": True}
    monkeypatch.setattr(busy_threads, "measure", lambda threads, seconds: {"threads": threads, **figures})
    monkeypatch.setattr(busy_threads, "overhead", lambda: 200.0)
    monkeypatch.setattr("sys.argv", ["busy_threads", "--rivals", "0", "--results", str(tmp_path)])
    busy_threads.main()
    assert "| 0 | 2 | 3.9 | 0.50 | – | 0.25 | warns |" in capsys.readouterr().out
    kept = results.read("busy_threads", tmp_path)
    assert kept is not None and {"date", "environment", "before"} < kept.keys()
    assert kept["phase_microseconds"] == 200.0 and [row["threads"] for row in kept["rows"]] == [1, 2]
    assert kept["rows"][0] == {"rivals": 0, "threads": 1, **figures}


def test_the_page_stands_without_results() -> None:
    assert "No results yet." in speed_page({}) and "`benchmarks.gpu`" in speed_page({}).split("Not run yet: ")[1]
    for name, result in found().items():
        assert speed_page({name: result}).startswith("# Speed and memory")


def test_rows_of_another_machine_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"trl": "1.12.0"}
    rows = [{"name": "default", "tuning": t} for t in ("full", "lora")]
    results.write("race", {"rows": rows}, packages, tmp_path)
    kept = results.kept_rows("race", ("name", "tuning"), [("default", "full")], packages, tmp_path)
    assert kept == [{"name": "default", "tuning": "lora"}]
    assert not results.kept_rows("race", ("name", "tuning"), [], {"trl": "9"}, tmp_path)
    monkeypatch.setattr(results, "environment", lambda: {"packages": {}, "hardware": {"cpu": "another"}})
    assert not results.kept_rows("race", ("name", "tuning"), [], packages, tmp_path)
