"""The embedded rollout engine: PyTorch and the transformers model itself, on any device.

Rows wait in the order of their prompt lengths; a prompt that several rows share is read once; a row that ends makes room
for the next one. Prompts are padded at the left in here only.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srppo.errors import ConfigError
from srppo.memory_limit import limits
from srppo.models.compiled import uncompiled
from srppo.models.sharding import gathered
from srppo.records import Rollout
from srppo.rollout.attention import grouped
from srppo.rollout.decode import NextToken, Step, decode, unwrapped
from srppo.rollout.engine import Progress, Sampling
from srppo.rollout.merging import merged
from srppo.rollout.record import check_lengths, position_limit, rollout_of
from srppo.rollout.refill import decode_refilled
from srppo.rollout.slots import fits
from srppo.rollout.stats import DecodeStats
from srppo.seeding import row_uniforms
from srppo.world import deal, world

KEY = "rollout.batch_size"

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from srppo.models.load import SpecialTokens

TOLD_EVERY = 1.0  # seconds after which on_progress is called though no row has ended
AUTOCAST = {"none": None, "bfloat16": torch.bfloat16}


class TorchEngine:
    """A RolloutEngine on the model it is given.

    special: pad id (any valid one: padding is masked) and the EOS ids, of which the first sampled ends a response.
    batch_size: rows decoded at once; wide is fast, memory grows with it. autocast: none, or bfloat16 matrix products except on a CPU.
    cuda_graphs: on a CUDA device replay the steps as graphs. merge_adapters: see merging.py; not under autocast.
    refill: let rows that have ended be replaced while the others go on (off to compare; never with recurrent layers).
    last: what the last `generate` cost.
    """

    def __init__(
        self,
        special: SpecialTokens,
        batch_size: int,
        autocast: str = "none",
        *,
        cuda_graphs: bool = False,
        merge_adapters: bool = True,
        refill: bool = True,
    ):
        if batch_size < 1:
            raise ConfigError(f"rollout.batch_size is {batch_size}; at least one row is decoded at once")
        if autocast not in AUTOCAST:
            raise ConfigError(f"model.autocast is {autocast!r}; it is one of {', '.join(AUTOCAST)}")
        self.special, self.batch_size, self.autocast = special, batch_size, AUTOCAST[autocast]
        self.cuda_graphs, self.merge_adapters, self.refill, self.last = cuda_graphs, merge_adapters, refill, DecodeStats()

    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        prompt_index: Sequence[int] | None = None,
        on_progress: Progress | None = None,
    ) -> Rollout:
        """One response a row, in the order of the rows (see RolloutEngine). The record's tensors are on the CPU.

        The model is used without gradients, in evaluation mode, and left in the mode it was in.
        Raises DataError for an empty prompt or one that leaves no room for max_new_tokens within the model's positions,
        ModelError when the model gives NaN or infinite logits.
        """
        merge = self.merge_adapters and (self.autocast is None or model.device.type == "cpu")
        with self.generating(model), merged(unwrapped(model)) if merge else contextlib.nullcontext():
            step, room = NextToken(model, self.special.pad_id), position_limit(unwrapped(model).config)
            return self.generate_by(step, room, prompts, seeds, sampling, prompt_index, on_progress)

    def generate_by(
        self,
        step: Step,
        room: int | None,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        prompt_index: Sequence[int] | None = None,
        on_progress: Progress | None = None,
        models: int = 1,
    ) -> Rollout:
        """`generate` by any function that says the next token's logits, within `generating` for each model behind it.

        room: how many tokens a sequence may have, None for no limit. models: how many keep keys and values of a row; so many times
        fewer rows are decoded at once.
        Of several processes each decodes its share of the rows, and all get all; on_progress speaks of the share until all is there.
        """
        assert len(prompts) == len(seeds) and (prompt_index is None or len(prompt_index) == len(prompts))
        rows = [tuple(p) for p in prompts]
        limit = sampling.max_new_tokens
        check_lengths([len(p) for p in rows], limit, room)
        here = world()
        began, stats = time.perf_counter(), DecodeStats()
        key = KEY if models == 1 else f"{KEY} (of {models} models together)"  # whose limit is no other's
        share = deal([len(p) + limit for p in rows], here.size)[here.rank]

        def decode_share() -> tuple[list[int], Tensor, Tensor]:
            def decode(width: int) -> tuple[Tensor, Tensor]:
                return self._decode(step, [rows[r] for r in share], [seeds[r] for r in share], sampling, on_progress, stats, width)

            return share, *limits.within(key, max(1, self.batch_size // models), 1, decode, alone=True)

        decoded = here.each(decode_share)
        if on_progress is not None and not here.alone:
            here.each(lambda: on_progress(len(rows), len(rows)))  # it may ask for a stop, in one process alone
        tokens = torch.zeros(len(rows), limit, dtype=torch.int64)
        logprobs = torch.zeros(len(rows), limit, dtype=torch.float32)
        for part, own_tokens, own_logprobs in decoded:
            tokens[part], logprobs[part] = own_tokens, own_logprobs
        rollout = rollout_of(rows, prompt_index, tokens, logprobs, self.special.eos_ids)
        stats.idle_row_steps = stats.row_steps - (int(rollout.mask[share].sum()) - len(share))
        stats.seconds = time.perf_counter() - began
        self.last = stats
        return rollout

    def _decode(
        self,
        step: Step,
        rows: list[tuple[int, ...]],
        seeds: Sequence[int],
        sampling: Sampling,
        on_progress: Progress | None,
        stats: DecodeStats,
        width: int,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, T] int64 and their log-probabilities [B, T] float32, on the CPU, in the order of the rows; `width` rows at once."""
        limit, eos_ids = sampling.max_new_tokens, self.special.eos_ids
        # longest first (too large a batch shows at once), equal prompts side by side
        order = sorted(range(len(rows)), key=lambda r: (-len(rows[r]), rows[r]))
        tokens = torch.zeros(len(rows), limit, dtype=torch.int64)
        logprobs = torch.zeros(len(rows), limit, dtype=torch.float32)
        ended_rows, told = 0, time.monotonic()

        def advance(count: int) -> None:
            nonlocal ended_rows, told
            ended_rows += count
            now = time.monotonic()
            if on_progress is not None and (count or now - told >= TOLD_EVERY):  # it may ask for a stop
                told = now
                on_progress(ended_rows, len(rows))

        ordered = [rows[r] for r in order]
        drawn = row_uniforms([seeds[r] for r in order], limit) if rows else torch.zeros(0, limit)
        if self.refill and rows and fits(step.new_cache(), step.config):
            static = self.cuda_graphs and step.device.type == "cuda"
            sampled, scores = decode_refilled(step, ordered, drawn.to(step.device), eos_ids, sampling, width, advance, stats, static)
            tokens[order], logprobs[order] = sampled.cpu(), scores.cpu()
        else:
            for start in range(0, len(order), width):
                part = slice(start, start + width)
                sampled, scores = decode(step, ordered[part], drawn[part].to(step.device), eos_ids, sampling, advance, stats)
                tokens[order[part]], logprobs[order[part]] = sampled.cpu(), scores.cpu()
        return tokens, logprobs

    @contextlib.contextmanager
    def generating(self, model: PreTrainedModel) -> Iterator[None]:
        """No gradients, evaluation mode (dropout off, and no gradient checkpointing, which forbids a cache), autocast; then as before."""
        training = [m for m in model.modules() if m.training]
        model.eval()
        try:
            # not inference_mode: buffers that a model fills on its way would be unusable in training
            with uncompiled(model), torch.no_grad(), gathered(unwrapped(model)):
                device = model.device.type  # of gathered weights: spread ones may be elsewhere
                # On a CPU autocast converts all weights anew for each token: decoding in it was 16 % slower than in float32.
                autocast = self.autocast is not None and device != "cpu"
                with torch.autocast(device, self.autocast, enabled=autocast), grouped(unwrapped(model)):
                    yield
        finally:
            for module in training:
                module.training = True
