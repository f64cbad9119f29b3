"""The model card beside every saved model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from srppo.config import RewardConfig, RunConfig
from srppo.text import code, counted

_LEARNED = "supervised fine-tuning on demonstrations, then PPO with a preference-trained reward model (arXiv 2203.02155)"
_WHAT = {
    "sft": "supervised fine-tuning on demonstrations",
    "sft_continued": "supervised fine-tuning on demonstrations, continued with the compute of PPO (a baseline)",
    "policy": "supervised fine-tuning on demonstrations, then Self-Rewarding PPO (arXiv 2510.21090)",
}


def model_card(config: RunConfig, role: str, trained: Mapping[str, Any] | None = None) -> str:
    """What the model is and how it was made, as Markdown; saving adds the front matter and how to load it.

    trained: how PPO went, for the policy: `rounds`, `first_beta`, and `kept_round` where a guard watched.
    """
    reward, ppo = config.reward, config.ppo
    lines = [
        f"# {code(config.model.name)}, aligned from demonstrations",
        "",
        f"Made by srppo {version('srppo')} from {code(config.model.name)} by {_what(config, role)}.",
        "",
        f"- tuning: {config.tuning.kind}" + (f" (rank {config.tuning.lora_rank})" if config.tuning.kind == "lora" else ""),
        f"- demonstrations: {code(config.data.demonstrations)}",
        f"- seed: {config.seed}",
    ]
    if role == "policy":
        lines += [
            _reward_line(reward),
            _anchor_line(reward, trained or {}),
            f"- PPO: {_rounds(config, trained or {})} of {ppo.prompts_per_iteration} x {ppo.samples_per_prompt} rollouts, "
            f"lr {ppo.learning_rate}{_kept(trained or {})}",
        ]
    lines += ["", "The run folder's report.html and summary.json say how it compares with the base and the fine-tuned model.", ""]
    return "\n".join(lines)


def _what(config: RunConfig, role: str) -> str:
    return _LEARNED if role == "policy" and config.reward.kind == "preference_model" else _WHAT[role]


def _anchor_line(reward: RewardConfig, trained: Mapping[str, Any]) -> str:
    if reward.kl_anchor == "none":
        return "- no KL anchor"
    target = f" in the first round, target {reward.kl_target:g} nats" if reward.kl_target else ""
    return f"- KL anchor {reward.kl_anchor}, coefficient {trained.get('first_beta', reward.kl_coef)}{target}"


def _rounds(config: RunConfig, trained: Mapping[str, Any]) -> str:
    planned = config.ppo.iterations
    done = trained.get("rounds", planned)
    return counted(done, "round") + (f" (of {planned} planned; the guard stopped it)" if done < planned else "")


def _kept(trained: Mapping[str, Any]) -> str:
    """What a guard that went back has kept."""
    kept = trained.get("kept_round", trained.get("rounds"))
    if kept == trained.get("rounds"):
        return ""
    if kept == 0:
        return "; by the guard's measure no round was better than the SFT model, so these are the SFT model's weights"
    return f"; these are the weights after round {kept}, the best by the guard's measure"


def _reward_line(reward: RewardConfig) -> str:
    if reward.kind == "preference_model":
        return f"- reward: the score of {code(reward.preference_model)}"
    numerator = ""
    if isinstance(reward.checkpoint, float):
        numerator = f" (pi_sft after {100 * reward.checkpoint:g} % of the SFT)"
    elif reward.checkpoint not in ("auto", "sft"):
        numerator = f" (pi_sft from {code(reward.checkpoint)})"
    how = f"placement {reward.placement}, length normalisation {reward.length_normalization}"
    return f"- reward: log pi_sft - log pi_base{numerator}, {how}"
