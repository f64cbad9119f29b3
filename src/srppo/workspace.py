"""Everything a run works with, opened once: the locked folder, data, roles, engine and scorer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers.utils.logging import disable_progress_bar

from srppo.config import RunConfig, dump
from srppo.data.chat import ChatFormat
from srppo.data.demonstrations import Demonstrations, load_demonstrations
from srppo.data.prompts import load_prompts
from srppo.data.report import data_summary
from srppo.data.sources import read_rows
from srppo.errors import ConfigError, DataError
from srppo.models.roles import Roles, build_roles
from srppo.progress import Progress
from srppo.records import Prompt
from srppo.rollout.engine import RolloutEngine, Sampling, bias_warning
from srppo.rollout.torch_engine import TorchEngine, position_limit
from srppo.run_folder import RunFolder
from srppo.scoring import Scorer, load_scorer
from srppo.threads import set_threads
from srppo.train.interrupt import Interrupt


@dataclass(frozen=True)
class Loaded:
    """Models and data."""

    roles: Roles
    chat: ChatFormat
    demonstrations: Demonstrations
    prompts: list[Prompt]  # of PPO
    evaluation_prompts: list[Prompt]
    retention_prompts: list[Prompt]
    scorer: Scorer | None
    engine: RolloutEngine  # of PPO
    evaluation_engine: RolloutEngine
    sampling: Sampling  # of the rollouts
    data_summary: dict[str, Any]

    def decode(self, ids: list[int]) -> str:
        """A response as text, without EOS and special tokens."""
        return self.chat.response_text(ids)


@dataclass(frozen=True)
class Workspace:
    """An open run."""

    config: RunConfig
    run: RunFolder
    progress: Progress
    interrupt: Interrupt
    loaded: Loaded
    started: float  # time.monotonic() at opening
    seconds_before: float  # of the processes that began this run

    def elapsed(self) -> float:
        """Wall seconds of the run so far, resumed ones included."""
        return self.seconds_before + time.monotonic() - self.started


def check_inputs(config: RunConfig) -> None:
    """Fail on what can be known before a model is loaded. Raises ConfigError or DataError."""
    if not config.model.name:
        raise ConfigError("model.name is not set: give a hub id, a Hugging Face folder or a GGUF file")
    if not config.data.demonstrations:
        raise ConfigError("data.demonstrations is not set: give a file, a folder saved by `datasets`, or a hub id")
    load_scorer(config.evaluation.scorer)
    read_rows(config.data.demonstrations, config.data.demonstrations_split)
    if config.data.prompts:
        read_rows(config.data.prompts, config.data.prompts_split)
    for source in (config.evaluation.prompts, config.evaluation.retention_prompts):
        if source:
            read_rows(source, config.evaluation.prompts_split)


@contextmanager
def open_workspace(config: RunConfig, progress: Progress, *, resume: bool = False, overwrite: bool = False) -> Iterator[Workspace]:
    """Check the inputs, take the run folder, load models and data, and report on the data. Signals are caught inside."""
    started = time.monotonic()
    progress.note(set_threads(config.threads))
    RunFolder.check(config.output, resume=resume, overwrite=overwrite)
    check_inputs(config)
    loaded = _load(config, progress)  # before the folder is touched: a wrong model or file leaves no trace
    with RunFolder.open(config.output, dump(config), resume=resume, overwrite=overwrite) as run, Interrupt() as interrupt:
        before = run.read_json("elapsed.json")["seconds"] if run.has("elapsed.json") else 0.0
        space = Workspace(config, run, progress, interrupt, loaded, started, before)
        run.write_json("data.json", loaded.data_summary)
        try:
            yield space
        finally:
            run.write_json("elapsed.json", {"seconds": space.elapsed()})


def _load(config: RunConfig, progress: Progress) -> Loaded:
    """Models, data and scorer. Writes nothing."""
    disable_progress_bar()  # transformers' bars for shards and tensors would tear ours
    roles = build_roles(config)
    progress.note(f"model: {config.model.name}, {config.tuning.kind} tuning, on {roles.device}")
    chat = ChatFormat.from_config(roles.tokenizer, roles.special.eos_ids, config.data)
    data, seed, evaluation = config.data, config.seed, config.evaluation
    if chat.template_name != "tokenizer":
        roles.tokenizer.chat_template = chat.template  # saved with every model, so that it is asked as it was trained
    with roles.use("base") as model:
        context = position_limit(model.config)
    demonstrations = load_demonstrations(data, chat, seed, context=context)
    prompt_set = None
    if data.prompts:
        prompt_set = load_prompts(data.prompts, data.prompts_split, data, chat, seed, data.max_prompts, context=context)
    prompts = prompt_set.prompts if prompt_set else demonstrations.train_prompts
    if config.ppo.iterations and not prompts:
        raise DataError("there are no prompts for PPO: the demonstrations have none to reuse; set data.prompts", data.demonstrations)
    summary = data_summary(demonstrations, prompt_set)
    for line in summary.lines():
        progress.note(line)
    sampling = Sampling(config.rollout.max_new_tokens, config.rollout.temperature, config.rollout.top_p, config.rollout.top_k)
    if warning := bias_warning(sampling):
        progress.warn(warning)
    judged = demonstrations.heldout_prompts
    if evaluation.prompts:
        source, split = evaluation.prompts, evaluation.prompts_split
        judged = load_prompts(source, split, data, chat, seed, evaluation.max_prompts, per_group=True, context=context).prompts
    if not judged:
        progress.warn("nothing to evaluate on: no held-out demonstrations and no evaluation.prompts")
    others: list[Prompt] = []
    if evaluation.retention_prompts:
        source = evaluation.retention_prompts
        others = load_prompts(source, evaluation.prompts_split, data, chat, seed, evaluation.retention_max_prompts, context=context).prompts
    # On a CPU autocast converts all weights anew for each token: decoding in it was 16 % slower than in float32.
    autocast = config.model.autocast if roles.device.type == "cuda" else "none"
    engine, judge = (TorchEngine(roles.special, rows, autocast) for rows in (config.rollout.batch_size, evaluation.batch_size))
    scorer = load_scorer(evaluation.scorer)
    return Loaded(roles, chat, demonstrations, prompts, judged, others, scorer, engine, judge, sampling, summary.to_dict())
