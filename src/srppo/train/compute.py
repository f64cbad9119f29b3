"""What a stage cost, in units every method shares: tokens passed through a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Compute:
    """Token passes. A backward pass costs about two forward ones (2N and 4N operations a token for N weights)."""

    forward_tokens: int = 0  # generation, scoring, values
    trained_tokens: int = 0  # forward and backward
    padding_tokens: int = 0  # positions of scoring and update that held no token

    @property
    def passes(self) -> int:
        """Equivalent forward token passes: forward + 3 trained."""
        return self.forward_tokens + 3 * self.trained_tokens

    def add(self, other: Compute) -> None:
        """Count another's passes too."""
        self.forward_tokens += other.forward_tokens
        self.trained_tokens += other.trained_tokens
        self.padding_tokens += other.padding_tokens

    def to_dict(self) -> dict[str, int]:
        return {"forward_tokens": self.forward_tokens, "trained_tokens": self.trained_tokens, "passes": self.passes}
