"""The whole job and its parts: demonstrations in, an aligned model and an honest table out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from srppo.config import RunConfig, build, merge
from srppo.diagnose import tell
from srppo.diagnosis import diagnosis_stage, make_card, note_card, ppo_begun, start_checkpoint
from srppo.environment import versions
from srppo.errors import ConfigError
from srppo.intervals import paired_gain
from srppo.meeting import world_of_run
from srppo.outcomes import read_answers
from srppo.progress import Progress, make_progress
from srppo.run_config import load_run_config
from srppo.run_folder import is_run
from srppo.stages import ROLE_OF_STAGE, continued_stage, evaluation_stage, outcome, ppo_stage, sft_stage
from srppo.text import counted
from srppo.titles import stage_titles
from srppo.train.continued import ROLE as CONTINUED
from srppo.workspace import Workspace, open_workspace
from srppo.world import world

P = ParamSpec("P")
R = TypeVar("R")

STAGES = ("base", "sft", CONTINUED, "srppo")


def by_all_processes(job: Callable[P, R]) -> Callable[P, R]:
    """Of a job that torchrun may have started several times: it is done by all together, and rank 0 alone reports."""

    @functools.wraps(job)
    def together(*args: P.args, **options: P.kwargs) -> R:
        with world_of_run() as here:
            if not here.main:
                options["progress"] = make_progress("silent")
            return job(*args, **options)

    return together


@by_all_processes
def align(config: RunConfig, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """SFT, the reward card, Self-Rewarding PPO, the continued-SFT baseline and the evaluation of all. Returns (and writes) the summary.

    resume continues the run in config.output where it stopped; overwrite replaces it.
    Raises SrppoError for bad input, RewardRefused where the card says no-go, Interrupted after Ctrl-C with the state saved.
    """
    progress = progress or make_progress("live")
    with open_workspace(config, progress, resume=resume, overwrite=overwrite, may_differ=("diagnose",), ppo=True) as space:
        evaluation_stage(space, "base")
        sft_stage(space)
        if config.ppo.iterations:
            space = diagnosis_stage(space)
        evaluation_stage(space, "sft")
        if config.ppo.iterations:
            ppo = ppo_stage(space)
            evaluation_stage(space, "srppo")
            roles = space.loaded.roles  # make room; a resumed run has no critic
            for role in ["policy"] * roles.has("policy") + ["critic"] * roles.has_critic:
                roles.drop(role)
            if config.evaluation.continued_sft:
                continued_stage(space, ppo["compute"]["passes"])
                evaluation_stage(space, CONTINUED)
        return conclude(space)


@by_all_processes
def run_sft(config: RunConfig, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Supervised fine-tuning alone, with its evaluation beside the base's."""
    progress = progress or make_progress("live")
    with open_workspace(config, progress, resume=resume, overwrite=overwrite, may_differ=("diagnose",)) as space:
        evaluation_stage(space, "base")
        sft_stage(space)
        evaluation_stage(space, "sft")
        return conclude(space)


@by_all_processes
def run_ppo(config: RunConfig, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """PPO alone, from sft.checkpoint or from the SFT model that a run in config.output already holds (then pass resume)."""
    progress = progress or make_progress("live")
    held = world().once(lambda: (Path(config.output) / "stages/sft.json").is_file())
    if config.sft.checkpoint is None and not (resume and held):
        raise ConfigError(
            f"there is no SFT model to start PPO from: set sft.checkpoint, or run `srppo sft` into {config.output} first and add --resume"
        )
    with open_workspace(config, progress, resume=resume, overwrite=overwrite, may_differ=("diagnose",), ppo=True) as space:
        sft_stage(space)
        space = diagnosis_stage(space)
        for stage in ("base", "sft"):
            evaluation_stage(space, stage)
        ppo_stage(space)
        evaluation_stage(space, "srppo")
        return conclude(space)


@by_all_processes
def run_diagnose(config: RunConfig, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """The reward card alone: of the SFT that the run in config.output holds (resume), of sft.checkpoint, or of one trained first.

    Returns the card as a dict, which diagnose.json in the run folder holds too. A later `align` with resume goes on from it, and obeys
    it, unless PPO has run already. Raises SrppoError for bad input.
    """
    progress = progress or make_progress("live")
    if config.reward.kind != "coherent":
        raise ConfigError("reward.kind is preference_model; the reward card judges the coherent reward, reward.kind: coherent")
    with open_workspace(config, progress, resume=resume, overwrite=overwrite, may_differ=("diagnose",)) as space:
        sft_stage(space)
        card = make_card(space)
        if ppo_begun(space):
            progress.note("PPO has begun on this run, so the card looks at what it uses and decides nothing")
        else:
            note_card(space, card)
        tell(card, progress)
        from srppo.report import write_report  # plotting is slow to import and needed only here

        progress.note(f"report: {world().once(lambda: write_report(space.run.path))}")
    return card.to_dict()


@by_all_processes
def run_evaluate(target: str, config: RunConfig | None = None, *, progress: Progress | None = None) -> dict[str, Any]:
    """Evaluate again what a run folder holds, or evaluate a model beside the base of a recipe.

    target: a run folder (config overrides its own evaluation settings), or a model folder or hub id (then config is needed, and
    the results go to config.output). Returns the summary.
    """
    progress = progress or make_progress("live")
    if not is_run(target):
        if config is None:
            raise ConfigError(f"{target} is not a run folder; to evaluate a model, give a recipe with its base, prompts and scorer too")
        changes = {"sft.checkpoint": str(target), "ppo.iterations": 0, "reward.checkpoint": "sft"}
        return align(build(merge(config.model_dump(), changes)), progress=progress)
    config = config or load_run_config(target, progress.warn)
    config = config.model_copy(update={"output": str(target)})
    with open_workspace(config, progress, resume=True, may_differ=("evaluation",)) as space:
        roles, run = space.loaded.roles, space.run
        for stage, folder in (("base", ""), ("sft", "sft"), ("srppo", "policy"), (CONTINUED, CONTINUED)):
            if outcome(space, f"evaluate-{stage}") is None:
                continue
            if not roles.has(ROLE_OF_STAGE[stage]):
                roles.load(ROLE_OF_STAGE[stage], run.path / folder)
            evaluation_stage(space, stage, again=True)
            if stage not in ("base", "sft"):
                roles.drop(ROLE_OF_STAGE[stage])
        return conclude(space)


def conclude(space: Workspace) -> dict[str, Any]:
    """Write summary.json and report.html from the finished stages, and show the table."""
    summary = summarise(space)
    from srppo.report import closing_line, write_report  # plotting is slow to import and needed only here

    space.run.write_json("summary.json", summary)
    space.note_cost()
    with space.ledger.stage("report"):
        world().once(lambda: write_report(space.run.path))
    show(summary, space.progress, stage_titles(space.config.reward.kind))
    if line := world().once(lambda: closing_line(space.run.path)):
        space.progress.note(line)
    space.progress.note(f"report: {space.run.path / 'report.html'}")
    return summary


def summarise(space: Workspace) -> dict[str, Any]:
    """summary.json: for each finished stage its groups, and what the run cost."""
    summary: dict[str, Any] = {
        "seed": space.config.seed,
        "wall_seconds": space.elapsed(),
        "peak_rss_mb": space.peak_rss_mb(),
        "versions": versions(),
    }
    extras: dict[str, dict[str, Any]] = {"heldout_nll": {}, "lost_and_gained": {}, "forgetting": {}, "compute": {}, "stage_seconds": {}}
    for stage in STAGES:
        evaluated = outcome(space, f"evaluate-{stage}")
        if evaluated is None:
            continue
        summary[stage] = evaluated["groups"]
        for name in ("heldout_nll", "lost_and_gained", "forgetting"):
            if evaluated.get(name):
                extras[name][stage] = evaluated[name]
    for name in ("sft", "ppo", CONTINUED):
        trained = outcome(space, name)
        if trained is not None:
            extras["compute"][name] = trained["compute"]
            extras["stage_seconds"][name] = trained.get("seconds")
            summary[f"{name}_training"] = {k: v for k, v in trained.items() if k not in ("compute", "seconds")}
    if start := start_checkpoint(space):
        summary["sft_training"]["kept"] = start
    answers = world().once(lambda: {s: read_answers(space.run.path / f"evaluation/{s}.jsonl") for s in STAGES if summary.get(s)})
    extras["srppo_gain"] = {
        other: {group: gain.to_dict() for group in summary[other] if (gain := paired_gain(rows, answers["srppo"], group))}
        for other, rows in answers.items()
        if other != "srppo" and "srppo" in answers
    }
    return summary | extras


def show(summary: dict[str, Any], progress: Progress, titles: Mapping[str, str]) -> None:
    """The headline table."""
    groups = list(dict.fromkeys(g for s in STAGES for g in summary.get(s, {})))
    for group in groups:
        rows = []
        for stage in STAGES:
            result = summary.get(stage, {}).get(group)
            if result:
                percent = [
                    None if result[k] is None else f"{100 * result[k]:.1f} %" for k in ("sampled", "sampled_low", "sampled_high", "greedy")
                ]
                interval = f"{percent[1]} to {percent[2]}" if percent[1] else ""
                kept = [percent[0] or "", interval, percent[3] or ""]
                rows.append([titles[stage], *kept, f"{result['mean_length']:.1f}", f"{100 * result['eos_rate']:.0f} %"])
        n = next(summary[s][group]["n"] for s in STAGES if group in summary.get(s, {}))
        columns = ["", "sampled", "95 % interval", "greedy", "mean length", "ends"]
        progress.table(f"{group.replace('_', ' ')} ({counted(n, 'prompt')})", columns, rows)
