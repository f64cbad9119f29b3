"""The claims of docs/security.md: no code of models or data runs, nothing they say harms a reader, nothing is written elsewhere."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

import srppo
from srppo.card import model_card
from srppo.cli import cli
from srppo.config import build, dump
from srppo.data.sources import read_rows
from srppo.data.templates import render
from srppo.errors import ConfigError, DataError, ModelError, RunFolderError
from srppo.files import append_lines, write_bytes
from srppo.generate import Completion, generate_text, print_completions
from srppo.limits import TooMuch, bounded
from srppo.models.load import load_model, load_tokenizer
from srppo.models.roles import build_roles
from srppo.progress import make_progress
from srppo.report import write_report
from srppo.run_folder import MARK, RunFolder
from srppo.terminal import guard_terminal
from srppo.text import clean, code, json_text
from srppo.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tiny_models import save_tiny, standard_roles, tiny_tokenizer
from tiny_report import write_run

SOURCE = Path(srppo.__file__).parent
CSI, OSC = "\x1b[31mred\x1b[2J", "\x1b]0;title\x07\x1b]8;;http://x\x07link\x1b]8;;\x07"
ATTACK = f"a{CSI}b{OSC}c\x9b1md\u202ee\u2066f\u061cg\x07h\x00i\x7fj\U000e0041k\ud800l"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "m")
    return tmp_path / "m"


def settings(place: Any, kind: str = "full", **changes: Any) -> Any:
    return build({"model": {"name": str(place), "device": "cpu", **changes}, "tuning": {"kind": kind, "lora_rank": 4}})


class Payload:
    """What a pickle runs when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


# --- no code of models or data is run


def test_the_source_unpickles_nothing_and_calls_no_shell() -> None:
    """Whole words, so a new one has to be looked at."""
    forbidden = r"\b(torch\.load|pickle\.|cPickle|dill\.|joblib|marshal\.|shelve|eval\(|exec\(|os\.system|subprocess|yaml\.load\()"
    allowed = {"world.py: pickle.loads(pickle.dumps(value))"}  # its own value, on the way to the run's other processes
    found = []
    for path in SOURCE.rglob("*.py"):
        for line in path.read_text().splitlines():
            if re.search(forbidden, line.split("#")[0]) and not re.search(r"\.eval\(\)|`|def eval|\"\"\"", line):
                found.append(f"{path.relative_to(SOURCE)}: {line.strip()}")
    assert set(found) <= allowed


def test_code_that_comes_with_a_model_is_refused(model: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (model / f"{name}.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Evil: pass\n")
    config = json.loads((model / "config.json").read_text())
    tokens = json.loads((model / "tokenizer_config.json").read_text())
    maps = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": maps}))
    with pytest.raises(ModelError, match="runs Python code that comes with the model, which is refused by default"):
        load_model(settings(model).model)
    (model / "config.json").write_text(json.dumps({**config, "auto_map": maps}))  # of a known architecture: transformers' own code is taken
    load_model(settings(model).model)
    odd = {**tokens, "auto_map": {"AutoTokenizer": [None, "tokenization_evil.Evil"]}, "tokenizer_class": "Evil"}
    (model / "tokenizer_config.json").write_text(json.dumps(odd))
    with pytest.raises(ModelError, match=r"its tokenizer runs Python code that comes with it, .*model\.trust_remote_code"):
        load_tokenizer(settings(model).model)
    assert not ran.exists()


@pytest.mark.parametrize(
    "kernel",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel:function"},
        {"attn_implementation": {"": "evil/kernel@main"}},
        {"experts_implementation": "evil/kernel"},
        {"text_config": {"_attn_implementation": "paged|evil/kernel"}},
    ],
)
def test_kernels_from_the_hub_are_refused(model: Path, kernel: dict[str, Any]) -> None:
    """A model's config.json may name a repository whose compiled code transformers then loads as its attention."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **kernel}))
    with pytest.raises(ModelError, match=r"config\.json asks for code from the hub \(.*evil/kernel"):
        load_model(settings(model).model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickled_weights_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    ran = tmp_path / "ran"
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(ModelError, match=r"pickle files .* refused by default"):
        load_model(settings(model).model)
    assert not ran.exists()


@pytest.mark.parametrize(
    "shard", ["pytorch_model.bin", "../other.safetensors", "/tmp/x.safetensors", ".hidden.safetensors", 5, "a\0.safetensors"]
)
def test_an_index_may_not_lead_to_pickles_or_out_of_the_folder(model: Path, tmp_path: Path, shard: Any) -> None:
    ran = tmp_path / "ran"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(ran)))
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": shard}}))
    (model / "model.safetensors").rename(model / "other.safetensors")
    with pytest.raises(ModelError, match="no safetensors file of that folder: refused"):
        load_model(settings(model).model)
    assert not ran.exists()


def test_weights_named_by_the_configuration(model: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (model / "adapter_model.bin").write_bytes(pickle.dumps(Payload(ran)))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))
    with pytest.raises(ModelError, match=r"adapter_model\.bin' as weights, .* refused"):
        load_model(settings(model).model)
    assert not ran.exists()


def test_pickled_adapters_are_refused(model: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    standard_roles(str(model), "lora").save("policy", tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    (tmp_path / "adapter/adapter_model.bin").write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(ModelError, match=r"pickled adapter_model\.bin can run code"):
        build_roles(settings(model, "lora")).load("sft", tmp_path / "adapter")
    assert not ran.exists()


def test_a_data_sets_loading_script_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n")
    with pytest.raises(DataError, match="holds no data file"):
        read_rows(str(folder))
    (folder / "state.json").write_text("{}")
    with pytest.raises(DataError, match="`datasets` cannot load the folder"):
        read_rows(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch {ran}']", "a: !!python/object/new:subprocess.Popen [[touch, {ran}]]"]
)
def test_yaml_makes_no_objects(tmp_path: Path, text: str) -> None:
    ran = tmp_path / "ran"
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text.format(ran=ran))
    for arguments in (["config", str(recipe)], ["plan", str(recipe)]):
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 2 and "not valid YAML" in result.output
    run = write_run(tmp_path / "run", answers=False, iterations=1)
    (run / "config.yaml").write_text(f"{MARK}\n{text.format(ran=ran)}")
    write_report(run)
    assert not ran.exists()


def test_asking_a_strangers_run_does_not_run_its_code(model: Path, tmp_path: Path) -> None:
    """Its config.yaml may allow what the reader never has."""
    run = tmp_path / "run"
    for key in ("trust_remote_code", "allow_pickle"):
        shutil.rmtree(run, ignore_errors=True)
        with RunFolder.open(run, dump(settings(model, **{key: True}))):
            shutil.copytree(model, run / "policy")
        with pytest.raises(ModelError, match=rf"its configuration sets model\.{key}, so loading it can run code; add --trust"):
            generate_text(str(run), ["hello"], max_new_tokens=2)
        assert len(generate_text(str(run), ["hello"], max_new_tokens=2, trust=True)) == 1


# --- chat templates


TALK = [{"role": "user", "content": "a"}]


def rendered(template: str) -> str:
    return render(tiny_tokenizer(), template, TALK, generation_prompt=False, tokens={})


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ (messages|map(attribute='__class__')|list)[0].__name__ }}",
        "{{ namespace.__init__.__globals__ }}",
    ],
)
def test_templates_reach_nothing_outside(template: str) -> None:
    try:
        text = rendered(template)
    except ConfigError:
        return
    except Exception as error:
        assert type(error).__name__ == "Unusable"
        return
    assert "<class" not in text and "module" not in text and "function" not in text


def test_a_template_that_reaches_out_is_stopped_in_words() -> None:
    with pytest.raises(ConfigError, match="does what no template may, and was stopped: access to attribute '__class__'"):
        rendered("{{ ''.__class__.__mro__ }}")
    with pytest.raises(ConfigError, match=r"no template may|broken"):
        rendered("{% include '/etc/passwd' %}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% for i in range(99999) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
    ],
)
def test_a_template_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr("srppo.data.templates.bounded", lambda: bounded(seconds=0.5))
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"does not end within 0\.5 seconds|RecursionError"):
        rendered(template)
    assert time.monotonic() - began < 30


def test_a_template_that_grows_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srppo.data.templates.bounded", lambda: bounded(seconds=60.0, memory=100 << 20))
    grows = "{% set n = namespace(x='x' * 1000000) %}{% for i in range(99999) %}{% set n.x = n.x ~ 'y' * 20000000 %}{% endfor %}"
    with pytest.raises(ConfigError, match=r"takes more than 100 MiB of memory|MemoryError"):
        rendered(grows)


def test_a_range_beyond_the_sandboxs_is_refused() -> None:
    with pytest.raises(ConfigError, match="chat template is broken: OverflowError"):
        rendered("{{ range(10 ** 9) | list | length }}")


def test_bounds_leave_no_timer_behind() -> None:
    import signal

    with bounded():
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    with pytest.raises(TooMuch), bounded(seconds=0.3):
        while True:
            pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    done: list[int] = []

    def elsewhere() -> None:
        with bounded(seconds=0.1):  # not in the main thread: no bound, no error
            done.append(1)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done == [1]


# --- what is shown in a terminal

HARMFUL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")


def test_clean_leaves_nothing_that_moves_or_hides() -> None:
    assert not HARMFUL.search(clean(ATTACK)) and clean(ATTACK).encode() and "red" in clean(ATTACK)
    assert clean("é日本🏳️\u200d🌈\tx\ny") == "é日本🏳️\u200d🌈\tx\ny"


@pytest.mark.parametrize("mode", ["plain", "quiet", "json", "live"])
def test_every_progress_is_clean(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal() if mode == "live" else io.StringIO()
    progress = make_progress(mode, stream)
    with progress.stage(ATTACK, 2, "rows") as stage:
        stage.advance(1, **{ATTACK: 0.5, f"eval/{ATTACK}/sampled": 1.0})
        stage.advance(2)
    progress.note(ATTACK)
    progress.warn(f"{ATTACK} [red]no mark-up[/red]")
    progress.table(ATTACK, [ATTACK, "b"], [[ATTACK, 1.0], ["[bold]x[/bold]", ATTACK]])
    captured = capsys.readouterr()
    shown = stream.getvalue() + captured.out + captured.err
    if mode == "live":  # its own bars move the cursor and colour text: the attacker's parts are not among it
        assert "\x1b]" not in shown and "\x1b[2J" not in shown and "\x07" not in shown and "\u202e" not in shown
    else:
        assert not HARMFUL.search(shown)
    assert "[red]no mark-up[/red]" in shown or mode == "json"
    if mode == "json":
        assert all(isinstance(json.loads(line), dict) for line in shown.splitlines())


def test_generated_text(capsys: pytest.CaptureFixture[str]) -> None:
    answers = [Completion(ATTACK, ATTACK, ATTACK, 3, True)] * 2
    print_completions(answers)
    assert not HARMFUL.search(capsys.readouterr().out)
    print_completions(answers, as_json=True)
    out = capsys.readouterr().out
    assert not HARMFUL.search(out)
    assert [json.loads(line)["completion"] for line in out.splitlines()] == [ATTACK] * 2  # nothing is lost


def test_json_text_is_json() -> None:
    for value in ("\x7f", '"\\\x7f', {"\u202e": [ATTACK, None, 1.5, True]}, "é日本", "\\u202e"):
        text = json_text(value)
        assert json.loads(text) == value and not HARMFUL.search(text)
    assert json_text("é日本") == '"é日本"'


def test_error_messages_are_clean(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({ATTACK: ATTACK}) + "\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"demonstrations": str(path)}, "model": {"name": "x"}, "a\x1b[2Jb\u202e": 1}))
    result = CliRunner().invoke(cli, ["config", str(recipe)])
    assert result.exit_code == 2 and not HARMFUL.search(result.output)


def test_a_recipe_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"system_prompt": "a\u202eb\x1b[2J"}}))
    result = CliRunner().invoke(cli, ["config", str(recipe)])
    assert yaml.safe_load(result.output)["data"]["system_prompt"] == "a\u202eb\x1b[2J"  # a file gets it whole


def test_warnings_and_logs_of_libraries_are_cleaned(tmp_path: Path) -> None:
    """In a process of its own, as the command sets it up."""
    program = f"""
        import logging, warnings
        from srppo.terminal import guard_terminal
        guard_terminal(); guard_terminal()
        attack = {ATTACK.replace(chr(0xD800), "")!r}
        warnings.warn(attack)
        logging.getLogger("transformers").warning("model says %s", attack)
        logging.warning(attack)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.count("red") >= 3
    assert not HARMFUL.search(done.stderr), done.stderr


def test_guarding_keeps_another_record_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    before, plain = logging.getLogRecordFactory(), warnings.formatwarning

    class Own(logging.LogRecord):
        pass

    try:
        logging.setLogRecordFactory(Own)
        guard_terminal()
        assert logging.getLogRecordFactory() is Own
    finally:
        logging.setLogRecordFactory(before)
        warnings.formatwarning = plain


# --- what is shown in a browser


def test_the_page_allows_no_script_and_no_request(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", iterations=2)
    page = write_report(run).read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy and policy[1].startswith("default-src 'none'")
    allowed = dict(part.strip().split(" ", 1) for part in policy[1].split(";"))
    assert allowed == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not re.search(r"<(script|iframe|object|embed|link|base|form|a |svg)", page) and "javascript:" not in page
    assert not re.search(r"(src|href)=\"(?!data:image/png;base64,)", page)


# --- model cards


def test_a_card_is_text(tmp_path: Path) -> None:
    evil = "x`\n# Install\n<script>alert(1)</script>[click](http://x)``` `"
    config = build({"model": {"name": evil}, "data": {"demonstrations": evil}, "reward": {"checkpoint": evil}})
    card = model_card(config, "policy")
    assert "\n# Install" not in card
    for line in card.splitlines():
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line)  # CommonMark's code spans
        assert "<script" not in outside and "](" not in outside, line
    assert code("plain") == "`plain`" and code("a`b") == "`` a`b ``" and code("") == "`  `"


# --- nothing is written elsewhere


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "samples.jsonl", "config.yaml", "summary.json", "report.html", "elapsed.json"])
def test_a_link_in_a_run_folder_is_not_written_through(tmp_path: Path, victim: Path, name: str) -> None:
    """Of a folder that somebody else made: its .lock may be a link to your keys."""
    run = write_run(tmp_path / "run", answers=False, iterations=1)
    if name == "config.yaml":
        victim.write_bytes((run / name).read_bytes())
    before = victim.read_bytes()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    with pytest.raises(RunFolderError, match="is a link"):
        RunFolder.existing(run)
    with pytest.raises(RunFolderError, match=r"is a link|differ"):
        RunFolder.open(run, dump(build({})), resume=True)
    if name != ".lock":
        with pytest.raises(RunFolderError, match="is a link"):
            write_report(run)
    assert victim.read_bytes() == before


@pytest.mark.parametrize("name", ["plots", "stages", "evaluation", "checkpoints", "policy", "checkpoints/ppo"])
def test_a_linked_folder_is_not_written_into(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run", answers=False, iterations=1)
    outside = tmp_path / "outside"
    outside.mkdir()
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(outside)
    with pytest.raises(RunFolderError, match="is a link"):
        RunFolder.existing(run)
    with pytest.raises(RunFolderError, match="is a link"):
        write_report(run)
    assert not list(outside.iterdir())


def test_the_output_itself_may_be_a_link(tmp_path: Path) -> None:
    run = write_run(tmp_path / "real", answers=False, iterations=1)
    (tmp_path / "latest").symlink_to(run)
    assert write_report(tmp_path / "latest").is_file()
    RunFolder.existing(tmp_path / "latest").close()


def test_overwriting_deletes_links_but_not_what_they_lead_to(tmp_path: Path, victim: Path) -> None:
    run = write_run(tmp_path / "run", answers=False, iterations=1)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "work").write_text("years")
    (run / "checkpoints").symlink_to(outside)
    (run / "notes.txt").symlink_to(victim)
    (run / "stages").mkdir()
    (run / "stages/deep").symlink_to(outside)
    RunFolder.open(run, dump(build({})), overwrite=True).close()
    assert (outside / "work").read_text() == "years" and victim.read_text() == "precious"
    assert not (run / "checkpoints").exists() and not (run / "notes.txt").exists()


def test_appending_follows_no_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(RunFolderError, match="is a link"):
        append_lines(tmp_path / "metrics.jsonl", [{"a": 1}])
    write_bytes(tmp_path / "metrics.jsonl", b"new")  # replaces the link
    assert victim.read_text() == "precious" and not (tmp_path / "metrics.jsonl").is_symlink()


def test_names_from_data_are_no_paths(tmp_path: Path) -> None:
    """Groups are named by the data; no file is named by them."""
    from tiny_job import run, tiny_job, write_rows

    rows = [
        {"prompt": f"say {i}:", "completion": f" {i}", "group": ["../../escaped", "/tmp/escaped", "a/b", "."][i % 4]} for i in range(20)
    ]
    changes = {"data__demonstrations": write_rows(tmp_path / "d2.jsonl", rows), "ppo__iterations": 0, "data__heldout": 8}
    before = {p for p in tmp_path.rglob("*") if "run" not in p.parts}
    config = tiny_job(tmp_path, **changes)
    run(config)
    made = {p for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "run")} - before
    assert all(p.is_relative_to(tmp_path / "llama") or p.suffix == ".jsonl" for p in made), made
    assert not Path("/tmp/escaped").exists()


# --- permissions


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_what_is_written_obeys_the_umask(model: Path, tmp_path: Path, umask: int) -> None:
    roles = standard_roles(str(model), "lora")
    before = os.umask(umask)
    try:
        with RunFolder.open(tmp_path / "run", dump(build({}))) as run:
            run.log({"stage": "sft", "step": 1})
            run.write_json("summary.json", {})
        roles.save("policy", tmp_path / "run/policy")
    finally:
        os.umask(before)
    for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & umask == 0, (path, oct(mode))
        assert path.name.startswith(".") or path.is_dir() or mode == 0o666 & ~umask, (path, oct(mode))  # as any new file
        assert path.name.startswith(".") or mode & 0o700 >= 0o600, (path, oct(mode))


def test_reading_the_umask_opens_nothing(tmp_path: Path) -> None:
    """It can only be read by setting it: another thread's file made at that moment must not become readable to all."""
    from srppo.files import current_umask

    seen: list[int] = []
    before = os.umask(0o077)
    try:
        original = os.umask

        def watching(mask: int) -> int:
            seen.append(mask)
            return original(mask)

        os.umask = watching  # type: ignore[assignment]
        assert current_umask() == 0o077
    finally:
        os.umask = original
        os.umask(before)
    assert all(mask & 0o077 == 0o077 for mask in seen)


def test_torch_is_not_asked_to_unpickle(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for models nor for checkpoints."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was loaded")

    for place, name in ((torch, "load"), (pickle, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(place, name, refuse)
    roles = standard_roles(str(model), "full")
    roles.save("policy", model.parent / "policy")
    build_roles(settings(model)).load("sft", model.parent / "policy")
    save_checkpoint(model.parent / "checkpoints", Checkpoint(1, {"policy": roles.state("policy")}, {"a": 1}), keep=1)
    assert load_checkpoint(model.parent / "checkpoints", 1).state == {"a": 1}
    assert not list(model.parent.rglob("*.metadata")) and not list(model.parent.rglob("*.pt"))
