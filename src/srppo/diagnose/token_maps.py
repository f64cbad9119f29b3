"""Responses token by token with their log-ratios, for the heat map of the report."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from srppo.diagnose.evidence import Responses
from srppo.diagnose.figures import Group
from srppo.diagnose.reward_card import TokenMap
from srppo.rewards import CoherentReward

PROMPTS_A_GROUP, GROUPS = 3, 6
LONGEST = 256  # tokens shown


def token_maps(groups: Sequence[Group], reward: CoherentReward, numerator: str, tokenizer: PreTrainedTokenizerBase) -> list[TokenMap]:
    """The first prompts of each group: the demonstration where there is one, the first sample of the start, and the base's."""
    out = []
    for group in groups[:GROUPS]:
        authors = [("demonstration", group.demonstrations), ("sft", group.samples), ("base", group.base)]
        for p, prompt in enumerate(group.prompts[:PROMPTS_A_GROUP]):
            for author, responses in authors:
                if responses is None:
                    continue
                tokens, terms = _tokens(responses, p, numerator, tokenizer)
                score = float(group.scores[p, 0]) if author == "sft" and group.scores is not None else None
                worth = float(responses.rewards(reward, numerator)[p, 0])
                out.append(TokenMap(author, group.name, prompt.text, tokens, terms, worth, score))
    return out


def _tokens(responses: Responses, prompt: int, numerator: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[float]]:
    row = prompt * responses.each
    ids = responses.rollout.response_ids(row)[:LONGEST]
    terms = responses.log_ratio(numerator)[row][: len(ids)].tolist()
    return [str(tokenizer.decode([i])) for i in ids], terms
