"""The reward card as a stage of a run: made between SFT and PPO, kept in diagnose.json, and obeyed where the recipe says auto."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from srppo.card import model_card
from srppo.config import RunConfig
from srppo.diagnose import Checkpoints, RewardCard, diagnose, tell
from srppo.diagnose.evidence import CANDIDATE, OTHER
from srppo.errors import RewardRefused, RunFolderError
from srppo.methods.srppo import first_beta
from srppo.stages import finish, outcome
from srppo.train.checkpoint import load_own, saved_steps
from srppo.train.interrupt import Interrupted, StopRequested
from srppo.train.sft import share_name
from srppo.workspace import Workspace, metered
from srppo.world import world

STAGE = "diagnose"
MOVED = "start"  # stages/start.json: which checkpoint the card has put in place of sft/
UNKNOWN = "unknown"


def diagnosis_stage(space: Workspace) -> Workspace:
    """Make the card (once a run), and return the workspace with its decisions in place of every `auto`; the role `sft` (and sft/) is
    then the checkpoint PPO starts from.

    Raises RewardRefused on no-go, unless diagnose.on_no_go is warn, and Interrupted after Ctrl-C.
    """
    done = card_outcome(space)
    if done is None and not space.config.diagnose.enabled:
        return space
    if space.config.reward.kind != "coherent":
        space.progress.note("no reward card: it judges the coherent reward, and reward.kind is preference_model")
        return space
    if done is None and ppo_begun(space):
        space.progress.note("no reward card: PPO has begun without one, and goes on as it began")
        return space
    if done is None:
        card = make_card(space)
        tell(card, space.progress)
        done = note_card(space, card)
    obeyed = obey(space, done["decision"])
    if done["verdict"] == "no-go" and space.config.diagnose.enabled and not ppo_begun(space):
        _refuse(obeyed, done["reasons"])
    return obeyed


def card_outcome(space: Workspace) -> dict[str, Any] | None:
    """What the finished stage says: verdict, reasons, decision; None before it. Raises RunFolderError where its file is damaged."""
    cure = "put it back, or begin anew with --overwrite" if ppo_begun(space) else "delete it, and --resume makes the reward card anew"
    done = outcome(space, STAGE, cure)
    if done is None:
        return None
    decision = done.get("decision") if isinstance(done, dict) else None
    whole = isinstance(decision, dict) and {"start", "numerator", "beta", "automatic"} <= set(decision)
    if not whole or not isinstance(done.get("reasons"), list) or "verdict" not in done:
        file = space.run.path / f"stages/{STAGE}.json"
        raise RunFolderError(f"{file}: damaged (it says no decision of the reward card); {cure}")
    return done


@metered("diagnose")
def make_card(space: Workspace) -> RewardCard:
    """Make the card and write diagnose.json. The roles are left as they were.

    Once PPO has begun nothing is left open: the card then looks at what PPO uses.
    """
    loaded, config = space.loaded, (_as_used(space) if ppo_begun(space) else space.config)
    try:
        made = diagnose(
            loaded.roles,
            checkpoints(space),
            loaded.demonstrations.heldout,
            loaded.demonstrations.heldout_prompts,
            loaded.prompts,
            config,
            engine=loaded.evaluation_engine,
            extrapolator=loaded.extrapolator,
            decode=loaded.decode,
            scorer=loaded.scorer,
            progress=space.progress,
            check=space.interrupt.check,
            poll=space.interrupt.poll,
        )
    except StopRequested:
        raise Interrupted("stopped while the reward card was made, which --resume starts again; finished stages are saved") from None
    card = world().share(made)  # what is decided by it is decided alike
    if ppo_begun(space):  # what an earlier card chose is still its choice
        found = card_outcome(space)
        card = replace(card, decision=replace(card.decision, automatic=found["decision"]["automatic"] if found else []))
    space.run.write_json("diagnose.json", card.to_dict())
    return card


def ppo_begun(space: Workspace) -> bool:
    """Whether PPO has left anything that a resumed run goes on from."""
    folder = space.run.path / "checkpoints" / "ppo"
    return outcome(space, "ppo") is not None or world().once(lambda: bool(saved_steps(folder)))


def _as_used(space: Workspace) -> RunConfig:
    """The configuration with the values PPO uses in place of every `auto`."""
    found = card_outcome(space)
    reward = _decided(space.config, found["decision"]).reward if found else space.config.reward
    settled = {"kl_coef": first_beta(reward), "checkpoint": "sft" if reward.checkpoint == "auto" else reward.checkpoint}
    return space.config.model_copy(
        update={
            "reward": reward.model_copy(update=settled),
            # The last of `checkpoints` is the only start then, and with PPO begun that is the one sft/ holds, whichever was chosen.
            "sft": space.config.sft.model_copy(update={"keep": "last"}),
        }
    )


def note_card(space: Workspace, card: RewardCard) -> dict[str, Any]:
    """Finish the stage: what PPO goes by from here on."""
    return finish(space, STAGE, {"verdict": card.verdict, "reasons": card.reasons, "decision": asdict(card.decision)})


def checkpoints(space: Workspace) -> Checkpoints:
    """The SFT checkpoints of the run; `sft` is the only one where sft.checkpoint gave it."""
    trained = outcome(space, "sft") or {}
    roles = {"reward": "reward"} if space.loaded.roles.has("reward") else {}
    elsewhere: dict[str, str] = {}
    if isinstance(space.config.reward.checkpoint, str) and space.config.reward.checkpoint not in ("auto", "sft") and not roles:
        elsewhere[OTHER] = space.config.reward.checkpoint
    if "kept" not in trained:
        return Checkpoints(["sft"], {"sft": "sft", **roles}, elsewhere)
    steps = {c["step"]: c["share"] for c in trained["checkpoints"]}  # of two shares on one step, the later
    kept = share_name(trained["kept"]["share"])
    others = [share_name(share) for step, share in sorted(steps.items()) if step != trained["kept"]["step"]]
    folders = {share_name(c["share"]): str(space.run.path / c["folder"]) for c in trained["checkpoints"]} | elsewhere
    held = _held(space)
    names = [*others, kept]
    if ppo_begun(space):  # the default is what it started from
        names = [*(n for n in names if n != held), held]
    return Checkpoints(names, roles if held == UNKNOWN else {held: "sft", **roles}, {n: f for n, f in folders.items() if n != held})


def _held(space: Workspace) -> str:
    """The checkpoint of this run's SFT that the role `sft` and the folder sft/ hold: the one it kept, until the card puts another there;
    UNKNOWN where it was stopped in doing so."""
    moved, trained = outcome(space, MOVED), outcome(space, "sft")
    if moved is not None:
        return str(moved["held"])
    assert trained is not None, "the SFT comes before the card"
    return share_name(trained["kept"]["share"])


def start_checkpoint(space: Workspace) -> dict[str, Any] | None:
    """The SFT checkpoint that sft/ holds and PPO starts from (share, step, loss, folder): the card's where it has moved it. None where
    this run has trained no SFT."""
    trained = outcome(space, "sft") or {}
    if "kept" not in trained:
        return None
    held = _held(space)
    kept: dict[str, Any] = trained["kept"]
    return next((c for c in trained["checkpoints"] if share_name(c["share"]) == held), kept)


def obey(space: Workspace, decision: dict[str, Any]) -> Workspace:
    """Put the card's decisions in place of every `auto`."""
    if "sft.keep" in decision["automatic"] and decision["start"] != _held(space):
        _move(space, decision["start"])
    return replace(space, config=_decided(space.config, decision))


def _move(space: Workspace, start: str) -> None:
    """Put another checkpoint in place of `sft` and sft/. A stop on the way is mended by the next run."""
    roles, run = space.loaded.roles, space.run
    folder = run.path / f"sft_checkpoints/{start}"
    load_own(roles, CANDIDATE, folder)  # whether it is there and whole, before anything is deleted
    roles.drop(CANDIDATE)
    finish(space, MOVED, {"held": UNKNOWN})
    for stale in ("stages/evaluate-sft.json", "evaluation/sft.jsonl"):  # they speak of the checkpoint that was there
        if world().main:
            (run.path / stale).unlink(missing_ok=True)
    roles.drop("sft")
    load_own(roles, "sft", folder)
    roles.save("sft", run.path / "sft", card=model_card(space.config, "sft"))
    finish(space, MOVED, {"held": start})


def _decided(config: RunConfig, decision: dict[str, Any]) -> RunConfig:
    """The configuration with the card's reward settings in place of `auto`."""
    changes: dict[str, Any] = {}
    if "reward.checkpoint" in decision["automatic"]:
        same = decision["numerator"] == decision["start"]
        changes["checkpoint"] = "sft" if same else float(decision["numerator"].removeprefix("share-"))
    if "reward.kl_coef" in decision["automatic"]:
        changes["kl_coef"] = decision["beta"]
    return config.model_copy(update={"reward": config.reward.model_copy(update=changes)})


def _refuse(space: Workspace, reasons: list[str]) -> None:
    if space.config.diagnose.on_no_go == "warn":
        space.progress.warn("the reward card says no-go; PPO is run all the same, as diagnose.on_no_go says")
        return
    from srppo.report import write_report  # plotting is slow to import and needed only here

    world().once(lambda: write_report(space.run.path))
    raise RewardRefused(
        f"the reward card says no-go, so PPO was not run. {' '.join(reasons[:1])} The card is in {space.run.path / 'report.html'}. "
        "To run PPO all the same: add --resume --diagnose.on_no_go warn"
    )
