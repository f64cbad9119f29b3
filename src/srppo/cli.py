"""The command `srppo`. Nothing heavy is imported here: each command loads what it needs when it runs."""

from __future__ import annotations

import errno
import functools
import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from srppo import __version__
from srppo.errors import ConfigError, SrppoError
from srppo.flags import RunCommand, parse_overrides
from srppo.terminal import guard_terminal
from srppo.text import clean

if TYPE_CHECKING:
    from srppo.config import RunConfig
    from srppo.progress import Progress

Function = TypeVar("Function", bound=Callable[..., Any])
INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for a program that such a signal ended
PATIENCE = 5.0  # seconds that a process leaves to the one that speaks for its machine: torchrun ends all as soon as one has failed


class Commands(click.Group):
    """A group that tells the user's errors in words and keeps tracebacks for bugs (and --debug)."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SrppoError as error:
            if ctx.meta.get("debug"):
                raise
            if _speaks(error):
                click.echo(f"srppo: {_process()}{clean(str(error))}", err=True)  # it may quote data, and what a user's scorer said
            ctx.exit(error.exit_code)
        except click.UsageError as error:
            if _speaks(error):
                raise
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as error:
            if _speaks(error):
                click.echo("\n" + after_interrupt(ctx.meta.get("output")), err=True)
            ctx.exit(getattr(error, "exit_code", INTERRUPTED))


def _speaks(error: BaseException) -> bool:
    """Whether this process is to tell of an error. Of several that have not met yet all have it alike as a rule, so one a machine speaks;
    the others wait meanwhile, and do so too if nobody has ended them, as the error is theirs then."""
    from srppo.meeting import launched
    from srppo.world import world

    if launched() and world().alone:
        if (first := os.environ.get("LOCAL_RANK", "0") == "0") or isinstance(error, KeyboardInterrupt):
            return first
        time.sleep(PATIENCE)
        return True
    return not getattr(error, "told", False)  # by rank 0


def _process() -> str:
    """Which of several processes speaks, where it is not the first."""
    from srppo.meeting import launched

    rank = os.environ.get("RANK", "0") if launched() else "0"
    return "" if rank == "0" else f"process {rank}: "


def after_interrupt(output: str | None) -> str:
    """What a run that was cut off at once (before or while it saved) left, and how to go on."""
    from srppo.meeting import launched
    from srppo.run_folder import is_run

    if output is None:
        return "srppo: interrupted"
    if not is_run(output):
        return "srppo: interrupted before anything was saved"
    stages = ("sft", "ppo", "sft_continued")  # in their order; dates may lie
    places = [(n, p) for n, stage in enumerate(stages) for p in Path(output).glob(f"checkpoints/{stage}/checkpoint-*") if p.is_dir()]
    saved = [(n, int(step), p) for n, p in places if (step := p.name.removeprefix("checkpoint-")).isdecimal()]
    newest = max(saved, default=(None, None, None))[2]
    kept = f"the state of {newest} is kept" if newest else "finished stages are kept, the stage it was in starts again"
    words = [w for w in sys.argv[1:] if w not in ("--overwrite", "--resume")]
    command = "torchrun … -m srppo" if launched() else "srppo"
    return f"srppo: interrupted; {kept}. Continue with: {command} {shlex.join(words)} --resume"


def _set_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["debug"] = True  # meta is shared with the group's context


def common(command: Function) -> Function:
    """Options of every command that computes."""
    choice = click.Choice(["live", "plain", "quiet", "json"])
    say = "How to report: bars, lines for a log, warnings and tables only, or JSON lines. live is plain where stdout is no terminal."
    command = click.option("--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show tracebacks of errors.")(command)
    return click.option("--progress", type=choice, default="live", show_default=True, help=say)(command)


def folder_options(command: Function) -> Function:
    """What to do with an output folder that exists."""
    command = click.option("--overwrite", is_flag=True, help="Delete the run that is in the output folder, and start anew.")(command)
    return click.option("--resume", is_flag=True, help="Continue the run in the output folder where it stopped.")(command)


def by_the_first(command: Function) -> Function:
    """A command for one process: of several that torchrun has started, the first does it and the others have nothing to do."""

    @functools.wraps(command)
    def alone(*args: Any, **options: Any) -> Any:
        from srppo.meeting import launched

        return None if launched() and os.environ.get("RANK", "0") != "0" else command(*args, **options)

    return alone  # type: ignore[return-value]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="srppo")
def cli() -> None:
    """Align language models from demonstrations only, by Self-Rewarding PPO.

    \b
    srppo demo                 see it work in a few minutes, in an embedded world
    srppo config > my.yaml     a recipe to fill in: every key, documented
    srppo plan my.yaml         does it fit this machine, and how long does it take
    srppo diagnose my.yaml     can the reward help? a verdict before compute is spent
    srppo align my.yaml        demonstrations in, aligned model and honest report out
    """


def _config(ctx: click.Context, recipe: str | None, flags: dict[str, str | None]) -> RunConfig:
    """The recipe with the flags over it; where its output goes is remembered for the word after Ctrl-C."""
    from srppo.config import build, load_recipe, merge

    overrides = parse_overrides(flags)
    config = load_recipe(recipe, overrides) if recipe is not None else build(merge({}, overrides), source="the flags")
    ctx.meta["output"] = config.output
    return config


def _progress(mode: str) -> Progress:
    from srppo.progress import make_progress

    return make_progress(mode)


@cli.command(cls=RunCommand, short_help="Everything: SFT, PPO, baselines, evaluation, report.")
@click.argument("recipe", required=False)
@folder_options
@common
@click.pass_context
def align(ctx: click.Context, recipe: str | None, resume: bool, overwrite: bool, progress: str, **flags: str | None) -> None:
    """Do everything: SFT, PPO, the baselines, the evaluation and the report.

    RECIPE is a YAML file; every key of it can be given as a flag instead, or changed by one: --ppo.learning_rate 1e-6.
    """
    config = _config(ctx, recipe, flags)
    from srppo.job import align as library

    library(config, resume=resume, overwrite=overwrite, progress=_progress(progress))


@cli.command(cls=RunCommand, short_help="Fine-tune on the demonstrations only.")
@click.argument("recipe", required=False)
@folder_options
@common
@click.pass_context
def sft(ctx: click.Context, recipe: str | None, resume: bool, overwrite: bool, progress: str, **flags: str | None) -> None:
    """Fine-tune on the demonstrations only, and evaluate that."""
    config = _config(ctx, recipe, flags)
    from srppo.job import run_sft

    run_sft(config, resume=resume, overwrite=overwrite, progress=_progress(progress))


@cli.command(cls=RunCommand, short_help="PPO only, from a finished SFT model.")
@click.argument("recipe", required=False)
@folder_options
@common
@click.pass_context
def ppo(ctx: click.Context, recipe: str | None, resume: bool, overwrite: bool, progress: str, **flags: str | None) -> None:
    """Run PPO only: from --sft.checkpoint, or (with --resume) from the SFT model that the output folder holds."""
    config = _config(ctx, recipe, flags)
    from srppo.job import run_ppo

    run_ppo(config, resume=resume, overwrite=overwrite, progress=_progress(progress))


@cli.command(cls=RunCommand, short_help="Can the reward help? A verdict before PPO, without labels.")
@click.argument("target", required=False)
@click.option("--json", "as_json", is_flag=True, help="The card as one JSON object on standard output, and nothing else there.")
@folder_options
@common
@click.pass_context
def diagnose(
    ctx: click.Context, target: str | None, as_json: bool, resume: bool, overwrite: bool, progress: str, **flags: str | None
) -> None:
    """Say whether the reward can help, before PPO is run: go, caution or no-go, with the reasons.

    TARGET is a run folder that holds an SFT model, or a recipe (then the SFT is trained first, unless --sft.checkpoint gives it).
    """
    from srppo.progress import make_progress
    from srppo.run_config import load_run_config
    from srppo.run_folder import is_run

    report = make_progress("quiet" if as_json and progress == "live" else progress, stream=sys.stderr if as_json else None)
    if target is not None and is_run(target):
        if overwrite or flags.get("output") is not None:
            option, why = ("--overwrite", "it is looked at, not made anew") if overwrite else ("--output", "its card goes into it")
            raise ConfigError(f"{option} does not go with a run folder, {target}: {why}; leave the option out, or name a recipe")
        config = load_run_config(target, report.warn, parse_overrides(flags)).model_copy(update={"output": target})
        if not (Path(target) / "stages/sft.json").is_file():
            raise ConfigError(f"{target} holds no finished SFT yet; run `srppo sft` or `srppo align` first")
        resume = True
    elif target is not None and Path(target).is_dir():
        raise ConfigError(
            f"{target}: not a run folder (no config.yaml of srppo in it); for a model: srppo diagnose RECIPE --sft.checkpoint {target}"
        )
    else:
        config = _config(ctx, target, flags)
    ctx.meta["output"] = config.output
    from srppo.job import run_diagnose

    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # what a scoring function or a library prints is not the card
        card = run_diagnose(config, resume=resume, overwrite=overwrite, progress=report)
    from srppo.world import world

    if as_json and world().main:
        import json

        from srppo.files import plain

        click.echo(json.dumps(plain(card), allow_nan=False))


@cli.command(cls=RunCommand, short_help="Memory and time of a run, before it is run: does it fit?")
@click.argument("recipe", required=False)
@click.option("--gpu", help="Plan for this card instead of what is here: a100, h100, h200, l40s, rtx4090 …")
@click.option("--gpus", default=1, show_default=True, type=click.IntRange(1), help="So many on each machine, a process each.")
@click.option("--nodes", default=1, show_default=True, type=click.IntRange(1), help="So many machines.")
@click.option("--network", type=click.FloatRange(0, min_open=True), help="Gbit/s of a machine to the others, over the table's.")
@click.option("--gpu-memory", help="A card's memory, over the table's or the present one's: 80GB, 24GiB.")
@click.option("--response-tokens", type=click.FloatRange(1), help="Mean length of the responses to come, for the time.")
@click.option("--json", "as_json", is_flag=True, help="The plan as one JSON object on standard output, and nothing else there.")
@click.option("--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show tracebacks of errors.")
@click.pass_context
@by_the_first
def plan(
    ctx: click.Context,
    recipe: str | None,
    gpu: str | None,
    gpus: int,
    nodes: int,
    network: float | None,
    gpu_memory: str | None,
    response_tokens: float | None,
    as_json: bool,
    **flags: str | None,
) -> None:
    """Say what memory and time `srppo align` with this RECIPE or these flags would need, and what to change where it does not fit.

    Only the model's config.json is read, no weights. Without --gpu the plan is for this machine, whose speed is measured in a second.
    """
    config = _config(ctx, recipe, flags)
    from srppo.planning.run import run_plan

    planned = run_plan(config, gpu=gpu, gpus=gpus, nodes=nodes, gpu_memory=gpu_memory, network=network, response_tokens=response_tokens)
    if as_json:
        import json

        click.echo(json.dumps(planned.to_dict(), allow_nan=False))
        return
    from srppo.planning.tell import tell

    tell(planned, sys.stdout)


@cli.command(cls=RunCommand, short_help="Evaluate a run again, or another model by its rules.")
@click.argument("target")
@click.option("--model", help="A model folder or hub id to evaluate instead of what the run holds.")
@common
@click.pass_context
def evaluate(ctx: click.Context, target: str, model: str | None, progress: str, **flags: str | None) -> None:
    """Evaluate again what a run holds, or another model by its rules.

    TARGET is a run folder, or a recipe. With --model the results go to a run folder of their own, --output.
    """
    from srppo.run_config import load_run_config
    from srppo.run_folder import is_run

    given = {k: v for k, v in flags.items() if v is not None}
    if is_run(target):
        if model is not None and "output" not in given:
            raise ConfigError("--model: say with --output where the results go; the run folder itself keeps its own")
        config = load_run_config(target, _progress(progress).warn, parse_overrides(flags)) if given else None
    elif Path(target).is_dir():
        raise ConfigError(
            f"{target}: not a run folder (no config.yaml of srppo in it); to evaluate a model: srppo evaluate RECIPE --model {target}"
        )
    else:
        config = _config(ctx, target, flags)
        target = config.output
        if model is None and not is_run(target):
            raise ConfigError(f"its output {target} holds no run yet; give --model FOLDER, or run `srppo align` first")
    from srppo.job import run_evaluate

    run_evaluate(model or target, config, progress=_progress(progress))


@cli.command(short_help="See it work in an embedded world, in minutes.")
@click.option("--seed", default=0, show_default=True, help="Decides data, sampling and initial values.")
@click.option("--output", default="runs/demo", show_default=True, help="The run folder.")
@folder_options
@common
@click.pass_context
def demo(ctx: click.Context, seed: int, output: str, resume: bool, overwrite: bool, progress: str) -> None:
    """Run everything in a small embedded world with exact answers."""
    ctx.meta["output"] = output
    from srppo.lab.demo import demo as library

    library(seed, output, resume=resume, overwrite=overwrite, progress=_progress(progress))


@cli.command(short_help="Print a model's answers to prompts.")
@click.argument("model")
@click.option("--prompt", "prompts", multiple=True, help="A prompt; may be given several times.")
@click.option("--prompts", "file", type=click.Path(), help="A .txt file with a prompt a line, or a jsonl, json, csv or parquet file.")
@click.option("--base", help="The base of an adapter, where not the one its own configuration names.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(1), help="Length limit of an answer.")
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(0), help="1 is the model's own distribution.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True), help="Nucleus sampling.")
@click.option("--samples", default=1, show_default=True, type=click.IntRange(1), help="Answers a prompt.")
@click.option("--greedy", is_flag=True, help="Always the likeliest token.")
@click.option("--raw", is_flag=True, help="Continue prompts as they are, without a chat template.")
@click.option("--seed", default=0, show_default=True, help="Decides the samples.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda …")
@click.option("--trust", is_flag=True, help="Allow the code and pickle weights that the run's configuration allows.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: prompt, completion, tokens, ended.")
@click.option("--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show tracebacks of errors.")
@by_the_first
def generate(model: str, prompts: tuple[str, ...], file: str | None, as_json: bool, **settings: Any) -> None:
    """Print a model's answers. MODEL is a model folder, an adapter folder, a run folder (its policy, else its SFT model) or a hub id."""
    if bool(prompts) == (file is not None):
        raise ConfigError("give either --prompt TEXT (once or more) or --prompts FILE")
    from srppo.generate import generate_text, print_completions

    print_completions(generate_text(model, prompts, file=file, **settings), as_json=as_json)


@cli.command(short_help="Write a run's report.html and plots anew.")
@click.argument("run")
@click.option("--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show tracebacks of errors.")
@by_the_first
def report(run: str) -> None:
    """Write report.html and the plots anew from what a run folder holds (also of an unfinished run)."""
    from srppo.report import write_report

    click.echo(clean(str(write_report(run))))


@cli.command(cls=RunCommand, short_help="Every key of a recipe, documented.")
@click.argument("recipe", required=False)
@click.pass_context
@by_the_first
def config(ctx: click.Context, recipe: str | None, **flags: str | None) -> None:
    """Print every key with its documentation and default; with a RECIPE or flags, the values a run would have."""
    from srppo.config import dump
    from srppo.flags import template

    if recipe is None and not any(v is not None for v in flags.values()):
        click.echo(template(), nl=False)
    else:
        text = dump(_config(ctx, recipe, flags))
        click.echo(clean(text) if sys.stdout.isatty() else text, nl=False)  # a file gets every character, a terminal none that harms


@cli.group()
def lab() -> None:
    """The embedded world: remake its model, or write out its data."""


@lab.command()
@click.option("--output", required=True, help="Folder for the model, in the Hugging Face layout.")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps; by default as for the model that srppo ships.")
@click.option("--seed", default=0, show_default=True)
@common
@by_the_first
def pretrain(output: str, steps: int | None, seed: int, progress: str) -> None:
    """Pretrain the world's base model."""
    from srppo.lab.pretrain import STEPS
    from srppo.lab.pretrain import pretrain as library
    from srppo.run_folder import refuse_existing

    refuse_existing(output)
    reporter, total = _progress(progress), steps or STEPS
    with reporter.stage("Pretrain", total, "steps") as stage:
        library(output, seed=seed, steps=total, progress=lambda done, _, loss: stage.advance(done, loss=loss))
    reporter.note(f"model: {output}")


@lab.command()
@click.option("--output", required=True, help="Folder for the demonstrations, prompts and evaluation rows.")
@click.option("--seed", default=0, show_default=True)
@click.option("--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show tracebacks of errors.")
@by_the_first
def world(output: str, seed: int) -> None:
    """Write the world's demonstrations, prompts and evaluation rows as jsonl files, and a recipe that uses them."""
    from srppo.config import build, dump
    from srppo.files import write_bytes
    from srppo.lab.world import recipe, write_world
    from srppo.run_folder import refuse_existing

    refuse_existing(output)
    config = dump(build(recipe(Path(output), seed)))
    write_world(Path(output), seed)
    write_bytes(Path(output) / "recipe.yaml", config.encode())
    click.echo(f"{output}; now: srppo align {Path(output) / 'recipe.yaml'}")


def main() -> None:
    """The console script."""
    guard_terminal()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  for as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without β must not end a run
    try:
        try:
            cli(prog_name="srppo")
        except SystemExit as done:
            from srppo.meeting import end

            end(done.code if isinstance(done.code, int) else int(done.code is not None))
            raise
        finally:
            sys.stdout.flush()  # here, where its failure can be told
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or error.filename is not None or "--debug" in sys.argv:
            raise
        sys.stderr.write(f"srppo: the output cannot be written: {error.strerror}\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what it still holds must not fail again at the end
        sys.exit(2)
