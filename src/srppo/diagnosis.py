"""The reward card as a stage of a run: made between SFT and PPO, kept in diagnose.json, and obeyed where the recipe says auto."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from srppo.card import model_card
from srppo.diagnose import Checkpoints, RewardCard, diagnose, share_name, tell
from srppo.errors import RewardRefused
from srppo.stages import finish, outcome
from srppo.train.interrupt import Interrupted, StopRequested
from srppo.workspace import Workspace

STAGE = "diagnose"


def diagnosis_stage(space: Workspace) -> Workspace:
    """Make the card (once a run), and return the workspace with its decisions in place of every `auto`; the role `sft` (and sft/) is
    then the checkpoint PPO starts from.

    Raises RewardRefused on no-go, unless diagnose.on_no_go is warn, and Interrupted after Ctrl-C.
    """
    if not space.config.diagnose.enabled:
        return space
    done = outcome(space, STAGE)
    if done is None:
        card = make_card(space)
        tell(card, space.progress)
        done = note_card(space, card)
    obeyed = obey(space, done["decision"])
    if done["verdict"] == "no-go":
        _refuse(obeyed, done["reasons"])
    return obeyed


def make_card(space: Workspace) -> RewardCard:
    """Make the card and write diagnose.json. The roles are left as they were."""
    loaded, config = space.loaded, space.config
    try:
        card = diagnose(
            loaded.roles,
            checkpoints(space),
            loaded.demonstrations.heldout,
            loaded.demonstrations.heldout_prompts,
            loaded.prompts,
            config,
            engine=loaded.evaluation_engine,
            decode=loaded.decode,
            scorer=loaded.scorer,
            progress=space.progress,
            check=space.interrupt.check,
        )
    except StopRequested:
        raise Interrupted("stopped while the reward card was made, which --resume starts again; finished stages are saved") from None
    space.run.write_json("diagnose.json", card.to_dict())
    return card


def note_card(space: Workspace, card: RewardCard) -> dict[str, Any]:
    """Finish the stage: what PPO goes by from here on."""
    return finish(space, STAGE, {"verdict": card.verdict, "reasons": card.reasons, "decision": asdict(card.decision)})


def checkpoints(space: Workspace) -> Checkpoints:
    """The SFT checkpoints of the run; `sft` is the only one where sft.checkpoint gave it."""
    trained = outcome(space, "sft") or {}
    roles = {"reward": "reward"} if space.loaded.roles.has("reward") else {}
    if "kept" not in trained:
        return Checkpoints(["sft"], {"sft": "sft", **roles}, {})
    steps = {c["step"]: c["share"] for c in trained["checkpoints"]}  # of two shares on one step, the later
    kept = share_name(trained["kept"]["share"])
    others = [share_name(share) for step, share in sorted(steps.items()) if step != trained["kept"]["step"]]
    folders = {share_name(c["share"]): str(space.run.path / c["folder"]) for c in trained["checkpoints"]}
    held = ((outcome(space, STAGE) or {}).get("decision") or {}).get("start", kept)
    return Checkpoints([*others, kept], {held: "sft", **roles}, {n: f for n, f in folders.items() if n != held})


def obey(space: Workspace, decision: dict[str, Any]) -> Workspace:
    """Put the card's decisions in place of every `auto`."""
    config, roles = space.config, space.loaded.roles
    automatic = set(decision["automatic"])
    if "sft.keep" in automatic:
        kept = share_name(outcome(space, "sft")["kept"]["share"])  # type: ignore[index]  # automatic only after a training
        if decision["start"] != kept:
            roles.drop("sft")
            roles.load("sft", space.run.path / f"sft_checkpoints/{decision['start']}")
            roles.save("sft", space.run.path / "sft", card=model_card(config, "sft"))
    changes: dict[str, Any] = {}
    if "reward.checkpoint" in automatic:
        same = decision["numerator"] == decision["start"]
        changes["checkpoint"] = "sft" if same else float(decision["numerator"].removeprefix("share-"))
    if "reward.kl_coef" in automatic:
        changes["kl_coef"] = decision["beta"]
    return replace(space, config=config.model_copy(update={"reward": config.reward.model_copy(update=changes)}))


def _refuse(space: Workspace, reasons: list[str]) -> None:
    if space.config.diagnose.on_no_go == "warn":
        space.progress.warn("the reward card says no-go; PPO is run all the same, as diagnose.on_no_go says")
        return
    raise RewardRefused(
        f"the reward card says no-go, so PPO was not run. {reasons[0]} The card is in {space.run.path / 'diagnose.json'}. "
        "To run PPO all the same: add --resume --diagnose.on_no_go warn"
    )
