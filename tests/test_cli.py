"""The command: flags from the configuration, errors in words with the right exit code, Ctrl-C, pipes, and what each command hands on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

import srppo
from srppo import job
from srppo.cli import after_interrupt, cli
from srppo.config import RunConfig, build, dump, valid_keys
from srppo.errors import DataError, TrainingStopped
from srppo.flags import leaves, parse_overrides
from srppo.lab import demo as demo_module
from srppo.run_folder import RunFolder
from srppo.train.interrupt import Interrupted


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), prog_name="srppo")


def shell(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "srppo", *arguments], capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, first argument, options) of every library function a command called, none of which ran."""
    seen: list[tuple[str, Any, dict[str, Any]]] = []

    def recorder(name: str) -> Callable[..., dict[str, Any]]:
        return lambda *a, **k: seen.append((name, a[0] if len(a) == 1 else a, k)) or {}

    for name in ("align", "run_sft", "run_ppo", "run_evaluate"):
        monkeypatch.setattr(job, name, recorder(name))
    monkeypatch.setattr(demo_module, "demo", recorder("demo"))
    return seen


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(f"output: {tmp_path / 'run'}\nmodel: {{name: m}}\ndata: {{demonstrations: d.jsonl}}\nppo: {{clip: 0.1}}\n")
    return str(path)


# --- help and flags


def test_help_lists_the_commands() -> None:
    text = call("--help").output
    for command in ("align", "sft", "ppo", "evaluate", "generate", "demo", "report", "config", "lab"):
        assert f"\n  {command} " in text
    assert call("--version").output == f"srppo, version {srppo.__version__}\n"


def test_every_key_is_a_flag_with_its_documentation_and_default() -> None:
    text = " ".join(call("align", "--help").output.split())
    for leaf in leaves():
        assert f"--{leaf.key} " in text, leaf.key
    assert "--ppo.clip epsilon of the clipped surrogate. [number; default: 0.2]" in text
    assert "--reward.kl_anchor The model the policy is held near. [sft | base | none; default: sft]" in text
    assert {leaf.key for leaf in leaves()} <= set(valid_keys())


@pytest.mark.parametrize(("command", "function"), [("align", "align"), ("sft", "run_sft"), ("ppo", "run_ppo")])
def test_flags_override_the_recipe(calls: list[Any], recipe: str, command: str, function: str) -> None:
    flags = [
        "--ppo.learning-rate",
        "1e-5",
        "--ppo.critic_learning_rate=2e-5",
        "--sft.checkpoints_at",
        "[0.5, 1]",
        "--sft.keep",
        "5e-1",
        "--seed",
        "-3",
    ]
    flags += ["--ppo.target_kl", "null", "--evaluation.continued_sft", "false", "--data.columns", "{prompt: question}", "--resume"]
    result = call(command, recipe, *flags, "--progress", "quiet")
    assert result.exit_code == 0, result.output
    [(name, config, options)] = calls
    assert name == function and isinstance(config, RunConfig)
    assert (config.ppo.learning_rate, config.ppo.critic_learning_rate, config.ppo.clip) == (1e-5, 2e-5, 0.1)
    assert (config.sft.checkpoints_at, config.sft.keep, config.seed, config.ppo.target_kl) == ([0.5, 1.0], 0.5, -3, None)
    assert config.evaluation.continued_sft is False and config.data.columns == {"prompt": "question"}
    assert options["resume"] is True and options["overwrite"] is False


def test_a_recipe_is_not_needed(calls: list[Any]) -> None:
    assert call("align", "--model.name", "m", "--output", "x", "--overwrite").exit_code == 0
    assert calls[0][1] == build({"model": {"name": "m"}, "output": "x"}) and calls[0][2]["overwrite"] is True


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("5", 5),
        ("true", True),
        ("null", None),
        ("[a, b]", ["a", "b"]),
        ("", ""),
        ("a: b", {"a": "b"}),
        ("it's", "it's"),
        ('"x', '"x'),
        ("%x", "%x"),
    ],
)
def test_flag_values_are_read_as_yaml(text: str, value: Any) -> None:
    assert parse_overrides({"ppo__clip": text, "seed": None}) == {"ppo.clip": value}


@pytest.mark.parametrize("text", ["Be brief # please", "2026-11-21", "Answer briefly: yes", "no", "1e-5", "", "[a", "~", "'quoted'"])
def test_text_flags_are_taken_as_they_are(text: str) -> None:
    for key in ("output", "data__system_prompt", "model__name"):
        assert parse_overrides({key: text}) == {key.replace("__", "."): text}


def test_text_flags_beside_other_kinds() -> None:
    given = {
        "data__system_prompt": "null",
        "output": "null",
        "model__autocast": "none",
        "reward__checkpoint": "0.5",
        "tuning__lora_targets": "[a]",
    }
    assert list(parse_overrides(given).values()) == [None, "null", "none", 0.5, ["a"]]
    assert parse_overrides({"reward__checkpoint": "2026-11-21"}) == {"reward.checkpoint": "2026-11-21"}  # a folder, no date


# --- wrong use


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["align", "--ppo.lerning-rate", "1"], "unknown flag --ppo.lerning_rate; did you mean --ppo.learning_rate?"),
        (["align", "--model", "m"], "unknown flag --model; did you mean --model.name?"),
        (["align", "--kl_coef", "1"], "did you mean --reward.kl_coef?"),
        (["align", "--resum"], "unknown flag --resum; did you mean --resume?"),
        (["align", "--ppo.clip", "-1"], "the flags: ppo.clip: input should be greater than 0, got -1"),
        (["align", "--ppo.clip", "many"], "ppo.clip: input should be a valid number, got 'many'"),
        (["align", "--sft.checkpoints_at", "[0.5"], "--sft.checkpoints_at: '[0.5' is not valid YAML; lists are written '[a, b]'"),
        (["align", "none.yaml"], "none.yaml: no such recipe"),
        (["align", "--ppo.clip"], "requires an argument"),
        (["align", "--progress", "loud"], "'loud' is not one of 'live', 'plain', 'quiet', 'json'"),
        (["aling"], "Did you mean 'align'"),
        (["evaluate", "none.yaml"], "none.yaml: no such recipe"),
        (["generate", "m"], "give either --prompt TEXT (once or more) or --prompts FILE"),
        (["generate", "m", "--prompt", "a", "--prompts", "f"], "give either --prompt TEXT"),
        (["generate", "m", "--prompt", "a", "--temperature", "-1"], "not in the range x>=0"),
        (["report", "."], "not a run folder"),
        (["lab", "world"], "Missing option '--output'"),
    ],
)
def test_wrong_use_is_exit_2_and_a_sentence(arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2 and expected in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("bad row", "d.jsonl", 3), 2),
        (TrainingStopped("stopped"), 3),
        (Interrupted("stopped after round 2; continue with --resume"), 130),
    ],
)
def test_errors_of_the_library_become_words_and_codes(monkeypatch: pytest.MonkeyPatch, recipe: str, error: Exception, code: int) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(job, "align", fail)
    result = call("align", recipe)
    assert result.exit_code == code and result.output == f"srppo: {error}\n"
    traced = call("align", recipe, "--debug")
    assert traced.exception is error


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    monkeypatch.setattr(job, "align", lambda *_, **__: 1 / 0)
    assert isinstance(call("align", recipe).exception, ZeroDivisionError)


# --- Ctrl-C


def test_interrupt_before_anything_is_saved(monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "align", interrupt)
    result = call("align", recipe)
    assert result.exit_code == 130 and result.output == "\nsrppo: interrupted before anything was saved\n"


def test_interrupt_says_what_is_kept_and_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my run"
    RunFolder.open(folder, dump(build({}))).close()
    monkeypatch.setattr(sys, "argv", ["srppo", "align", "r.yaml", "--output", str(folder), "--overwrite"])
    command = f"Continue with: srppo align r.yaml --output '{folder}' --resume"
    assert after_interrupt(str(folder)) == f"srppo: interrupted; finished stages are kept, the stage it was in starts again. {command}"
    for step in (5, 10):
        (folder / "checkpoints" / "ppo" / f"checkpoint-{step}").mkdir(parents=True)
        os.utime(folder / "checkpoints" / "ppo" / f"checkpoint-{step}", (step, step))
    assert after_interrupt(str(folder)) == f"srppo: interrupted; the state of {folder}/checkpoints/ppo/checkpoint-10 is kept. {command}"


def test_signal_in_a_real_process(recipe: str) -> None:
    """SIGINT at a moment the training loop does not guard: exit 130, one line, no traceback."""
    code = f"""
        import os, signal, sys, time, types
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test-suite in the background inherits an ignored SIGINT
        stop = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT) or time.sleep(30)
        sys.modules["srppo.job"] = types.SimpleNamespace(align=stop)
        sys.argv = ["srppo", "align", {recipe!r}]
        from srppo.cli import main
        main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr.strip() == "srppo: interrupted before anything was saved"


# --- processes: exit codes, pipes, terminals


def test_exit_code_and_stderr_of_a_real_process(tmp_path: Path) -> None:
    done = shell("align", str(tmp_path / "none.yaml"))
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr == f"srppo: {tmp_path}/none.yaml: no such recipe; recipes/ has examples\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_full_disk_behind_stdout() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "srppo", "config"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "srppo: the output cannot be written: No space left on device\n")


def test_errors_cannot_move_the_cursor(calls: list[Any], recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise DataError("found the key \x1b[2J\x1b]0;title\x07prompt")

    monkeypatch.setattr(job, "align", fails)
    assert call("align", recipe).stderr == "srppo: found the key prompt\n"


def test_closed_pipe_is_no_traceback() -> None:
    done = subprocess.run(f"{sys.executable} -m srppo config | head -1", shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("# Every key") and done.stderr == ""


def test_terminal_without_unicode(recipe: str) -> None:
    """A β that the terminal has no letter for must not end a run."""
    code = f"""
        import sys, types
        sys.modules["srppo.job"] = types.SimpleNamespace(align=lambda *a, progress, **k: progress.note(chr(0x3B2) + " is 1"))
        sys.argv = ["srppo", "align", {recipe!r}]
        from srppo.cli import main
        main()
    """
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "? is 1\n", "")


# --- the other commands


def test_config_prints_the_template_or_the_resolved_values(recipe: str) -> None:
    assert build(yaml.safe_load(call("config").output)) == build({})
    resolved = yaml.safe_load(call("config", recipe, "--ppo.gamma", "0.9").output)
    assert (resolved["ppo"]["clip"], resolved["ppo"]["gamma"], resolved["sft"]["batch_size"]) == (0.1, 0.9, 16)


def test_evaluate_of_a_run_a_recipe_and_another_model(calls: list[Any], recipe: str, tmp_path: Path) -> None:
    config = build(yaml.safe_load(Path(recipe).read_text()))
    assert "holds no run yet" in call("evaluate", recipe).output
    assert call("evaluate", recipe, "--model", "other").exit_code == 0
    assert calls.pop()[1] == ("other", config)
    run = tmp_path / "run"
    RunFolder.open(run, dump(config)).close()
    assert call("evaluate", str(run)).exit_code == 0
    assert calls.pop()[1] == (str(run), None)
    assert call("evaluate", str(run), "--evaluation.samples", "8").exit_code == 0
    target, changed = calls.pop()[1]
    assert target == str(run) and changed.evaluation.samples == 8 and changed.ppo.clip == 0.1
    assert call("evaluate", recipe).exit_code == 0
    assert calls.pop()[1] == (str(run), config)
    assert "say with --output where the results go" in call("evaluate", str(run), "--model", "other").output
    assert call("evaluate", str(run), "--model", "other", "--output", str(tmp_path / "new")).exit_code == 0
    target, changed = calls.pop()[1]
    assert target == "other" and changed.output == str(tmp_path / "new")
    assert "neither" not in call("evaluate", str(tmp_path)).output and not calls


def test_demo_hands_its_options_on(calls: list[Any], tmp_path: Path) -> None:
    assert call("demo", "--seed", "3", "--output", str(tmp_path / "d"), "--overwrite", "--progress", "quiet").exit_code == 0
    [(name, arguments, options)] = calls
    assert (name, arguments) == ("demo", (3, str(tmp_path / "d"))) and options["overwrite"] is True


def test_report_writes_the_page(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", dump(build({}))).close()
    result = call("report", str(tmp_path / "run"))
    assert result.exit_code == 0 and result.output == f"{tmp_path}/run/report.html\n"
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


def test_lab_world_writes_files_and_a_recipe_and_touches_nothing_else(tmp_path: Path) -> None:
    result = call("lab", "world", "--output", str(tmp_path / "w"), "--seed", "1")
    assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "w").iterdir()} == {"demonstrations.jsonl", "prompts.jsonl", "eval.jsonl", "recipe.yaml"}
    assert srppo.load_recipe(tmp_path / "w" / "recipe.yaml").seed == 1
    again = call("lab", "world", "--output", str(tmp_path / "w"))
    assert again.exit_code == 2 and "exists already" in again.output


def test_lab_pretrain_makes_a_model(tmp_path: Path) -> None:
    result = call("lab", "pretrain", "--output", str(tmp_path / "m"), "--steps", "1", "--progress", "json")
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [e["event"] for e in events] == ["stage_start", "advance", "stage_end", "note"] and events[1]["metrics"]["loss"] > 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").num_parameters() > 1000
    assert call("lab", "pretrain", "--output", str(tmp_path / "m"), "--steps", "1").exit_code == 2
