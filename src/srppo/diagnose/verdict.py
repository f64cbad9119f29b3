"""The verdict: whether the reward can help, in plain sentences. Thresholds were chosen in the lab: docs/results/card_grid.md."""

from __future__ import annotations

import math

from srppo.diagnose.reward_card import BetaRow, Preference, RewardCard, RewardSpread, Verdict
from srppo.diagnose.scored import Scored, score_changes
from srppo.text import counted

FEW = 12  # held-out prompts below which nothing is sure
SPAN = 3  # prompts from which an interval says anything
TELLING = 5  # of them, on which a sample differs from the demonstration: below it the AUC says nothing
LENGTH_RANK, LENGTH_CHANGE = 0.5, 1.25
EOS_SHARE = 0.5
ENDS = 0.8
NOTHING, TAIL = 0.1, 1.25  # of the reward on prompts like the demonstrations: mean, and 95 % quantile, for a caution by itself
OVER = 0.9  # of that quantile, above which a predicted loss is believed
MATCHES_MORE = 0.01  # of the samples: likelihood and match then disagree, and neither is ground to stop on
Finding = tuple[Verdict, str]
RANK: dict[Verdict, int] = {"go": 0, "caution": 1, "no-go": 2}


def judge_reward(card: RewardCard) -> tuple[Verdict, list[str]]:
    """Verdict and reasons, the gravest first; where nothing speaks against the reward, what speaks for it."""
    scored = score_changes(card)
    signs = _weighed([*_discrimination(card), *_gain(card), *_shift(card)], scored)
    found = [*_scores(scored, card.decision.beta), *signs, *_length(card), *_ending(card), *_size(card)]
    found.sort(key=lambda item: -RANK[item[0]])
    verdict: Verdict = max((v for v, _ in found), key=RANK.__getitem__, default="go")
    return verdict, [reason for _, reason in found]


def _grave(card: RewardCard) -> Verdict:
    """no-go, unless it rests on a handful of demonstrations, which are no ground to stop on."""
    return "no-go" if card.heldout >= FEW else "caution"


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
                "caution",
                "Every sample of the SFT model says what the held-out demonstrations say: on prompts like these nothing is left to gain, "
                "and nothing tells whether the reward helps on others.",
            )
        ]
    span = f"{100 * auc.low:.0f} to {100 * auc.high:.0f} %, " if auc.n >= SPAN else ""
    figures = f"in {100 * auc.value:.0f} % of the cases ({span}{counted(auc.n, 'prompt')}; chance is 50 %)"
    if auc.high < 0.5 and auc.n >= TELLING:
        return [
            (
                _grave(card),
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
    if auc.n < TELLING:
        return [("caution", f"The reward prefers a held-out demonstration to the SFT model's own samples {figures}: too few to tell.")]
    return [("go", f"The reward prefers a held-out demonstration to the SFT model's own samples {figures}.")]


def _gain(card: RewardCard) -> list[Finding]:
    gain, beta = card.decision.gain, card.decision.beta
    found = _against_sft(card)
    if gain.value is None or gain.low is None or gain.high is None or found is None or found.auc.value is None:
        return []  # where every sample is the demonstration, the gain is 0 but for rounding
    figures = f"{gain.value:+.2f} nats a response" + (f" ({gain.low:+.2f} to {gain.high:+.2f})" if gain.n >= SPAN else "")
    if not math.isfinite(gain.value):
        return [
            ("caution", f"How likely PPO at beta {beta:g} would make held-out demonstrations cannot be computed: the rewards overflow.")
        ]
    if gain.value <= 0:
        chosen = f"At beta {beta:g}, the card's choice," if "reward.kl_coef" in card.decision.automatic else f"At beta {beta:g}"
        words = f"{chosen} PPO would not make held-out demonstrations likelier: {figures}"
        row = _row_at(card, "held-out")
        if row is not None and row.match is not None and row.match_gain is not None and row.match_gain >= MATCHES_MORE:
            before, after = 100 * (row.match - row.match_gain), 100 * row.match
            return [("caution", f"{words}; but it would say what they say more often ({before:.0f} to {after:.0f} % of its samples).")]
        tail = tail_ratio(card)
        if tail is None or tail > OVER:
            more = "" if tail is None else ", and the best-paid samples earn about as much or more on PPO's prompts"
            return [(_grave(card), f"{words}{more}.")]
        return [
            ("caution", f"{words}; but the best-paid samples earn less on PPO's prompts than on the demonstrations', as where PPO helps.")
        ]
    if gain.low <= 0:
        return [("caution", f"Whether PPO at beta {beta:g} makes held-out demonstrations likelier is not clear: {figures}.")]
    return [("go", f"At beta {beta:g} PPO should make held-out demonstrations likelier: {figures}.")]


def tail_ratio(card: RewardCard) -> float | None:
    """What the best-paid samples (95 % quantile) earn on PPO's prompts, mean over its groups by their sizes, over the same on prompts
    like the demonstrations; infinite where only the latter is not above 0. None where nothing is to be compared."""
    own, others = _sft_spreads(card)
    if own is None or not others:
        return None
    top, below = sum(s.n * s.quantiles[-1] for s in others) / sum(s.n for s in others), own.quantiles[-1]
    return top / below if below > 0 else math.inf if top > 0 else 0.0


def _sft_spreads(card: RewardCard) -> tuple[RewardSpread | None, list[RewardSpread]]:
    """The SFT samples' rewards on prompts like the demonstrations, and on the groups of PPO's prompts."""
    found = [s for s in card.spreads if s.author == "sft" and s.n]
    return next((s for s in found if s.group == "held-out"), None), [s for s in found if s.group != "held-out"]


def _scores(scored: Scored, beta: float) -> list[Finding]:
    verdict, pooled = scored.verdict(FEW), scored.pooled
    if pooled.value is None or pooled.low is None or pooled.high is None:
        return []
    figures = f"{100 * pooled.value:+.1f} points"
    if verdict is None:
        return [("go", f"The scoring function fits only {counted(pooled.n, 'prompt')} of PPO's: {figures}, too few to go by.")]
    how = "worse" if pooled.high < 0 else "no better" if pooled.value <= 0 else "better" if pooled.low > 0 else "perhaps better"
    parts = [f"{100 * (g.value or 0.0):+.1f} on {_called(name)}" for name, g in scored.groups.items()] if len(scored.groups) > 1 else []
    figures += f" ({100 * pooled.low:+.1f} to {100 * pooled.high:+.1f})" + (f": {', '.join(parts)}" if parts else "")
    return [(verdict, f"By the scoring function, PPO at beta {beta:g} would answer {how}, {figures}.")]


def _weighed(signs: list[Finding], scored: Scored) -> list[Finding]:
    """The signs that go without scores, no graver than the scores leave them."""
    most = scored.outweighs(FEW)
    if most is None:
        return signs
    words = {"go": "The scores speak for it all the same.", "caution": "The scores lean the other way."}[most]
    return [(v, said) if RANK[v] <= RANK[most] else (most, f"{said} {words}") for v, said in signs]


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
                    f"{row.beta:g} would make responses {word} on {_called(group)} ({start.length:.1f} to {row.length:.1f} tokens). "
                    "If that is not wanted: reward.length_normalization, token_shift or token_clip.",
                )
            )
    return out


def _called(group: str) -> str:
    """A group of prompts in a sentence, by the name that the tables give it."""
    name = group.replace("_", " ")
    return {"all": "all prompts", "held-out": "the held-out prompts"}.get(group, f"the prompts '{name}'")


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
            out.append(
                (
                    "caution",
                    f"Only {100 * s.ends:.0f} % of the SFT model's samples on {_called(s.group)} end before rollout.max_new_tokens.",
                )
            )
    return out


def _shift(card: RewardCard) -> list[Finding]:
    """Groups of prompts on which the samples earn next to nothing, or more than on prompts like the demonstrations."""
    own, others = _sft_spreads(card)
    if own is None:
        return []
    out: list[Finding] = []
    for s in others:
        on = _called(s.group)
        if own.mean > 0 and s.mean < NOTHING * own.mean:
            out.append(
                (
                    "caution",
                    f"On {on} the SFT model's samples earn {s.mean:.2f} nats, on prompts like the demonstrations {own.mean:.2f}: "
                    "fine-tuning hardly changed how it answers there, so the reward has little to say.",
                )
            )
        if own.quantiles[-1] > 0 and s.quantiles[-1] > TAIL * own.quantiles[-1]:
            out.append(
                (
                    "caution",
                    f"On {on} the best-paid samples earn more ({s.quantiles[-1]:.1f} nats) than on prompts like the demonstrations "
                    f"({own.quantiles[-1]:.1f}): the reward is surest where nothing was shown, which a longer SFT brings about.",
                )
            )
    return out


def _size(card: RewardCard) -> list[Finding]:
    if 0 < card.heldout < FEW:
        return [
            ("caution", f"Only {counted(card.heldout, 'held-out demonstration')}: every figure here is rough. data.heldout takes more.")
        ]
    return []
