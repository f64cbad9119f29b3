"""Everything a run works with, opened once: the locked folder, data, roles, engine and scorer."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from transformers.utils.logging import disable_progress_bar

from srppo.allocator import give_back, keep_freed_memory
from srppo.config import RunConfig, dump
from srppo.data.chat import ChatFormat
from srppo.data.demonstrations import Demonstrations, load_demonstrations
from srppo.data.prompts import PromptSet, load_prompts
from srppo.data.report import data_summary
from srppo.data.sources import read_rows
from srppo.environment import versions
from srppo.errors import ConfigError, DataError, RunFolderError
from srppo.meeting import start_world
from srppo.memory_limit import limits
from srppo.models.preference_model import PreferenceModel
from srppo.models.roles import Roles, build_roles
from srppo.outcomes import read_elapsed
from srppo.profiling.ledger import Ledger
from srppo.profiling.memory import resident
from srppo.progress import Progress
from srppo.records import Prompt
from srppo.rollout.engine import RolloutEngine, Sampling, bias_warning
from srppo.rollout.record import position_limit
from srppo.rollout.torch_engine import TorchEngine
from srppo.rollout.vllm_make import check_vllm, vllm_engine
from srppo.run_folder import RunFolder
from srppo.scoring import Scorer, load_scorer
from srppo.threads import ThreadWatch, Watched, set_threads, torch_threads
from srppo.train.interrupt import Interrupt
from srppo.world import world

NOTED_EVERY = 10.0  # seconds between two notes of what the run cost
P = ParamSpec("P")
R = TypeVar("R")


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
    extrapolator: TorchEngine | None  # of the reward card, which decodes with several models at once; None where they have no room
    sampling: Sampling  # of the rollouts
    data_summary: dict[str, Any]
    preference_model: PreferenceModel | None = None  # PPO's reward, where it is not the coherent one

    def decode(self, ids: list[int]) -> str:
        """A response as text, without EOS and special tokens."""
        return self.chat.response_text(ids)


@dataclass(frozen=True, eq=False)  # one is itself, whatever it holds
class Workspace:
    """An open run."""

    config: RunConfig
    run: RunFolder
    progress: Progress
    interrupt: Interrupt
    loaded: Loaded
    started: float  # time.monotonic() at opening
    seconds_before: float  # of the processes that began this run
    peak_before: float  # MiB, of theirs
    ledger: Ledger  # what each stage cost

    def elapsed(self) -> float:
        """Wall seconds of the run so far, resumed ones included."""
        return self.seconds_before + time.monotonic() - self.started

    def peak_rss_mb(self) -> float:
        """Peak resident memory of the run's processes, MiB."""
        return max(self.peak_before, resident().so_far()[""])

    def note_cost(self) -> None:
        """Write what the run cost so far, for the process that resumes it."""
        self._write_cost(self.peak_rss_mb())

    def _write_cost(self, peak: float) -> None:
        self.run.write_json("elapsed.json", {"seconds": self.elapsed(), "peak_rss_mb": peak, "stages": self.ledger.so_far()})

    @contextmanager
    def costs_noted(self) -> Iterator[None]:
        """Inside it what the run cost is noted every NOTED_EVERY seconds, lest a process that is killed should count for nothing."""
        over = threading.Event()

        def note() -> None:
            while not over.wait(NOTED_EVERY):
                with suppress(RunFolderError, RuntimeError):  # a full disk is told where more depends on it
                    self._write_cost(max(self.peak_before, resident().highest.get("", 0.0)))

        thread = threading.Thread(target=note, name="srppo-costs", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def metered(name: str) -> Callable[[Callable[Concatenate[Workspace, P], R]], Callable[Concatenate[Workspace, P], R]]:
    """Of a function that is a stage of a run: its seconds and peak memory go into the run's ledger."""

    def decorate(stage: Callable[Concatenate[Workspace, P], R]) -> Callable[Concatenate[Workspace, P], R]:
        @functools.wraps(stage)
        def measured(space: Workspace, *args: P.args, **options: P.kwargs) -> R:
            try:
                with space.ledger.stage(name):
                    return stage(space, *args, **options)
            finally:
                give_back()

        return measured

    return decorate


def check_inputs(config: RunConfig) -> None:
    """Fail on what can be known before a model is loaded. Raises ConfigError or DataError."""
    if not config.model.name:
        raise ConfigError("model.name is not set: give a hub id, a Hugging Face folder or a GGUF file")
    if not config.data.demonstrations:
        raise ConfigError("data.demonstrations is not set: give a file, a folder saved by `datasets`, or a hub id")
    check_vllm(config)
    load_scorer(config.evaluation.scorer)
    read_rows(config.data.demonstrations, config.data.demonstrations_split)
    if config.data.prompts:
        read_rows(config.data.prompts, config.data.prompts_split)
    for source in (config.evaluation.prompts, config.evaluation.retention_prompts):
        if source:
            read_rows(source, config.evaluation.prompts_split)


@contextmanager
def open_workspace(
    config: RunConfig,
    progress: Progress,
    *,
    resume: bool = False,
    overwrite: bool = False,
    may_differ: Collection[str] = (),
    ppo: bool = False,
) -> Iterator[Workspace]:
    """Check the inputs, load models and data, take the run folder, and report on the data. Signals are caught inside.

    may_differ: configuration keys and sections that a resumed run may have otherwise than the folder (see RunFolder.open).
    ppo: whether PPO is to run, so that what judges responses is needed.
    """
    started = time.monotonic()
    here = start_world()
    if not here.alone:
        progress.note(f"{here.size} processes, {here.local_size} on this machine")
    progress.note(set_threads(config.threads))
    keep_freed_memory(several=not here.alone)
    progress = Watched(progress, ThreadWatch(progress.warn, torch_threads))
    text = dump(config)
    here.check_alike({"configuration": text, "libraries": repr(versions()), "choice of --resume or --overwrite": repr((resume, overwrite))})
    here.once(lambda: RunFolder.check(config.output, resume=resume, overwrite=overwrite, config_yaml=text, may_differ=may_differ))
    here.once(lambda: check_inputs(config))  # rank 0 first, so that what a hub data set needs is there for the others
    judging = ppo and config.reward.kind == "preference_model" and config.ppo.iterations > 0
    if resume and here.once(lambda: (Path(config.output) / "stages/ppo.json").is_file()):
        judging = False  # PPO is done
    loading = Ledger()
    with loading.stage("load"):
        loaded = _load(config, progress, judging)  # before the folder is touched: a wrong model or file leaves no trace
    here.check_alike({"data": repr(loaded.data_summary)})
    with RunFolder.open(config.output, text, resume=resume, overwrite=overwrite, may_differ=may_differ) as run, Interrupt() as interrupt:
        _check_seen(run.path)
        before = here.once(lambda: read_elapsed(run.path / "elapsed.json"))
        ledger = Ledger(before.get("stages"))
        ledger.add(loading)
        spent = (before.get("seconds", 0.0), before.get("peak_rss_mb", 0.0))
        space = Workspace(config, run, progress, interrupt, loaded, started, *spent, ledger)
        run.write_json("data.json", loaded.data_summary)
        try:
            with space.costs_noted():
                yield space
        except BaseException:
            with suppress(RunFolderError):  # the error on its way is the one to tell
                space.note_cost()
            raise
        space.note_cost()


def _check_seen(path: Path) -> None:
    """Raise ConfigError where a process does not see the run folder that rank 0 writes."""
    blind = [str(rank) for rank, sees in enumerate(world().gather((path / "config.yaml").is_file())) if not sees]
    if blind:
        raise ConfigError(f"{path}: not seen by process {', '.join(blind)}; --output must lie on a file system that all machines share")


def _load(config: RunConfig, progress: Progress, judging: bool) -> Loaded:
    """Models, data and scorer; with judging the reward model too. Writes nothing."""
    disable_progress_bar()  # transformers' bars for shards and tensors would tear ours
    roles = build_roles(config)
    progress.note(f"model: {config.model.name}, {config.tuning.kind} tuning, on {roles.device}")
    chat = ChatFormat.from_config(roles.tokenizer, roles.special.eos_ids, config.data)
    own_template = roles.tokenizer.chat_template
    if chat.template_name != "tokenizer":
        roles.tokenizer.chat_template = chat.template  # saved with every model, so that it is asked as it was trained
    with roles.use("base") as model:
        context = position_limit(model.config)
    room = None if context is None else context - config.rollout.max_new_tokens + 1  # a prompt needs space for its answer
    data, seed, evaluation = config.data, config.seed, config.evaluation

    def prompts_of(source: str, split: str, limit: int | None, per_group: bool = False) -> PromptSet:
        return load_prompts(source, split, data, chat, seed, limit, per_group=per_group, context=room)

    demonstrations = load_demonstrations(data, chat, seed, context=context)
    asked = prompts_of(data.prompts, data.prompts_split, data.max_prompts) if data.prompts else None
    prompts = asked.prompts if asked else _with_room(demonstrations.train_prompts, room)
    if config.ppo.iterations and not prompts:
        raise DataError("there are no prompts for PPO: the demonstrations have none to reuse; set data.prompts", data.demonstrations)
    split = evaluation.prompts_split
    judged = prompts_of(evaluation.prompts, split, evaluation.max_prompts, per_group=True) if evaluation.prompts else None
    others = prompts_of(evaluation.retention_prompts, split, evaluation.retention_max_prompts) if evaluation.retention_prompts else None
    summary = data_summary(demonstrations, asked, judged, others)
    for line in summary.lines():
        progress.note(line)
    sampling = Sampling(config.rollout.max_new_tokens, config.rollout.temperature, config.rollout.top_p, config.rollout.top_k)
    if warning := bias_warning(sampling):
        progress.warn(warning)
    judged_prompts = judged.prompts if judged else _with_room(demonstrations.heldout_prompts, room)
    if not judged_prompts:
        progress.warn("nothing to evaluate on: no held-out demonstrations and no evaluation.prompts")
    scorer = load_scorer(evaluation.scorer)
    if scorer and judged_prompts:
        scorer("", judged_prompts[0].fields)  # a scorer that misses a field says so now, not after hours
    _try_roles(config, roles)
    limits.begin(progress.warn, apart=not roles.spread)
    sizes = (config.rollout.batch_size, evaluation.batch_size)
    fast = {"cuda_graphs": config.rollout.cuda_graphs, "merge_adapters": config.rollout.merge_adapters}
    own, judging_engine = (TorchEngine(roles.special, rows, config.model.autocast, **fast) for rows in sizes)
    engine: RolloutEngine = own
    judge: RolloutEngine = judging_engine
    if config.rollout.engine == "vllm":
        known = [*prompts, *judged_prompts, *demonstrations.heldout_prompts, *(others.prompts if others else [])]
        longest = max((len(p.ids) for p in known), default=0)
        engine = judge = vllm_engine(config, roles.special, longest, roles.device, progress.warn)
    preference_model = None
    if judging:
        everyone = [*prompts, *demonstrations.heldout_prompts]
        preference_model = PreferenceModel(config, everyone, roles.tokenizer, chat.response_text, policy_templates=[own_template])
    return Loaded(
        roles,
        chat,
        demonstrations,
        prompts,
        judged_prompts,
        others.prompts if others else [],
        scorer,
        engine,
        judge,
        None if roles.spread and config.rollout.engine == "vllm" else judging_engine,
        sampling,
        summary.to_dict(),
        preference_model,
    )


def _with_room(prompts: list[Prompt], room: int | None) -> list[Prompt]:
    """Demonstrations' prompts that leave room for an answer; load_prompts drops (and counts) the others of a file by itself."""
    return prompts if room is None else [p for p in prompts if len(p.ids) < room]


def _try_roles(config: RunConfig, roles: Roles) -> None:
    """Load the checkpoints the configuration names, and see that an adapter fits: before anything is written or computed."""
    if config.sft.checkpoint is not None:
        roles.load("sft", config.sft.checkpoint)
    if isinstance(config.reward.checkpoint, str) and config.reward.checkpoint not in ("auto", "sft") and config.ppo.iterations:
        roles.load("reward", config.reward.checkpoint)
        roles.freeze("reward")
    if config.tuning.kind == "lora":
        roles.create("trial", "base")
        roles.drop("trial")
