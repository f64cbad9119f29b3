"""The demonstration: the whole method in the embedded world, in a few minutes on a laptop, with exact answers to judge by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from srppo.config import build, dump, merge
from srppo.job import align, by_all_processes
from srppo.lab.world import recipe, write_world
from srppo.meeting import start_world
from srppo.progress import Progress, make_progress
from srppo.run_folder import RunFolder

WHAT = """\
A tiny language model was pretrained on texts by many authors: some answer string tasks right, some answer another task, some ramble,
some are verbose. Asked at random it is right about a third of the time, though its best guess is mostly right.
Demonstrations show right, terse answers for FOUR of ten task families. The question is what happens on the SIX families without any.
  base           the pretrained model
  SFT            fine-tuned a little on the demonstrations
  continued SFT  fine-tuned further with as much compute as PPO used, kept at its lowest held-out loss
  SRPPO          PPO from the SFT model; the reward is log pi_sft - log pi_base: no labels, no reward model
"""


@by_all_processes
def demo(
    seed: int = 0,
    output: str = "runs/demo",
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Run the whole job in the lab world and say what is seen. Returns the summary.

    The world's files are written beside the run folder, to <output>-world: a stopped run needs them again, and so does a later look.
    changes: dotted configuration keys with `__` for the dot (ppo__iterations=5), for experiments.
    """
    progress = progress or make_progress("live")
    progress.note(WHAT)
    place, here = Path(f"{output}-world"), start_world()
    config = build(merge(recipe(place, seed, output), {name.replace("__", "."): value for name, value in changes.items()}))
    here.once(lambda: RunFolder.check(output, resume=resume, overwrite=overwrite, config_yaml=dump(config)))
    here.once(lambda: write_world(place, seed))
    summary = align(config, resume=resume, overwrite=overwrite, progress=progress)
    for line in verdict(summary):
        progress.note(line)
    return summary


def verdict(summary: dict[str, Any]) -> list[str]:
    """What the table says, in words that the figures bear out."""
    out = []
    for rival, name in (("sft", "SFT"), ("sft_continued", "continued SFT")):
        for group, gain in summary.get("srppo_gain", {}).get(rival, {}).items():
            points, low, high = (100 * gain[k] for k in ("gain", "low", "high"))
            clear = "" if low > 0 or high < 0 else ", which chance alone could give"
            families, chance = f"Families {group.replace('_', ' ')}", f"95 % interval {low:+.1f} to {high:+.1f}{clear}"
            out.append(f"{families}: SRPPO {points:+.1f} points over {name} ({chance}).")
    return out
