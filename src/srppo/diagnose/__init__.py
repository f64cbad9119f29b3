"""The reward card: whether the coherent reward can help, said before compute is spent."""

from __future__ import annotations

from srppo.diagnose.evidence import Checkpoints
from srppo.diagnose.inquiry import diagnose
from srppo.diagnose.reward_card import Decision, RewardCard
from srppo.diagnose.tell import tell

__all__ = ["Checkpoints", "Decision", "RewardCard", "diagnose", "tell"]
