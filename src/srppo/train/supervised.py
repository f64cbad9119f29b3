"""The supervised loop shared by SFT and continued SFT: batches in, optimizer steps out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from srppo.config import SFTConfig
from srppo.data.batching import micro_batches, step_batch, steps_per_epoch
from srppo.errors import TrainingStopped
from srppo.losses.supervised import cross_entropy
from srppo.masking import example_batch, token_chunks
from srppo.memory_limit import limits
from srppo.models.roles import Roles
from srppo.progress import Progress, Stage
from srppo.records import Example, LossOutput, TokenBatch
from srppo.run_folder import RunFolder
from srppo.seeding import seed_dropout
from srppo.train.compute import Compute
from srppo.train.interrupt import Interrupt
from srppo.train.learner import Cut, Learner, cosine_lr, silenced
from srppo.world import deal, world

KEY = "sft.micro_batch_tokens"
MAX_SKIPPED_STEPS = 5  # consecutive non-finite steps after which the run stops


def new_learner(roles: Roles, role: str, config: SFTConfig) -> Learner:
    """An AdamW over the role's trainable parameters."""
    return Learner(roles.parameters(role), config.learning_rate, config.max_grad_norm, config.weight_decay, config.adam_epsilon)


def planned_steps(examples: Sequence[Example], config: SFTConfig) -> int:
    """Optimizer steps of the training: `steps`, or `epochs` passes."""
    return config.steps or max(1, round(config.epochs * steps_per_epoch(len(examples), config.batch_size)))


def heldout_nll(roles: Roles, role: str, examples: Sequence[Example], tokens: int, compute: Compute | None = None) -> float | None:
    """Mean negative log-likelihood of held-out target tokens, nats a token; None without examples."""
    here = world()
    mine = [examples[i] for i in deal([len(e.ids) for e in examples], here.size)[here.rank]]

    def run(size: int) -> tuple[float, int]:
        total, count = 0.0, 0
        chunks = token_chunks([len(e.ids) for e in mine], size)
        spare = here.most(len(chunks)) - len(chunks) if roles.spread else 0  # all run a model as often as each other
        for chunk in chunks:
            batch = example_batch([mine[i] for i in chunk], roles.special.pad_id).to(roles.device)
            total -= float(roles.score(role, batch).logprobs.double().sum())
            count += batch.targets
        for _ in range(spare):
            roles.score(role, example_batch(examples[:1], roles.special.pad_id).to(roles.device))
        return total, count

    total, count = limits.within(KEY, tokens, max((len(e.ids) for e in mine), default=1), run)
    if compute:
        compute.forward_tokens += sum(len(e.ids) for e in examples)
    said = here.gather((total, count))
    total, count = sum(t for t, _ in said), sum(c for _, c in said)
    return total / count if count else None


def train_supervised(
    roles: Roles,
    role: str,
    examples: Sequence[Example],
    learner: Learner,
    config: SFTConfig,
    *,
    steps: int,
    max_tokens: int,
    first_step: int,
    seed: int,
    stage: str,
    run: RunFolder,
    title: str,
    progress: Progress,
    compute: Compute,
    interrupt: Interrupt,
    after_step: Callable[[int, Stage], bool],
) -> None:
    """Optimizer steps first_step + 1 .. steps on the cross-entropy of the target tokens.

    after_step(steps done, stage) is called after each; it may evaluate and save, and returns True to stop early.
    Raises TrainingStopped after MAX_SKIPPED_STEPS consecutive non-finite steps, StopRequested at a safe point.
    """

    def loss_of(batch: TokenBatch) -> Callable[[], LossOutput]:
        return lambda: cross_entropy(roles.score(role, batch, train=True).logprobs)

    here = world()

    def cut(rows: Sequence[Example], size: int) -> list[TokenBatch]:
        batches = micro_batches(
            rows,
            micro_batch_tokens=size,
            pad_id=roles.special.pad_id,
            batching=config.batching,
            max_tokens=max_tokens,
        )
        return [b.to(roles.device) for b in batches]

    def work(step: int, mine: Sequence[Example], spare: Sequence[Example]) -> Cut:
        def losses(size: int) -> Iterator[Callable[[], LossOutput]]:
            seed_dropout(seed, stage, step, here.rank)
            yield from (loss_of(b) for b in cut(mine, size))
            yield from (silenced(loss_of(cut([row], size)[0])) for row in spare)

        return Cut(KEY, config.micro_batch_tokens, max((len(e.ids) for e in mine), default=1), losses)

    with progress.stage(title, steps, "steps", first_step) as ticker:
        for step in range(first_step, steps):
            interrupt.check()
            started = time.perf_counter()
            lr = cosine_lr(step, steps, config.learning_rate, config.warmup, config.final_lr_fraction)
            learner.set_lr(lr)
            rows = step_batch(examples, step=step, batch_size=config.batch_size, seed=seed, batching=config.batching)
            mine = [rows[i] for i in deal([len(e.ids) for e in rows], here.size)[here.rank]]
            batches = cut(mine, limits.size(KEY, config.micro_batch_tokens))
            own = (sum(b.targets for b in batches), sum(b.attention_mask.numel() for b in batches), len(batches), limits.news())
            counts = here.gather(own)
            limits.hear([c[3] for c in counts])
            targets, places, most = sum(c[0] for c in counts), sum(c[1] for c in counts), max(c[2] for c in counts)
            tokens = sum(len(e.ids) for e in rows)
            spare = most - len(batches) if roles.spread else 0  # all run a model as often as each other
            result = learner.step(work(step, mine, rows[:1] * spare), targets)
            if result.skipped:
                progress.warn(f"{stage} step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}: step skipped")
                if learner.consecutive_skips >= MAX_SKIPPED_STEPS:
                    raise TrainingStopped(
                        f"{stage}: {MAX_SKIPPED_STEPS} steps in a row had a NaN or infinite loss or gradient. "
                        "Lower sft.learning_rate, or use model.dtype float32"
                    )
            compute.trained_tokens += tokens
            seconds = time.perf_counter() - started
            record = {"loss": result.loss, "lr": lr, "grad_norm": result.grad_norm, "tokens_per_second": tokens / seconds}
            record |= {
                "timing/step": seconds,
                "padding_share": 0.0 if roles.flat else 1 - tokens / places,
            }
            run.log({"stage": stage, "step": step + 1, **record, **limits.metrics(), "skipped_steps": learner.total_skips})
            ticker.advance(step + 1, loss=result.loss, lr=lr)
            if after_step(step + 1, ticker):
                return
