"""The shapes that are raced: a model's sizes and a round's work. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool  # the LM head is the embedding

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """(name, in, out) of the linear layers of one block."""
        attention, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "q", self.hidden, attention
        yield "k", self.hidden, kv
        yield "v", self.hidden, kv
        yield "o", attention, self.hidden
        yield "gate", self.hidden, self.intermediate
        yield "up", self.hidden, self.intermediate
        yield "down", self.intermediate, self.hidden

    def parameters(self) -> int:
        """Of the causal language model."""
        block = sum(a * b for _, a, b in self.linears()) + 2 * self.hidden
        return self.layers * block + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    def config(self, positions: int) -> dict[str, Any]:
        """Arguments of transformers' LlamaConfig."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": positions,
            "tie_word_embeddings": self.tied,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


@dataclass(frozen=True)
class Shape:
    """A model and one PPO round on it. Prompts have 8 to `prompt` tokens, or a quarter of `prompt` where that is more."""

    name: str
    model: Model
    batch: int  # responses a round
    prompt: int  # longest prompt, tokens; TRL pads all to it
    response: int  # response limit, tokens
    epochs: int
    minibatches: int
    rank: int = 16  # of LoRA, all linear layers
    samples: int = 1  # responses a prompt

    def changed(self, **sizes: Any) -> Shape:
        return replace(self, **sizes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"parameters": self.model.parameters()}

    @staticmethod
    def of(values: dict[str, Any]) -> Shape:
        rest = {k: v for k, v in values.items() if k not in ("model", "parameters")}
        return Shape(model=Model(**values["model"]), **rest)


SMALL = Model(layers=4, hidden=256, intermediate=1024, heads=4, kv_heads=4, vocab=4096, tied=False)
SMOLLM2 = Model(layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, vocab=49152, tied=True)
LLAMA_1B = Model(layers=16, hidden=2048, intermediate=8192, heads=32, kv_heads=8, vocab=128256, tied=True)
TINY = Model(layers=2, hidden=32, intermediate=64, heads=2, kv_heads=1, vocab=96, tied=True)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("default", SMALL, batch=64, prompt=32, response=64, epochs=4, minibatches=4),
        Shape("smollm2", SMOLLM2, batch=16, prompt=32, response=32, epochs=2, minibatches=2),
        Shape("tiny", TINY, batch=8, prompt=16, response=8, epochs=2, minibatches=2),
    )
}
