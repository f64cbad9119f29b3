"""The reward card: what base, SFT and held-out demonstrations say of the coherent reward before PPO is run. Records only.

Everything is read without labels, unless the user has a scoring function that fits the prompts. Words used throughout:
    demonstration   a held-out one, never trained on
    sample          a response at temperature 1
    numerator       the SFT checkpoint whose log-ratio to the base is the reward
    start           the SFT checkpoint that PPO would start from
    preference      share of (demonstration, sample) pairs of the same prompt in which the demonstration has the higher reward,
                    ties half; samples that say the same as the demonstration, token for token, are left out. This is the AUC.
Intervals are 95 % bootstrap percentiles over prompts. Rewards are nats a response.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["go", "caution", "no-go"]


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its 95 % interval; all None where no prompt tells."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0  # prompts it rests on


@dataclass(frozen=True)
class Preference:
    """How the reward ranks held-out demonstrations against a model's samples."""

    against: str  # "base" or "sft"
    bucket: str  # "all", or the demonstrations' lengths: "1 to 5 tokens"
    auc: Estimate
    margin: Estimate  # mean reward of the demonstration minus that of the samples, nats


@dataclass(frozen=True)
class LengthBias:
    """Reward against length over the start's samples."""

    spearman: float | None  # rank correlation over all samples
    slope: float | None  # nats a token, least squares
    spearman_within: float | None  # after each prompt's means are taken off reward and length
    eos_share: float  # of the sum of |log-ratio|, what the EOS tokens carry
    top_share: float  # of it, what each response's three largest tokens carry
    negative_share: float  # share of tokens whose log-ratio is below 0


@dataclass(frozen=True)
class BetaRow:
    """What PPO at this KL coefficient would move towards, estimated by reweighting the start's samples with exp(r / beta)."""

    beta: float
    group: str  # "held-out", or a group of PPO prompts
    effective: float  # mean effective sample size, as a share of the samples a prompt; low: the estimate rests on few samples
    kl: float  # mean KL of the weights to equal ones, nats: how far past the start; at most log(samples)
    reward: float  # expected reward, nats
    length: float  # expected tokens
    match: float | None = None  # probability of saying what the demonstration says, token for token (held-out only)
    gain: Estimate | None = None  # predicted rise of the held-out demonstrations' log-likelihood, nats a response (held-out only)
    accuracy: Estimate | None = None  # where a scoring function fits
    accuracy_gain: Estimate | None = None  # against equal weights, paired over prompts
    match_gain: float | None = None  # match minus that of equal weights, the start's own (held-out only)


@dataclass(frozen=True)
class RewardSpread:
    """The reward's distribution over samples of one model on one group of prompts, nats."""

    author: str  # "base" or "sft"
    group: str
    mean: float
    std: float
    quantiles: list[float]  # 5, 25, 50, 75, 95 %
    length: float  # mean tokens
    ends: float  # share with EOS
    n: int  # samples


@dataclass(frozen=True)
class Candidate:
    """One pair of start and numerator."""

    start: str  # "sft" or "share-0.5"
    numerator: str
    auc: Estimate  # preference against the start's samples
    beta: float  # where the gain is best
    gain: Estimate  # predicted rise of held-out log-likelihood at that beta, nats a response
    start_nll: float  # of the held-out demonstrations under the start, nats a response
    predicted_nll: float  # start_nll - gain
    chosen: bool = False


@dataclass(frozen=True)
class PreviewRow:
    """Samples of a model, or of an extrapolation that needs no training, on one group of prompts."""

    name: str  # "base", "sft", "logits, beta 1", "weights, alpha 0.5"
    group: str
    reward: float
    length: float
    ends: float
    accuracy: float | None
    match: float | None
    examples: list[str] = field(default_factory=list)  # one response to each of the first prompts


@dataclass(frozen=True)
class TokenMap:
    """One sample and its per-token log-ratios, for the heat map."""

    author: str  # "demonstration", "base" or "sft"
    group: str
    prompt: str
    tokens: list[str]  # as text, EOS shown by its name
    log_ratio: list[float]  # nats
    reward: float
    score: float | None  # of the user's scoring function


@dataclass(frozen=True)
class Decision:
    """What PPO should use. Where the recipe does not say auto, its own values stand here."""

    start: str
    numerator: str
    beta: float
    gain: Estimate
    automatic: list[str] = field(default_factory=list)  # the keys the card decided: "sft.keep", "reward.checkpoint", "reward.kl_coef"


@dataclass(frozen=True)
class RewardCard:
    """Everything `srppo diagnose` says."""

    verdict: Verdict
    reasons: list[str]  # plain sentences, the gravest first
    decision: Decision
    preferences: list[Preference]
    length_bias: LengthBias
    betas: list[BetaRow]
    spreads: list[RewardSpread]
    candidates: list[Candidate]
    preview: list[PreviewRow]
    maps: list[TokenMap]
    heldout: int  # demonstrations looked at
    prompts: int  # PPO prompts looked at
    samples: int  # a prompt

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what diagnose.json and `srppo diagnose --json` hold."""
        return asdict(self)
