"""Supervised fine-tuning on demonstrations: train the role `sft`, keep checkpoints at chosen shares, choose the one PPO starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from srppo.config import RunConfig
from srppo.errors import TrainingStopped
from srppo.models.roles import Roles
from srppo.progress import Progress, Stage
from srppo.records import Example
from srppo.run_folder import RunFolder
from srppo.train.checkpoint import Checkpoint, load_latest
from srppo.train.compute import Compute
from srppo.train.interrupt import Interrupt, Interrupted, StopRequested
from srppo.train.saver import Saver
from srppo.train.supervised import heldout_nll, new_learner, planned_steps, train_supervised

CHECKPOINTS_KEPT = 2  # should the last be damaged, the one before it is there


@dataclass(frozen=True)
class SFTCheckpoint:
    share: float  # of the training
    step: int
    heldout_nll: float | None  # nats a token
    folder: str  # relative to the run folder


@dataclass(frozen=True)
class SFTResult:
    steps: int
    checkpoints: list[SFTCheckpoint]
    kept: SFTCheckpoint

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def share_name(share: float) -> str:
    """The name, and in sft_checkpoints/ the folder, of the checkpoint kept after a share of the training: share-0.5."""
    return f"share-{share:g}"


def choose(checkpoints: Sequence[SFTCheckpoint], keep: str | float) -> SFTCheckpoint:
    """The checkpoint `sft.keep` names. `best` is the lowest held-out loss; without held-out demonstrations it is the last.

    `auto` is the last until the reward card has chosen (see diagnose).
    """
    last = max(checkpoints, key=lambda c: c.step)
    if keep in ("last", "auto"):
        return last
    if keep == "best":
        judged = [c for c in checkpoints if c.heldout_nll is not None]
        return min(judged, key=lambda c: c.heldout_nll or 0.0) if judged else last
    return next(c for c in checkpoints if c.share == keep)


def train_sft(
    roles: Roles,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    config: RunConfig,
    *,
    run: RunFolder,
    progress: Progress,
    compute: Compute,
    interrupt: Interrupt,
) -> SFTResult:
    """Create the role `sft` from the base, train it, and leave it holding the kept checkpoint.

    Writes sft_checkpoints/share-<s>/ (Hugging Face layout or adapter) for every share of sft.checkpoints_at, and resumes from
    checkpoints/sft/ when that holds one. Raises Interrupted after saving, TrainingStopped on repeated non-finite steps.
    """
    sft, steps = config.sft, planned_steps(examples, config.sft)
    shares: dict[int, list[float]] = {}  # of a short training, two may fall on one step
    for share in sorted({*sft.checkpoints_at, 1.0}):
        shares.setdefault(max(1, round(share * steps)), []).append(share)
    resume_folder = run.path / "checkpoints" / "sft"
    roles.create("sft", "base")
    learner = new_learner(roles, "sft", sft)
    found: list[SFTCheckpoint] = []
    done = 0
    like = {"sft": roles.weights("sft"), "optimizer": learner.places()}
    if (saved := load_latest(resume_folder, like, warn=progress.warn)) is not None:
        done = saved.step
        roles.load_state("sft", saved.tensors["sft"])
        learner.load_state(saved.tensors["optimizer"])
        learner.total_skips, learner.consecutive_skips = saved.state["skipped_steps"], saved.state["consecutive_skips"]
        compute.trained_tokens, compute.forward_tokens = saved.state["trained_tokens"], saved.state["forward_tokens"]
        found = [SFTCheckpoint(**c) for c in saved.state["found"]]
        del saved
    run.truncate_metrics(done, "sft")

    saver = Saver(resume_folder, CHECKPOINTS_KEPT, config.background_checkpoints)

    def save(step: int) -> None:
        state = {"found": [asdict(c) for c in found], "skipped_steps": learner.total_skips, "consecutive_skips": learner.consecutive_skips}
        state |= {"trained_tokens": compute.trained_tokens, "forward_tokens": compute.forward_tokens}
        saver.save(Checkpoint(step, {"sft": roles.weights("sft"), "optimizer": learner.state()}, state))

    def after_step(step: int, ticker: Stage) -> bool:
        nonlocal done
        done = step
        saver.check()
        judged = step in shares or (sft.eval_every and step % sft.eval_every == 0)
        nll = heldout_nll(roles, "sft", heldout, sft.micro_batch_tokens, compute) if judged else None
        if nll is not None:
            run.log({"stage": "sft", "step": step, "heldout_nll": nll})
            ticker.advance(step, heldout_loss=nll)
        if step in shares:
            for share in shares[step]:
                folder = f"sft_checkpoints/{share_name(share)}"
                roles.save("sft", run.path / folder)
                found.append(SFTCheckpoint(share, step, nll, folder))
        if step < steps and (step in shares or (sft.checkpoint_every and step % sft.checkpoint_every == 0)):
            save(step)
        return False

    with saver:
        try:
            train_supervised(
                roles,
                "sft",
                examples,
                learner,
                sft,
                steps=steps,
                max_tokens=config.data.max_tokens,
                first_step=done,
                seed=config.seed,
                stage="sft",
                run=run,
                title="SFT",
                progress=progress,
                compute=compute,
                interrupt=interrupt,
                after_step=after_step,
            )
        except TrainingStopped as stop:
            save(done)
            saver.wait()
            raise TrainingStopped(f"{stop}. The state of step {done} is saved in {resume_folder}") from None
        except StopRequested:
            save(done)
            saver.wait()
            raise Interrupted(f"stopped after SFT step {done} of {steps}; the state is saved: continue with --resume") from None
    kept = choose(found, sft.keep)
    if kept.step != steps:
        roles.drop("sft")
        roles.load("sft", run.path / kept.folder)
    return SFTResult(steps, found, kept)
