"""Where PPO is heading, for free: samples by logit and weight extrapolation beside the start's and the base's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from srppo.diagnose.evidence import Checkpoints, Gatherer, Responses, scores_of
from srppo.diagnose.figures import Group
from srppo.diagnose.reward_card import PreviewRow
from srppo.errors import ArchitectureError
from srppo.rewards import CoherentReward
from srppo.scoring import Scorer

ALPHA = 0.5  # of the weight extrapolation; at 1 samples were worse in the embedded world: docs/results/evidence.md
EXAMPLES = 3  # responses shown a group
NUMERATOR = "numerator"  # the role of a numerator that is neither in memory nor the start
PREVIEW = "preview"  # the role of the extrapolated weights


def preview_rows(
    gatherer: Gatherer,
    checkpoints: Checkpoints,
    groups: Sequence[Group],
    reward: CoherentReward,
    start: str,
    numerator: str,
    beta: float,
    decode: Callable[[list[int]], str],
    scorer: Scorer | None,
    note: Callable[[str], None],
) -> list[PreviewRow]:
    """Rows for base, start, logit extrapolation at beta and weight extrapolation at ALPHA, on each group's prompts.

    No rows of logits with beta 0, or where the models have no room beside each other; none of weights where there is no line from the
    base's to the start's. Of the latter two `note` is told.
    """
    few = max(2, gatherer.config.diagnose.samples // 2)
    made: list[tuple[str, list[Responses]]] = []
    prompts = [[p.ids for p in g.prompts] for g in groups]
    with checkpoints.role(gatherer.roles, start) as role:
        if beta > 0 and gatherer.extrapolator is None:
            note("reward card: no preview by logits, as no process holds two whole models where weights are spread and vLLM decodes")
        elif beta > 0:
            with checkpoints.role(gatherer.roles, numerator, loaded_as=NUMERATOR) if numerator != start else nullcontext(role) as top:
                logits = [gatherer.sample_extrapolated(role, top, beta, ids, few, g.name) for g, ids in zip(groups, prompts)]
            made.append((f"logits, beta {beta:g}", logits))
        try:
            gatherer.roles.extrapolate(PREVIEW, role, ALPHA)
        except ArchitectureError:
            note("reward card: no preview by weights, as the SFT is of another architecture than the base")
        else:
            try:
                weights = [gatherer.sample(PREVIEW, "sft", ids, few, g.name) for g, ids in zip(groups, prompts)]
            finally:
                gatherer.roles.drop(PREVIEW)
            made.append((f"weights, alpha {ALPHA:g}", weights))
    everything = [r for _, responses in made for r in responses]
    gatherer.score("base", "base", everything)
    with checkpoints.role(gatherer.roles, numerator) as role:
        gatherer.score(role, numerator, everything)
    named = [("base", [g.base for g in groups]), ("sft", [g.samples for g in groups]), *made]
    return [_row(name, group, by_group[i], reward, numerator, decode, scorer) for i, group in enumerate(groups) for name, by_group in named]


def _row(
    name: str,
    group: Group,
    responses: Responses,
    reward: CoherentReward,
    numerator: str,
    decode: Callable[[list[int]], str],
    scorer: Scorer | None,
) -> PreviewRow:
    scores = scores_of(scorer, group.prompts, responses, decode)
    held = group.demonstrations
    return PreviewRow(
        name,
        group.name,
        float(responses.rewards(reward, numerator).mean()),
        float(responses.lengths.mean()),
        float(responses.ended.mean()),
        None if scores is None else float(scores.mean()),
        None if held is None else float(responses.same_as(held).mean()),
        [decode(responses.rollout.response_ids(p * responses.each)) for p in range(min(EXAMPLES, len(group.prompts)))],
    )
