"""Killed runs: real `srppo align` processes die by SIGKILL at chosen moments, again and again, and must end as if nothing had happened.

    python -m benchmarks.crash [--kills 60] [--seed 0] [--processes 1] [--change]

An undisturbed run says what is right: the weights of every model, the records of metrics.jsonl and samples.jsonl, the answers of the
evaluations, the outcomes of the stages and the list of files. Then runs of the same recipe are killed, resumed
and killed again until they end, and compared with it: only clocks and memory may differ. Each kill is aimed at a phase (the one hit least
so far) and falls somewhere in it, by chance. Nothing in srppo knows of this: the processes are forked from this one, which has loaded the
libraries, and functions of theirs are wrapped to tell in shared memory which phase they are in. With --processes N each run is N processes
that share the weights, as torchrun would start them; the first tells the phase, and half of the kills are of one process, after which
the others have to end by themselves. With --change each start is by one process or by N, and the end is compared up to rounding. Needs
Linux or macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.crash_compare import fingerprint, near

from srppo.config import build, dump, load_recipe, merge
from srppo.lab.world import recipe, write_world

RESULTS = Path(__file__).parent / "results"
ALONE = 60.0  # that others may outlive one that was killed
PATIENCE = 300.0  # seconds that a process may take for what takes a few
# What is wrapped, and the phase it is. A phase inside another hides that.
PHASES = {
    "loading": ["srppo.workspace:_load"],
    "SFT": ["srppo.train.sft:train_supervised"],
    "reward card": ["srppo.diagnosis:make_card"],
    "rollout": ["srppo.train.ppo:collect"],
    "scoring": ["srppo.train.ppo:score"],
    "update": ["srppo.train.ppo:update"],
    "guard": ["srppo.train.guard:Guard.look"],
    "evaluation": ["srppo.stages:evaluate"],
    "continued SFT": ["srppo.train.continued:train_supervised"],
    "checkpoint writing": ["srppo.train.saver:save_checkpoint", "srppo.train.guard:save_checkpoint"],
    "checkpoint dropping": ["srppo.train.checkpoint:drop_old", "srppo.stages:drop_checkpoint", "srppo.train.guard:Guard.tidy"],
    "checkpoint reading": [f"srppo.train.{stage}:load_latest" for stage in ("sft", "ppo", "continued")],
    "model writing": ["srppo.models.roles:Roles.save", "srppo.models.roles:Roles.save_critic"],
    "model reading": ["srppo.models.roles:Roles.load"],
    "records": ["srppo.run_folder:RunFolder.log", "srppo.run_folder:RunFolder.samples", "srppo.run_folder:RunFolder.truncate_metrics"],
    "stage outcome": ["srppo.stages:finish", "srppo.diagnosis:finish", "srppo.diagnosis:note_card"],
    "moving the start": ["srppo.diagnosis:_move"],
    "report": ["srppo.report:write_report"],
}
WEIGHTS = {"checkpoint writing": 2.0, "checkpoint dropping": 1.5, "model writing": 1.5, "stage outcome": 1.5}  # where most could go wrong
LIBRARIES = (
    "datasets",
    "peft",
    "matplotlib.pyplot",
    "torch.distributed.checkpoint",
    "srppo.train.checkpoint_storage",
    "transformers.models.llama.modeling_llama",
    "rich.table",
)
# Stages whose outcome says that a phase will not come again.
OVER = {"SFT": "sft", "reward card": "diagnose", "moving the start": "diagnose", "continued SFT": "sft_continued"}
OVER |= dict.fromkeys(("rollout", "scoring", "update", "guard"), "ppo")


class Told:
    """Memory shared with a process: its phase, how often it has entered each, and when it entered this one."""

    SIZE = 4096

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.SIZE)
        self.now: list[tuple[str, float]] = []
        self.entered: Counter[str] = Counter()

    def write(self) -> None:
        phase, since = self.now[-1] if self.now else ("elsewhere", 0.0)
        text = json.dumps([phase, since, self.entered]).encode()
        self._memory[:] = text + b"\0" * (self.SIZE - len(text))

    def read(self) -> tuple[str, float, dict[str, int]]:
        """What the process said last; while it is writing, nothing."""
        with contextlib.suppress(ValueError):
            phase, since, entered = json.loads(self._memory[:].rstrip(b"\0") or b"null") or ["starting", 0.0, {}]
            return phase, since, entered
        return "", 0.0, {}

    def clear(self) -> None:
        self._memory[:] = b"\0" * self.SIZE


def wrap(told: Told, spent: dict[str, list[float]] | None = None) -> None:
    """In the process that runs: have the phases' functions tell where it is. spent: seconds of each call, to fill."""
    for phase, places in PHASES.items():
        for place in places:
            module, _, path = place.partition(":")
            owner: Any = importlib.import_module(module)
            *within, name = path.split(".")
            for part in within:
                owner = getattr(owner, part)
            setattr(owner, name, _telling(getattr(owner, name), phase, told, spent))


def _telling(inner: Callable[..., Any], phase: str, told: Told, spent: dict[str, list[float]] | None) -> Callable[..., Any]:
    def telling(*args: Any, **options: Any) -> Any:
        began = time.monotonic()
        told.now.append((phase, began))
        told.entered[phase] += 1
        told.write()
        try:
            return inner(*args, **options)
        finally:
            told.now.remove((phase, began))
            told.write()
            if spent is not None:
                spent.setdefault(phase, []).append(time.monotonic() - began)

    return telling


def start(recipe_file: Path, output: Path, told: Told, times: Path | None = None, processes: int = 1) -> list[int]:
    """`srppo align RECIPE --output OUTPUT --resume` in so many processes, in a group of their own. times: where the phases' seconds go."""
    told.clear()
    sys.stdout.flush()
    world: dict[str, str] = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pids: list[int] = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            if world:
                os.environ |= world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _run(recipe_file, output, told if rank == 0 else Told(), times if rank == 0 else None)
        pids.append(pid)
        with contextlib.suppress(PermissionError, ProcessLookupError):  # whoever is first
            os.setpgid(pid, pids[0])
    return pids


def _run(recipe_file: Path, output: Path, told: Told, times: Path | None) -> NoReturn:
    """In a forked process."""
    code = 70
    try:
        log = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        spent: dict[str, list[float]] = {}
        wrap(told, spent)
        from srppo.cli import cli

        try:
            cli(["align", str(recipe_file), "--output", str(output), "--resume", "--progress", "plain"], prog_name="srppo")
        except SystemExit as end:
            code = int(end.code or 0)
        if times is not None:
            times.write_text(json.dumps(spent))
        sys.stdout.flush()
    finally:
        os._exit(code)


def ended(pids: list[int]) -> int | None:
    """The first process's exit code; None while it runs, minus the signal where one killed it. With it the others are over too."""
    done, status = os.waitpid(pids[0], os.WNOHANG)
    if not done:
        return None
    for other in pids[1:]:
        os.waitpid(other, 0)
    return os.waitstatus_to_exitcode(status)


def kill(pids: list[int]) -> int:
    """Kill a run's processes, all at once. The first one's exit code."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pids[0], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return codes[0]


def wait(pids: list[int]) -> int:
    end = time.monotonic() + PATIENCE
    while (code := ended(pids)) is None:
        if time.monotonic() > end:
            kill(pids)
            raise SystemExit("a run takes too long")
        time.sleep(0.005)
    return code


def left_alone(pids: list[int], lost: int) -> int:
    """Kill one process; the others have to end by themselves. The first one's exit code."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pids[lost], signal.SIGKILL)
    end, codes = time.monotonic() + ALONE, dict[int, int]()
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            kill([pid for pid in pids if pid not in codes])
            raise SystemExit(f"process {lost} was killed, and another was still there {ALONE:.0f} s later")
        time.sleep(0.005)
    return codes[pids[0]]


def kill_in(pids: list[int], told: Told, phase: str, nth: int, delay: float, lost: int | None = None) -> str | None:
    """Kill a run `delay` seconds after it has entered a phase for the nth time: all its processes, or the `lost` one alone.
    The phase it died in; None where it ended before."""
    end = time.monotonic() + PATIENCE
    while True:
        if (code := ended(pids)) is not None:
            if code:
                raise SystemExit(f"a run failed with exit code {code}")
            return None
        if time.monotonic() > end:
            kill(pids)
            raise SystemExit("a run takes too long")
        _, _, entered = told.read()
        if entered.get(phase, 0) >= nth:
            break
        time.sleep(0.0005)
    time.sleep(delay)
    where = told.read()[0]
    code = kill(pids) if lost is None else left_alone(pids, lost)
    if code == 0:
        return None
    if code != -signal.SIGKILL and lost is None:
        raise SystemExit(f"a run failed with exit code {code}")
    return where or told.read()[0] or "elsewhere"


@dataclass
class Case:
    """A recipe, and how it went."""

    name: str
    recipe: Path
    processes: int = 1
    change: bool = False  # each start is by one process or by all of them, whichever chance says
    right: dict[str, str] = field(default_factory=dict)  # fingerprint of the undisturbed run
    typical: dict[str, list[float]] = field(default_factory=dict)  # seconds of each call, by phase
    seconds: float = 0.0  # that it took
    runs: int = 0
    most: int = 0  # kills of one run
    alone: int = 0  # kills of one of several processes
    differences: list[str] = field(default_factory=list)


def lab_cases(folder: Path, seed: int) -> list[Case]:
    """The embedded world's model, small: full tuning, LoRA, and both the card's choices and background writing."""
    world = folder / "world"
    write_world(world, seed, demonstrations=32, prompts=96, eval_per_family=2)
    small = {
        "diagnose.samples": 2,
        "diagnose.heldout": 8,
        "diagnose.prompts": 4,
        "diagnose.preview": False,
        "sft.steps": 12,
        "sft.batch_size": 16,
        "sft.checkpoint_every": 3,
        "sft.checkpoints_at": [0.5, 1.0],
        "sft.eval_every": 4,
        "sft.keep": "auto",
        "ppo.iterations": 6,
        "ppo.prompts_per_iteration": 16,
        "ppo.epochs": 2,
        "ppo.minibatches": 2,
        "ppo.checkpoint_every": 2,
        "rollout.max_new_tokens": 12,
        "guard.every": 2,
        "guard.samples": 1,
        "guard.heldout": 8,
        "guard.keep": "best",
        "evaluation.samples": 1,
        "evaluation.every": 3,
        "evaluation.during_prompts": 2,
    }
    lora = {"tuning.kind": "lora", "tuning.lora_rank": 4}
    kinds: dict[str, dict[str, Any]] = {
        "full": {},
        "lora": {**lora, "tuning.lora_dropout": 0.1, "reward.kl_target": 0.5},
        "full, in the background": {"background_checkpoints": True, "tuning.critic": "least_squares"},
        "lora, in the background": {**lora, "background_checkpoints": True, "ppo.baseline": "group", "ppo.samples_per_prompt": 2},
    }
    cases = []
    for name, changes in kinds.items():
        file = folder / f"{name.replace(', ', '-').replace(' ', '-')}.yaml"
        file.write_text(dump(build(merge(recipe(world, seed, folder / "unused"), {**small, **changes}))), encoding="utf-8")
        cases.append(Case(name, file))
    return cases


def crash(cases: list[Case], folder: Path, kills: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Kill runs of the cases in turn, until there were so many kills and the runs at hand have ended. Returns the result."""
    rng, told = random.Random(seed), Told()
    hit: Counter[str] = Counter()
    for case in cases:
        began, times = time.monotonic(), folder / "times.json"
        run = folder / f"{case.recipe.stem}-undisturbed"
        if wait(start(case.recipe, run, told, times, case.processes)):
            raise SystemExit(f"{case.name}: the undisturbed run failed; see {run}.log")
        case.seconds, case.right = time.monotonic() - began, fingerprint(run)
        case.typical = json.loads(times.read_text())
        say(f"{case.name}: undisturbed {case.seconds:.1f} s")
    aimed: Counter[str] = Counter()
    while hit.total() < kills:
        for case in cases:
            killed = _one_run(case, folder, told, rng, hit, aimed, kills)
            say(f"{case.name}: run {case.runs}, killed {killed} times, {len(case.differences)} differences")
    return {
        "kills": hit.total(),
        "by_phase": dict(sorted(hit.items(), key=lambda item: -item[1])),
        "runs": sum(case.runs for case in cases),
        "differences": sum(len(case.differences) for case in cases),
        "cases": [
            {"name": c.name, "runs": c.runs, "most_kills": c.most, "undisturbed_seconds": round(c.seconds, 1), "differences": c.differences}
            for c in cases
        ],
        "alone": sum(case.alone for case in cases),
        "seed": seed,
        "processes": cases[0].processes,
        "changed": cases[0].change,
    }


def _one_run(
    case: Case,
    folder: Path,
    told: Told,
    rng: random.Random,
    hit: Counter[str],
    aimed: Counter[str],
    kills: int,
) -> int:
    """One run from its beginning to its end, killed on the way; how often."""
    run, killed = folder / f"{case.recipe.stem}-{case.runs}", 0

    def begin() -> list[int]:
        return start(case.recipe, run, told, None, rng.choice((1, case.processes)) if case.change else case.processes)

    while True:
        if hit.total() >= kills:
            if code := wait(begin()):
                raise SystemExit(f"{case.name}: a resumed run failed with exit code {code}; see {run}.log")
            break
        ahead = [p for p in sorted(case.typical) if p not in OVER or not (run / f"stages/{OVER[p]}.json").exists()]
        phase = min(ahead, key=lambda p: ((hit[p] + aimed[p] / 4) / WEIGHTS.get(p, 1.0), rng.random()))
        aimed[phase] += 1  # some phases never come again in what is left of a run
        nth = 1 if phase in ("loading", "report") else rng.randint(1, 3)
        delay = rng.random() * rng.choice(case.typical[phase])
        pids = begin()
        lost = rng.randrange(len(pids)) if len(pids) > 1 and rng.random() < 0.5 else None
        try:
            where = kill_in(pids, told, phase, nth, delay, lost)
        except SystemExit as error:
            raise SystemExit(f"{case.name}: {error}; see {run}.log") from None
        if where is None:
            break
        hit[where] += 1
        killed += 1
        case.alone += lost is not None
    undisturbed = folder / f"{case.recipe.stem}-undisturbed"
    if case.change:
        odd = near(run, undisturbed)
    else:
        found = fingerprint(run)
        odd = sorted(name for name in found.keys() | case.right.keys() if found.get(name) != case.right.get(name))
        odd = [f"{name}{'' if name in found else ' is missing'}" for name in odd]
    case.differences += [f"run {case.runs}: {what}" for what in odd]
    case.runs, case.most = case.runs + 1, max(case.most, killed)
    if not odd:
        shutil.rmtree(run)
    return killed


@contextlib.contextmanager
def workplace(given: str | None) -> Iterator[Path]:
    if given is not None:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--change", action="store_true", help="begin and resume each run now with one process, now with all of them")
    parser.add_argument("--recipe", action="append", help="instead of the embedded world's; may be given more than once")
    parser.add_argument("--work", help="where the runs lie; by default a temporary folder")
    parser.add_argument("--output", help="by default in benchmarks/results")
    given = parser.parse_args(arguments)
    name = "crash" + (f"_{given.processes}" if given.processes > 1 else "") + ("_changed" if given.change else "") + ".json"
    output = Path(given.output or RESULTS / name)
    ours = {place.partition(":")[0] for places in PHASES.values() for place in places} | {"srppo.job", "srppo.cli"}
    for name in [*LIBRARIES, *sorted(ours)]:  # now, so that all runs are of one version, and start quickly
        importlib.import_module(name)
    with workplace(given.work) as folder:
        if given.recipe:
            cases = [Case(Path(file).stem, Path(file)) for file in given.recipe]
            for case in cases:
                load_recipe(str(case.recipe))
        else:
            cases = lab_cases(folder, given.seed)
        for case in cases:
            case.processes, case.change = given.processes, given.change
        result = crash(cases, folder, given.kills, given.seed, lambda text: print(text, flush=True))
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    width = max(map(len, result["by_phase"]))
    print(f"\n{'phase':<{width}}  kills")
    for phase, count in result["by_phase"].items():
        print(f"{phase:<{width}}  {count:5d}")
    print(f"{'all':<{width}}  {result['kills']:5d}   in {result['runs']} runs; differences from the undisturbed: {result['differences']}")
    for case in result["cases"]:
        for difference in case["differences"]:
            print(f"  {case['name']}: {difference}")
    return 1 if result["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
