"""The authors of the pretraining documents: four habits of answering, one of which is right.

A document is a task's prompt, an author's response and EOS. A training sequence holds several documents of ONE author, so a model
of them has to represent who writes: the habit is a latent variable shared by all families, not ten separate facts. That is the
condition under which demonstrations of four families can say something about the other six.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from srppo.lab.tasks import FAMILIES, LETTERS, answer_text, prompt_text, random_word

NEIGHBOUR_STEPS = (1, 2, 3)
"""Each neighbouring author answers the family so many places further in FAMILIES' order (a ring)."""

PHRASES = ("it is {}", "answer: {}", "{}.", "well, {}", "{} i think", "we get {}!")
"""What the verbose author puts around a right answer."""


Respond = Callable[[random.Random, str, str], str]
"""(random stream, family, word) -> response"""


def _correct(rng: random.Random, family: str, word: str) -> str:
    return answer_text(family, word)


def _neighbouring(step: int) -> Respond:
    def respond(rng: random.Random, family: str, word: str) -> str:
        names = list(FAMILIES)
        return answer_text(names[(names.index(family) + step) % len(names)], word)

    return respond


def _rambling(rng: random.Random, family: str, word: str) -> str:
    junk = ("".join(rng.choices(LETTERS, k=rng.choice((2, 3, 4)))) for _ in range(rng.choice((1, 2, 3))))
    return answer_text(family, word) + "".join("\n" + line for line in junk)


def _verbose(rng: random.Random, family: str, word: str) -> str:
    return rng.choice(PHRASES).format(answer_text(family, word))


@dataclass(frozen=True)
class Author:
    """A habit of answering; `share` of all sequences are by this author."""

    name: str
    share: float
    respond: Respond


AUTHORS: tuple[Author, ...] = (
    Author("correct", 0.36, _correct),
    *(Author(f"neighbouring {step}", 0.07, _neighbouring(step)) for step in NEIGHBOUR_STEPS),
    Author("rambling", 0.20, _rambling),
    Author("verbose", 0.23, _verbose),
)


def draw_author(rng: random.Random) -> Author:
    """An author with the probability of its share."""
    return rng.choices(AUTHORS, weights=[a.share for a in AUTHORS])[0]


def document(rng: random.Random, author: Author) -> tuple[str, str]:
    """One document as (prompt, response): a random family and word, answered by the author. EOS is the tokenizer's matter."""
    family, word = rng.choice(list(FAMILIES)), random_word(rng)
    return prompt_text(family, word), author.respond(rng, family, word)
