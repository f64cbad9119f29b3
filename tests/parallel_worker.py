"""Started by torchrun with a JSON file of tiny jobs, which it does one after the other: see test_parallel.py.

A job: folder (with the materials), kind, output, changes (of the configuration), resume, stop (at the so-many-th safe point), what
(align or another of srppo.job), fail (rank that raises in the middle), kill (rank that is killed there),
memory (in what rank 1 has no memory left).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import srppo.workspace
from srppo import job
from srppo.meeting import world_of_run
from srppo.progress import make_progress
from srppo.train import supervised, update
from srppo.train.interrupt import Interrupt, Interrupted
from srppo.world import world
from tiny_job import tiny_job


class StopAtPoint(Interrupt):
    """As if a signal came in to the last process before its n-th safe point."""

    left = 0

    def check(self) -> None:
        self.left -= 1
        self.requested = self.left <= 0 and world().rank == world().size - 1
        super().check()


def do(spec: dict[str, Any]) -> None:
    config = world().once(lambda: tiny_job(Path(spec["folder"]), kind=spec["kind"], output=spec["output"], **spec.get("changes", {})))
    StopAtPoint.left = spec.get("stop", 10**9)
    srppo.workspace.Interrupt = StopAtPoint  # type: ignore[misc]
    if spec.get("fail") == world().rank:

        def broken(*_: Any, **__: Any) -> Any:
            raise srppo.errors.DataError("this process cannot read it", "a file", 7)

        job.continued_stage = broken
    if spec.get("kill") == world().rank:
        job.continued_stage = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    if spec.get("memory") and world().rank == 1:
        module = supervised if spec["memory"] == "sft" else update
        name = "cross_entropy" if spec["memory"] == "sft" else "clipped_surrogate"

        def out_of_memory(*_: Any) -> Any:
            raise torch.OutOfMemoryError("no memory left")

        setattr(module, name, out_of_memory)
    if spec.get("what") == "run_evaluate":
        job.run_evaluate(config.output, config, progress=make_progress("quiet"))
        return
    try:
        getattr(job, spec.get("what", "align"))(config, resume=spec.get("resume", False), progress=make_progress("quiet"))
    except Interrupted as error:
        assert "stop" in spec, error


def main() -> None:
    with world_of_run() as here:
        for spec in json.loads(Path(sys.argv[1]).read_text()):
            do(spec)
            here.barrier()


if __name__ == "__main__":
    import click

    from srppo.cli import Commands

    @click.command()
    def run() -> None:
        main()

    group = Commands("worker", commands={"run": run})
    sys.argv = [sys.argv[0], *sys.argv[1:]]
    group.main(["run"], standalone_mode=True)
