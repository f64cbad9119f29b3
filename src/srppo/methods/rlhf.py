"""PPO with a preference-trained reward model (Ouyang et al. 2022, arXiv 2203.02155): what the Self-Rewarding PPO paper compares with.

The loop, the losses and the KL anchor are those of methods/srppo.py; only what judges a whole response differs. The coefficient of
the KL where the recipe leaves it open is BETA, the usual one with a learned reward (arXiv 2403.17031), not SRPPO's 1.
"""

from __future__ import annotations

from srppo.config import RewardConfig
from srppo.rewards import PreferenceReward

BETA = 0.05


def preference_reward(config: RewardConfig) -> PreferenceReward:
    """The reward as the configuration states it."""
    return PreferenceReward(config.scale, config.missing_eos, config.missing_eos_penalty, config.whiten)
