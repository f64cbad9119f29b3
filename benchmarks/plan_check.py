"""Are the memory plans right? Real small runs, each in a process of its own, against what `srppo plan` says of them. One command:

python benchmarks/plan_check.py

Writes benchmarks/results/plan_check.json and the table in docs/plan.md. Models are random, of the shapes below; each run is a whole
`srppo align` of one PPO round. Measured is the process's peak resident memory less what it held before the models were loaded
(Linux, /proc). Time is compared too, on this machine as it is while others may use it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from srppo.config import RunConfig, build, merge
from srppo.environment import environment

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 0.15
SMALL = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
SMOL = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4}  # SmolLM2-135M with 4 of its 30 layers
SHORT, LONG = (24, 24), (32, 96)  # tokens of prompt and response
LORA, AGAIN = {"tuning.kind": "lora"}, {"model.gradient_checkpointing": True}
FITTED = {"tuning.critic": "least_squares"}
CARD = {  # whose decoding is the most that these need
    "diagnose.enabled": True,
    "diagnose.on_no_go": "warn",
    "evaluation.batch_size": 256,
    "ppo.micro_batch_tokens": 512,
    "sft.micro_batch_tokens": 512,
    "rollout.batch_size": 8,
}
CASES: dict[str, dict[str, Any]] = {
    "small vocabulary, full, short": {"shape": SMALL, "lengths": SHORT},
    "small vocabulary, full, long": {"shape": SMALL, "lengths": LONG},
    "small vocabulary, full, long, checkpointing": {"shape": SMALL, "lengths": LONG, **AGAIN},
    "small vocabulary, lora, long": {"shape": SMALL, "lengths": LONG, **LORA},
    "49k vocabulary, full, short": {"shape": SMOL, "lengths": SHORT},
    "49k vocabulary, lora, short": {"shape": SMOL, "lengths": SHORT, **LORA},
    "49k vocabulary, lora, long": {"shape": SMOL, "lengths": LONG, **LORA},
    "49k vocabulary, lora, long, checkpointing": {"shape": SMOL, "lengths": LONG, **LORA, **AGAIN},
    "49k vocabulary, lora, long, fitted critic": {"shape": SMOL, "lengths": LONG, **LORA, **FITTED},
    "small vocabulary, full, long, fitted critic": {"shape": SMALL, "lengths": LONG, **FITTED},
    "small vocabulary, full, long, reward card": {"shape": SMALL, "lengths": LONG, **CARD},
    "small vocabulary, lora, long, reward card": {"shape": SMALL, "lengths": LONG, **CARD, **LORA},
}


def write_case(folder: Path, case: dict[str, Any]) -> RunConfig:
    """Model, tokenizer, data and recipe of a case."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    shape, (prompt, response) = case["shape"], case["lengths"]
    heads = {"num_attention_heads": shape["hidden_size"] // 64, "num_key_value_heads": 1 if shape["hidden_size"] % 192 else 3}
    settings = LlamaConfig(**shape, **heads, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder / "model")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, shape["vocab_size"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder / "model")
    draw = random.Random(0)

    def text(count: int) -> str:
        return "".join(f" w{draw.randrange(3, shape['vocab_size'])}" for _ in range(count))

    rows = [{"prompt": text(prompt), "completion": text(response - 1)} for _ in range(72)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values: dict[str, Any] = {
        "output": str(folder / "run"),
        "threads": 1,
        "model": {"name": str(folder / "model"), "device": "cpu"},
        "data": {"demonstrations": str(folder / "rows.jsonl"), "heldout": 2},
        "sft": {"steps": 2, "batch_size": 8, "checkpoints_at": [0.5, 1.0]},
        "rollout": {"max_new_tokens": response},
        "ppo": {"iterations": 1, "prompts_per_iteration": 12, "epochs": 1, "minibatches": 1, "critic_warmup": 0},
        "diagnose": {"enabled": False},
        "guard": {"every": 0},
        "evaluation": {"scorer": "none", "continued_sft": False, "max_prompts": 2},
    }
    return build(merge(values, {k: v for k, v in case.items() if "." in k}))


class Watch:
    """Peak resident memory by phase, beyond what was held when the models were about to be loaded. Linux."""

    def __init__(self) -> None:
        self.start = 0
        self.peak = 0
        self.phases: dict[str, int] = {}

    def read(self, key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    def turn(self) -> None:
        """Note the high-water mark and set it back to what is held now."""
        self.peak = max(self.peak, self.read("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")

    def over(self, module: Any, name: str, called: str | Callable[[Any], str]) -> None:
        """Watch every call of a function. called: the phase's name, or a function that gives it for the call's first argument."""
        inner = getattr(module, name)

        def watched(*args: Any, **options: Any) -> Any:
            phase = called if isinstance(called, str) else called(args[0])
            if phase == "load":
                self.start = self.read("VmRSS")
            self.turn()
            try:
                return inner(*args, **options)
            finally:
                self.phases[phase] = max(self.phases.get(phase, 0), self.read("VmHWM") - self.start)
                self.turn()

        setattr(module, name, watched)


def run_case(recipe: str) -> None:
    """In a process of its own: plan, run, and print both as JSON."""
    import datasets  # noqa: F401  libraries are loaded before the models, as in a run
    import torch

    import srppo.diagnosis
    import srppo.stages
    import srppo.train.ppo
    import srppo.train.saver
    import srppo.workspace
    from srppo.config import load_recipe
    from srppo.job import align
    from srppo.progress import make_progress

    config, watch = load_recipe(recipe), Watch()
    (torch.ones(512, 512) @ torch.ones(512, 512)).sum()  # and so are the threads and buffers of matrix products
    watch.over(srppo.workspace, "build_roles", "load")
    watch.over(srppo.stages, "train_sft", "sft")
    watch.over(srppo.diagnosis, "make_card", "reward card")
    watch.over(srppo.train.saver, "save_checkpoint", lambda folder: f"{folder.name} checkpoint")
    watch.over(srppo.train.ppo, "collect", "rollout")
    watch.over(srppo.train.ppo, "score", "scoring")
    watch.over(srppo.train.ppo, "update", "update")
    watch.over(srppo.stages, "evaluate", "evaluation")
    align(config, progress=make_progress("quiet"))
    watch.turn()
    rounds = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    last = next(r for r in reversed(rounds) if "timing/update" in r)
    seconds = {name: last[f"timing/{name}"] for name in ("rollout", "score", "update")}
    print(json.dumps({"peak": watch.peak - watch.start, "start": watch.start, "phases": watch.phases, "seconds": seconds}))


def measure(name: str, case: dict[str, Any], known: dict[str, Any] | None) -> dict[str, Any]:
    """A case planned, and measured where no measurement of it is `known`."""
    from srppo.config import dump
    from srppo.planning.run import run_plan

    with tempfile.TemporaryDirectory() as place:
        config = write_case(Path(place), case)
        recipe = Path(place) / "recipe.yaml"
        recipe.write_text(dump(config), encoding="utf-8")
        planned = run_plan(config).to_dict()
        measured = known or run_apart(name, recipe)
    plan = planned["peak_bytes"] - planned["libraries_bytes"]
    return {
        "plan": plan,
        "error": plan / measured["peak"] - 1,
        "plan_phase": planned["peak_phase"],
        "plan_phases": {p["name"]: p["bytes"] for p in planned["phases"]},
        "plan_libraries": planned["libraries_bytes"],
        "plan_seconds": {k: planned["seconds"][k] for k in ("rollout", "score", "update")},
        "measured": measured,
    }


def run_apart(name: str, recipe: Path) -> dict[str, Any]:
    """What run_case prints, of a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, "--child", str(recipe)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    """Markdown for docs/plan.md."""
    lines = ["| run | planned | measured | error | a round: planned | measured |", "|---|---|---|---|---|---|"]
    for name, case in result["cases"].items():
        seconds = [sum(s.values()) for s in (case["plan_seconds"], case["measured"]["seconds"])]
        lines.append(
            f"| {name} | {case['plan'] / 1e6:,.0f} MB | {case['measured']['peak'] / 1e6:,.0f} MB | {100 * case['error']:+.0f} % "
            f"| {seconds[0]:.1f} s | {seconds[1]:.1f} s |"
        )
    worst = max(abs(c["error"]) for c in result["cases"].values())
    lines += ["", f"Largest error {100 * worst:.0f} % ({result['date']}, {result['environment']['hardware']['cpu']}, one thread)."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="run the cases whose names hold this, print them and write nothing")
    parser.add_argument("--replan", action="store_true", help="make the plans anew, against the measurements of the last whole check")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_case(args.child)
        return
    file = ROOT / "benchmarks/results/plan_check.json"
    before = json.loads(file.read_text(encoding="utf-8")) if args.replan else None
    cases = {}
    for name, case in CASES.items():
        if (args.only is None or args.only in name) and (before is None or name in before["cases"]):
            cases[name] = measure(name, case, before["cases"][name]["measured"] if before else None)
            peak = cases[name]["measured"]["peak"]
            print(f"{name}: planned {cases[name]['plan'] / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB", flush=True)
            if args.only is not None:
                print(json.dumps(cases[name], indent=1), flush=True)
    if args.only is not None:
        return
    result = {"date": datetime.date.today().isoformat(), "environment": environment()}
    if before is not None:
        result = {"date": before["date"], "environment": before["environment"]}
    result["cases"] = cases
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = ROOT / "docs/plan.md"
    old = page.read_text(encoding="utf-8")
    fresh = re.sub(r"(?<=<!-- check -->\n).*?(?=<!-- end of check -->)", lambda _: table(result) + "\n", old, flags=re.S)
    page.write_text(fresh, encoding="utf-8")
    wrong = [name for name, case in cases.items() if abs(case["error"]) > TOLERANCE]
    if wrong:
        raise SystemExit(f"off by more than {100 * TOLERANCE:.0f} %: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
