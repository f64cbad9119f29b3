"""What decoding cost, beside what it gave."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DecodeStats:
    """Counts of one `generate`. A row-step is one row in one forward pass of one token."""

    row_steps: int = 0
    """Decoded row-steps. A row's first token comes with its prompt and costs none."""
    idle_row_steps: int = 0
    """Those of rows that had ended already, whose token was dropped."""
    prefill_tokens: int = 0
    """Prompt tokens read; a prompt read once for several rows counts once."""
    padding_tokens: int = 0
    """Padding read beside them."""
    seconds: float = 0.0
    """Wall-clock time, prompts included."""

    @property
    def idle_share(self) -> float:
        """Idle row-steps of all row-steps, 0 to 1."""
        return self.idle_row_steps / self.row_steps if self.row_steps else 0.0
