"""The model card beside every saved model."""

from __future__ import annotations

from importlib.metadata import version

from srppo.config import RewardConfig, RunConfig

_LEARNED = "supervised fine-tuning on demonstrations, then PPO with a preference-trained reward model (arXiv 2203.02155)"
_WHAT = {
    "sft": "supervised fine-tuning on demonstrations",
    "sft_continued": "supervised fine-tuning on demonstrations, continued with the compute of PPO (a baseline)",
    "policy": "supervised fine-tuning on demonstrations, then Self-Rewarding PPO (arXiv 2510.21090)",
}


def model_card(config: RunConfig, role: str) -> str:
    """What the model is and how it was made, as Markdown; saving adds the front matter and how to load it."""
    reward, ppo = config.reward, config.ppo
    lines = [
        f"# {config.model.name}, aligned from demonstrations",
        "",
        f"Made by srppo {version('srppo')} from `{config.model.name}` by {_what(config, role)}.",
        "",
        f"- tuning: {config.tuning.kind}" + (f" (rank {config.tuning.lora_rank})" if config.tuning.kind == "lora" else ""),
        f"- demonstrations: {config.data.demonstrations}",
        f"- seed: {config.seed}",
    ]
    if role == "policy":
        lines += [
            _reward_line(reward),
            f"- KL anchor {reward.kl_anchor}, coefficient {reward.kl_coef}" + (f", target {reward.kl_target}" if reward.kl_target else ""),
            f"- PPO: {ppo.iterations} rounds of {ppo.prompts_per_iteration} x {ppo.samples_per_prompt} rollouts, lr {ppo.learning_rate}",
        ]
    lines += ["", "The run folder's report.html and summary.json say how it compares with the base and the fine-tuned model.", ""]
    return "\n".join(lines)


def _what(config: RunConfig, role: str) -> str:
    return _LEARNED if role == "policy" and config.reward.kind == "preference_model" else _WHAT[role]


def _reward_line(reward: RewardConfig) -> str:
    if reward.kind == "preference_model":
        return f"- reward: the score of `{reward.preference_model}`"
    return f"- reward: log pi_sft - log pi_base, placement {reward.placement}, length normalisation {reward.length_normalization}"
