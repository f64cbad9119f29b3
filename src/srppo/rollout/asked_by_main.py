"""Of several processes one asks the rollout engine for all rows: for engines that live elsewhere, such as vLLM's servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from srppo.models.sharding import gathered
from srppo.records import Rollout
from srppo.rollout.decode import unwrapped
from srppo.rollout.engine import Progress, RolloutEngine, Sampling
from srppo.world import world

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AskedByMain:
    """A RolloutEngine around another that only rank 0 talks to. Weights that are spread are gathered for as long as it takes."""

    def __init__(self, engine: RolloutEngine):
        self._engine = engine

    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        prompt_index: Sequence[int] | None = None,
        on_progress: Progress | None = None,
    ) -> Rollout:
        """See RolloutEngine."""
        with gathered(unwrapped(model)):
            return world().once(lambda: self._engine.generate(model, prompts, seeds, sampling, prompt_index, on_progress))
