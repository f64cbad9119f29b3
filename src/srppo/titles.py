"""What the stages of a run are called wherever people read of them."""

from __future__ import annotations

STAGES = {"base": "base", "sft": "SFT", "sft_continued": "continued SFT", "srppo": "SRPPO"}  # in the order of the tables


def stage_titles(kind: str | None) -> dict[str, str]:
    """STAGES, with another name for PPO where reward.kind says that a reward model judges."""
    return STAGES | ({"srppo": "PPO, reward model"} if kind == "preference_model" else {})
