"""How long prompts and answers are: of the recipe's data where they lie here and are small, else the recipe's limits."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path

from srppo.config import RunConfig
from srppo.data.chat import ChatFormat
from srppo.data.demonstrations import load_demonstrations
from srppo.data.prompts import load_prompts
from srppo.errors import SrppoError
from srppo.models.tokens import load_tokenizer, special_tokens
from srppo.planning.architecture import Architecture
from srppo.planning.inputs import Lengths
from srppo.rollout.record import position_limit

SMALL = 64 * 2**20  # bytes of a data file that is read for a plan


def limits(config: RunConfig, context: int | None, response: float | None = None) -> Lengths:
    """What the recipe allows. Memory is planned for prompts and demonstrations at their limits."""
    data, new = config.data, config.rollout.max_new_tokens
    prompt = data.max_prompt_tokens if context is None else max(1, min(data.max_prompt_tokens, context - new))
    whole = data.max_tokens if context is None else min(data.max_tokens, context)
    return Lengths(prompt, new, prompt, min(new, response or new), whole, whole)


def find_lengths(config: RunConfig, architecture: Architecture, response: float | None = None) -> tuple[Lengths, str]:
    """The lengths and where they are from, in words. response: the mean of the responses to come, where the user knows better."""
    context = position_limit(architecture.config)
    allowed = limits(config, context, response)
    sources = [s for s in (config.data.demonstrations, config.data.prompts, config.evaluation.prompts) if s]
    if not config.data.demonstrations:
        return allowed, "the recipe's limits (no data.demonstrations)"
    for source in sources:
        path = Path(source).expanduser()
        if not path.is_file() or path.stat().st_size > SMALL:
            return allowed, f"the recipe's limits ({source} is not a local file of at most {SMALL >> 20} MiB)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _measured(config, context, response, allowed), "the recipe's data"
    except (SrppoError, OSError) as error:
        return allowed, f"the recipe's limits (the data could not be read: {error})"


def _measured(config: RunConfig, context: int | None, response: float | None, allowed: Lengths) -> Lengths:
    data, seed, new = config.data, config.seed, config.rollout.max_new_tokens
    tokenizer = load_tokenizer(config.model)
    chat = ChatFormat.from_config(tokenizer, special_tokens(tokenizer).eos_ids, data)
    room = None if context is None else context - new + 1
    demonstrations = load_demonstrations(data, chat, seed, context=context)
    asked = demonstrations.train_prompts
    if data.prompts:
        asked = load_prompts(data.prompts, data.prompts_split, data, chat, seed, data.max_prompts, context=room).prompts
    judged: Sequence[object] = demonstrations.heldout_prompts
    if config.evaluation.prompts:
        source, split, most = config.evaluation.prompts, config.evaluation.prompts_split, config.evaluation.max_prompts
        judged = load_prompts(source, split, data, chat, seed, most, per_group=True, context=room).prompts
    prompts = [len(p.ids) for p in asked] or [allowed.max_prompt]
    wholes = [len(e.ids) for e in demonstrations.train]
    answers = statistics.fmean(sum(e.target_mask) for e in demonstrations.train)
    return Lengths(
        max(prompts),
        new,
        statistics.fmean(prompts),
        min(new, response or max(1.0, answers)),
        max(wholes),
        statistics.fmean(wholes),
        len(wholes),
        len(judged),
        True,
    )
