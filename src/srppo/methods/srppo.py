"""Self-Rewarding PPO (arXiv 2510.21090, COLM 2025): PPO on r(x, y) = log pi_sft(y|x) - log pi_base(y|x).

Where we depart from the paper, or it does not say:
- The paper publishes neither gamma, lambda, the KL coefficient and anchor, nor learning rates and batch sizes where we could read it.
  Ours: gamma 1, lambda .95, clip .2, 4 epochs (arXiv 2403.17031's PPO), anchor sft with beta 1, whose optimum squares the SFT odds.
- Placement `token`, length normalisation, token shift and clip, and a numerator from another SFT checkpoint are options of ours.
- A rollout without EOS loses one nat by default; with anchor sft a smaller beta extrapolates further and over-optimises sooner.
"""

from __future__ import annotations

from srppo.config import RewardConfig
from srppo.methods.rlhf import BETA as PREFERENCE_BETA
from srppo.rewards import AdaptiveKL, CoherentReward


def coherent_reward(config: RewardConfig) -> CoherentReward:
    """The reward as the configuration states it."""
    return CoherentReward(
        placement=config.placement,
        length_normalization=config.length_normalization,
        scale=config.scale,
        token_shift=config.token_shift,
        token_clip=config.token_clip,
        include_eos=config.include_eos,
        missing_eos=config.missing_eos,
        missing_eos_penalty=config.missing_eos_penalty,
        whiten=config.whiten,
    )


def first_beta(config: RewardConfig) -> float:
    """The KL coefficient of the first round; 0 without an anchor, 1 where it is left to a reward card that was not made.

    With a preference model instead of the coherent reward the one left open is methods/rlhf.py's.
    """
    if config.kl_anchor == "none":
        return 0.0
    if config.kl_coef != "auto":
        return float(config.kl_coef)
    return 1.0 if config.kind == "coherent" else PREFERENCE_BETA


def next_beta(config: RewardConfig, beta: float, kl: float, episodes: int) -> float:
    """beta after a round whose KL to the anchor was `kl` nats a response; unchanged where no kl_target is set."""
    if config.kl_target is None or config.kl_anchor == "none":
        return beta
    return AdaptiveKL(beta, config.kl_target, config.kl_horizon).updated(kl, episodes).coef
