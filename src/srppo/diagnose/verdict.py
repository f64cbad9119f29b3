"""The verdict: whether the reward can help, in plain sentences. Thresholds were chosen in the lab: docs/results/card_grid.md."""

from __future__ import annotations

from srppo.diagnose.reward_card import BetaRow, Preference, RewardCard, Verdict

FEW = 12  # held-out prompts below which nothing is sure
TELLING = 5  # of them, on which a sample differs from the demonstration: below it the AUC alone stops nothing
LENGTH_RANK, LENGTH_CHANGE = 0.5, 1.25
EOS_SHARE = 0.5
ENDS = 0.8
NOTHING, TAIL = 0.1, 1.25  # of the reward on prompts like the demonstrations: mean, and 95 % quantile
MATCHES_MORE = 0.01  # of the samples: likelihood and match then disagree, and neither is ground to stop on
Finding = tuple[Verdict, str]
RANK: dict[Verdict, int] = {"go": 0, "caution": 1, "no-go": 2}


def judge_reward(card: RewardCard) -> tuple[Verdict, list[str]]:
    """Verdict and reasons, the gravest first; where nothing speaks against the reward, what speaks for it."""
    found = [*_discrimination(card), *_gain(card), *_length(card), *_ending(card), *_shift(card), *_size(card)]
    found.sort(key=lambda item: -RANK[item[0]])
    verdict: Verdict = max((v for v, _ in found), key=RANK.__getitem__, default="go")
    if verdict == "no-go" and card.heldout < FEW:
        verdict = "caution"  # so few demonstrations are no ground to stop on
    return verdict, [reason for _, reason in found]


def _against_sft(card: RewardCard) -> Preference | None:
    return next((p for p in card.preferences if p.against == "sft" and p.bucket == "all"), None)


def _discrimination(card: RewardCard) -> list[Finding]:
    found = _against_sft(card)
    if found is None:
        return [("caution", "There are no held-out demonstrations, so nothing tells whether the reward is right; set data.heldout.")]
    auc = found.auc
    if auc.value is None or auc.low is None or auc.high is None:
        return [
            (
                "go",
                "Every sample of the SFT model says what the held-out demonstrations say: on prompts like these nothing is left to gain.",
            )
        ]
    figures = f"in {100 * auc.value:.0f} % of the cases ({100 * auc.low:.0f} to {100 * auc.high:.0f} %, {auc.n} prompts; chance is 50 %)"
    if auc.high < 0.5 and auc.n >= TELLING:
        return [
            (
                "no-go",
                f"The reward prefers a held-out demonstration to the SFT model's own differing samples only {figures}: PPO would move "
                "away from what the demonstrations show. The SFT model has probably learned them by heart; use an earlier checkpoint "
                "(reward.checkpoint), fewer SFT steps or more demonstrations.",
            )
        ]
    if auc.low < 0.5:
        return [
            (
                "caution",
                f"The reward prefers a held-out demonstration to the SFT model's own samples {figures}: perhaps no better than chance.",
            )
        ]
    return [("go", f"The reward prefers a held-out demonstration to the SFT model's own samples {figures}.")]


def _gain(card: RewardCard) -> list[Finding]:
    gain, beta = card.decision.gain, card.decision.beta
    found = _against_sft(card)
    if gain.value is None or gain.low is None or gain.high is None or found is None or found.auc.value is None:
        return []  # where every sample is the demonstration, the gain is 0 but for rounding
    figures = f"{gain.value:+.2f} nats a response ({gain.low:+.2f} to {gain.high:+.2f})"
    if gain.value <= 0:
        chosen = "Even at the best beta" if "reward.kl_coef" in card.decision.automatic else "At the recipe's beta"
        words = f"{chosen}, {beta:g}, PPO would not make held-out demonstrations likelier: {figures}"
        row = _row_at(card, "held-out")
        if row is not None and row.match is not None and row.match_gain is not None and row.match_gain >= MATCHES_MORE:
            before, after = 100 * (row.match - row.match_gain), 100 * row.match
            return [("caution", f"{words}; but it would say what they say more often ({before:.0f} to {after:.0f} % of its samples).")]
        return [("no-go", f"{words}.")]
    if gain.low <= 0:
        return [("caution", f"Whether PPO at beta {beta:g} makes held-out demonstrations likelier is not clear: {figures}.")]
    return [("go", f"At beta {beta:g} PPO should make held-out demonstrations likelier: {figures}.")]


def _length(card: RewardCard) -> list[Finding]:
    rank = card.length_bias.spearman_within
    out: list[Finding] = []
    for group in dict.fromkeys(row.group for row in card.betas):
        row, start = _row_at(card, group), next((s for s in card.spreads if s.group == group and s.author == "sft"), None)
        if row is None or start is None or start.length <= 0 or rank is None or abs(rank) < LENGTH_RANK:
            continue
        ratio = row.length / start.length
        if not 1 / LENGTH_CHANGE < ratio < LENGTH_CHANGE:
            word = "longer" if ratio > 1 else "shorter"
            out.append(
                (
                    "caution",
                    f"Length bias: among samples to one prompt the reward goes with length (rank correlation {rank:+.2f}), and PPO at beta "
                    f"{row.beta:g} would make responses {word} on {group} ({start.length:.1f} to {row.length:.1f} tokens). "
                    "If that is not wanted: reward.length_normalization, token_shift or token_clip.",
                )
            )
    return out


def _row_at(card: RewardCard, group: str) -> BetaRow | None:
    return next((row for row in card.betas if row.group == group and row.beta == card.decision.beta), None)


def _ending(card: RewardCard) -> list[Finding]:
    out: list[Finding] = []
    share = card.length_bias.eos_share
    if share > EOS_SHARE:
        out.append(
            (
                "caution",
                f"{100 * share:.0f} % of the reward sits in the EOS token: it says little but to end. Consider reward.include_eos: false.",
            )
        )
    for s in card.spreads:
        if s.author == "sft" and s.ends < ENDS and s.n:
            out.append(("caution", f"Only {100 * s.ends:.0f} % of the SFT model's samples on {s.group} end before rollout.max_new_tokens."))
    return out


def _shift(card: RewardCard) -> list[Finding]:
    """Groups of prompts on which the samples earn next to nothing, or more than on prompts like the demonstrations."""
    own = next((s for s in card.spreads if s.author == "sft" and s.group == "held-out"), None)
    if own is None:
        return []
    out: list[Finding] = []
    for s in card.spreads:
        if s.author != "sft" or s is own or not s.n:
            continue
        if own.mean > 0 and s.mean < NOTHING * own.mean:
            out.append(
                (
                    "caution",
                    f"On {s.group} the SFT model's samples earn {s.mean:.2f} nats, on prompts like the demonstrations {own.mean:.2f}: "
                    "fine-tuning hardly changed how it answers there, so the reward has little to say.",
                )
            )
        if own.quantiles[-1] > 0 and s.quantiles[-1] > TAIL * own.quantiles[-1]:
            out.append(
                (
                    "caution",
                    f"On {s.group} the best-paid samples earn more ({s.quantiles[-1]:.1f} nats) than on prompts like the demonstrations "
                    f"({own.quantiles[-1]:.1f}): the reward is surest where nothing was shown, which a longer SFT brings about.",
                )
            )
    return out


def _size(card: RewardCard) -> list[Finding]:
    if 0 < card.heldout < FEW:
        return [("caution", f"Only {card.heldout} held-out demonstrations: every figure here is rough. data.heldout takes more.")]
    return []
