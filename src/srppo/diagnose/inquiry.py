"""`diagnose`: sample, score, weigh. Base, SFT checkpoints, held-out demonstrations and prompts in; a reward card out. No training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from srppo.config import RewardConfig, RunConfig
from srppo.diagnose.candidates import Pair, choose_pair, weigh_pair
from srppo.diagnose.evidence import OTHER, Checkpoints, Gatherer, Responses, forgiving, scores_of, spread_prompts
from srppo.diagnose.figures import Group, beta_rows, length_bias, preferences, spread
from srppo.diagnose.preview import preview_rows
from srppo.diagnose.reward_card import Decision, Estimate, RewardCard
from srppo.diagnose.token_maps import token_maps
from srppo.diagnose.verdict import judge_reward
from srppo.methods.srppo import coherent_reward, first_beta
from srppo.models.roles import Roles
from srppo.progress import Progress
from srppo.records import Example, Prompt
from srppo.rollout.engine import RolloutEngine
from srppo.rollout.torch_engine import TorchEngine
from srppo.scoring import Scorer
from srppo.train.sft import share_name

HELDOUT = "held-out"


def diagnose(
    roles: Roles,
    checkpoints: Checkpoints,
    heldout: Sequence[Example],
    heldout_prompts: Sequence[Prompt],
    prompts: Sequence[Prompt],
    config: RunConfig,
    *,
    engine: RolloutEngine,
    extrapolator: TorchEngine | None,
    decode: Callable[[list[int]], str],
    scorer: Scorer | None,
    progress: Progress,
    check: Callable[[], None] = lambda: None,
    poll: Callable[[int, int], None] = lambda done, total: None,
) -> RewardCard:
    """Make the reward card. The roles are left as they were found.

    checkpoints: the SFT checkpoints PPO may start from and the reward may use; the last name is the default for both.
    heldout: demonstrations no checkpoint was trained on; heldout_prompts: their prompts with fields for the scorer.
    prompts: of PPO. extrapolator: for the preview by logits, which is left out without it.
    Without held-out demonstrations the card can only describe: verdict caution, defaults kept.
    """
    settings, reward = config.diagnose, coherent_reward(config.reward)
    scorer = forgiving(scorer, progress.warn)
    gatherer = Gatherer(roles, engine, extrapolator, config, check, poll)
    open_pairs = considered(checkpoints, config)
    starts, numerators = (list(dict.fromkeys(side)) for side in zip(*open_pairs, strict=True))
    # Empty where beta does not mean what the theory says: nothing is foretold of any then.
    betas = sorted({*settings.betas, *filter(None, [fixed_beta(config.reward)])}) if foretold(config.reward) else []
    shown = spread_prompts(prompts, settings.prompts)
    with progress.stage("Reward card", 3 + settings.preview, "parts") as ticker:
        demonstrations = gatherer.demonstrations(heldout)
        asked = demonstrations.rollout.prompt_ids
        few = max(2, settings.samples // 2)
        base = gatherer.sample("base", "base", asked, few, HELDOUT)
        samples: dict[str, Responses] = {}
        for name in starts:
            with checkpoints.role(roles, name) as role:
                samples[name] = gatherer.sample(role, "sft", asked, settings.samples, HELDOUT)
        ticker.advance(1)
        everything = [demonstrations, base, *samples.values()]
        gatherer.score("base", "base", everything)
        for name in dict.fromkeys([*numerators, *starts]):
            with checkpoints.role(roles, name) as role:
                gatherer.score(role, name, everything)
        pairs = (
            [weigh_pair(s, n, reward, demonstrations, samples[s], betas, fixed_beta(config.reward)) for s, n in open_pairs] if asked else []
        )
        chosen = choose_pair(pairs)
        start, numerator = (chosen.start, chosen.numerator) if chosen else open_pairs[-1]
        decision = _decision(config, start, numerator, chosen)
        ticker.advance(2)
        with checkpoints.role(roles, start) as role:
            sft_prompts = gatherer.sample(role, "sft", [p.ids for p in shown], settings.samples, "prompts")
            base_prompts = gatherer.sample("base", "base", [p.ids for p in shown], few, "prompts")
        gatherer.score("base", "base", [sft_prompts, base_prompts])
        with checkpoints.role(roles, numerator) as role:
            gatherer.score(role, numerator, [sft_prompts, base_prompts])
        ticker.advance(3)
        own = {tuple(p.ids): p for p in heldout_prompts}
        held = [own.get(tuple(ids), Prompt(list(ids), "", 0)) for ids in asked]
        groups = _groups(held, samples.get(start), base, demonstrations, shown, sft_prompts, base_prompts, decode, scorer)
        rows = [row for group in groups for row in beta_rows(group, reward, numerator, betas)]
        preview = []
        if settings.preview:
            beta = decision.beta if betas else 0.0
            preview = preview_rows(gatherer, checkpoints, groups, reward, start, numerator, beta, decode, scorer, progress.note)
            ticker.advance(4)
    card = RewardCard(
        verdict="caution",
        reasons=[],
        decision=decision,
        preferences=preferences(reward, numerator, demonstrations, {"sft": samples[start], "base": base}) if asked else [],
        length_bias=length_bias(groups, reward, numerator),
        betas=rows,
        spreads=[spread(g, author, reward, numerator) for g in groups for author in ("sft", "base")],
        candidates=[p.to_candidate(p is chosen) for p in pairs],
        preview=preview,
        maps=token_maps(groups, reward, numerator, roles.tokenizer),
        heldout=len(asked),
        prompts=len(shown),
        samples=settings.samples,
    )
    verdict, reasons = judge_reward(card)
    return replace(card, verdict=verdict, reasons=reasons)


def considered(checkpoints: Checkpoints, config: RunConfig) -> list[tuple[str, str]]:
    """Pairs of start and numerator that the recipe leaves open, the default last: one pair where it leaves nothing open."""
    names, wanted = checkpoints.names, config.reward.checkpoint
    starts = names if config.sft.keep == "auto" and config.sft.checkpoint is None else names[-1:]
    if wanted == "auto":
        return [(start, numerator) for start in starts for numerator in names]
    if wanted == "sft":
        return [(start, start) for start in starts]
    return [(start, OTHER if isinstance(wanted, str) else share_name(wanted)) for start in starts]


def _groups(
    held: Sequence[Prompt],
    samples: Responses | None,
    base: Responses,
    demonstrations: Responses,
    shown: Sequence[Prompt],
    sft_prompts: Responses,
    base_prompts: Responses,
    decode: Callable[[list[int]], str],
    scorer: Scorer | None,
) -> list[Group]:
    """The held-out demonstrations and each group of PPO prompts, with samples and, where a scorer fits, scores."""
    out: list[Group] = []
    if held and samples is not None:
        out.append(Group(HELDOUT, list(held), samples, base, demonstrations, scores_of(scorer, held, samples, decode)))
    for name in dict.fromkeys(p.group for p in shown):
        which = [i for i, p in enumerate(shown) if p.group == name]
        own = [shown[i] for i in which]
        mine, theirs = sft_prompts.of_prompts(which), base_prompts.of_prompts(which)
        shown_as = f"{name} (prompts)" if name == HELDOUT else name
        out.append(Group(shown_as, own, mine, theirs, None, scores_of(scorer, own, mine, decode)))
    return out


def fixed_beta(reward: RewardConfig) -> float | None:
    """The KL coefficient where the card may not choose it: given by the recipe, or outside the card's theory (see foretold)."""
    return None if reward.kl_coef == "auto" and foretold(reward) else first_beta(reward)


def foretold(reward: RewardConfig) -> bool:
    """Whether beta means what the card's theory says: the KL is to the SFT, and the reward is not divided by a round's deviation."""
    return reward.kl_anchor == "sft" and not reward.whiten


def _decision(config: RunConfig, start: str, numerator: str, chosen: Pair | None) -> Decision:
    keys = {
        "sft.keep": config.sft.keep == "auto" and config.sft.checkpoint is None,
        "reward.checkpoint": config.reward.checkpoint == "auto",
        "reward.kl_coef": fixed_beta(config.reward) is None,
    }
    beta = chosen.beta if chosen else first_beta(config.reward)
    return Decision(start, numerator, beta, chosen.gain if chosen else Estimate(None), [k for k, automatic in keys.items() if automatic])
