"""Checkpoints appear whole or not at all, give back every bit, and notice when a bit is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from srppo.errors import RunFolderError
from srppo.train import checkpoint as module
from srppo.train import checkpoint_storage as storage
from srppo.train.checkpoint import Checkpoint, checkpoint_path, load_checkpoint, load_latest, save_checkpoint, saved_steps
from srppo.train.saver import Saver
from test_input_faults import mounted


def content(step: int) -> Checkpoint:
    return Checkpoint(step, {"policy": {"w": torch.full((3,), float(step))}, "optimizer": {"w/step": torch.tensor(step)}}, {"beta": 0.5})


def of_every_kind() -> dict[str, dict[str, Tensor]]:
    """Scalars, odd precisions, no elements, views, gradients, odd names, an empty group."""
    bits = torch.tensor([0x7FC01234, 0x7F800000, -0x80000000, 1], dtype=torch.int32)  # NaN with a payload, infinity, -0, a denormal
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    return {
        "policy": {
            "model.layers.0/q-proj weight": weight,
            "bits": bits.view(torch.float32),
            "bf16": torch.tensor([1.0, 1.0039, -3e38]).bfloat16(),
            "half": torch.tensor([[6e-8], [65504.0]]).half(),
            "double": torch.tensor(1 / 3, dtype=torch.float64),
            "transposed": weight.detach().t(),
            "every other": torch.arange(10)[::2],
            "expanded": torch.ones(1, 3).expand(2, 3),
            "none": torch.zeros(0, 5),
            "flags": torch.tensor([True, False]),
        },
        "optimizer": {"model.layers.0/q-proj weight/step": torch.tensor(7.0), "count": torch.tensor(-(2**62))},
        "critic": {},
    }


def same(one: Tensor, other: Tensor) -> bool:
    one, other = one.detach().contiguous(), other.detach().contiguous()
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.flatten().view(torch.uint8).equal(other.flatten().view(torch.uint8))
    )


def test_every_bit_comes_back(tmp_path: Path) -> None:
    tensors = of_every_kind()
    state = {"beta": 0.1 + 0.2, "nan": float("nan"), "list": [1, None, "ü"], "deep": {"z": 1, "a": 2}}
    save_checkpoint(tmp_path / "a" / "b", Checkpoint(3, tensors, state), keep=1)
    for like in (None, tensors):
        back = load_checkpoint(tmp_path / "a" / "b", 3, like)
        assert back.step == 3 and str(dict(back.state)) == str(state)
        assert {g: set(own) for g, own in back.tensors.items()} == {g: set(own) for g, own in tensors.items()}
        for group, own in tensors.items():
            assert all(same(tensor, back.tensors[group][name]) for name, tensor in own.items())
            assert not any(t.requires_grad for t in back.tensors[group].values())


def test_the_files_are_plain_safetensors_and_json(tmp_path: Path) -> None:
    tensors = of_every_kind()
    path = save_checkpoint(tmp_path, Checkpoint(3, tensors, {}), keep=1)
    assert sorted(p.name for p in path.iterdir()) == ["index.json", "optimizer.safetensors", "policy.safetensors", "state.json"]
    read = load_file(path / "policy.safetensors")
    assert all(same(read[name], tensor) for name, tensor in tensors["policy"].items() if tensor.numel())
    told = json.loads((path / "state.json").read_text())
    assert told["world_size"] == 1 and set(told["files"]) == {p.name for p in path.iterdir()} - {"state.json"}
    assert all(told["files"][p.name]["bytes"] == p.stat().st_size for p in path.iterdir() if p.name != "state.json")


def test_the_last_k_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, content(step), keep=2)
    assert saved_steps(tmp_path) == [2, 10] and sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    latest = load_latest(tmp_path, warn=pytest.fail)
    assert latest and latest.step == 10 and latest.tensors["policy"]["w"].tolist() == [10.0] * 3
    assert load_latest(tmp_path / "nothing", warn=pytest.fail) is None


def test_saving_copies_what_is_trained_at_the_moment_of_writing(tmp_path: Path) -> None:
    weight = torch.zeros(3)
    save_checkpoint(tmp_path, Checkpoint(1, {"policy": {"w": weight}}, {}), keep=1)
    weight += 1
    assert load_checkpoint(tmp_path, 1).tensors["policy"]["w"].tolist() == [0.0] * 3


@pytest.mark.parametrize("at", ["first file", "second file", "state.json", "rename", "folder"])
def test_a_failed_write_leaves_the_earlier_ones_and_nothing_half_written(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, content(1), keep=2)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    inner = storage.Summed.write
    if at in ("first file", "second file"):
        calls: list[int] = []

        def write(self: storage.Summed, piece: Any) -> None:
            calls.append(1)
            inner(self, piece)  # the head, or half a file
            if len(calls) == {"first file": 1, "second file": 3}[at]:
                fail()

        monkeypatch.setattr(storage.Summed, "write", write)
    elif at == "state.json":
        monkeypatch.setattr(module, "state_text", fail)
    elif at == "rename":
        monkeypatch.setattr(module.os, "replace", fail)
    else:
        monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(RunFolderError, match=r"checkpoint-2: .*No space left.*earlier checkpoints are intact"):
        save_checkpoint(tmp_path, content(2), keep=2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert load_checkpoint(tmp_path, 1).step == 1


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from srppo.errors import RunFolderError
from srppo.train.checkpoint import Checkpoint, save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
save_checkpoint(folder, Checkpoint(1, {"policy": {"w": torch.ones(100)}}, {}), 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(folder, Checkpoint(2, {"policy": {"w": torch.ones(100)}, "optimizer": {"w": torch.ones(100_000)}}, {}), 2)
except RunFolderError as error:
    print(error)
"""


def test_a_file_that_the_system_refuses_to_let_grow(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert "checkpoint-2: the checkpoint could not be written" in done.stdout and "File too large" in done.stdout, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"] and load_checkpoint(tmp_path, 1).step == 1


def test_records_are_on_the_disk_before_the_checkpoint_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure must not leave a checkpoint whose rounds' records, which no resumed run writes again, are gone."""
    order: list[str] = []
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    monkeypatch.setattr(module, "sync_file", lambda path: order.append(Path(path).name))
    monkeypatch.setattr(module.os, "replace", lambda old, new, replace=os.replace: (order.append("renamed"), replace(old, new))[1])
    save_checkpoint(tmp_path / "checkpoints/ppo", content(1), keep=1)
    assert order[0] == "metrics.jsonl" and "renamed" in order[1:]


def test_a_step_that_was_just_saved_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a signal after a round's checkpoint there is no time to sum up a terabyte."""
    read: list[Path] = []
    monkeypatch.setattr(module, "is_whole", lambda path: (read.append(path), False)[1])
    with Saver(tmp_path, keep=2) as saver:
        saver.save(content(1))
        saver.save(content(1))
        saver.save(content(2))
    assert read == [checkpoint_path(tmp_path, 1), checkpoint_path(tmp_path, 2)] and saved_steps(tmp_path) == [1, 2]


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    program = """
        import torch
        from srppo.errors import RunFolderError
        from srppo.train.checkpoint import Checkpoint, load_latest, save_checkpoint

        def content(step):
            return Checkpoint(step, {"policy": {"w": torch.ones(100)}, "optimizer": {"w": torch.ones(30_000)}}, {})

        for step in (1, 2, 3, 4):
            try:
                save_checkpoint(place / "ppo", content(step), keep=3)
            except RunFolderError as error:
                print("said:", error)
        print("left:", sorted(p.name for p in (place / "ppo").iterdir()), load_latest(place / "ppo", warn=print).step)
    """
    done = mounted(tmp_path, "300k", program)
    for step in (3, 4):
        assert f"checkpoint-{step}: the checkpoint could not be written ([Errno 28] No space left" in done.stdout, done.stderr
    assert "left: ['checkpoint-1', 'checkpoint-2'] 2" in done.stdout


def test_ctrl_c_while_writing_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        _ctrl_c_while_writing(tmp_path, monkeypatch)
    finally:
        signal.signal(signal.SIGINT, before)


def _ctrl_c_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.Summed, "write", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, content(1), keep=1)
    assert not list(tmp_path.iterdir())


def test_a_partial_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-3.partial").mkdir()
    (tmp_path / ".checkpoint-2.71-9.partial").mkdir()  # killed while it was being deleted
    (tmp_path / "checkpoint-4").mkdir()  # killed so by an older version
    assert saved_steps(tmp_path) == []
    save_checkpoint(tmp_path, content(3), keep=1)
    save_checkpoint(tmp_path, content(4), keep=1)
    assert saved_steps(tmp_path) == [4] and [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def rubbish(path: Path) -> None:
    path.write_bytes(b"\x00\xff" * 40)


@pytest.mark.parametrize("harm", [cut, flip, empty, rubbish, Path.unlink])
@pytest.mark.parametrize("file", ["policy.safetensors", "optimizer.safetensors", "index.json", "state.json"])
def test_damage_is_noticed_and_the_one_before_is_taken(harm: Any, file: str, tmp_path: Path) -> None:
    for step in (4, 5):
        save_checkpoint(tmp_path, content(step), keep=2)
    harm(checkpoint_path(tmp_path, 5) / file)
    with pytest.raises(RunFolderError, match=r"checkpoint-5: damaged .*delete this folder to continue"):
        load_checkpoint(tmp_path, 5)
    told: list[str] = []
    found = load_latest(tmp_path, warn=told.append)
    assert found and found.step == 4 and found.tensors["policy"]["w"].tolist() == [4.0] * 3
    assert len(told) == 1 and "checkpoint-5: damaged (" in told[0] and file in told[0] and "checkpoint-4" in told[0]
    save_checkpoint(tmp_path, content(5), keep=2)  # the run comes there again
    assert load_checkpoint(tmp_path, 5).tensors["policy"]["w"].tolist() == [5.0] * 3 and saved_steps(tmp_path) == [4, 5]


def test_a_bit_in_any_byte_of_state_json_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, content(5), keep=1) / "state.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        if json_value(path.read_bytes()) != json_value(whole):  # white space may become other white space
            with pytest.raises(RunFolderError, match="checkpoint-5: "):
                load_checkpoint(tmp_path, 5)


def json_value(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def test_without_a_whole_one_the_error_says_what_to_do(tmp_path: Path) -> None:
    for step in (4, 5):
        save_checkpoint(tmp_path, content(step), keep=2)
    cut(checkpoint_path(tmp_path, 5) / "policy.safetensors")
    (checkpoint_path(tmp_path, 4) / "state.json").unlink()
    words = r"no checkpoint is whole \(checkpoint-5: policy.safetensors has \d+ bytes, not \d+; checkpoint-4: state.json is missing\)"
    with pytest.raises(RunFolderError, match=words + r".*delete this folder: --resume"):
        load_latest(tmp_path, warn=pytest.fail)


def test_a_damaged_later_one_never_costs_the_whole_ones(tmp_path: Path) -> None:
    """Number 10 is damaged, the run goes on from 5 and saves 7 with room for one: 7 stays, not 10."""
    for step in (5, 10):
        save_checkpoint(tmp_path, content(step), keep=2)
    cut(checkpoint_path(tmp_path, 10) / "policy.safetensors")
    save_checkpoint(tmp_path, content(7), keep=1)
    assert saved_steps(tmp_path) == [7]


def test_older_formats_and_other_models_are_refused_in_words(tmp_path: Path) -> None:
    old = tmp_path / "old" / "checkpoint-3"
    old.mkdir(parents=True)
    (old / "state.json").write_text(json.dumps({"step": 3, "groups": ["policy"], "beta": 1.0}))
    with pytest.raises(RunFolderError, match=r"checkpoint-3: written by an older version of srppo.*--overwrite"):
        load_latest(tmp_path / "old", warn=pytest.fail)
    save_checkpoint(tmp_path, content(1), keep=1)
    with pytest.raises(RunFolderError, match=r"policy/w is \[3\] there and \[4\] here"):
        load_latest(tmp_path, {"policy": {"w": torch.zeros(4)}}, warn=pytest.fail)


def test_no_pickle_is_read(tmp_path: Path) -> None:
    """Files of another's making: a pickle is not opened, and no path leaves the folder."""
    path = save_checkpoint(tmp_path, content(1), keep=1)
    torch.save({"w": torch.zeros(3)}, path / "policy.safetensors")
    with pytest.raises(RunFolderError, match="damaged"):
        load_checkpoint(tmp_path, 1)
    shutil.rmtree(path)
    path = save_checkpoint(tmp_path / "x", content(1), keep=1)
    state = json.loads((path / "state.json").read_text())
    state["files"]["../policy.safetensors"] = state["files"].pop("policy.safetensors")
    from srppo.train.checkpoint_state import state_text

    (path / "state.json").write_bytes(state_text({k: v for k, v in state.items() if k not in ("format", "checksum")}))
    with pytest.raises(RunFolderError, match="damaged"):
        load_checkpoint(tmp_path / "x", 1)


# --- in the background


class Held:
    """Holds a write until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.go, self.begun, inner = threading.Event(), threading.Event(), storage.Summed.write

        def write(summed: storage.Summed, piece: Any) -> None:
            self.begun.set()
            assert self.go.wait(60)
            inner(summed, piece)

        monkeypatch.setattr(storage.Summed, "write", write)


def test_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(3)
    with Saver(tmp_path, keep=1, background=True) as saver:
        saver.save(Checkpoint(1, {"policy": {"w": weight}}, {}))
        saver.wait()
        held = Held(monkeypatch)
        weight += 1
        saver.save(Checkpoint(2, {"policy": {"w": weight}}, {}))
        assert held.begun.wait(60)
        weight += 1  # the next step
        saver.check()
        assert saved_steps(tmp_path) == [1]  # what a kill now would leave
        held.go.set()
    assert saved_steps(tmp_path) == [2] and load_checkpoint(tmp_path, 2).tensors["policy"]["w"].tolist() == [1.0] * 3


def test_what_a_write_in_the_background_fails_with_comes_at_the_next_safe_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with Saver(tmp_path, keep=1, background=True) as saver:
        saver.save(content(1))
        saver.wait()
        monkeypatch.setattr(storage.Summed, "write", fail)
        saver.save(content(2))
        saver._thread.join()  # type: ignore[union-attr]
        with pytest.raises(RunFolderError, match=r"checkpoint-2.*No space left"):
            saver.check()
        saver.check()  # told once
        saver.save(content(3))
        with pytest.raises(RunFolderError, match="checkpoint-3"):
            saver.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    with pytest.raises(RunFolderError, match="checkpoint-4"), Saver(tmp_path, keep=1, background=True) as saver:
        saver.save(content(4))
    with pytest.raises(ZeroDivisionError), Saver(tmp_path, keep=1, background=True) as saver:
        saver.save(content(4))
        raise ZeroDivisionError  # the first error is the one to tell
