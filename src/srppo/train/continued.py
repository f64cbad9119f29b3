"""Continued SFT, the baseline PPO must beat: the same SFT model trained further with as much compute as PPO used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

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
from srppo.train.sft import CHECKPOINTS_KEPT
from srppo.train.supervised import heldout_nll, new_learner, train_supervised

ROLE = "sft_continued"
EVALUATIONS = 20  # of the held-out loss over the whole budget
PATIENCE = 5  # evaluations without a lower held-out loss after which the rest of the budget cannot change what is kept


@dataclass(frozen=True)
class ContinuedResult:
    budget_steps: int  # optimizer steps that cost as many token passes as PPO
    trained_steps: int
    kept_step: int  # 0: no further step lowered the held-out loss, the SFT model itself is kept
    heldout_nll: float | None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def budget_steps(examples: Sequence[Example], batch_size: int, passes: int) -> int:
    """How many SFT steps cost `passes` forward-equivalent token passes (a trained token counts 3)."""
    mean_tokens = sum(len(e.ids) for e in examples) / len(examples)
    return max(1, round(passes / (3 * mean_tokens * min(batch_size, len(examples)))))


def continue_sft(
    roles: Roles,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    config: RunConfig,
    *,
    passes: int,
    run: RunFolder,
    progress: Progress,
    compute: Compute,
    interrupt: Interrupt,
) -> ContinuedResult:
    """Train the role `sft_continued`, a copy of the SFT model, within the budget, and leave it at its lowest held-out loss.

    Without held-out demonstrations the whole budget is used and the last state kept. Resumes from checkpoints/sft_continued/ when
    that holds a checkpoint. Raises Interrupted after saving, TrainingStopped (state saved) on repeated non-finite steps.
    """
    sft, steps = config.sft, budget_steps(examples, config.sft.batch_size, passes)
    learner = new_learner(roles, ROLE, sft)
    folder = run.path / "checkpoints" / ROLE
    kept_step, done, waited = 0, 0, 0
    best_nll: float | None
    like = {ROLE: roles.weights(ROLE), "best": roles.weights(ROLE), "optimizer": learner.places()}
    if (saved := load_latest(folder, like, warn=progress.warn)) is not None:
        done, kept_step, waited, best_nll = saved.step, saved.state["kept_step"], saved.state["waited"], saved.state["best_nll"]
        best_state: Mapping[str, Tensor] = saved.tensors["best"]
        roles.load_state(ROLE, saved.tensors[ROLE])
        learner.load_state(saved.tensors["optimizer"])
        learner.total_skips, learner.consecutive_skips = saved.state["skipped_steps"], saved.state["consecutive_skips"]
        compute.trained_tokens = saved.state["trained_tokens"]
        del saved
    else:
        best_nll, best_state = heldout_nll(roles, ROLE, heldout, sft.micro_batch_tokens), roles.state(ROLE)
    run.truncate_metrics(done, ROLE)
    every = max(1, steps // EVALUATIONS)

    saver = Saver(folder, CHECKPOINTS_KEPT, config.background_checkpoints)

    def save() -> None:
        state = {"kept_step": kept_step, "waited": waited, "best_nll": best_nll}
        state |= {"skipped_steps": learner.total_skips, "consecutive_skips": learner.consecutive_skips}
        state |= {"trained_tokens": compute.trained_tokens}
        saver.save(Checkpoint(done, {ROLE: roles.weights(ROLE), "best": best_state, "optimizer": learner.state()}, state))

    def after_step(step: int, ticker: Stage) -> bool:
        nonlocal done
        done = step
        saver.check()
        ended = best_nll is not None and (step % every == 0 or step == steps) and look(step, ticker)
        if not ended and step < steps and sft.checkpoint_every and step % sft.checkpoint_every == 0:
            save()
        return ended

    def look(step: int, ticker: Stage) -> bool:
        """Keep the weights where the held-out loss is the lowest; whether the rest of the budget cannot change what is kept."""
        nonlocal best_nll, best_state, kept_step, waited
        nll = heldout_nll(roles, ROLE, heldout, sft.micro_batch_tokens)
        assert nll is not None and best_nll is not None
        run.log({"stage": ROLE, "step": step, "heldout_nll": nll})
        ticker.advance(step, heldout_loss=nll)
        if nll < best_nll:
            best_nll, best_state, kept_step, waited = nll, roles.state(ROLE), step, 0
        else:
            waited += 1
        return waited >= PATIENCE

    with saver:
        try:
            train_supervised(
                roles,
                ROLE,
                examples,
                learner,
                sft,
                steps=steps,
                max_tokens=config.data.max_tokens,
                first_step=done,
                seed=config.seed + 1,  # another order of the demonstrations than the SFT's own
                stage=ROLE,
                run=run,
                title="Continued SFT",
                progress=progress,
                compute=compute,
                interrupt=interrupt,
                after_step=after_step,
            )
        except TrainingStopped as stop:
            save()
            saver.wait()
            raise TrainingStopped(f"{stop}. The state of step {done} is saved in {folder}") from None
        except StopRequested:
            save()
            saver.wait()
            raise Interrupted(
                f"stopped after step {done} of {steps} of continued SFT; the state is saved: continue with --resume"
            ) from None
    if best_nll is None:
        kept_step = done
    else:
        roles.load_state(ROLE, best_state)
    return ContinuedResult(steps, done, kept_step, best_nll)
