"""The stages of a run. Each is done once: its outcome lies in stages/<name>.json, and a resumed run takes it from there."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import Any
from weakref import WeakKeyDictionary

from srppo.card import model_card
from srppo.evaluate import Answers, Evaluation, GroupResult, evaluate, limit_per_group, lost_and_gained
from srppo.files import write_lines
from srppo.methods.srppo import first_beta
from srppo.outcomes import CURE, read_answers, read_outcome
from srppo.records import Rollout
from srppo.retention import base_answers, forgetting
from srppo.titles import stage_titles
from srppo.train.checkpoint import load_own
from srppo.train.compute import Compute
from srppo.train.continued import ROLE as CONTINUED
from srppo.train.continued import continue_sft
from srppo.train.guard import CHECKPOINTS, Guard, watched
from srppo.train.interrupt import Interrupted, StopRequested
from srppo.train.ppo import PPOSetup, train_ppo
from srppo.train.sft import share_name, train_sft
from srppo.train.supervised import heldout_nll
from srppo.workspace import Workspace, metered
from srppo.world import world

_ANSWERS: WeakKeyDictionary[Workspace, Rollout] = WeakKeyDictionary()
ROLE_OF_STAGE = {"base": "base", "sft": "sft", CONTINUED: CONTINUED, "srppo": "policy"}


def outcome(space: Workspace, name: str, cure: str = CURE) -> dict[str, Any] | None:
    """What a finished stage left, or None. Raises RunFolderError where that is damaged, which ends with the cure."""
    file, run = f"stages/{name}.json", space.run
    return world().once(lambda: read_outcome(run.path / file, name, cure) if run.has(file) else None)


def finish(space: Workspace, name: str, content: dict[str, Any]) -> dict[str, Any]:
    if world().main:
        (space.run.path / "stages").mkdir(exist_ok=True)
    space.run.write_json(f"stages/{name}.json", content)
    return content


@metered("sft")
def sft_stage(space: Workspace) -> dict[str, Any]:
    """Leave the role `sft` trained. Writes sft/, unless sft.checkpoint names a finished model (the workspace has loaded that)."""
    config, roles, run = space.config, space.loaded.roles, space.run
    done = outcome(space, "sft")
    if config.sft.checkpoint is not None:
        done = done or finish(space, "sft", {"loaded": config.sft.checkpoint, "compute": Compute().to_dict()})
    elif done is not None:
        load_own(roles, "sft", run.path / "sft")
    else:
        compute = Compute()
        result = train_sft(
            roles,
            space.loaded.demonstrations.train,
            space.loaded.demonstrations.heldout,
            config,
            run=run,
            progress=space.progress,
            compute=compute,
            interrupt=space.interrupt,
        )
        roles.save("sft", run.path / "sft", card=model_card(config, "sft"))
        done = finish(space, "sft", {**result.to_dict(), "compute": compute.to_dict(), "seconds": space.ledger.seconds("sft")})
    drop_checkpoint(space, "sft")  # also where the process that finished was killed before
    return done


@metered("ppo")
def ppo_stage(space: Workspace) -> dict[str, Any]:
    """Leave the role `policy` trained by Self-Rewarding PPO. Writes policy/ and critic/."""
    config, roles, run, loaded = space.config, space.loaded.roles, space.run, space.loaded
    done = outcome(space, "ppo")
    if done is not None:
        roles.load("policy", run.path / "policy")
        drop_checkpoint(space, CHECKPOINTS)
        return done
    if isinstance(config.reward.checkpoint, float | int):
        load_own(roles, "reward", run.path / "sft_checkpoints" / share_name(config.reward.checkpoint))
        roles.freeze("reward")
    compute = Compute()
    during = limit_per_group(loaded.evaluation_prompts, config.evaluation.during_prompts)

    def evaluate_now(iteration: int) -> dict[str, float]:
        result = evaluate(
            roles,
            "policy",
            during,
            scorer=loaded.scorer,
            engine=loaded.evaluation_engine,
            decode=loaded.decode,
            max_new_tokens=config.rollout.max_new_tokens,
            samples=1,
            seed=config.seed,
        )  # no stop in here: the round's weights have moved, and its record is written after this
        metrics: dict[str, float] = {}
        for name, group in result.groups.items():
            metrics |= {f"eval/{name}/{k}": v for k in ("sampled", "greedy", "mean_length") if (v := getattr(group, k)) is not None}
        nll = heldout_nll(roles, "policy", loaded.demonstrations.heldout, config.sft.micro_batch_tokens)
        return metrics | ({} if nll is None else {"eval/heldout_nll": nll})

    setup = PPOSetup(
        roles,
        loaded.prompts,
        config,
        engine=loaded.engine,
        sampling=loaded.sampling,
        run=run,
        progress=space.progress,
        compute=compute,
        interrupt=space.interrupt,
        decode=loaded.decode,
        preference_model=loaded.preference_model,
    )
    state = train_ppo(setup, evaluate=evaluate_now if during else lambda _: {}, guard=make_guard(space))
    if loaded.preference_model is not None and loaded.preference_model.cut:
        space.progress.warn(f"{loaded.preference_model.cut} texts were longer than the preference model reads, and lost their beginning")
    kept = state.guard.outcome(state.iteration) if state.guard else {}
    how = {"rounds": state.iteration, "first_beta": first_beta(config.reward), **kept}
    roles.save("policy", run.path / "policy", card=model_card(config, "policy", how))
    if roles.has_critic and state.scale is not None:
        roles.save_critic(run.path / "critic")
        run.write_json("critic/value_scale.json", {"mean": state.scale.mean, "std": state.scale.std})
    done = finish(
        space,
        "ppo",
        {
            "iterations": state.iteration,
            "episodes": state.episodes,
            "final_beta": state.beta,
            "skipped_steps": sum(learner.total_skips for learner in state.learners),
            **kept,
            "compute": compute.to_dict(),
            "seconds": space.ledger.seconds("ppo"),
        },
    )
    drop_checkpoint(space, CHECKPOINTS)
    return done


def make_guard(space: Workspace) -> Guard | None:
    """The guard over PPO; None where it is turned off, or there are no held-out demonstrations to look at."""
    config, loaded = space.config, space.loaded
    if not config.guard.every:
        return None
    demonstrations = watched(loaded.demonstrations.heldout, loaded.roles, config)
    if not demonstrations.prompt_ids:
        space.progress.note("guard: off, as there are no held-out demonstrations with a prompt (data.heldout)")
        return None
    return Guard(
        loaded.roles,
        demonstrations,
        config,
        engine=loaded.evaluation_engine,
        run=space.run,
        progress=space.progress,
        preference_model=loaded.preference_model,
    )


@metered(CONTINUED)
def continued_stage(space: Workspace, passes: int) -> dict[str, Any]:
    """Leave the role `sft_continued` trained with `passes` token passes. Writes sft_continued/.

    It starts from the SFT model in full precision: the role `sft` may be frozen in a lower one by now.
    """
    config, roles, run = space.config, space.loaded.roles, space.run
    done = outcome(space, CONTINUED)
    if done is not None:
        roles.load(CONTINUED, run.path / CONTINUED)
        drop_checkpoint(space, CONTINUED)
        return done
    compute = Compute()
    roles.load(CONTINUED, config.sft.checkpoint or run.path / "sft")
    result = continue_sft(
        roles,
        space.loaded.demonstrations.train,
        space.loaded.demonstrations.heldout,
        config,
        passes=passes,
        run=run,
        progress=space.progress,
        compute=compute,
        interrupt=space.interrupt,
    )
    roles.save(CONTINUED, run.path / CONTINUED, card=model_card(config, CONTINUED))
    done = finish(space, CONTINUED, {**result.to_dict(), "compute": compute.to_dict(), "seconds": space.ledger.seconds(CONTINUED)})
    drop_checkpoint(space, CONTINUED)
    return done


@metered("evaluate")
def evaluation_stage(space: Workspace, stage: str, again: bool = False) -> dict[str, Any]:
    """Evaluate base, sft, sft_continued or srppo. Writes evaluation/<stage>.jsonl (answers) and stages/evaluate-<stage>.json."""
    config, loaded = space.config, space.loaded
    done = outcome(space, f"evaluate-{stage}")
    if done is not None and not again:
        return done
    roles, role, prompts = loaded.roles, ROLE_OF_STAGE[stage], loaded.evaluation_prompts
    content: dict[str, Any] = {"groups": {}}
    try:
        if prompts:
            total = len(prompts) * (config.evaluation.samples + 1)
            with space.progress.stage(f"Evaluate {stage_titles(config.reward.kind)[stage]}", total, "answers") as ticker:

                def tick(finished: int, _: int) -> None:
                    space.interrupt.poll()
                    ticker.advance(finished)

                result = evaluate(
                    roles,
                    role,
                    prompts,
                    scorer=loaded.scorer,
                    engine=loaded.evaluation_engine,
                    decode=loaded.decode,
                    max_new_tokens=config.rollout.max_new_tokens,
                    samples=config.evaluation.samples,
                    seed=config.seed,
                    on_progress=tick,
                )
            if world().main:
                (space.run.path / "evaluation").mkdir(exist_ok=True)
            write_lines(space.run.path / f"evaluation/{stage}.jsonl", [asdict(row) for row in result.rows])
            content["groups"] = result.to_dict()
            content["lost_and_gained"] = {} if stage == "base" else lost_and_gained(_base_evaluation(space), result)
        space.interrupt.check()
        content["heldout_nll"] = heldout_nll(roles, role, loaded.demonstrations.heldout, config.sft.micro_batch_tokens)
        if loaded.retention_prompts:
            content["forgetting"] = _forgetting(space, role)
    except StopRequested:
        raise Interrupted(f"stopped while evaluating {stage}; finished stages are saved: continue with --resume") from None
    return finish(space, f"evaluate-{stage}", content)


def _base_evaluation(space: Workspace) -> Evaluation:
    """The base's evaluation as its stage wrote it."""
    groups = (outcome(space, "evaluate-base") or {"groups": {}})["groups"]
    rows = [Answers(**row) for row in world().once(lambda: read_answers(space.run.path / "evaluation/base.jsonl"))]
    return Evaluation({name: GroupResult(**group) for name, group in groups.items()}, rows)


def _forgetting(space: Workspace, role: str) -> dict[str, float]:
    config, loaded = space.config, space.loaded
    with space.progress.stage("Retention", 2, "steps") as ticker:
        answers = _base_answers(space)
        ticker.advance(1)
        out = forgetting(loaded.roles, role, answers, config.ppo.micro_batch_tokens)
        ticker.advance(2, nats_per_token=out["nats_per_token"])
    return out


def _base_answers(space: Workspace) -> Rollout:
    """The base's answers to the retention prompts, asked for once a process."""
    if space not in _ANSWERS:
        loaded, config = space.loaded, space.config
        _ANSWERS[space] = base_answers(
            loaded.roles,
            loaded.retention_prompts,
            loaded.evaluation_engine,
            config.rollout.max_new_tokens,
            config.seed,
            space.interrupt.poll,
        )
    return _ANSWERS[space]


def drop_checkpoint(space: Workspace, name: str) -> None:
    """Training state that a finished stage needs no more."""
    if world().main:
        shutil.rmtree(space.run.path / "checkpoints" / name, ignore_errors=True)
